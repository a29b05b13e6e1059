"""Checks of what is contradicted in files of statistics: everything wrong, and nothing right."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from conformance.harness.calls import Call
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.requirement import current_tally
from conformance.harness.statistics_cases import (
    PRINTED,
    StatisticsCase,
    aggregate_of,
    document_of,
    plain,
)
from conformance.harness.statistics_checks import FILE_NAME, made, save, written
from conformance.harness.subject import Subject, errors_named

Edit = Callable[[dict[str, Any]], object]


def judged(statistics: Any, text: str, call: Call) -> tuple[list[str], str]:
    """The lines for a file of such text, and the Python that asks for them."""
    if getattr(statistics, "contradictions", None) is None:
        raise Declined("the statistics have no method contradictions")
    shown = f"open({FILE_NAME!r}, 'w').write({text!r})\nprint(out.contradictions('.'))"
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / FILE_NAME).write_text(text, "utf-8")
        with failing_at(call), errors_named("contradictions()"):
            found = statistics.contradictions(directory)
            lines = [str(line) for line in found]
    if isinstance(found, str):
        summary = "contradictions() gives one string, expected a sequence of them"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by=shown)
    current_tally().comparisons["exact"] += 1
    return lines, shown


def assert_no_contradictions(compression_statistics: Subject, case: StatisticsCase) -> None:
    """Neither a right file nor the file that was saved is contradicted."""
    call = case.call()
    statistics = made(compression_statistics, call)
    with tempfile.TemporaryDirectory() as directory:
        save(statistics, directory, call)
        saved = (Path(directory) / FILE_NAME).read_text("utf-8")
    for text in (written(document_of(case.entries)), saved):
        assert_none(statistics, text, call)


def assert_none(statistics: Any, text: str, call: Call) -> None:
    """A file is not contradicted."""
    lines, shown = judged(statistics, text, call)
    if lines:
        summary = f"a right file is contradicted: {lines[0][:200]}"
        raise ConformanceFailure("false contradiction", summary, call=call, shown_by=shown)


def assert_other_file(compression_statistics: Subject, case: StatisticsCase) -> None:
    """A file is judged by the entries in it, whatever entries the statistics were made of."""
    call = case.call()
    entries = tuple(entry._replace(rank=entry.rank + 1) for entry in case.entries[::-1])
    text = written(document_of(entries))
    assert_none(made(compression_statistics, call), text, call)


def assert_contradicted(
    compression_statistics: Subject, case: StatisticsCase, edits: Mapping[str, Edit]
) -> None:
    """A right file after each edit is contradicted by a line that has the name of the edit."""
    call = case.call()
    statistics, right = made(compression_statistics, call), document_of(case.entries)
    for name, edit in edits.items():
        document = copy.deepcopy(right)
        edit(document)
        lines, shown = judged(statistics, written(document), call)
        if not any(name in line for line in lines):
            summary = f"{name} is wrong and no line names it: {lines[:3] or 'there is none'}"
            raise ConformanceFailure("missed", summary, call=call, shown_by=shown)


def off(value: Any) -> Any:
    """Another number close by: one more, or a little more than is in writing it."""
    return value + 1 if isinstance(value, int) else value * (1 + 1e-4) + 1e-6


def edited_totals(case: StatisticsCase) -> dict[str, Edit]:
    """One field of the aggregate off, each in turn."""
    return {
        name: lambda document, name=name: document.update({name: off(document[name])})
        for name in aggregate_of(case.entries)
    }


COMPUTED = (
    "original_total_params",
    "original_active_params",
    "compressed_total_params",
    "compressed_active_params",
    "core_params",
    "wrapper_params_per_expert",
    "total_compression_ratio",
    "total_reduction_percent",
    "active_compression_ratio",
    "active_increase_percent",
)
"""The fields of an entry that follow from the others."""


def edited_entries(case: StatisticsCase) -> dict[str, Edit]:
    """One computed field of an entry off, each in turn."""

    def edit(document: dict[str, Any], name: str) -> None:
        layer = document["per_layer_stats"][case.one]
        layer[name] = off(layer[name])

    return {name: lambda document, name=name: edit(document, name) for name in COMPUTED}


def rounded(case: StatisticsCase) -> dict[str, Edit]:
    """One quotient rounded to two or four digits, each in turn; those that stay the same left out."""
    found: dict[str, Edit] = {}
    for name, value in plain(aggregate_of(case.entries)).items():
        digits = next((n for n in (4, 2) if off_by_rounding(value, n)), None)
        if isinstance(value, float) and digits is not None:
            found[name] = lambda document, name=name, digits=digits: document.update(
                {name: round(document[name], digits)}
            )
    return found


def off_by_rounding(value: float, digits: int) -> bool:
    """Whether rounding changes the number by more than a millionth of it."""
    return abs(round(value, digits) - value) > 1e-6 * (1 + abs(value))


def printed() -> dict[str, Edit]:
    """The figures that are printed for Mixtral, together."""
    return {name: lambda document: document.update(PRINTED) for name in PRINTED}


def missing(case: StatisticsCase) -> dict[str, Edit]:
    """One field missing, each in turn: of the aggregate, and computed and given ones of an entry."""
    found: dict[str, Edit] = {
        name: lambda document, name=name: document.pop(name) for name in aggregate_of(case.entries)
    }
    for name in (*COMPUTED[:6], "rank", "d_in", "num_experts"):
        found[name] = lambda document, name=name: document["per_layer_stats"][case.one].pop(name)
    found["per_layer_stats"] = lambda document: document.pop("per_layer_stats")
    return found


def impossible(case: StatisticsCase) -> dict[str, Edit]:
    """One size of an entry that cannot be, each in turn."""

    def edit(document: dict[str, Any], name: str, value: object) -> None:
        document["per_layer_stats"][case.one][name] = value

    values = {"rank": 0, "d_in": 0, "num_experts": 0, "d_out": -3, "num_active_experts": 0}
    return {
        name: lambda document, name=name, value=value: edit(document, name, value)
        for name, value in values.items()
    }


def entries_left_out(case: StatisticsCase) -> dict[str, Edit]:
    """An entry left out, so that totals are those of more entries than there are."""
    leave_out = lambda document: document["per_layer_stats"].pop(case.one)
    names = ("num_entries", "total_params_original", "active_params_compressed")
    return dict.fromkeys(names, leave_out)


def assert_duplicates_contradicted(compression_statistics: Subject, case: StatisticsCase) -> None:
    """A file that has an entry twice is contradicted, though its totals have it twice as well."""
    call = case.call()
    entries = (*case.entries, case.entries[case.one])
    text = written(document_of(entries))
    lines, shown = judged(made(compression_statistics, call), text, call)
    if not lines:
        summary = "a file with an entry twice is not contradicted"
        raise ConformanceFailure("missed", summary, call=call, shown_by=shown)


def assert_damage_told(compression_statistics: Subject, case: StatisticsCase) -> None:
    """A file that is damaged or missing raises, or is contradicted: it is never right."""
    call = case.call()
    statistics = made(compression_statistics, call)
    whole = written(document_of(case.entries))
    for text in (whole[: len(whole) // 3] + "\n: [", "", "[1, 2]", "a plain sentence"):
        told(statistics, text, call, "a damaged file")
    if getattr(statistics, "contradictions", None) is not None:
        with tempfile.TemporaryDirectory() as directory:
            told(statistics, None, call, "a missing file", directory)


def told(statistics: Any, text: str | None, call: Call, what: str, directory: str = "") -> None:
    """A file raises or is contradicted."""
    shown = "print(out.contradictions('.'))"
    try:
        if text is not None:
            lines, shown = judged(statistics, text, call)
        else:
            current_tally().comparisons["exact"] += 1
            with errors_named("contradictions()"):
                lines = list(statistics.contradictions(directory))
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return
    if not lines:
        summary = f"{what} is not contradicted"
        raise ConformanceFailure("missed", summary, call=call, shown_by=shown)


def assert_no_code_is_run(compression_statistics: Subject, case: StatisticsCase) -> None:
    """Reading a file makes no objects and runs no function that the file names."""
    call = case.call()
    statistics = made(compression_statistics, call)
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "run"
        text = f"total_params_original: !!python/object/apply:os.mkdir [{str(trace)!r}]\n"
        text += written(document_of(case.entries))
        told(statistics, text, call, "a file that calls a function")
        if trace.exists():
            summary = "contradictions() runs a function that the file names"
            shown = f"open({FILE_NAME!r}, 'w').write({text!r})\nprint(out.contradictions('.'))"
            raise ConformanceFailure("code is run", summary, call=call, shown_by=shown)
