"""The numerics ledger: how accurate an implementation was, to hold its next revision against.

Every comparison with the oracle leaves its four error statistics as shares of the case's own floor
(:mod:`conformance.harness.tolerance`). A run's shares are a :class:`Recording`, and two recordings
make a :class:`Comparison`. docs/numerics.md says how the rule was measured. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.harness.calls import Call
    from conformance.harness.tolerance import ErrorStatistics

FORMAT = "model-conformance numerics"
VERSION = 1

STATISTICS = ("largest", "root mean square", "worst row", "gain")
"""In the order of :class:`conformance.harness.tolerance.ErrorStatistics`."""

FACTOR = 1.5
"""Times its base that an error is worse from, unless the user gives another factor."""

NEGLIGIBLE = {"precision": 0.1, "semantic": 0.2}
"""Share of a floor below which an error counts as this share, in base and head alike, by lane.

A factor between two errors that are both far below the floor says nothing, and one over an error of
zero is infinite. One rounding of an output to its 16-bit dtype is a share of about 0.2; three
roundings are 0.2 in float32, whose floor has sixteen, and other orders of summing make as much.
"""

LARGEST_SHARE = 1e6
"""An error where the floor is zero is this share, for JSON has no infinity."""

Shares = tuple[float, ...]
"""The four statistics of one comparison, each as a share of its floor."""

Entry = Mapping[str, Mapping[str, list[Shares]]]
"""The comparisons of a requirement: ``lane dtype output`` to case to one item a repetition."""

REFUSED = {"suite_version": "version of the suite", "device": "device"}
"""What a base and its head must have in common, and what it is called."""

NAMED = {
    "implementation": "implementation",
    "profile": "profile",
    "seed": "seed",
    "torch": "torch",
    "hypothesis": "hypothesis",
    "cpu": "CPU",
}
"""What may differ between a base and its head, but is said."""


class NumericsError(ValueError):
    """A base that cannot be used, or a file that cannot be written; one line says why."""


# One comparison


@dataclass(frozen=True, slots=True)
class Measured:
    """The errors of one output of one call."""

    output: str
    """Lane, dtype and name of the output."""
    case: str
    """Digest of the case and of the source of the call, 8 hexadecimal digits."""
    shares: Shares


def measured(
    call: Call, name: str, lane: str, errors: ErrorStatistics, floor: ErrorStatistics
) -> Measured:
    """What the ledger keeps of one comparison."""
    text = "\n".join((repr(call.case), *call.lines, call.source()))
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    dtype = str(call.dtype).removeprefix("torch.")
    shares = tuple(share(error, most) for error, most in zip(astuple(errors), astuple(floor)))
    return Measured(f"{lane} {dtype} {name}", digest, shares)


def share(error: float, floor: float) -> float:
    """``error`` over ``floor``, dimensionless, to four significant digits; of two zeros 0."""
    if error == 0:
        return 0.0
    return float(f"{min(error / floor, LARGEST_SHARE) if floor > 0 else LARGEST_SHARE:.4g}")


def entry_of(errors: Iterable[Measured]) -> dict[str, dict[str, list[Shares]]]:
    """The comparisons of one requirement as plain, sorted JSON values, which can travel."""
    entry: dict[str, dict[str, list[Shares]]] = defaultdict(lambda: defaultdict(list))
    for one in errors:
        entry[one.output][one.case].append(one.shares)
    return {output: dict(sorted(cases.items())) for output, cases in sorted(entry.items())}


# A run


@dataclass(frozen=True)
class Recording:
    """How accurate a run was."""

    made_by: Mapping[str, Any]
    """What :func:`made_by` says of the run."""
    entries: Mapping[str, Entry]
    """By the id of a requirement, of those that passed and compare anything."""

    @property
    def comparisons(self) -> int:
        """How many there are."""
        return sum(
            len(repetitions)
            for entry in self.entries.values()
            for cases in entry.values()
            for repetitions in cases.values()
        )

    def text(self) -> str:
        """The file's text: JSON, sorted, a line for every output of a requirement."""
        head = {"format": FORMAT, "version": VERSION, **self.made_by, "statistics": STATISTICS}
        lines = [f"{_json(key)}: {_json(value)}," for key, value in head.items()]
        requirements = [
            f"{_json(id)}: {{\n"
            + ",\n".join(f"{_json(output)}: {_json(cases)}" for output, cases in entry.items())
            + "\n}"
            for id, entry in sorted(self.entries.items())
        ]
        body = ",\n".join(requirements)
        return "\n".join(["{", *lines, '"requirements": {', body, "}", "}", ""])


def made_by(header: Mapping[str, Any], cpu: str) -> dict[str, Any]:
    """What a recording says of the run that made it, from the header of the run's report.

    ``cpu`` names the processor's family and its widest vector instructions: torch has other kernels
    for each.
    """
    implementation, environment = header["implementation"], header["environment"]
    version = f" {implementation['version']}" if implementation["version"] else ""
    return {
        "suite_version": header["suite_version"],
        "implementation": f"{implementation['name']}{version}",
        "profile": "smoke" if header["smoke"] else header["profile"],
        "seed": header["seed"],
        "device": environment["device"],
        "torch": environment["torch"],
        "hypothesis": environment["hypothesis"],
        "cpu": cpu,
    }


def parse(text: str, path: object) -> Recording:
    """The recording in a file's text; NumericsError in one line for what is none, or cut off."""
    wrong = lambda why: NumericsError(f"--numerics-check: {path} {why}")
    again = "record it again with --numerics-record"
    try:
        value = json.loads(text)
    except ValueError:
        ours = text.lstrip("{\n ").startswith(f'"format": "{FORMAT}"')
        found = "is cut off or damaged" if ours else "is not a file of --numerics-record (no JSON)"
        raise wrong(f"{found}; {again}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise wrong(f"is not a file of --numerics-record (its format is not {FORMAT!r})")
    if value.get("version") != VERSION:
        found = value.get("version")
        raise wrong(f"has format version {found!r}, expected {VERSION}; {again}")
    missing = [name for name in (*REFUSED, *NAMED, "requirements") if name not in value]
    if missing:
        raise wrong(f"is damaged: it has no {', '.join(missing)}; {again}")
    if not _well_formed(value["requirements"]):
        raise wrong(f"is damaged: a comparison is not {len(STATISTICS)} numbers from 0; {again}")
    made_by = {name: said for name, said in value.items() if name in (*REFUSED, *NAMED)}
    return Recording(made_by, value["requirements"])


def _well_formed(requirements: Any) -> bool:
    """Whether every comparison, by requirement, output and case, is four numbers from 0."""
    if not isinstance(requirements, dict):
        return False
    outputs = list(requirements.values())
    if not all(isinstance(entry, dict) for entry in outputs):
        return False
    cases = [cases for entry in outputs for cases in entry.values()]
    if not all(isinstance(each, dict) for each in cases):
        return False
    repetitions = [many for each in cases for many in each.values()]
    if not all(isinstance(many, list) for many in repetitions):
        return False
    return all(
        isinstance(shares, list)
        and len(shares) == len(STATISTICS)
        and all(type(s) in (int, float) and 0 <= s <= LARGEST_SHARE for s in shares)
        for many in repetitions
        for shares in many
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


# Two runs


@dataclass(frozen=True)
class Row:
    """One statistic of one requirement in one lane, over the cases that both runs have."""

    id: str
    lane: str
    statistic: str
    base: float
    """Root mean square of the shares, as of ``head``."""
    head: float
    cases: int
    """How many comparisons it is over."""

    @property
    def factor(self) -> float:
        """How many times as large the error is; 1 where both are negligible."""
        least = NEGLIGIBLE[self.lane]
        return max(self.head, least) / max(self.base, least)


@dataclass(frozen=True)
class Comparison:
    """A head against its base."""

    limit: float
    rows: tuple[Row, ...]
    """Worst first."""
    common: int
    """Comparisons that both have."""
    only_base: int
    """Comparisons of requirements of this run that the base alone has."""
    only_head: int
    differences: tuple[str, ...] = field(default=())
    """What was not alike, in words."""

    @property
    def worse(self) -> tuple[Row, ...]:
        """The rows over the limit."""
        return tuple(row for row in self.rows if row.factor > self.limit)

    @property
    def requirements(self) -> int:
        """How many requirements have comparisons in common."""
        return len({row.id for row in self.rows})


def must_match(base: Recording, made_by: Mapping[str, Any], path: object) -> None:
    """NumericsError unless errors of the base can be held against those of a run at all."""
    for name, what in REFUSED.items():
        if base.made_by[name] != made_by[name]:
            raise NumericsError(
                f"--numerics-check: {path} was recorded with {what} {_said(base.made_by[name])}, "
                f"this run has {_said(made_by[name])}; record a base for it with --numerics-record"
            )


def compare(
    base: Recording, head: Recording, planned: Iterable[str], limit: float = FACTOR
) -> Comparison:
    """Hold ``head`` against ``base`` on the comparisons that both have.

    ``planned`` are the ids of the requirements that the head ran; others of the base do not count.
    Comparisons are the same where requirement, output, dtype, case, source of the call, and number
    of the repetition are. A statistic of a requirement in a lane is the root mean square of its
    shares over them: a loss in a few cases counts, and the luck of one small case does not rule.
    """
    common = only_base = only_head = 0
    pairs: dict[tuple[str, str], list[tuple[Shares, Shares]]] = defaultdict(list)
    for id in planned:
        before, after = _flat(base.entries.get(id, {})), _flat(head.entries.get(id, {}))
        both = before.keys() & after.keys()
        common += len(both)
        only_base += len(before) - len(both)
        only_head += len(after) - len(both)
        for key in sorted(both):
            pairs[id, key[0].split(" ", 1)[0]].append((before[key], after[key]))
    rows = [row for (id, lane), found in pairs.items() for row in _rows(id, lane, found)]
    rows.sort(key=lambda row: (-row.factor, -row.head, row.id, row.lane, row.statistic))
    differences = tuple(
        f"{what} {_said(base.made_by[name])} in the base, {_said(head.made_by[name])} here"
        for name, what in NAMED.items()
        if base.made_by[name] != head.made_by[name]
    )
    return Comparison(limit, tuple(rows), common, only_base, only_head, differences)


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _flat(entry: Entry) -> dict[tuple[str, str, int], Shares]:
    return {
        (output, case, number): shares
        for output, cases in entry.items()
        for case, repetitions in cases.items()
        for number, shares in enumerate(repetitions)
    }


def _rows(id: str, lane: str, pairs: list[tuple[Shares, Shares]]) -> list[Row]:
    before, after = zip(*pairs)
    columns = zip(STATISTICS, zip(*before), zip(*after))
    return [Row(id, lane, name, _mean(b), _mean(a), len(pairs)) for name, b, a in columns]


def _mean(shares: Iterable[float]) -> float:
    """Root mean square."""
    shares = list(shares)
    return math.sqrt(math.fsum(s * s for s in shares) / len(shares))
