"""The oracle of experts: every expert on every token, and a mask that takes what was chosen.

A second formulation, on purpose: nothing is gathered, grouped or put back as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.differentiated import Differentiated, differentiate, values_and_gradients
from conformance.harness.memo import remembered


def gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of Hendrycks and Gimpel."""
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: torch.where(x > 0, x, 0),
}


def dense(
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
    """The output [tokens, hidden], in the dtype of ``hidden``, with sums over slots in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    gate_up_EHJ = gate_up_proj if transposed else gate_up_proj.transpose(1, 2)
    down_EIH = down_proj if transposed else down_proj.transpose(1, 2)
    halves, axis = ((2, -1), -2) if layout == "concatenated" else ((-1, 2), -1)
    gate_EHI, up_EHI = gate_up_EHJ.unflatten(-1, halves).unbind(axis)

    def every(x_TH: Tensor) -> Tensor:
        """What each expert makes of each token, [tokens, experts, hidden]."""
        gate_TEI = torch.einsum("th,ehi->tei", x_TH, gate_EHI)
        up_TEI = torch.einsum("th,ehi->tei", x_TH, up_EHI)
        h_TEI = ACTIVATIONS[activation](gate_TEI) * up_TEI
        return torch.einsum("tei,eih->teh", h_TEI, down_EIH)

    numbers_E = torch.arange(len(down_proj))
    y_TEH = None if weight_on_input else every(hidden)
    out_TH = hidden.new_zeros(hidden.shape, dtype=wide)
    for slot in range(indices.shape[1]):
        chosen_TE1 = (indices[:, slot, None] == numbers_E)[..., None]
        weight_T1 = weights[:, slot, None].to(wide)
        if weight_on_input:
            y_TEH = every((hidden.to(wide) * weight_T1).to(hidden.dtype))
        y_TH = torch.where(chosen_TE1, y_TEH, 0).sum(1).to(wide)
        out_TH = out_TH + (y_TH if weight_on_input else y_TH * weight_T1)
    return out_TH.to(hidden.dtype)


def function_of(call: Call) -> Callable[..., tuple[Tensor, ...]]:
    """The function of ``call``, with its options, of tensors by name."""
    _, options = call.values()
    return lambda **tensors: (dense(**tensors, **options),)


def inputs_of(call: Call) -> dict[str, Tensor]:
    """The arguments of ``call`` by name, on the CPU."""
    arguments, _ = call.values()
    return {name: x.detach().cpu() for name, x in zip(call.arguments, arguments)}


@remembered
def expected(call: Call) -> Differentiated:
    """Output and gradients of ``call``, with the limits that rounding sets."""
    return differentiate(function_of(call), inputs_of(call), call.dtype, call.case.seed)


@remembered
def exact(call: Call) -> dict[str, Tensor]:
    """Output and gradients of a call with integers, in float64, for :func:`integer_upstream`.

    What float32 cannot hold is nothing: SiLU of -512 is 1e-220.
    """
    inputs = in_float64(inputs_of(call))
    upstream = integer_upstream(call).double()
    values = values_and_gradients(function_of(call), inputs, (upstream,))
    return {name: value.float().double() for name, value in values.items()}


UPSTREAM = "torch.randint(-2, 3, {shape}, generator=torch.Generator().manual_seed({seed})).float()"


def integer_upstream(call: Call) -> Tensor:
    """A gradient of the output [tokens, hidden] in small integers, float32 on the CPU."""
    return eval(integer_upstream_line(call))


def integer_upstream_line(call: Call) -> str:
    """The expression that makes it."""
    return UPSTREAM.format(shape=tuple(inputs_of(call)["hidden"].shape), seed=call.case.seed + 1)
