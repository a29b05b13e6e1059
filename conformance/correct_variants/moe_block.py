"""Other right ways to offer the contract ``moe_block``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from conformance.correct_variants import correct_variant
from reference_impl.moe.block import MoEBlock
from reference_impl.moe.experts import BatchedExperts, GroupedExperts


@correct_variant("block-batched", contract="moe_block")
class Batched(BatchedExperts, MoEBlock):
    """Every pair of a token and a slot has its own product."""


@correct_variant("block-grouped", contract="moe_block")
class Grouped(GroupedExperts, MoEBlock):
    """Pairs are sorted by expert, for grouped products."""


@correct_variant("block-logits-in-float32", contract="moe_block")
class LogitsInFloat32(MoEBlock):
    """The router is computed in float32 whatever the dtype, and its weights stay in it."""

    def moe_block(
        self,
        hidden,
        router,
        gate_up_proj,
        down_proj,
        *,
        shared=None,
        shared_gate=None,
        return_logits=False,
        **options,
    ):
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = x_TH.float() @ router.float().T
        weights_TK, indices_TK = self.moe_router(logits_TE, **options)
        out_TH = self.experts(x_TH, indices_TK, weights_TK, gate_up_proj, down_proj)
        if shared is not None:
            out_TH = self.shared_expert(x_TH, *shared, shared_gate) + out_TH
        out = out_TH.reshape(hidden.shape)
        return (out, logits_TE) if return_logits else out


@correct_variant("block-transformers-loop", contract="moe_block")
class TransformersLoop(MoEBlock):
    """Experts in a loop over a one-hot mask, summed in the dtype of the hidden states."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out_TH = torch.zeros_like(hidden)
        mask_EKT = F.one_hot(indices, len(down_proj)).permute(2, 1, 0)
        for expert in range(len(down_proj)):
            slots, tokens = torch.where(mask_EKT[expert])
            gate, up = F.linear(hidden[tokens], gate_up_proj[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down_proj[expert]) * weights[tokens, slots, None]
            out_TH = out_TH.index_add(0, tokens, y.to(out_TH.dtype))
        return out_TH


@correct_variant("block-experts-backwards", contract="moe_block")
class Backwards(MoEBlock):
    """Experts from the last to the first, each by itself; the shared expert first."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        out_TH = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        for expert in reversed(range(len(down_proj))):
            rows_T = (indices == expert).any(-1)
            weight_T = (weights * (indices == expert)).sum(-1)[rows_T]
            gate_up = gate_up_proj[expert]
            gate, up = (hidden[rows_T] @ part.T for part in gate_up.chunk(2))
            y = (gate * gate.sigmoid() * up) @ down_proj[expert].T
            out_TH = out_TH.index_put((rows_T,), out_TH[rows_T] + y * weight_T[:, None])
        return out_TH.to(hidden.dtype)


@correct_variant("block-dense", contract="moe_block")
class AllExperts(MoEBlock):
    """Every token goes through every expert, and weights that are zero leave most of it out."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        dense_TE = weights.new_zeros(len(hidden), len(down_proj)).scatter(-1, indices, weights)
        gate_TEI, up_TEI = torch.einsum("th,ejh->tej", hidden, gate_up_proj).chunk(2, dim=-1)
        y_TEH = torch.einsum("tei,ehi->teh", F.silu(gate_TEI) * up_TEI, down_proj)
        return torch.einsum("te,teh->th", dense_TE.to(hidden.dtype), y_TEH)


@correct_variant("block-weight-before-down", contract="moe_block")
class WeightBeforeDown(MoEBlock):
    """The weight is on what goes into the down projection, which is linear."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        slots, width = indices.shape[-1], down_proj.shape[-1]
        out_TH = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        for slot in range(slots):
            chosen_T = indices[:, slot]
            both = torch.einsum("th,tjh->tj", hidden, gate_up_proj[chosen_T])
            h = F.silu(both[:, :width]) * both[:, width:] * weights[:, slot, None]
            h = h.to(hidden.dtype)
            out_TH = out_TH + torch.einsum("ti,thi->th", h, down_proj[chosen_T])
        return out_TH.to(hidden.dtype)


@correct_variant("block-shared-as-expert", contract="moe_block")
class SharedInFloat32(MoEBlock):
    """The shared expert is computed in float32 and rounded once, with its gate."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        wide = [x.float() for x in (x_TH, gate_up_proj, down_proj)]
        gate = None if shared_gate is None else shared_gate.float()
        return super().shared_expert(*wide, gate).to(x_TH.dtype)


@correct_variant("block-tokens-in-two", contract="moe_block")
class InTwoChunks(MoEBlock):
    """Tokens are processed in two parts; the router raises on NaN."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        if bool(hidden.isnan().any()):
            raise ValueError("NaN among the hidden states")
        rows = hidden.flatten(0, 1)
        half = len(rows) // 2
        parts = [
            super(InTwoChunks, self).moe_block(part[None], *weights, return_logits=True, **options)
            for part in (rows[:half], rows[half:])
        ]
        out = torch.cat([part[0][0] for part in parts]).view(hidden.shape)
        return (out, torch.cat([part[1] for part in parts])) if return_logits else out
