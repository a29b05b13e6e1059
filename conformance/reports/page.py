"""``report.html``: one run on one page that stands alone. It loads nothing, and runs no script.

What an implementation says is hostile until it is escaped: the templates escape every text, and the
page forbids itself whatever is not written in it.
"""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conformance.harness.records import (
    DECLINED,
    ERROR,
    FAIL,
    INCONCLUSIVE,
    KNOWN_FAILURE,
    LEDGER_MISMATCH,
    NOT_OFFERED,
    NOT_RUN,
    OUTCOMES,
    PASS,
)
from conformance.harness.verdict import WORDS
from conformance.reports import plots
from conformance.reports.diagnoses import (
    AMBIGUOUS,
    Group,
    explanations,
    group_failures,
    observations,
)
from conformance.reports.outcomes import (
    ONE,
    ContractCounts,
    by_contract,
    deselected,
    failed,
    known_failures,
    never_reported,
    not_checked,
    partly_declined,
    passed_with_errors,
)
from conformance.reports.reader import Report

if TYPE_CHECKING:
    from jinja2 import Environment

SYMBOLS = {
    PASS: "✓",
    FAIL: "✗",
    ERROR: "!",
    LEDGER_MISMATCH: "≠",
    KNOWN_FAILURE: "⚑",
    NOT_OFFERED: "–",
    DECLINED: "⊘",
    INCONCLUSIVE: "?",
    NOT_RUN: "○",
    "deselected": "·",
    "missing": "…",
}
"""Beside every colour, for readers who do not tell colours apart."""

VERDICTS = {
    "pass": ("✓", "every core requirement of the suite ran and passed"),
    "partial": ("◐", "nothing failed, but not every core requirement was checked"),
    "fail": ("✗", "something is wrong, or something required did not run"),
    "inconclusive": ("?", "too little ran to tell right from wrong"),
}
"""Symbol and meaning of each verdict."""

LANES = ("exact", "semantic", "precision")

ENDS = (*OUTCOMES, "deselected", "missing")

SHOWN_WHOLE = 120
"""Failures that are shown with everything known of them; further ones have a line each."""

EACH_GROUP = 3
"""Failures of each group that are shown whole in any case."""

MOST_TEXT_LINES = 60
"""Lines of details, or that reproduce a failure."""

NEAREST = 3
"""Requirements of a contract that are named as the nearest to their limits."""


def page(report: Report) -> str:
    """The page of a run, as HTML."""
    red = failed(report.records)
    contracts = by_contract(report)
    return render(
        "run.html.j2",
        report=report,
        header=report.header,
        verdict=report.verdict,
        sentences=sentences(report),
        bars=[(level, level_bar(report, level)) for level in ("core", "extended")],
        used_ends=used_ends([report.verdict.counts]),
        contracts=contracts,
        contract_ends=contract_ends,
        requirements=requirements(report),
        failures=red,
        groups=[group_view(group, group_count) for group, group_count in whole(red)],
        known=[(record, explanations(record)) for record in known_failures(report.records)],
        nearest=nearest(report),
        exact_only=sum(
            record["outcome"] == PASS and not record["closest"] for record in report.records
        ),
        unchecked=unchecked(report),
        partly=sorted(partly_declined(report.records).items(), key=lambda pair: -pair[1]),
        environment=environment_rows(report),
        variables=report.header["environment"]["variables"],
        command=command_line(report.header),
        selected=len(report.header["planned"]) if deselected(report) else None,
        seconds=sum(record["duration"] for record in report.records),
        command_for=lambda slug: command_line(report.header, slug),
        bar_of=contract_bar,
    )


def render(template: str, **values: Any) -> str:
    """A template of this package with these values."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def printable(value: object) -> object:
        """Characters that HTML does not have are shown as what they are: nothing to read."""
        if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
            return value
        return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in value)

    made = Environment(
        loader=PackageLoader("conformance.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(WORDS=WORDS, ONE=ONE, SYMBOLS=SYMBOLS, VERDICTS=VERDICTS, LANES=LANES)
    made.filters.update(number=number, thousands=thousands, web_address=web_address)
    made.filters["duration"] = duration
    return made


def thousands(count: int) -> str:
    """``1,299``."""
    return f"{count:,}"


def number(value: float | None) -> str:
    """A measured number in three digits; the word for what is not one."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "not finite"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e6 else f"{rounded:.3g}"


def duration(seconds: float) -> str:
    """``4.2 s`` or ``3 min 20 s``."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def web_address(text: str) -> bool:
    """Whether a text is an address that can be followed without running anything."""
    return text.startswith("https://") and text.isprintable() and " " not in text


def sentences(report: Report) -> list[str]:
    """The counts of a run with their denominators, in words."""
    counts, said = report.verdict.counts, []
    for level, ends in counts["levels"].items():
        rest = [
            f"{thousands(ends[end])} {(ONE if ends[end] == 1 else WORDS)[end]}"
            for end in ENDS[1:]
            if ends.get(end)
        ]
        passed = f"{thousands(ends.get(PASS, 0))} of {thousands(ends['suite'])}"
        said.append(f"{passed} {level} requirements passed" + "".join(f"; {each}" for each in rest))
    cases, lanes = counts["cases"], counts["comparisons"]
    compared = enumerated(f"{thousands(lanes[lane])} {lane}" for lane in LANES if lanes.get(lane))
    said.append(
        f"{thousands(cases['executed'])} of {thousands(cases['drawn'])} drawn cases executed"
        f", with {compared or 'no'} comparisons"
    )
    return [f"{each}." for each in said]


def enumerated(parts: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    parts = list(parts)
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def used_ends(counts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ways of ending that occur, in their order."""
    found = [level for each in counts for level in each["levels"].values()]
    return [end for end in ENDS if any(level.get(end) for level in found)]


def contract_ends(contracts: Sequence[ContractCounts]) -> list[str]:
    """The columns of the table of contracts beside what passed: what failed, and what occurs."""
    found = used_ends(each.counts for each in contracts)
    return [end for end in ENDS[1:] if end == FAIL or end in found]


def level_bar(report: Report, level: str) -> tuple[Any, int, int]:
    """A bar of how the requirements of a level ended, how many passed, and of how many."""
    ends = report.verdict.counts["levels"][level]
    bar = plots.stacked_bar([(end, ends.get(end, 0)) for end in ENDS])
    return bar, ends.get(PASS, 0), ends["suite"]


def contract_bar(each: ContractCounts) -> Any:
    """A bar of how the requirements of a contract ended."""
    return plots.stacked_bar([(end, each.both(end)) for end in ENDS])


def requirements(report: Report) -> dict[str, list[Mapping[str, Any]]]:
    """By contract the records of its requirements, in the order of the plan."""
    order = {id: position for position, id in enumerate(report.header["planned"])}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(report.records, key=lambda record: order[record["id"]]):
        found.setdefault(record["slug"].partition(".")[0], []).append(record)
    return found


def whole(red: list[Mapping[str, Any]]) -> list[tuple[Group, int]]:
    """The groups of failures, and how many of each are shown with everything known of them."""
    left, found = SHOWN_WHOLE, []
    for group in group_failures(red):
        shown = min(len(group.records), max(EACH_GROUP, left))
        left -= shown
        found.append((group, shown))
    return found


def group_view(group: Group, shown: int) -> dict[str, Any]:
    """What the page shows of a group of failures."""
    return {
        "kind": group.kind,
        "title": group.title,
        "ambiguous": group.kind == AMBIGUOUS,
        "explanations": group.explanations,
        "failures": [failure_view(record) for record in group.records[:shown]],
        "brief": group.records[shown:],
        "count": len(group.records),
    }


def failure_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one failure."""
    failure = record["failure"] or {}
    reproduction = failure.get("reproduction") or []
    return {
        "record": record,
        "facts": [
            (name, text)
            for name, text in (
                ("rule", failure.get("rule")),
                ("source", failure.get("source")),
                ("found", failure.get("summary") or record["reason"]),
                ("case", failure.get("case")),
                ("lane", failure.get("lane")),
                ("device", record["device"] if record["device"] != "cpu" else None),
            )
            if text
        ],
        "details": failure.get("details", [])[:MOST_TEXT_LINES],
        "seen": observations(record),
        "note": (record.get("diagnosis") or {}).get("note"),
        "agreed": (record.get("diagnosis") or {}).get("cases"),
        "named": explanations(record),
        "measured": measured_view(failure.get("measured")),
        "reproduction": "\n".join(reproduction[:MOST_TEXT_LINES]),
        "ledger": record["ledger"],
    }


def measured_view(measured: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The statistics of a failing comparison against their floors, and errors along each axis."""
    if not measured:
        return None
    rows = [
        (each["name"], each.get("value"), each.get("floor"), each.get("limit"))
        for each in measured["statistics"]
        if isinstance(each, Mapping) and "name" in each
    ]
    ratios = [plots.ratio(value, limit) for _, value, _, limit in rows]
    floors = [plots.ratio(floor, limit) if floor else None for _, _, floor, limit in rows]
    axis = plots.axis_of(ratios)
    limit, floor = measured.get("limit"), measured.get("floor")
    return {
        "name": measured.get("name") or "output",
        "limit": limit,
        "floor": floor,
        "axis": plots.statistic_axis(axis),
        "rows": [
            (*row, each, plots.statistic_row(each, axis, below))
            for row, each, below in zip(rows, ratios, floors)
        ],
        "profiles": [
            profile_view(str(each["axis"]), each["errors"], limit, floor)
            for each in measured["profiles"]
            if each.get("errors")
        ],
    }


def profile_view(
    axis: str, errors: Sequence[float | None], limit: float | None, floor: float | None
) -> dict[str, Any]:
    """Errors along one axis, as bars and in a sentence."""
    values = plots.binned(errors, len(errors))
    over = sum(each > limit for each in values) if limit is not None else None
    largest = max(values)
    above = "" if over is None else f"{over} of {len(values)} above the limit; "
    return {
        "axis": axis,
        "bars": plots.profile_bars(errors, limit, floor),
        "last": len(values) - 1,
        "said": f"{above}largest {number(largest)} at {values.index(largest)}",
    }


def nearest(report: Report) -> list[dict[str, Any]]:
    """How near each contract's requirements that passed came to their limits."""
    found = passed_with_errors(report.records)
    shares = {
        contract: [record["closest"] for record in records] for contract, records in found.items()
    }
    tallest = max((max(plots.bin_counts(each)) for each in shares.values()), default=1)
    return [
        {
            "contract": contract,
            "count": len(records),
            "histogram": plots.histogram(shares[contract], tallest),
            "nearest": records[:NEAREST],
        }
        for contract, records in found.items()
    ]


def unchecked(report: Report) -> list[tuple[str, int, list[tuple[str, list[str]]]]]:
    """By outcome: how many were not checked, and by reason which."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for outcome, reason, ids in not_checked(report.records):
        found.setdefault(outcome, []).append((reason, ids))
    if left := deselected(report):
        found["deselected"] = [("not selected for this run", left)]
    if missing := never_reported(report):
        found["missing"] = [("the run ended before they did", missing)]
    return [
        (
            outcome,
            sum(len(ids) for _, ids in groups),
            sorted(groups, key=lambda pair: -len(pair[1])),
        )
        for outcome, groups in found.items()
    ]


def environment_rows(report: Report) -> list[tuple[str, str]]:
    """What the run ran on, by name."""
    header, environment = report.header, report.header["environment"]
    implementation = header["implementation"]
    rows = [
        ("implementation", implementation["name"]),
        ("version", implementation["version"]),
        ("file", implementation.get("file")),
        ("chosen by", implementation.get("chosen_by")),
        ("suite", f"model-conformance {header['suite_version']}"),
        ("profile", header["profile"] + (", smoke" if header["smoke"] else "")),
        ("seed", "fixed by the profile" if header["seed"] is None else header["seed"]),
        ("device", environment["device"]),
        *(
            (name, value)
            for name, value in environment.items()
            if name not in ("device", "variables") and isinstance(value, str)
        ),
    ]
    return [(name, value) for name, value in rows if value]


def command_line(header: Mapping[str, Any], only: str = "") -> str:
    """The command that runs the same again; with ``only``, one requirement of it."""
    implementation, environment = header["implementation"], header["environment"]
    words = ["pytest"]
    if implementation.get("chosen_by") != "fixture":
        words += ["--pyargs", "conformance", "--impl", implementation["name"]]
    if environment["device"] != "cpu":
        words += ["-m", "gpu"]
    if header["smoke"]:
        words.append("--smoke")
    elif header["profile"] != "gate":
        words += ["--hypothesis-profile", header["profile"]]
    if header["seed"] is not None:
        words.append(f"--hypothesis-seed={header['seed']}")
    if only:
        words += ["-k", only]
    variables = [
        f"{name}={shlex.quote(str(value))}"
        for name, value in environment["variables"].items()
        if name != "CONFORMANCE_IMPL"
    ]
    return " ".join([*variables, shlex.join(words)])
