"""Documented bugs of the contract ``expert_parallel_block``."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.moe.parallel import ExpertParallelBlock
from reference_impl.ranks import copy_to_ranks, reduce_from_ranks


@known_bug(
    "moe-ep-router-grad-partial",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.gradient.router",
)
class RouterGradientPartial(ExpertParallelBlock):
    """Gradients of routing weights are not summed: each rank's router learns from its experts."""

    def copied(self, x, ranks):
        is_weights = x.dtype == torch.float32 and x.shape[1] < 5
        return x if is_weights else super().copied(x, ranks)


@known_bug(
    "moe-ep-router-grad-partial.hidden",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.gradient.hidden",
)
class HiddenGradientPartial(ExpertParallelBlock):
    """The gradient that experts send to their input is not summed over the ranks."""

    def copied(self, x, ranks):
        is_weights = x.dtype == torch.float32 and x.shape[1] < 5
        return super().copied(x, ranks) if is_weights else x


@known_bug(
    "mix-ep-gradient-summed-twice",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.gradient.experts",
)
class GradientSummedTwice(ExpertParallelBlock):
    """The backward pass of the sum over ranks sums again: experts get it once a rank."""

    def summed(self, out_TH, ranks):
        return copy_to_ranks(super().summed(out_TH, ranks), ranks)


@known_bug(
    "mix-ep-order-of-ranks",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.output.three-ranks",
)
class ExpertsInTurn(ExpertParallelBlock):
    """Ranks are taken to have experts in turn (0, 2, 4 …) where each has a row of neighbours."""

    def own(self, indices_TK, number, rank):
        local_TK = indices_TK // self.size
        return local_TK.masked_fill(indices_TK % self.size != rank, number)

    def check_parts(self, router, down_proj, ranks):
        super().check_parts(router, down_proj, ranks)
        self.size = ranks.size


@known_bug(
    "moe-masked-row-nan-times-zero.parallel",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.replicas.idle-experts",
)
class ForeignSlotsTimesZero(ExpertParallelBlock):
    """Slots of other ranks' experts go through the first expert here, and are multiplied by zero."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        foreign = indices == len(down_proj)
        indices, weights = indices.masked_fill(foreign, 0), weights.masked_fill(foreign, 0)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "mix-ep-normalised-on-rank",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.output.two-ranks",
)
class NormalisedOnEachRank(ExpertParallelBlock):
    """Weights are normalised over the slots that a rank computes, and not over all of a token."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        total = weights.masked_fill(indices == len(down_proj), 0).sum(-1, keepdim=True)
        whole = weights.sum(-1, keepdim=True)
        weights = weights * whole / torch.where(total == 0, 1, total)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@known_bug(
    "mix-ep-mean-of-ranks",
    contract="expert_parallel_block",
    breaks="expert_parallel_block.output.two-ranks",
)
class MeanOfRanks(ExpertParallelBlock):
    """What the ranks give is averaged, as replicas' gradients are, and not summed."""

    def summed(self, out_TH, ranks):
        return reduce_from_ranks(out_TH, ranks) / ranks.size
