"""Cases of watchers: the checkpoints of a run, in the order in which they are written.

Steps have different numbers of digits, and fewer digits begin with a larger one: their order as text is
not that as numbers. They are not written in their order either. Each has its own weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conformance.harness.calls import shown_case
from conformance.harness.qwen2_cases import as_strategy

ORDINARY = ("single", "sharded")
COMPRESSED = ("compressed", "compressed_pt")
KINDS = (*ORDINARY, *COMPRESSED)


@dataclass(frozen=True, kw_only=True)
class WatcherCase:
    """The checkpoints of a run."""

    steps: tuple[int, ...] = (1000, 900)
    """In the order in which they are written."""
    kinds: tuple[str, ...] = ("single", "sharded")
    attempts: int = 3
    first: int = 5
    """What the weights of the first checkpoint are told by; the others follow."""
    which: int = 0
    """What a rule draws among its own choices."""

    def __repr__(self) -> str:
        """The steps, and whatever else is not at its default."""
        return shown_case(self, always=2)

    def confusable(self) -> frozenset[str]:
        """Coincidences under which some wrong implementations give the right answer."""
        equal = set()
        if len(self.steps) < 2:
            equal.add("one checkpoint")
        if sorted(self.steps) == sorted(self.steps, key=str):
            equal.add("lexical order")
        if sorted(self.steps) == list(self.steps):
            equal.add("written in order")
        return frozenset(equal)

    @property
    def names(self) -> list[str]:
        """The names of the folders, in the order of the steps."""
        return [name_of(step) for step in sorted(self.steps)]

    @property
    def chosen(self) -> str:
        """The checkpoint that a rule about one of them is about."""
        return self.names[self.which % len(self.names)]

    @property
    def others(self) -> list[str]:
        """All but that, in the order of the steps."""
        return [name for name in self.names if name != self.chosen]

    def kind(self, name: str) -> str:
        """In which layout a checkpoint is written."""
        return self.kinds[[name_of(step) for step in self.steps].index(name)]

    def code(self, name: str) -> int:
        """What the weights of a checkpoint are told by: 1 to 999."""
        return self.first + 11 * [name_of(step) for step in self.steps].index(name)


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"checkpoint-{step}"


# Strategies

STEPS = st.one_of(
    st.tuples(st.integers(1, 8), st.integers(0, 1)).map(
        lambda drawn: ((drawn[0] + 1) * 10 ** drawn[1], drawn[0] * 10 ** (drawn[1] + 1))
    ),
    st.sampled_from([(900, 1000), (2, 10), (99, 100), (500, 1500)]),
)
"""Two steps: the smaller one has fewer digits and is the later one as text."""
THREE_STEPS = st.tuples(st.integers(1, 7), st.integers(0, 99), st.integers(0, 999)).map(
    lambda d: (d[0] + 2, (d[0] + 1) * 10 + d[1] % 10, d[0] * 100 + d[2] % 100)
)
"""Three with one, two and three digits, in the opposite order as text."""


def watcher_cases(
    steps: SearchStrategy[tuple[int, ...]] = STEPS,
    kinds: tuple[str, ...] = KINDS,
    **fixed: Any,
) -> SearchStrategy[WatcherCase]:
    """Cases with such steps, in layouts among ``kinds``; a strategy or a value fixes a field."""
    return _watcher_cases(steps, st.sampled_from(kinds), fixed)


@st.composite
def _watcher_cases(
    draw: st.DrawFn,
    steps: SearchStrategy[tuple[int, ...]],
    kinds: SearchStrategy[str],
    fixed: dict[str, Any],
) -> WatcherCase:
    given = {name: draw(as_strategy(value)) for name, value in fixed.items()}
    ordered = sorted(draw(steps))
    turn = draw(st.integers(1, len(ordered) - 1))
    given["steps"] = (*ordered[turn:], *ordered[:turn])
    given["kinds"] = tuple(draw(kinds) for _ in ordered)
    choices = {
        "attempts": st.integers(1, 4),
        "first": st.integers(1, 700),
        "which": st.integers(0, 999),
    }
    drawn = {name: draw(choice) for name, choice in choices.items() if name not in given}
    return WatcherCase(**given, **drawn)
