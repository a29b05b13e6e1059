"""A tensor beside what the oracle expects of it: what a failure shows, and what diagnosis compares."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from conformance.harness.tolerance import ErrorStatistics, Expectation, measure

MOST_ENTRIES = 256
"""Indices of one axis that a profile has; longer axes are cut into as many groups."""

HEADS = ("batch rows", "heads", "tokens", "features")
TOKENS = ("rows", "tokens", "features")

_AXES = {
    ("attention", 4): HEADS,
    ("attention", 3): HEADS[:3],
    ("cached_attention", 4): HEADS,
    ("rotary", 4): HEADS,
    ("rotary_module", 4): HEADS,
    ("gpt_checkpoint", 3): TOKENS,
    ("causal_lm", 3): TOKENS,
    ("parallel_linear", 3): TOKENS,
    ("parallel_linear", 2): TOKENS[1:],
    ("moe_router", 2): ("tokens", "columns"),
    ("experts", 2): TOKENS[1:],
    ("moe_block", 3): TOKENS,
    ("expert_parallel_block", 3): TOKENS,
    ("shared_core", 2): TOKENS[1:],
    ("shared_core_block", 3): TOKENS,
    ("distillation_loss", 3): ("rows", "tokens", "vocabulary"),
}
"""Names of the axes of an output by contract and number of axes."""


def axes_of(contract: str, name: str, ndim: int) -> tuple[str, ...]:
    """What the axes of an output are called; of anything else they are numbered.

    A gradient at an input of attention has the axes of the input, which are those of the output.
    """
    is_weight = "weight" in name or "bias" in name
    known = None if is_weight else _AXES.get((contract, ndim))
    return known or tuple(f"indices of axis {axis}" for axis in range(ndim))


@dataclass(frozen=True)
class Compared:
    """An output that is not as expected."""

    name: str
    axes: tuple[str, ...]
    found: Tensor
    """float64, on the CPU."""
    expectation: Expectation

    @property
    def error(self) -> Tensor:
        """Absolute errors; infinite where NaN or infinity was found and a finite number expected.

        0 where the oracle is infinite.
        """
        expected = self.expectation.value
        error = (self.found - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        return torch.where(torch.isfinite(expected), error, 0)

    def profile(self, axis: int) -> list[float]:
        """The largest error at each index of an axis."""
        error = self.error
        others = tuple(a for a in range(error.ndim) if a != axis)
        largest = error.amax(others) if others else error
        if len(largest) > MOST_ENTRIES:
            largest = torch.stack([group.max() for group in largest.tensor_split(MOST_ENTRIES)])
        return largest.tolist()

    def as_data(self) -> dict[str, Any]:
        """Statistics with their limits and floors, and the profiles of all axes but the last."""
        statistics = measure(self.found, self.expectation.value)
        limits, floor = self.expectation.limits, self.expectation.floor
        names = (field.name.replace("_", " ") for field in fields(ErrorStatistics))
        return {
            "name": self.name,
            "statistics": [
                {"name": name, "value": value, "limit": limit, "floor": below}
                for name, value, limit, below in zip(
                    names, astuple(statistics), astuple(limits), astuple(floor)
                )
            ],
            "profiles": [
                {"axis": name, "errors": self.profile(axis)}
                for axis, name in enumerate(self.axes)
                if self.found.shape[axis] > 1 and (axis < len(self.axes) - 1 or axis == 0)
            ],
            "limit": limits.largest,
            "floor": floor.largest,
        }
