"""What the oracle says of features and logits, and how far a correct implementation may be off.

The limit is measured on the case: the error of the reference in the dtype, and the change of the
output when every weight is off by a rounding step at random, which is what the conditioning of a
deep network makes of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
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
PERTURBED = 2


def model_of(call: GPTCall, dtype: torch.dtype, *, perturbed: int = 0) -> GPTBatched:
    """The reference model of the call's true state."""
    state = {}
    generator = torch.Generator().manual_seed(perturbed)
    for key, tensor in call.named("state").items():
        exact = tensor.detach().to(torch.float64)
        if perturbed:
            noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
            exact = exact * (1 + PERTURBATION * noise)
        state[key] = exact.to(dtype)
    return from_state(call.case.config(), state, compute_dtype=dtype)


def run_reference(
    call: GPTCall, ids: Tensor, masks: Mapping[str, Any], dtype: torch.dtype, perturbed: int = 0
) -> dict[str, Tensor]:
    """Features and logits of the reference."""
    model = model_of(call, dtype, perturbed=perturbed)
    with torch.no_grad():
        features = model.features(ids, **masks)
        return {"features": features, "logits": model.logits(ids, **masks)}


def expected(
    call: GPTCall, ids: Tensor | None = None, rows: Tensor | None = None, **masks: Any
) -> dict[str, Expectation]:
    """Expectations of ``features`` and ``logits``; where ``rows`` bool [batch, tokens] is False, 0."""
    ids = (call.named("ids") if ids is None else ids).cpu()
    kept = tuple((name, hashable(value)) for name, value in masks.items())
    return _expected(call, hashable(ids), kept, None if rows is None else hashable(rows))


@remembered
def _expected(call: GPTCall, ids: Any, masks: Masks, rows: Any) -> dict[str, Expectation]:
    given = {name: as_tensor(value) for name, value in masks}
    ids = torch.tensor(ids)
    value = run_reference(call, ids, given, torch.float64)
    variants = [run_reference(call, ids, given, call.dtype)]
    moved = [
        run_reference(call, ids, given, torch.float64, perturbed=seed)
        for seed in range(1, PERTURBED + 1)
    ]
    kept = torch.ones(ids.shape, dtype=torch.bool) if rows is None else torch.tensor(rows)
    only = lambda output: torch.where(kept[..., None], output, 0)
    expectations = {}
    for name in value:
        squares = [((each[name] - value[name]) / PERTURBATION).square() for each in moved]
        noise = torch.stack(squares).mean(0).sqrt() + value[name].abs()
        expectations[name] = expect(
            only(value[name]), [only(each[name]) for each in variants], only(noise), call.dtype
        )
    return expectations


def hashable(value: Any) -> Any:
    """A tensor as nested tuples."""
    if isinstance(value, Tensor):
        return hashable(value.tolist())
    return tuple(hashable(each) for each in value) if isinstance(value, list) else value


def as_tensor(value: Any) -> Any:
    """Nested tuples as a tensor again."""
    return torch.tensor(value) if isinstance(value, tuple) else value
