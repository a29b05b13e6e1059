"""Other right ways to offer the contract ``expert_parallel_block``."""

from __future__ import annotations

import torch

from conformance.correct_variants import correct_variant
from reference_impl.moe.block import MoEBlock
from reference_impl.moe.experts import BatchedExperts, GroupedExperts
from reference_impl.moe.parallel import ExpertParallelBlock
from reference_impl.ranks import current_ranks, reduce_from_ranks


@correct_variant("ep-experts-gathered", contract="expert_parallel_block")
class GathersExperts(ExpertParallelBlock):
    """Every rank gathers all experts and computes the whole block; nothing is summed."""

    def expert_parallel_block(self, hidden, router, gate_up_proj, down_proj, **options):
        ranks = current_ranks()
        self.check_parts(router, down_proj, ranks)
        whole = []
        for own in (gate_up_proj, down_proj):
            parts = ranks.gather(own.detach().contiguous())
            parts[ranks.rank] = own  # through which its gradient comes
            whole.append(torch.cat(parts))
        return MoEBlock().moe_block(hidden, router, *whole, **options)


@correct_variant("ep-summed-in-float32", contract="expert_parallel_block")
class SumsInFloat32(ExpertParallelBlock):
    """What ranks give travels in float32, and is rounded when it has been summed."""

    def summed(self, out_TH, ranks):
        return reduce_from_ranks(out_TH.float(), ranks).to(out_TH.dtype)


@correct_variant("ep-batched", contract="expert_parallel_block")
class Batched(BatchedExperts, ExpertParallelBlock):
    """Each rank's pairs are one batched product."""


@correct_variant("ep-grouped", contract="expert_parallel_block")
class Grouped(GroupedExperts, ExpertParallelBlock):
    """Each rank's pairs are sorted by expert and multiplied in groups."""


@correct_variant("ep-one-rank-a-slot", contract="expert_parallel_block")
class SlotAfterSlot(ExpertParallelBlock):
    """The slots of tokens are computed one after another, and each is summed over the ranks."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        parts = [
            super(SlotAfterSlot, self).experts(
                hidden, indices[:, [k]], weights[:, [k]], gate_up_proj, down_proj, **options
            )
            for k in range(indices.shape[1])
        ]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return sum(part.to(wide) for part in parts).to(hidden.dtype)
