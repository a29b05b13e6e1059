"""What shared-core layers and blocks compute, from dense weights in float64.

In float64 every weight is multiplied out and applied. In a 16-bit dtype, where the result is one
correct variant among others and only says how exact such a variant is, wrappers are applied to rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.core_cases import FACTORS
from conformance.harness.differentiated import Differentiated, differentiate
from conformance.harness.memo import remembered
from conformance.harness.tolerance import Expectation, expect


def square(u: Tensor, v: Tensor) -> Tensor:
    """I + U Vᵀ of every expert, [experts, width, width]."""
    return torch.eye(u.shape[1], dtype=u.dtype) + torch.einsum("eir,ejr->eij", u, v)


def dense(core: Tensor, u_in: Tensor, v_in: Tensor, u_out: Tensor, v_out: Tensor) -> Tensor:
    """The weights [experts, d_out, d_in], in float32 at least, in the dtype of the core."""
    wide = torch.promote_types(core.dtype, torch.float32)
    inner = square(u_in.to(wide), v_in.to(wide))
    outer = square(u_out.to(wide), v_out.to(wide))
    return torch.einsum("eop,pq,eqi->eoi", outer, core.to(wide), inner).to(core.dtype)


def through(x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """Rows x [..., d_in], or [experts, ..., d_in], through every expert: [experts, ..., d_out]."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return every(rows.expand(len(factors["u_in"]), -1, -1), factors).unflatten(
        1, x.shape[:-1] or (1,)
    )


def every(x_ETI: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """Rows of each expert through that expert, [experts, rows, d_out]."""
    if x_ETI.dtype == torch.float64:
        return torch.einsum("eti,eoi->eto", x_ETI, dense(**factors))
    core, u_in, v_in, u_out, v_out = (factors[name] for name in FACTORS)
    x_ETI = x_ETI + torch.einsum("etr,eir->eti", torch.einsum("eti,eir->etr", x_ETI, v_in), u_in)
    y_ETO = torch.einsum("eti,oi->eto", x_ETI, core)
    return y_ETO + torch.einsum("etr,eor->eto", torch.einsum("eto,eor->etr", y_ETO, v_out), u_out)


# Layers


def layer_inputs(call: Call) -> dict[str, Tensor]:
    """The factors of a call, and its bias if it has one."""
    namespace = call.namespace()
    names = (*FACTORS, *(name for name, _ in call.options if name == "bias"))
    return {name: namespace[name] for name in names}


@remembered
def weights_of(call: Call) -> Differentiated:
    """The weight of every expert, ``output 0`` …, and gradients of the factors."""

    def weights(**given: Tensor) -> tuple[Tensor, ...]:
        return tuple(dense(**given))

    factors = {name: given for name, given in layer_inputs(call).items() if name != "bias"}
    return differentiate(weights, factors, call.dtype, seed_of(call))


@remembered
def outputs_of(call: Call, experts: tuple[int, ...]) -> Differentiated:
    """The outputs of these experts for ``x``, ``output 0`` …, and gradients of everything."""

    def outputs(x: Tensor, bias: Tensor | None = None, **given: Tensor) -> tuple[Tensor, ...]:
        rows = through(x, given)
        added = [0] * len(rows) if bias is None else bias
        shape = (*x.shape[:-1], rows.shape[-1])
        return tuple((rows[expert] + added[expert]).reshape(shape) for expert in experts)

    inputs = layer_inputs(call) | {"x": call.named("x")}
    return differentiate(outputs, inputs, call.dtype, seed_of(call))


def seed_of(call: Call) -> int:
    """Of the gradients at the outputs."""
    return getattr(call.case, "seed", 0) + 1


@remembered
def one_rounding(call: Call, expert: int) -> Expectation:
    """The weight of an expert, computed in float32 or wider and rounded once."""
    factors = {name: given for name, given in layer_inputs(call).items() if name != "bias"}
    exact = dense(**in_float64(factors))[expert]
    return expect(exact, [exact.to(call.dtype)], exact.abs(), call.dtype)


@remembered
def update_of(call: Call, expert: int) -> Expectation:
    """What wrappers add to the core, as a product of two matrices that are rounded once."""
    factors = {name: given for name, given in layer_inputs(call).items() if name != "bias"}
    core, u_in, v_in, u_out, v_out = in_float64(factors).values()
    update = dense(core, u_in, v_in, u_out, v_out)[expert] - core
    a = torch.cat([core @ u_in[expert], u_out[expert]], -1)
    b = torch.cat([v_in[expert].mT, v_out[expert].mT @ core @ square(u_in, v_in)[expert]])
    noise = (2 * a.square() @ b.square()).sqrt()
    rounded = in_float64(a.to(call.dtype)) @ in_float64(b.to(call.dtype))
    return expect(update, [rounded], noise, call.dtype)


# Blocks


def mixture(
    hidden: Tensor, router: Tensor, chosen: Tensor, normalize: bool, factors: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The output and the logits of a block; every expert is computed for every token.

    ``chosen``, bool [tokens, experts], says which experts count; factors are named
    ``projection.factor``.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.flatten(0, 1)
    logits = torch.einsum("th,eh->te", x, router)
    scores = torch.exp(torch.log_softmax(logits.to(wide), -1)) * chosen
    if normalize:
        scores = scores / scores.sum(-1, keepdim=True)
    of = lambda projection: {name: factors[f"{projection}.{name}"] for name in FACTORS}
    rows = x.expand(len(router), -1, -1)
    gate, up = every(rows, of("gate_proj")), every(rows, of("up_proj"))
    down = every(gate * torch.sigmoid(gate) * up, of("down_proj"))
    out = torch.einsum("te,eth->th", scores, down.to(wide))
    return out.to(hidden.dtype).view_as(hidden), logits


def chosen_by(logits: Tensor, top_k: int) -> Tensor:
    """Which experts have one of the largest logits, bool [tokens, experts]."""
    ranks = (logits[:, None, :] > logits[:, :, None]).sum(-1)
    return ranks < top_k


@remembered
def block_of(call: Call) -> Differentiated:
    """The output (``output 0``) of a block, all gradients, and the logits (``output 1``) if returned.

    Gradients are those for a loss that reads the output alone.
    """
    case = call.case
    inputs = block_inputs(call)
    exact = in_float64(inputs)
    logits = exact["hidden"].flatten(0, 1) @ exact["router"].mT
    inputs["chosen"] = chosen_by(logits, case.top_k)

    def block(
        hidden: Tensor, router: Tensor, chosen: Tensor, **factors: Tensor
    ) -> tuple[Tensor, ...]:
        return mixture(hidden, router, chosen, case.normalize, factors)[:1]

    def logits_alone(hidden: Tensor, router: Tensor) -> tuple[Tensor, ...]:
        return (torch.einsum("th,eh->te", hidden.flatten(0, 1), router),)

    found = differentiate(block, inputs, call.dtype, seed_of(call))
    if not case.return_logits:
        return found
    both = {name: inputs[name] for name in ("hidden", "router")}
    other = differentiate(logits_alone, both, call.dtype, seed_of(call))
    renamed = lambda values: {"output 1": values["output 0"]} if values else {}
    return replace(
        found,
        values=found.values | renamed(other.values),
        variants=found.variants | renamed(other.variants),
        noise=found.noise | renamed(other.noise),
    )


def block_inputs(call: Call) -> dict[str, Tensor]:
    """``hidden``, ``router`` and the factors as ``projection.factor``."""
    namespace = call.namespace()
    factors = {
        f"{projection}.{name}": namespace[projection][name]
        for projection in ("gate_proj", "up_proj", "down_proj")
        for name in FACTORS
    }
    return {"hidden": namespace["hidden"], "router": namespace["router"]} | factors
