"""The streams of one run that was split over several runners, as the stream of that run.

The parts must be of one run: the same implementation, suite, profile and seed, and the same versions of
what decides which cases are drawn and what they compute. No requirement may be in two of them, and
none in no part, unless the run was a selection. The verdict is found anew from all records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.harness.verdict import judge
from conformance.reports.outcomes import deselected
from conformance.reports.reader import Report, ReportError, plan_of, slug_of
from conformance.reports.stream import footer

SAME = ("suite_version", "profile", "seed", "smoke", "required")
"""Fields of the header that the parts of one run have in common."""

SAME_IMPLEMENTATION = ("name", "version")

SAME_ENVIRONMENT = ("torch", "transformers", "hypothesis", "device")
"""What decides which cases are drawn and what they compute; the platform may differ."""

Part = tuple[Path, Report]


class CannotMerge(ReportError):
    """The streams are not the parts of one run."""


def merge(parts: Sequence[Part], *, partial: bool = False) -> tuple[Report, list[str]]:
    """The report of the whole run, and sentences on how its parts differ in what may differ.

    ``partial`` allows requirements of the suite that are in no part; they count as deselected.
    Raises CannotMerge.
    """
    _check_same_run(parts)
    _check_not_doubled(parts)
    suite = _suite(parts)
    environment, notes = _environment([report for _, report in parts])
    position = {slug: number for number, slug in enumerate(suite)}
    planned = [id for _, report in parts for id in report.header["planned"]]
    planned.sort(key=lambda id: (position[slug_of(id)], id))
    first = parts[0][1].header
    header = {**first, "environment": environment, "planned": planned, "suite": suite}
    order = {id: number for number, id in enumerate(planned)}
    records = [record for _, report in parts for record in report.records]
    records.sort(key=lambda record: order[record["id"]])
    verdict = judge(plan_of(header), records)
    merged = Report(header, records, footer(verdict, _numerics(parts)))
    left = deselected(merged)
    if left and not partial:
        raise CannotMerge(
            f"{len(left)} of the {len(suite)} requirements of the suite are in none of the parts, "
            f"the first is {left[0]}: a part is missing, or the run was a selection (--partial)."
        )
    return merged, notes


def _check_same_run(parts: Sequence[Part]) -> None:
    place, one = parts[0]
    for other_place, other in parts[1:]:
        for where, names, of in (
            ("", SAME, lambda report: report.header),
            ("implementation ", SAME_IMPLEMENTATION, lambda r: r.header["implementation"]),
            ("", SAME_ENVIRONMENT, lambda report: report.header["environment"]),
        ):
            for name in names:
                expected, found = of(one).get(name), of(other).get(name)
                if expected != found:
                    raise CannotMerge(
                        f"{place} and {other_place} are not of one run: "
                        f"{where}{name.replace('_', ' ')} is {_shown(expected)} in the first and "
                        f"{_shown(found)} in the second."
                    )


def _check_not_doubled(parts: Sequence[Part]) -> None:
    planned: dict[str, Path] = {}
    for place, report in parts:
        for id in report.header["planned"]:
            if id in planned:
                raise CannotMerge(f"{id} is planned in {planned[id]} and again in {place}.")
            planned[id] = place


def _suite(parts: Sequence[Part]) -> dict[str, str]:
    """Every requirement that the run could have held, in the order in which pytest collects them.

    On a GPU a part could hold what has no place there only where it planned it, so that the suites
    of its parts differ by that.
    """
    (place, one), on_cpu = parts[0], parts[0][1].header["environment"]["device"] == "cpu"
    suite: dict[str, str] = {}
    for other_place, other in parts:
        theirs = other.header["suite"]
        different = sorted(theirs.items() ^ one.header["suite"].items())
        if different and on_cpu:
            raise CannotMerge(
                f"{place} and {other_place} are not of one run: their suites differ, for example "
                f"in {different[0][0]}."
            )
        suite |= theirs
    inside = {slug: number for number, slug in enumerate(suite)}
    # Files in the order of their names, and in a file from top to bottom.
    ordered = sorted(suite, key=lambda slug: (slug.partition(".")[0], inside[slug]))
    return {slug: suite[slug] for slug in ordered}


def _environment(reports: Sequence[Report]) -> tuple[dict[str, Any], list[str]]:
    """The environment of all parts, and what differs: there every value is named."""
    all_of_them = [report.header["environment"] for report in reports]
    merged, notes = {}, []
    for name in _names(all_of_them):
        if name == "variables":
            continue
        merged[name], note = _joined(name, [each.get(name) for each in all_of_them])
        notes += note
    variables, merged["variables"] = [each["variables"] for each in all_of_them], {}
    for name in sorted(_names(variables)):
        value, note = _joined(name, [each.get(name) for each in variables])
        merged["variables"][name] = str(value)
        notes += note
    return merged, notes


def _joined(name: str, values: Sequence[Any]) -> tuple[Any, list[str]]:
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return different[0], []
    text = " and ".join(_shown(value) for value in different)
    return text, [f"The parts differ in {name}: {text}."]


def _numerics(parts: Sequence[Part]) -> dict[str, Any] | None:
    """The counts of the numerics ledger, where every part was checked against the same base."""
    found = [report.footer.get("numerics") for _, report in parts]
    if not any(found):
        return None
    if not all(found) or len({(each["base"], each["factor"]) for each in found}) > 1:
        raise CannotMerge("The parts were not all checked against the same numerics base.")
    counted = {
        name: sum(each[name] for each in found)
        for name in found[0]
        if name not in ("base", "factor")
    }
    return {"base": found[0]["base"], "factor": found[0]["factor"], **counted}


def _names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return f"{len(value)} slugs"
    return str(value)


__all__ = ["CannotMerge", "merge"]
