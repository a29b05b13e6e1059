"""Experts in grouped products (``F.grouped_mm``), dense and compressed to a shared core.

Axes are T tokens, K slots of a token, P = T·K pairs sorted by expert, E experts, H hidden, I
intermediate, R rank, S twice the rank. Nothing here waits for the device, but for float64 and for the
check of indices on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_impl.moe.experts import ACTIVATIONS, check_experts
from reference_impl.shared_core.block import PROJECTIONS, CompressedMoEBlock, SharedCoreBlock

ALIGNMENT = 16
"""Bytes of which ``grouped_mm`` wants every stride of its matrices to be a multiple."""


@dataclass(frozen=True)
class Sorted:
    """Pairs of tokens and slots in the order of their experts."""

    order_P: Tensor
    """The pair (token · K + slot) at each place, int64."""
    tokens_P: Tensor
    """Its token."""
    experts_P: Tensor
    """Its expert."""
    ends_E: Tensor
    """Where each expert's pairs end, int32."""
    shape: tuple[int, int]
    """(T, K)"""

    @classmethod
    def of(cls, indices_TK: Tensor, experts: int) -> Sorted:
        """The pairs of ``indices_TK`` int64 [T, K]; a sentinel counts as the last expert's."""
        flat = indices_TK.flatten().clamp(max=experts - 1)
        experts_P, order_P = flat.sort(stable=True)
        last = torch.arange(experts, device=flat.device)
        ends_E = torch.searchsorted(experts_P, last, right=True, out_int32=True)
        tokens_P = order_P // max(1, indices_TK.shape[1])
        return cls(order_P, tokens_P, experts_P, ends_E, tuple(indices_TK.shape))

    def product(self, x_PN: Tensor, weight_EMN: Tensor) -> Tensor:
        """Each pair's row times its expert's matrix, [P, M]."""
        if not len(x_PN):  # grouped_mm takes no empty matrix; gradients are zero, and there
            return F.linear(x_PN, weight_EMN.sum(0))
        if x_PN.dtype == torch.float64:  # grouped_mm has no float64
            parts = x_PN.tensor_split(self.ends_E[:-1].cpu().long())
            return torch.cat([F.linear(part, w) for part, w in zip(parts, weight_EMN)])
        width = weight_EMN.shape[1]
        unit = ALIGNMENT // x_PN.element_size()
        more_M, more_N = -width % unit, -x_PN.shape[1] % unit
        if more_N:
            x_PN = F.pad(x_PN, (0, more_N))
        if more_M or more_N:
            weight_EMN = F.pad(weight_EMN, (0, more_N, 0, more_M))
        out = F.grouped_mm(x_PN, weight_EMN.mT, offs=self.ends_E)
        return out[:, :width] if more_M else out

    def sum_slots(self, rows_PN: Tensor, weights_TK: Tensor) -> Tensor:
        """Σ over a token's slots of weight · row, [T, N] in the dtype of the rows.

        One batched product: sums are wider than the dtype, and no order of additions is by chance.
        """
        places = torch.empty_like(self.order_P)
        places[self.order_P] = torch.arange(len(places), device=places.device)
        rows_TKN = rows_PN[places].view(*self.shape, rows_PN.shape[-1])
        wide = torch.promote_types(rows_PN.dtype, weights_TK.dtype)
        return (weights_TK.to(wide)[:, None] @ rows_TKN.to(wide))[:, 0].to(rows_PN.dtype)


class TorchGroupedExperts:
    """Dense experts: sort, one grouped product for gate and up, one for down, a weighted sum.

    Native: products. Glue: all else. A slot without an expert becomes a row of zeros of the last
    one. Indices out of range raise on the CPU alone: on a GPU the check would wait for the device.
    """

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        transposed: bool = False,
        activation: str = "silu",
    ) -> Tensor:
        """See :class:`conformance.contracts.Experts`."""
        if transposed:
            gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        rows = slice(None if indices.device.type == "cpu" else 0)
        given = (hidden[rows], indices[rows], weights[rows], gate_up_proj, down_proj)
        check_experts(*given, "concatenated", activation)
        number = len(down_proj)
        pairs = Sorted.of(indices, number)
        real_TK = indices < number
        real_P1 = real_TK.flatten()[pairs.order_P, None]
        x_PH = torch.where(real_P1, hidden[pairs.tokens_P], 0)
        gate_PI, up_PI = pairs.product(x_PH, gate_up_proj).chunk(2, dim=-1)
        out_PH = pairs.product(ACTIVATIONS[activation](gate_PI) * up_PI, down_proj)
        return pairs.sum_slots(out_PH, torch.where(real_TK, weights, 0)).to(hidden.dtype)


class FoldedGroupedBlock(CompressedMoEBlock):
    """Each core once a token, and what is an expert's own as grouped products of low rank.

    With W_e = C + A_e B_e (:meth:`SharedCoreLayer.fold`) the cores of gate and up need the token
    alone, and that of down the weighted sum of its activations. Folded anew where gradients are
    needed; else once, and again when a factor was changed in place or moved.
    """

    def mixture(self, x_TH: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """See :meth:`CompressedMoEBlock.mixture`."""
        core_IH, b_gate_up, a_gate, a_up, core_HI, b_down, a_down = self.folded()
        pairs = Sorted.of(indices_TK, len(self.router))
        rank = a_gate.shape[-1]
        p_PS = pairs.product(x_TH[pairs.tokens_P], b_gate_up)
        gate_TI, up_TI = F.linear(x_TH, core_IH).chunk(2, dim=-1)
        gate_PI = gate_TI[pairs.tokens_P] + pairs.product(p_PS[:, :rank].contiguous(), a_gate)
        up_PI = up_TI[pairs.tokens_P] + pairs.product(p_PS[:, rank:].contiguous(), a_up)
        h_PI = F.silu(gate_PI) * up_PI
        weights_TK = weights_TK.to(x_TH.dtype)
        own_PH = pairs.product(pairs.product(h_PI, b_down), a_down)
        sums_TI = pairs.sum_slots(h_PI, weights_TK)
        return F.linear(sums_TI, core_HI) + pairs.sum_slots(own_PH, weights_TK)

    def folded(self) -> tuple[Tensor, ...]:
        """Of gate and up: cores [2·I, H], B [E, 2·S, H], each A [E, I, S]; of down: core, B and A."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.layers.parameters()):
            return self._fold()
        state = [(p.data_ptr(), p._version, p.dtype) for p in self.layers.parameters()]
        if getattr(self, "_state", None) != state:
            self._kept, self._state = self._fold(), state
        return self._kept

    def _fold(self) -> tuple[Tensor, ...]:
        gate, up, down = (self.layers[name].fold() for name in PROJECTIONS)
        core_IH, b_gate_up = torch.cat([gate[0], up[0]]), torch.cat([gate[2], up[2]], dim=1)
        return core_IH, b_gate_up, gate[1], up[1], down[0], down[2], down[1]


class FoldedGroupedExperts(SharedCoreBlock):
    """The contract ``shared_core_block`` by :class:`FoldedGroupedBlock`."""

    block_type = FoldedGroupedBlock
