"""What one process computes with the full weights, dealt out to the ranks, in float64.

A second formulation, on purpose: no part of the reference's parallel layers is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.memo import remembered
from conformance.harness.parallel_cases import IGNORED, LayerCase
from conformance.harness.tolerance import Expectation, expect

PERTURBATION = 1e-6
"""Relative; small enough to be linear, large enough for float64."""
PERTURBED = 3
"""How many times everything is perturbed at random."""


def heads_of(case: LayerCase, member: int) -> tuple[list[int], list[int]]:
    """The query heads and the key/value heads of a member of a group."""
    share = case.heads // case.size
    queries = list(range(member * share, (member + 1) * share))
    read = sorted({head // (case.heads // case.kv_heads) for head in queries})
    if case.size <= case.kv_heads:
        share = case.kv_heads // case.size
        assert read == list(range(member * share, (member + 1) * share))
    return queries, read


def named_weights(case: LayerCase, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with fused ones told apart: ``q.weight``, ``gate.weight`` …"""
    if case.layout == "separate":
        return dict(weights)
    parts = {}
    for what, fused in weights.items():
        if case.kind == "gate_up":
            split = fused.unflatten(0, (-1, 2) if case.layout == "interleaved" else (2, -1))
            pair = split.unbind(1 if case.layout == "interleaved" else 0)
            parts |= {f"{name}.{what}": part for name, part in zip(("gate", "up"), pair)}
            continue
        width, of_group = case.head_dim, case.heads // case.kv_heads
        heads = fused.unflatten(0, (-1, width))
        if case.layout == "concatenated":
            q, k, v = heads.split([case.heads, case.kv_heads, case.kv_heads])
        else:
            groups = heads.unflatten(0, (case.kv_heads, of_group + 2))
            q, k, v = (
                groups[:, :of_group].flatten(0, 1),
                groups[:, of_group],
                groups[:, of_group + 1],
            )
        parts |= {f"{name}.{what}": part.flatten(0, 1) for name, part in zip("qkv", (q, k, v))}
    return parts


def held(case: LayerCase, name: str, full: Tensor, member: int) -> Tensor:
    """What a member of a group holds of a weight; a vocabulary without its padding."""
    width = case.head_dim
    if case.kind == "qkv":
        queries, read = heads_of(case, member)
        heads = queries if name.startswith("q") else read
        return full.unflatten(0, (-1, width))[heads].flatten(0, 1)
    if case.kind in ("embedding", "head"):
        return full[member * case.vocab_rows : (member + 1) * case.vocab_rows]
    if case.kind == "row" or name == "down.weight":
        return full if name == "bias" else full.chunk(case.size, 1)[member]
    return full.chunk(case.size, 0)[member]


def dense(
    case: LayerCase, weights: Mapping[str, Tensor], x: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The outputs of one process with the full weights and the full input."""
    named = named_weights(case, weights)
    linear = lambda name: F.linear(x[0], named[f"{name}.weight"], named.get(f"{name}.bias"))
    if case.kind in ("column", "row"):
        return (F.linear(x[0], named["weight"], named.get("bias")),)
    if case.kind == "qkv":
        return tuple(linear(name) for name in "qkv")
    if case.kind == "gate_up":
        return linear("gate"), linear("up")
    if case.kind == "mlp":
        gate, up = linear("gate"), linear("up")
        return (F.linear(gate * torch.sigmoid(gate) * up, named["down.weight"]),)
    if case.kind == "embedding":
        return (named["weight"][x[0]],)
    if case.kind == "head":
        return (F.linear(x[0], named["weight"]),)
    if case.kind == "norm":
        mean_square = x[0].square().mean(-1, keepdim=True)
        return (x[0] / (mean_square + case.eps).sqrt() * named["weight"],)
    logits, targets = x[0][:, : case.width_out], x[1]
    kept = targets != IGNORED
    loss = F.cross_entropy(
        logits,
        torch.where(kept, targets, 0),
        reduction="none",
        label_smoothing=case.label_smoothing,
    )
    return (torch.where(kept, loss, 0),)


def output_part(case: LayerCase, number: int, full: Tensor, member: int) -> Tensor:
    """What a member of a group has of output ``number``."""
    if case.kind == "qkv":
        queries, read = heads_of(case, member)
        heads = queries if number == 0 else read
        return full.unflatten(-1, (-1, case.head_dim))[..., heads, :].flatten(-2)
    split = case.kind in ("gate_up", "norm") or (case.kind == "column" and not case.gather_output)
    return full.chunk(case.size, -1)[member] if split else full


def whole_inputs(case: LayerCase, call: Call, group: int) -> tuple[Tensor, ...]:
    """The full arguments of a group."""
    x = call.named("whole")[group]
    x = x.to(case.dtype) if x.is_floating_point() else x
    return (x, call.named("targets")[group]) if case.kind == "cross_entropy" else (x,)


@dataclass(frozen=True)
class Dense:
    """What one group of ranks is to compute, by name: ``output 0`` …, ``input`` and weights.

    The last two are gradients, for :attr:`upstream` at the outputs.
    """

    values: dict[str, Tensor]
    """float64."""
    variants: dict[str, Tensor]
    """One process in a 16-bit dtype of the call; empty in float32, where the noise says it all."""
    noise: dict[str, Tensor]
    dtype: torch.dtype
    upstream: tuple[Tensor, ...]
    """Gradients that reach the full outputs."""

    @property
    def outputs(self) -> int:
        """How many outputs there are."""
        return len(self.upstream)

    def expectation(
        self, name: str, part: Callable[[Tensor], Tensor] = lambda full: full
    ) -> Expectation:
        """The expectation of a part of a value."""
        variants = [part(self.variants[name])] if name in self.variants else []
        return expect(part(self.values[name]), variants, part(self.noise[name]), self.dtype)


@remembered
def dense_of_group(call: Call, group: int) -> Dense:
    """The oracle of a group."""
    case: LayerCase = call.case
    weights = in_float64(call.named("weights"))
    typed = whole_inputs(case, call, group)
    inputs = in_float64(typed)
    generator = torch.Generator().manual_seed(case.seed + 1 + group)
    shapes = [out.shape for out in dense(case, weights, inputs)]
    upstream = [torch.randn(shape, generator=generator) for shape in shapes]
    upstream = tuple(each.to(case.dtype) for each in upstream)
    exact = run_dense(case, weights, inputs, in_float64(upstream))
    noise = {name: value.square() for name, value in exact.items()}
    for _ in range(PERTURBED):
        moved = run_dense(
            case,
            {name: moved_at_random(weight, generator) for name, weight in weights.items()},
            tuple(moved_at_random(x, generator) for x in inputs),
            tuple(moved_at_random(each, generator) for each in in_float64(upstream)),
        )
        for name, value in exact.items():
            noise[name] = noise[name] + ((moved[name] - value) / PERTURBATION).square()
    variants: dict[str, Tensor] = {}
    if case.dtype not in (torch.float32, torch.float64):
        variants = run_dense(case, call.named("weights"), typed, upstream)
    noise = {name: total.sqrt() for name, total in noise.items()}
    return Dense(exact, variants, noise, case.dtype, upstream)


def run_dense(
    case: LayerCase,
    weights: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
) -> dict[str, Tensor]:
    """Outputs, and gradients of the input and of every (told apart) weight, by name."""
    named = named_weights(case, weights)
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in named.items()}
    x = inputs[0].detach().clone()
    x.requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        outputs = dense(separate(case), leaves, (x, *inputs[1:]))
        torch.autograd.backward(outputs, upstream)
    result = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    if x.grad is not None:
        result["input"] = x.grad
    return result | {name: leaf.grad for name, leaf in leaves.items()}


def separate(case: LayerCase) -> LayerCase:
    """The case with weights that are told apart already."""
    return replace(case, layout="separate")


def moved_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every element off by a random share of itself."""
    if not x.is_floating_point():
        return x
    return x * (1 + PERTURBATION * torch.randn(x.shape, generator=generator, dtype=x.dtype))
