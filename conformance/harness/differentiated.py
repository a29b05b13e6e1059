"""The oracle of a differentiable function: its outputs and every gradient, with what rounding may do.

The function is computed in float64; the noise of each value is what moving every input at random by a
small share of itself does to it, and one run in the dtype of the case is a floor for 16-bit dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.harness.calls import in_float64
from conformance.harness.tolerance import Expectation, expect

PERTURBATION = 1e-6
"""Relative; small enough to be linear, large enough for float64."""
PERTURBED = 3
"""How many times everything is perturbed at random."""

Function = Callable[..., tuple[Tensor, ...]]
"""Takes tensors by name and gives its outputs; differentiable with respect to the floating ones."""


@dataclass(frozen=True)
class Differentiated:
    """Values by name: ``output 0``, ``output 1`` …, and the gradient of each floating input."""

    values: dict[str, Tensor]
    """float64."""
    variants: dict[str, Tensor]
    """The same in a 16-bit dtype; empty in others, where the noise says it all."""
    noise: dict[str, Tensor]
    dtype: torch.dtype
    upstream: tuple[Tensor, ...]
    """The gradients that reach the outputs, in the dtype of the case."""

    def expectation(self, name: str) -> Expectation:
        """What a value must be, and within what limits."""
        variants = [self.variants[name]] if name in self.variants else []
        return expect(self.values[name], variants, self.noise[name], self.dtype)


def differentiate(
    function: Function, inputs: Mapping[str, Tensor], dtype: torch.dtype, seed: int
) -> Differentiated:
    """The oracle of ``function`` at ``inputs``, which are in ``dtype`` where they are floating."""
    generator = torch.Generator().manual_seed(seed)
    exact_inputs = in_float64(inputs)
    shapes = [out.shape for out in function(**exact_inputs)]
    upstream = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    exact_upstream = in_float64(upstream)
    exact = values_and_gradients(function, exact_inputs, exact_upstream)
    noise = {name: value.square() for name, value in exact.items()}
    for _ in range(PERTURBED):
        moved = values_and_gradients(
            function,
            {name: moved_at_random(x, generator) for name, x in exact_inputs.items()},
            tuple(moved_at_random(each, generator) for each in exact_upstream),
        )
        for name, value in exact.items():
            noise[name] = noise[name] + ((moved[name] - value) / PERTURBATION).square()
    variants: dict[str, Tensor] = {}
    if dtype not in (torch.float32, torch.float64):
        on_cpu = {name: x.cpu() for name, x in inputs.items()}
        variants = values_and_gradients(function, on_cpu, upstream)
    noise = {name: total.sqrt() for name, total in noise.items()}
    return Differentiated(exact, variants, noise, dtype, upstream)


def values_and_gradients(
    function: Function, inputs: Mapping[str, Tensor], upstream: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Outputs, and the gradient of every floating input for these gradients at the outputs.

    An input that nothing depends on has a gradient of zeros.
    """
    leaves = {name: x.detach().clone() for name, x in inputs.items()}
    wanted = {name: x.requires_grad_() for name, x in leaves.items() if x.is_floating_point()}
    with torch.enable_grad():
        outputs = function(**leaves)
        found = torch.autograd.grad(
            outputs,
            list(wanted.values()),
            tuple(each.to(out) for each, out in zip(upstream, outputs)),
            allow_unused=True,
        )
    named = {f"output {number}": out.detach() for number, out in enumerate(outputs)}
    for (name, leaf), gradient in zip(wanted.items(), found):
        named[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return named


def moved_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every element off by a random share of itself."""
    if not x.is_floating_point():
        return x
    return x * (1 + PERTURBATION * torch.randn(x.shape, generator=generator, dtype=x.dtype))
