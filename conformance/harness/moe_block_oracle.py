"""What a mixture-of-experts block must compute, in float64.

A second formulation: every token goes through every expert, in one product over all of them, and a
dense matrix of weights, zero where an expert is not chosen, sums them up. Axes are N tokens of all
batch rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.differentiated import Differentiated, differentiate
from conformance.harness.memo import remembered
from conformance.harness.router_oracle import (
    UNCLEAR,
    VANISHED,
    Choice,
    choose,
    dense_weights,
    scores,
)
from conformance.harness.tolerance import STEP_ERROR

OFF = 3
"""Logits are taken to be off by so many roundings of their terms and of themselves."""


def silu(x: Tensor) -> Tensor:
    """x times its sigmoid."""
    return x * torch.sigmoid(x)


def mlp(x_NH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) ⊙ up x) of one expert, [N, H]."""
    gate, up = (x_NH @ gate_up.T).tensor_split(2, dim=-1)
    return (silu(gate) * up) @ down.T


def all_experts(x_NH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Every token through every expert, [N, E, H]."""
    both_NEJ = torch.einsum("nh,ejh->nej", x_NH, gate_up_EJH)
    width = down_EHI.shape[-1]
    return torch.einsum(
        "nei,ehi->neh", silu(both_NEJ[..., :width]) * both_NEJ[..., width:], down_EHI
    )


@remembered
def block_choice(call: Call) -> Choice:
    """Which experts each token [N] goes to, in a computation with logits in the dtype of the call."""
    (hidden, router, *_), options = in_float64(call.values()[0]), call.values()[1]
    x_NH = hidden.detach().flatten(0, 1)
    logits_NE = x_NH @ router.T
    terms_NE = (x_NH.square() @ router.square().T).sqrt()
    off_NE = OFF * STEP_ERROR[call.dtype] * (terms_NE + logits_NE.abs())
    kind, bias = options.get("score", "softmax"), in_float64(options.get("selection_bias"))
    scores_NE = scores(logits_NE, kind)
    error_NE = scores_NE * off_NE * (1 - scores_NE)
    if kind == "softmax":
        error_NE = scores_NE * (off_NE + off_NE.amax(-1, keepdim=True))
    size_NE = scores_NE if bias is None else scores_NE + bias.abs()
    error_NE = error_NE + UNCLEAR * size_NE + VANISHED
    return choose(scores_NE, error_NE, options["top_k"], bias, options.get("groups"))


def inputs_of(arguments: list[Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call that gradients reach, by name."""
    named = dict(zip(("hidden", "router", "gate_up_proj", "down_proj"), arguments))
    if options.get("shared") is not None:
        named["shared gate_up_proj"], named["shared down_proj"] = options["shared"]
    if options.get("shared_gate") is not None:
        named["shared_gate"] = options["shared_gate"]
    return named


def dense_block(
    options: dict[str, Any], chosen_NE: Tensor, counted_N: Tensor
) -> Callable[..., tuple[Tensor]]:
    """The block with its choice given; zero for tokens that are not counted."""
    kind, normalize = options.get("score", "softmax"), options.get("normalize", False)
    factor = options.get("scaling_factor", 1.0)

    def block(**inputs: Tensor) -> tuple[Tensor]:
        x_NH = inputs["hidden"].flatten(0, 1)
        logits_NE = x_NH @ inputs["router"].T
        wide = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        weights_NE = dense_weights(scores(wide, kind), chosen_NE, normalize, factor)
        experts_NEH = all_experts(x_NH, inputs["gate_up_proj"], inputs["down_proj"])
        out_NH = torch.einsum("ne,neh->nh", weights_NE.to(x_NH.dtype), experts_NEH)
        if "shared gate_up_proj" in inputs:
            extra_NH = mlp(x_NH, inputs["shared gate_up_proj"], inputs["shared down_proj"])
            if "shared_gate" in inputs:
                extra_NH = torch.sigmoid(x_NH @ inputs["shared_gate"].T) * extra_NH
            out_NH = out_NH + extra_NH
        return (out_NH * counted_N[:, None],)

    return block


@remembered
def expected_block(call: Call) -> Differentiated:
    """Output [N, H] and gradients; tokens whose choice is not clear count nothing."""
    choice, (arguments, options) = block_choice(call), call.values()
    inputs = {name: x.detach().cpu() for name, x in inputs_of(arguments, options).items()}
    function = dense_block(options, choice.chosen, choice.clear)
    return differentiate(function, inputs, call.dtype, call.case.seed)


@remembered
def expected_logits(call: Call) -> Differentiated:
    """The logits [N, E] of the router."""
    hidden, router = (x.detach().cpu() for x in call.values()[0][:2])

    def logits(hidden: Tensor, router: Tensor) -> tuple[Tensor]:
        return (hidden.flatten(0, 1) @ router.T,)

    return differentiate(logits, {"hidden": hidden, "router": router}, call.dtype, call.case.seed)
