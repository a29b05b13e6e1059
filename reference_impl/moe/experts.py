"""Experts on routed tokens: a loop over experts, a batched product, and grouped products.

Axes are T tokens, K slots of a token, P pairs of a token and a slot that has an expert, E experts, H
hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = ("concatenated", "interleaved")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Experts:
    """Experts one after another; the other forms compute pairs in another way."""

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        layout: str = "concatenated",
        transposed: bool = False,
        activation: str = "silu",
        weight_on_input: bool = False,
    ) -> Tensor:
        """See :class:`conformance.contracts.Experts`."""
        if transposed:
            gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
        check_experts(hidden, indices, weights, gate_up_proj, down_proj, layout, activation)
        tokens_P, slots_P = (indices < len(down_proj)).nonzero(as_tuple=True)
        x_PH, weights_P1 = hidden[tokens_P], weights[tokens_P, slots_P, None]
        if weight_on_input:
            x_PH = self.weighted(x_PH, weights_P1).to(hidden.dtype)
        gate_EIH, up_EIH = self.gate_and_up(gate_up_proj, layout)
        out_PH = self.through_experts(
            x_PH, indices[tokens_P, slots_P], gate_EIH, up_EIH, down_proj, ACTIVATIONS[activation]
        )
        if not weight_on_input:
            out_PH = self.weighted(out_PH, weights_P1)
        return self.sum_slots(out_PH, tokens_P, hidden)

    def weighted(self, x_PH: Tensor, weights_P1: Tensor) -> Tensor:
        """Rows times their weights, in float32 at least."""
        wide = torch.promote_types(x_PH.dtype, torch.float32)
        return x_PH.to(wide) * weights_P1.to(wide)

    def gate_and_up(self, gate_up_proj: Tensor, layout: str) -> tuple[Tensor, Tensor]:
        """The weights of gate and up, each [E, I, H]."""
        if layout == "interleaved":
            return gate_up_proj[:, 0::2], gate_up_proj[:, 1::2]
        gate_EIH, up_EIH = gate_up_proj.chunk(2, dim=1)
        return gate_EIH, up_EIH

    def through_experts(
        self,
        x_PH: Tensor,
        experts_P: Tensor,
        gate_EIH: Tensor,
        up_EIH: Tensor,
        down_EHI: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Each row [P, H] through its expert, in the order of the rows."""
        out_PH = torch.zeros_like(x_PH)
        # Experts without rows too: so they have gradients, of zero, also where none has any.
        for expert in range(len(down_EHI)):
            rows = (experts_P == expert).nonzero()[:, 0]
            x = x_PH[rows]
            h = activation(F.linear(x, gate_EIH[expert])) * F.linear(x, up_EIH[expert])
            out_PH = out_PH.index_copy(0, rows, F.linear(h, down_EHI[expert]))
        return out_PH

    def sum_slots(self, out_PH: Tensor, tokens_P: Tensor, hidden: Tensor) -> Tensor:
        """The sum of each token's rows, in float32 at least, rounded once to the dtype of hidden."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out_TH = out_PH.new_zeros(hidden.shape, dtype=wide).index_add(0, tokens_P, out_PH.to(wide))
        return out_TH.to(hidden.dtype)


class BatchedExperts(Experts):
    """Every pair has its own copy of its expert's weights, in one batched product."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        """See :meth:`Experts.through_experts`."""
        x_PH1 = x_PH[..., None]
        h_PI1 = activation(gate_EIH[experts_P] @ x_PH1) * (up_EIH[experts_P] @ x_PH1)
        return (down_EHI[experts_P] @ h_PI1)[..., 0]


class GroupedExperts(Experts):
    """Pairs are sorted by expert, and each projection is one grouped product."""

    def through_experts(self, x_PH, experts_P, gate_EIH, up_EIH, down_EHI, activation):
        """See :meth:`Experts.through_experts`."""
        order = experts_P.argsort(stable=True)
        ends_E = experts_P.bincount(minlength=len(down_EHI)).cumsum(0).int()
        product = partial(grouped_product, ends_E=ends_E)
        x_PH = x_PH[order]
        h_PI = activation(product(x_PH, gate_EIH)) * product(x_PH, up_EIH)
        return product(h_PI, down_EHI)[order.argsort()]


GROUPED_ALIGNMENT = 16
"""Bytes of which ``grouped_mm`` wants every row of its matrices to have a multiple."""


def grouped_product(x_PN: Tensor, weight_EMN: Tensor, ends_E: Tensor) -> Tensor:
    """Rows sorted by expert, each group times its expert's matrix, [P, M]; ends_E is cumulative."""
    width = weight_EMN.shape[1]
    unit = GROUPED_ALIGNMENT // x_PN.element_size()
    more_M, more_N = -width % unit, -x_PN.shape[1] % unit
    x_PN = F.pad(x_PN, (0, more_N))
    weight_EMN = F.pad(weight_EMN, (0, more_N, 0, more_M))
    return F.grouped_mm(x_PN, weight_EMN.contiguous().mT, offs=ends_E)[:, :width]


def check_experts(
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    layout: str,
    activation: str,
) -> None:
    """Raise for shapes that do not belong together, unknown options and experts that there are not."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if hidden.ndim != 2 or down_proj.ndim != 3:
        found = f"{list(hidden.shape)} and {list(down_proj.shape)}"
        raise ValueError(f"hidden and down_proj have shapes {found}, expected 2 and 3 axes")
    number, width, intermediate = down_proj.shape
    slots = indices.shape[-1]
    for name, tensor, shape in (
        ("hidden", hidden, (len(hidden), width)),
        ("indices", indices, (len(hidden), slots)),
        ("weights", weights, (len(hidden), slots)),
        ("gate_up_proj", gate_up_proj, (number, 2 * intermediate, width)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) <= number:
        raise IndexError(
            f"indices go from {int(indices.min())} to {int(indices.max())}, expected 0 to {number}"
        )
