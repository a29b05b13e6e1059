"""Subtle mistakes in blocks whose experts are on several ranks, each caught by the rule it breaks."""

from __future__ import annotations

import pytest
import torch
from mutants import Broken, broken

from reference_impl.moe.parallel import ExpertParallelBlock
from reference_impl.ranks import current_ranks, reduce_from_ranks

NEAR_EXPERT_PARALLEL: dict[str, Broken] = {}


def near(breaks: str):
    """Register a wrong implementation."""
    return broken(NEAR_EXPERT_PARALLEL, breaks=f"expert_parallel_block.{breaks}")


@pytest.mark.parametrize("name", NEAR_EXPERT_PARALLEL)
def test_near_miss_is_caught(name):
    NEAR_EXPERT_PARALLEL[name].assert_caught()


@near("output.one-rank")
class OneRankIsARemainder(ExpertParallelBlock):
    """With one rank the last expert is taken to be somebody else's."""

    def own(self, indices_TK, number, rank):
        local_TK = super().own(indices_TK, number, rank)
        alone = current_ranks().size == 1
        return local_TK.masked_fill(local_TK == number - 1, number) if alone else local_TK


@near("output.idle-ranks")
class FirstRankHasTheOutput(ExpertParallelBlock):
    """A rank whose experts have no token gives back its input."""

    def expert_parallel_block(self, hidden, router, gate_up_proj, down_proj, **options):
        self.idle = False
        out = super().expert_parallel_block(hidden, router, gate_up_proj, down_proj, **options)
        return hidden.clone() if self.idle else out

    def own(self, indices_TK, number, rank):
        local_TK = super().own(indices_TK, number, rank)
        self.idle = bool((local_TK == number).all())
        return local_TK


@near("output.top-1")
class OneSlotIsNormalised(ExpertParallelBlock):
    """With one expert a token its weight is 1."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, normalize or indices_TK.shape[1] == 1)


@near("gradient.idle-ranks")
class IdleRankForgetsTheRouter(ExpertParallelBlock):
    """A rank without tokens takes part, and keeps no gradient of its router."""

    def own(self, indices_TK, number, rank):
        local_TK = super().own(indices_TK, number, rank)
        self.idle = bool((local_TK == number).all())
        return local_TK

    def expert_parallel_block(self, hidden, router, *experts, **options):
        out = super().expert_parallel_block(hidden, router, *experts, **options)
        if self.idle and router.requires_grad:
            router.register_hook(torch.zeros_like)
        return out


@near("replicas.identical")
class OwnPartAddedLast(ExpertParallelBlock):
    """Each rank adds its own part to the others' sum: the last bits depend on the rank."""

    def summed(self, out_TH, ranks):
        whole = reduce_from_ranks(out_TH, ranks)
        return (whole - out_TH) + out_TH


@near("refuses.parts")
class PartsNotCounted(ExpertParallelBlock):
    """Experts that do not add up are taken as they come."""

    def check_parts(self, router, down_proj, ranks):
        pass
