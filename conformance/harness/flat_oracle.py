"""What one process computes with the whole model on the batches of all ranks, in float64.

No part of the reference is used here: the modules are torch's, and so are the optimizers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.flat_cases import FlatCase
from conformance.harness.memo import remembered
from conformance.harness.tolerance import STEP_ERROR, Expectation, expect

PERTURBATION = 1e-6
"""Relative; small enough to be linear, large enough for float64."""
PERTURBED = 3
"""How many times everything is perturbed at random."""
SMALLEST = 1e-4
"""Share of a gradient's root mean square below which rounding in float32 changes how AdamW uses it."""
MAX_NORM = 0.1
"""To which gradients are clipped: less than any that the cases have."""


@dataclass(frozen=True)
class Whole:
    """What the whole model is and does; everything is by name.

    ``outputs {rank} {batch}``, of every batch that the steps take in turn; those of the first step
    belong to the initial parameters. ``gradient {name} {step}`` are means over the ranks, before
    clipping. ``parameter {name} {steps}`` follow that many steps, and ``change {name}`` is what all
    steps did; only of a case with an optimizer. ``norm {step}``, [1], and ``clipped {name} {step}``
    are the norm of a step's gradients before clipping and the gradients after it; only with clipping.
    """

    values: dict[str, Tensor]
    noise: dict[str, Tensor]
    variants: dict[str, Tensor]
    """The same in a 16-bit compute dtype of the case; empty in float32."""
    dtype: torch.dtype

    def expectation(self, name: str) -> Expectation:
        """The expectation of a value.

        Where all elements are one number, as in the gradient of a sum, their errors are one error too:
        they do not average out as limits suppose.
        """
        value = self.values[name]
        variants = [self.variants[name]] if name in self.variants else []
        made = expect(value, variants, self.noise[name], self.dtype)
        one_number = bool((value == value.flatten()[0]).all())
        return made.widened(value.numel() ** 0.5) if one_number else made


@remembered
def whole(call: Call, clipped: bool = False) -> Whole:
    """The oracle of a call: outputs and gradients of each step, and parameters after it.

    With ``clipped`` every step clips gradients to ``MAX_NORM`` first.
    """
    generator = torch.Generator().manual_seed(call.case.seed + 1)
    model = copy.deepcopy(nn.Sequential(*call.named("modules"))).to(torch.float64)
    exact = run(call, model, torch.float64, clipped)
    noise = {name: value.square() for name, value in exact.items()}
    for _ in range(PERTURBED):
        moved = run(call, model, torch.float64, clipped, generator)
        for name, value in exact.items():
            noise[name] = noise[name] + ((moved[name] - value) / PERTURBATION).square()
    variants = {}
    if call.dtype not in (torch.float32, torch.float64):
        variants = run(call, model.to(torch.float32), call.dtype, clipped)
    noise = {name: total.sqrt() for name, total in noise.items()}
    for name, more in signs_unknown(call.case, exact).items():
        noise[name] = noise[name] + more
    return Whole(exact, noise, variants, call.dtype)


def signs_unknown(case: FlatCase, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Further noise of parameters: AdamW divides a gradient by its size, however small that is.

    Where it is so small that rounding decides its sign, nothing is known of the update but its size.
    An exact zero is zero for everybody.
    """
    if not case.optimizer or case.optimizer["name"] != "adamw":
        return {}
    whole_step = case.optimizer["lr"] / STEP_ERROR[torch.float32]
    more = {}
    for name in case.trained_names():
        total = torch.zeros_like(exact[f"change {name}"])
        for step in range(case.steps):
            size = exact[f"gradient {name} {step}"].abs()
            tiny = (size > 0) & (size < SMALLEST * size.square().mean().sqrt())
            total = total + whole_step * tiny
            more[f"parameter {name} {step + 1}"] = total
        more[f"change {name}"] = total
    return more


def run(
    call: Call,
    model: nn.Module,
    dtype: torch.dtype,
    clipped: bool,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One process on the batches of all ranks; with a generator, all of it a little perturbed.

    ``model`` has the modules of the call, its parameters are given the initial values. In a 16-bit
    ``dtype`` the model computes in that, and gradients and parameters are float32.
    """
    case: FlatCase = call.case
    wide = torch.promote_types(dtype, torch.float32)
    parameters = dict(model.named_parameters())
    for name, value in call.named("parameters").items():
        parameters[name].data = moved(value.detach(), generator).to(wide, copy=True)
    optimizer = optimizer_of(case.optimizer, model) if case.optimizer else None
    inputs = [[moved(x, generator) for x in batches] for batches in call.named("inputs")]
    upstream = [[moved(u, generator) for u in batches] for batches in call.named("upstream")]
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    places = [(rank, number) for rank in range(case.ranks) for number in range(case.micro_batches)]
    apart = case.sometimes or dtype != wide
    found: dict[str, Tensor] = {}
    for step in range(case.steps if optimizer else 1):
        totals = {n: torch.zeros_like(p) for n, p in parameters.items() if p.requires_grad}
        now = [(rank, step * case.micro_batches + number) for rank, number in places]
        for part in [[place] for place in now] if apart else [now]:
            x = torch.cat([inputs[rank][number] for rank, number in part])
            u = torch.cat([upstream[rank][number] for rank, number in part])
            out, gradients = pass_through(model, dtype, x, u)
            for (rank, number), each in zip(part, out.split(case.batch)):
                found[f"outputs {rank} {number}"] = each
            for name, gradient in gradients.items():
                totals[name] += gradient / case.ranks
        found |= {f"gradient {name} {step}": total.clone() for name, total in totals.items()}
        for name, total in totals.items():
            parameters[name].grad = total
        if clipped:
            trained = [parameters[name] for name in totals]
            found[f"norm {step}"] = nn.utils.clip_grad_norm_(trained, MAX_NORM)[None]
            found |= {f"clipped {name} {step}": total for name, total in totals.items()}
        if optimizer:
            optimizer.step()
            for name, parameter in parameters.items():
                found[f"parameter {name} {step + 1}"] = parameter.detach().clone()
    if optimizer:
        found |= {f"change {n}": p.detach() - initial[n] for n, p in parameters.items()}
    return found


def pass_through(
    model: nn.Module, dtype: torch.dtype, x: Tensor, upstream: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for ``x`` in ``dtype``, and the gradients of the sum of output times upstream."""
    wide = torch.promote_types(dtype, torch.float32)
    computing = model if dtype == wide else copy.deepcopy(model).to(dtype)
    computing.zero_grad()
    with torch.enable_grad():
        out = computing(x.to(dtype) if x.is_floating_point() else x)
        (out.to(wide) * upstream.to(wide)).sum().backward()
    named = computing.named_parameters()
    return out.detach(), {name: p.grad.to(wide) for name, p in named if p.grad is not None}


def optimizer_of(options: Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer, in which parameters of one axis do not decay."""
    options = dict(options)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[options.pop("name")]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return kind(groups, **options)


def moved(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """In float64, every element off by a random share of itself; as it is without a generator."""
    if generator is None or not x.is_floating_point():
        return x
    x = x.to(torch.float64)
    return x * (1 + PERTURBATION * torch.randn(x.shape, generator=generator, dtype=x.dtype))
