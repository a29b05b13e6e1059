"""Deterministic metrics of base and head, compared exactly.

Launches, bytes, graph breaks, registers: numbers without noise, which catch a regression at no false
alarm, also where there is no GPU. A metric in which two processes of the base differ is not one, and
is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

Value = int | str
Counters = Mapping[str, Value]
Direction = Literal["worse", "better", "changed"]


@dataclass(frozen=True)
class Change:
    """One metric that differs."""

    metric: str
    base: Value | None
    head: Value | None

    @property
    def direction(self) -> Direction:
        """More is worse, of every number; of texts (the backend) none is better than another."""
        if isinstance(self.base, int) and isinstance(self.head, int):
            return "worse" if self.head > self.base else "better"
        return "changed"

    def __str__(self) -> str:
        """``launches: 12, the base has 8``."""
        return f"{self.metric}: {_shown(self.head)}, the base has {_shown(self.base)}"


def changes(base: Counters, head: Counters, control: Counters) -> list[Change]:
    """What differs between base and head, and not between two processes of the base."""
    names = [*base, *(name for name in head if name not in base)]
    return [
        Change(name, base.get(name), head.get(name))
        for name in names
        if base.get(name) == control.get(name) and base.get(name) != head.get(name)
    ]


def unsteady(base: Counters, control: Counters) -> list[str]:
    """Metrics that two processes of the base do not agree in."""
    return [name for name in {**base, **control} if base.get(name) != control.get(name)]


def failing(found: Sequence[Change], accepted: Sequence[str] = ()) -> list[Change]:
    """Changes for the worse, without those that the user accepts (globs on the metric's name)."""
    return [
        change
        for change in found
        if change.direction == "worse"
        and not any(fnmatchcase(change.metric, pattern) for pattern in accepted)
    ]


def _shown(value: Value | None) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else value
