"""What the oracle says of features and logits, and how far a correct implementation may be off.

The limit is measured on the case: the error of the reference in the dtype, and the change of the
output when every weight is off by a rounding step at random, which is what the conditioning of a
deep network makes of rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness.gpt_cases import GPTCall
from conformance.harness.memo import remembered
from conformance.harness.tolerance import Expectation, expect
from reference_impl.gpt.batched import GPTBatched, from_state

Masks = tuple[tuple[str, Any], ...]
"""Options of ``features`` by name, with tensors as nested tuples."""

PERTURBATION = 1e-6
"""Relative; small enough to be linear, large enough for float64."""


@functools.cache
def noise_pool() -> Tensor:
    """Normal random numbers, made once."""
    return torch.randn(1 << 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise(count: int) -> Tensor:
    """``count`` random numbers; tensors of different sizes begin at different places."""
    pool, start = noise_pool(), count % 1009
    repeats = -(-(start + count) // len(pool))
    return (pool if repeats == 1 else pool.repeat(repeats))[start : start + count]


@functools.lru_cache(maxsize=4)  # a case asks for several oracles of one checkpoint in turn
def model_of(call: GPTCall, dtype: torch.dtype, perturbed: bool) -> GPTBatched:
    """The reference model of the call's true state."""
    state = {}
    for key, tensor in call.named("state").items():
        exact = tensor.detach().to(torch.float64)
        if perturbed:
            exact = exact * (1 + PERTURBATION * noise(exact.numel()).view(exact.shape))
        state[key] = exact.to(dtype)
    return from_state(call.case.config(), state, compute_dtype=dtype)


def run_reference(
    call: GPTCall,
    ids: Tensor,
    masks: Mapping[str, Any],
    dtype: torch.dtype,
    perturbed: bool = False,
) -> dict[str, Tensor]:
    """Features and logits of the reference."""
    model = model_of(call, dtype, perturbed)
    with torch.no_grad():
        features = model.features(ids, **masks)
        return {"features": features, "logits": model.logits_of(features)}


@dataclass(frozen=True)
class Oracle:
    """The outputs of one call in float64, and what is needed to say how far off others may be."""

    value: dict[str, Tensor]
    variant: dict[str, Tensor] | None
    """The reference's outputs in a 16-bit dtype of the call; in float32 the noise says it all."""
    noise: dict[str, Tensor]
    dtype: torch.dtype

    def expectation(
        self, name: str, part: Callable[[Tensor], Tensor] = lambda output: output
    ) -> Expectation:
        """The expectation of ``features`` or ``logits``, or of a part of them."""
        variants = [] if self.variant is None else [part(self.variant[name])]
        return expect(part(self.value[name]), variants, part(self.noise[name]), self.dtype)


def oracle(call: GPTCall, ids: Tensor | None = None, **masks: Any) -> Oracle:
    """The oracle of a call's checkpoint on its ids, or on others."""
    ids = (call.named("ids") if ids is None else ids).cpu()
    kept = tuple((name, hashable(value)) for name, value in masks.items())
    return _oracle(call, hashable(ids), kept)


@remembered
def _oracle(call: GPTCall, ids: Any, masks: Masks) -> Oracle:
    given = {name: as_tensor(value) for name, value in masks}
    ids = torch.tensor(ids)
    value = run_reference(call, ids, given, torch.float64)
    rounded = call.dtype not in (torch.float32, torch.float64)
    variant = run_reference(call, ids, given, call.dtype) if rounded else None
    moved = run_reference(call, ids, given, torch.float64, perturbed=True)
    noise = {
        name: (moved[name] - exact).abs() / PERTURBATION + exact.abs()
        for name, exact in value.items()
    }
    return Oracle(value, variant, noise, call.dtype)


def hashable(value: Any) -> Any:
    """A tensor as nested tuples."""
    if isinstance(value, Tensor):
        return hashable(value.tolist())
    return tuple(hashable(each) for each in value) if isinstance(value, list) else value


def as_tensor(value: Any) -> Any:
    """Nested tuples as a tensor again."""
    return torch.tensor(value) if isinstance(value, tuple) else value
