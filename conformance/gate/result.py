"""What a gate run found: a row for every benchmark, one verdict over all, and an exit code. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.gate.metrics import Change

OK, REGRESSED, USAGE, NOT_SHOWN = 0, 1, 4, 6
"""Exit codes; those of the suite (README.md). NOT_SHOWN: nothing, or too little, could be told."""

FORMAT = 1
"""Of ``gate.json``."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its one-sided bounds: logarithms of a ratio of times, above 0 is slower."""

    estimate: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Row:
    """What is said of one benchmark."""

    benchmark: str
    verdict: str
    """REGRESSED, OK, INCONCLUSIVE, IMPROVED or VOID."""
    reason: str
    """One sentence."""
    head: Interval | None = None
    control: Interval | None = None
    """A second copy of the base against the base."""
    pairs: int = 0
    """Process pairs of all stages."""
    base_seconds: float | None = None
    """Median of a launch."""
    changes: tuple[Change, ...] = ()
    """Of deterministic metrics."""
    details: dict[str, Any] = field(default_factory=dict)
    """All numbers of the judgement, and what is told beside them."""


@dataclass(frozen=True)
class GateResult:
    """A whole run."""

    base: str
    head: str
    device: str
    rows: tuple[Row, ...]
    void: str | None = None
    """Why the controls make the whole session void, if they do."""
    strict: bool = False
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """The rule, where both sides are from, the machine."""

    def count(self, verdict: str) -> int:
        """How many benchmarks have a verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def verdict(self) -> str:
        """The verdict over all benchmarks."""
        return self._judged[0]

    @property
    def why(self) -> str:
        """It in words, with counts."""
        return self._judged[1]

    @property
    def exit_code(self) -> int:
        """0 where nothing regressed, 1 where something did, 6 where nothing could be told.

        INCONCLUSIVE benchmarks count among the latter where the user is strict.
        """
        return self._judged[2]

    @property
    def _judged(self) -> tuple[str, str, int]:
        counts = self._counts()
        if self.count("REGRESSED"):
            return "REGRESSED", counts, REGRESSED
        if self.void:
            return "VOID", f"{self.void}; {counts}", NOT_SHOWN
        if self.count("VOID"):
            return "VOID", counts, NOT_SHOWN
        told = self.count("OK") + self.count("IMPROVED")
        if not told:
            return "INCONCLUSIVE", counts, NOT_SHOWN
        if self.count("INCONCLUSIVE"):
            return "INCONCLUSIVE", counts, NOT_SHOWN if self.strict else OK
        return "OK", counts, OK

    def _counts(self) -> str:
        if not self.rows:
            return "no benchmark was compared"
        words = ("REGRESSED", "VOID", "INCONCLUSIVE", "IMPROVED", "OK")
        parts = [f"{self.count(word)} {word}" for word in words if self.count(word)]
        return f"{', '.join(parts)} of {len(self.rows)} benchmarks"

    def as_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "why": self.why,
            "exit_code": self.exit_code,
            "base": self.base,
            "head": self.head,
            "device": self.device,
            "void": self.void,
            "strict": self.strict,
            "notes": list(self.notes),
            **self.details,
            "benchmarks": [_row_json(row) for row in self.rows],
        }


def _row_json(row: Row) -> dict[str, Any]:
    changes: Sequence[Change] = row.changes
    return finite(
        {
            **asdict(row),
            "changes": [{**asdict(change), "direction": change.direction} for change in changes],
        }
    )


def finite(value: Any) -> Any:
    """The same in plain JSON, where there is no infinity: None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
