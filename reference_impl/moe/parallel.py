"""The block with its experts dealt out to ranks, each of which sees every token.

Axes are T tokens, K slots of a token, E experts, H hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from reference_impl.moe.block import MoEBlock
from reference_impl.ranks import Ranks, copy_to_ranks, current_ranks, reduce_from_ranks


class ExpertParallelBlock(MoEBlock):
    """Every rank routes all tokens, computes the slots of its own experts, and all add up."""

    def expert_parallel_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
    ) -> Tensor:
        """See :class:`conformance.contracts.ExpertParallelBlock`."""
        ranks = current_ranks()
        self.check_parts(router, down_proj, ranks)
        x_TH = hidden.flatten(0, 1)
        weights_TK, indices_TK = self.moe_router(
            F.linear(x_TH, router), top_k=top_k, normalize=normalize
        )
        out_TH = self.experts(
            self.copied(x_TH, ranks),
            self.own(indices_TK, len(down_proj), ranks.rank),
            self.copied(weights_TK, ranks).to(x_TH.dtype),
            gate_up_proj,
            down_proj,
        )
        return self.summed(out_TH, ranks).view_as(hidden)

    def copied(self, x: Tensor, ranks: Ranks) -> Tensor:
        """What all ranks have, whose gradient is the sum over what each makes of it."""
        return copy_to_ranks(x, ranks)

    def own(self, indices_TK: Tensor, number: int, rank: int) -> Tensor:
        """Indices among the experts of this rank; ``number`` for those of others."""
        local_TK = indices_TK - rank * number
        return local_TK.masked_fill((local_TK < 0) | (local_TK >= number), number)

    def summed(self, out_TH: Tensor, ranks: Ranks) -> Tensor:
        """The sum of what the ranks' experts give."""
        return reduce_from_ranks(out_TH, ranks)

    def check_parts(self, router: Tensor, down_proj: Tensor, ranks: Ranks) -> None:
        """Raise ValueError on every rank unless the ranks have the experts of the router."""
        counts = ranks.exchange(len(down_proj))
        if len(set(counts)) > 1 or sum(counts) != len(router):
            found = ", ".join(map(str, counts))
            raise ValueError(f"ranks have {found} experts, the router has {len(router)}")
