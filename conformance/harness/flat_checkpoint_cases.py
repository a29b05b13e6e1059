"""Cases of checkpoints: a model as one process has it, and how many ranks save and load it.

A batch is twelve rows, of which each of one to four ranks has an equal part, its own: whatever the
number of ranks, a step is that of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.flat_cases import FROZEN, SGD, FlatCase
from conformance.harness.qwen2_cases import as_strategy

ROWS = 12
"""Rows of a batch: what one, two, three and four ranks divide."""
WORLDS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointCase(FlatCase):
    """A model as one process has it, and the numbers of ranks that save and load it."""

    ranks: int = 1
    micro_batches: int = 1
    batch: int = ROWS
    tokens: int = 3
    saved_on: int = 2
    loaded_on: int = 3

    def __repr__(self) -> str:
        """Who saves and loads, and whatever is not at its default."""
        named = ("saved_on", "loaded_on")
        shown = [f"{name}={getattr(self, name)}" for name in named]
        shown += [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in named and getattr(self, field.name) != field.default
        ]
        return f"CheckpointCase({', '.join(shown)})"

    def __hash__(self) -> int:
        """Of what is shown: an optimizer is a mapping."""
        return hash(repr(self))

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = super().confusable() - {"one rank"}
        return equal | ({"one rank"} if self.saved_on == self.loaded_on == 1 else set())


def checkpoint_cases(
    worlds: tuple[tuple[int, int], ...] | None = None, **fixed: Any
) -> SearchStrategy[CheckpointCase]:
    """Cases with an optimizer; a strategy or a value fixes a field.

    ``worlds`` are pairs of numbers of ranks that save and load; default: any.
    """
    return _checkpoint_cases(worlds or tuple(product(WORLDS, WORLDS)), fixed)


def small_cases(
    worlds: tuple[tuple[int, int], ...] = ((2, 3), (3, 2), (1, 2), (2, 1)), **fixed: Any
) -> SearchStrategy[CheckpointCase]:
    """The same for rules about files, which sizes and values matter little to: a few cases."""
    sizes = {name: getattr(CheckpointCase, name) for name in ("vocab", "width", "hidden")}
    small = sizes | {"tied": False, "frozen": (4,), "seed": 1}
    return checkpoint_cases(worlds, **(small | fixed))


@st.composite
def _checkpoint_cases(
    draw: st.DrawFn, worlds: tuple[tuple[int, int], ...], fixed: Mapping[str, Any]
) -> CheckpointCase:
    """Composed once: to define a strategy takes longer than to draw from it."""
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    given["saved_on"], given["loaded_on"] = draw(st.sampled_from(worlds))
    if given.get("tiny"):
        given["tied"] = False
    choices = {
        "vocab": st.integers(17, 29),
        "width": st.sampled_from([10, 7, 13]),
        "hidden": st.sampled_from([14, 9, 11]),
        "tied": st.booleans(),
        "frozen": FROZEN,
        "optimizer": st.just(SGD),
        "seed": st.integers(0, 2**16),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return CheckpointCase(**given, **drawn)
