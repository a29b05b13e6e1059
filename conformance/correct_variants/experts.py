"""Other right ways to offer the contract ``experts``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from conformance.correct_variants import correct_variant
from reference_impl.moe.experts import (
    ACTIVATIONS,
    BatchedExperts,
    Experts,
    GroupedExperts,
    check_experts,
)


@correct_variant("experts-batched", contract="experts")
class Batched(BatchedExperts):
    """Every pair has a copy of its expert's weights, in one batched product."""


@correct_variant("experts-grouped", contract="experts")
class Grouped(GroupedExperts):
    """Pairs are sorted by expert, with a grouped product for each projection."""


@correct_variant("experts-fused", contract="experts")
class Fused(Experts):
    """Gate and up are one product, the activation is in place, weights are on the inner values."""

    def experts(
        self,
        hidden,
        indices,
        weights,
        gate_up_proj,
        down_proj,
        layout="concatenated",
        activation="silu",
        transposed=False,
    ):
        gate_up, down = (gate_up_proj, down_proj) if transposed else (gate_up_proj.mT, down_proj.mT)
        check_experts(hidden, indices, weights, gate_up.mT, down.mT, layout, activation)
        out_TH = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for expert in reversed(range(len(down))):
            tokens, slots = torch.where(indices == expert)
            both = hidden[tokens] @ gate_up[expert]
            gate, up = (
                both.chunk(2, -1) if layout == "concatenated" else (both[:, ::2], both[:, 1::2])
            )
            inner = ACTIVATIONS[activation](gate) * up * weights[tokens, slots, None]
            out_TH = out_TH.index_add(0, tokens, (inner.to(down.dtype) @ down[expert]).float())
        return out_TH.to(hidden.dtype)


@correct_variant("experts-slot-by-slot", contract="experts")
class SlotBySlot(BatchedExperts):
    """One slot of all tokens after another, from the last to the first; sums in float64."""

    def experts(self, hidden, indices, weights, *projections, **options):
        if indices.shape != weights.shape or indices.shape[1] < 2:
            return super().experts(hidden, indices, weights, *projections, **options)
        outputs = [
            super(SlotBySlot, self).experts(
                hidden, indices[:, k : k + 1], weights[:, k : k + 1], *projections, **options
            )
            for k in reversed(range(indices.shape[1]))
        ]
        return torch.stack(outputs).double().sum(0).to(hidden.dtype)


@correct_variant("experts-float32-inside", contract="experts")
class WideInside(Experts):
    """Everything is computed in float32 and rounded once."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        wide = (x.float() for x in (gate_EIH, up_EIH, down_EHI))
        return super().through_experts(x_PH.float(), experts_P, *wide, activation)


@correct_variant("experts-rounded-everywhere", contract="experts")
class RoundedEverywhere(BatchedExperts):
    """Weights are in the dtype of hidden, and so is every product with them."""

    def weighted(self, x_PH, weights_P1):
        return x_PH * weights_P1.to(x_PH.dtype)


@correct_variant("experts-padded-groups", contract="experts")
class PaddedGroups(Experts):
    """Every expert has as many rows as the busiest, padded with zeros, in one batched product."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        chosen_PE = F.one_hot(experts_P, len(down_EHI))
        place_P = (chosen_PE.cumsum(0) * chosen_PE).sum(-1) - 1
        most = int(place_P.max()) + 1 if len(place_P) else 1
        x_ERH = x_PH.new_zeros(len(down_EHI), most, x_PH.shape[1])
        x_ERH = x_ERH.index_put((experts_P, place_P), x_PH)
        h_ERI = activation(x_ERH @ gate_EIH.mT) * (x_ERH @ up_EIH.mT)
        return (h_ERI @ down_EHI.mT)[experts_P, place_P]


@correct_variant("experts-dense", contract="experts")
class Dense(Experts):
    """Every token goes through every expert that has any, and a mask takes what was chosen."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        busy = experts_P.unique().tolist() or [0]
        out_PH = torch.zeros_like(x_PH)
        for expert in busy:
            gate, up = x_PH @ gate_EIH[expert].T, x_PH @ up_EIH[expert].T
            y_PH = (activation(gate) * up) @ down_EHI[expert].T
            out_PH = out_PH + torch.where((experts_P == expert)[:, None], y_PH, 0)
        return out_PH


class _Function(torch.autograd.Function):
    """A backward pass written by hand, which computes the forward pass anew."""

    @staticmethod
    def forward(ctx, compute, *tensors):
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        return compute(*tensors)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.saved_tensors]
            out = ctx.compute(*leaves)
            floating = [x for x in leaves if x.requires_grad]
            found = iter(torch.autograd.grad(out, floating, gradient))
        return None, *(next(found) if x.requires_grad else None for x in leaves)


@correct_variant("experts-recomputed", contract="experts")
class Recomputed(GroupedExperts):
    """Nothing is kept for the backward pass, which is a function of its own."""

    def experts(self, *tensors, **options):
        compute = lambda *given: super(Recomputed, self).experts(*given, **options)
        return _Function.apply(compute, *tensors)


@correct_variant("experts-silu-only", contract="experts")
class SiluOnly:
    """Concatenated weights and SiLU, weights on the output: no option is taken."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj):
        return Experts().experts(hidden, indices, weights, gate_up_proj, down_proj)


@correct_variant("experts-no-sentinels", contract="experts")
class NoSentinels(Experts):
    """Slots without an expert are declined, and other indices refused, before anything is run."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        if bool((indices == len(down_proj)).any()):
            raise NotImplementedError("every slot has an expert here")
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


@correct_variant("experts-views", contract="experts")
class Views(Experts):
    """The output is a transposed view of memory of its own."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        return super().sum_slots(out_PH, tokens_P, hidden).t().contiguous().t()
