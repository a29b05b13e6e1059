"""Checks of compression statistics: fields, files, contradictions in files, refusals."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from conformance.harness.calls import Call
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.requirement import current_tally
from conformance.harness.statistics_cases import (
    PUBLISHED,
    StatisticsCase,
    aggregate_of,
    document_of,
    fields_of,
)
from conformance.harness.subject import Subject, errors_named

FILE_NAME = "compression_statistics.yaml"
ROUNDINGS = 8
"""How many roundings to a float a quotient may have been through, each of its largest term."""


# Asking


def made(subject: Subject, call: Call) -> Any:
    """The statistics of a call's entries, which stay as they are."""
    (entries,), _ = call.values()
    given = copy.deepcopy(entries)
    with failing_at(call):
        found = subject(given)
    if given != entries:
        summary = "the entries that were given are changed"
        raise ConformanceFailure("changed input", summary, call=call, shown_by="print(entries)")
    return found


@contextmanager
def asking(source: str, call: Call) -> Iterator[None]:
    """A failure while something is asked for is shown by that line of Python."""
    try:
        with failing_at(call), errors_named(source):
            yield
    except ConformanceFailure as failure:
        if failure.shown_by == "print(out)":
            failure.shown_by = f"print({source})"
        raise


def aggregate(statistics: Any, call: Call) -> Mapping[str, Any]:
    """What ``aggregate`` gives."""
    with asking("out.aggregate()", call):
        found = statistics.aggregate()
        if not isinstance(found, Mapping):
            summary = f"aggregate() gives {type(found).__name__}, expected a mapping"
            raise ConformanceFailure("wrong type", summary)
    return found


def per_layer(found: Mapping[str, Any], number: int, call: Call) -> list[Mapping[str, Any]]:
    """The fields of so many entries."""
    layers = found.get("per_layer_stats")
    if not isinstance(layers, (list, tuple)) or len(layers) != number:
        has = f"has {len(layers)} entries" if isinstance(layers, (list, tuple)) else "is no list"
        summary = f"per_layer_stats {has}, expected {number}"
        shown = "print(out.aggregate()['per_layer_stats'])"
        raise ConformanceFailure("wrong entries", summary, call=call, shown_by=shown)
    return list(layers)


# Comparing


def largest_term(name: str, expected: Fraction, fields: Mapping[str, Any]) -> Fraction:
    """Of the numbers that a quotient is computed from, the largest: what its roundings are of."""
    if name.endswith("_percent"):
        return 100 + abs(100 - expected) if "reduction" in name else 200 + abs(expected)
    if name == "memory_saved_gb":
        return max(fields["total_memory_original_gb"], fields["total_memory_compressed_gb"])
    return abs(expected)


def compare(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    names: Sequence[str],
    call: Call,
    source: str,
) -> None:
    """Fields are right: integers exactly, quotients to the last bits of a float."""
    for name in names:
        current_tally().comparisons["exact"] += 1
        right = expected[name]
        printed = float(right) if isinstance(right, Fraction) else right
        shown = f"print({source}[{name!r}], 'expected', {printed!r})"
        if name not in found:
            summary = f"{source} has no {name}"
            raise ConformanceFailure("missing field", summary, call=call, shown_by=shown)
        value = found[name]
        if isinstance(right, Fraction) and is_number(value):
            limit = ROUNDINGS * Fraction(2) ** -53 * largest_term(name, right, expected)
            if abs(Fraction(value) - right) <= limit:
                continue
        elif type(right) is str:
            if value == right:
                continue
        elif is_number(value) and value == right:
            continue
        summary = f"{name} is {value!r}, expected {printed!r}"
        raise ConformanceFailure("wrong figure", summary, call=call, shown_by=shown)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < float("inf")


# Fields


def assert_fields(compression_statistics: Subject, case: StatisticsCase, *names: str) -> None:
    """These fields of the aggregate (default: all) are right."""
    call = case.call()
    found = aggregate(made(compression_statistics, call), call)
    right = aggregate_of(case.entries)
    compare(found, right, names or tuple(right), call, "out.aggregate()")


def assert_entries(compression_statistics: Subject, case: StatisticsCase, *names: str) -> None:
    """These fields of every entry (default: all) are right, and entries are in their order."""
    call = case.call()
    found = aggregate(made(compression_statistics, call), call)
    compare_entries(found, case, call, names)


def compare_entries(
    found: Mapping[str, Any], case: StatisticsCase, call: Call, names: Sequence[str] = ()
) -> None:
    """The fields of every entry are right."""
    layers = per_layer(found, len(case.entries), call)
    for number, (layer, entry) in enumerate(zip(layers, case.entries)):
        right = fields_of(entry)
        source = f"out.aggregate()['per_layer_stats'][{number}]"
        compare(layer, right, names or tuple(right), call, source)


def assert_published(compression_statistics: Subject, case: StatisticsCase) -> None:
    """The figures of a published model are those that were worked out by hand."""
    call = case.call()
    found = aggregate(made(compression_statistics, call), call)
    right = aggregate_of(case.entries)
    for name, value in PUBLISHED[case.published][1].items():
        compare(found, right, [name], call, "out.aggregate()")
        current_tally().comparisons["exact"] += 1
        if round(float(found[name]), 6) != value:
            summary = f"{name} is {found[name]!r}, expected {value!r} to six decimals"
            raise ConformanceFailure("wrong figure", summary, call=call)


def assert_order_is_free(compression_statistics: Subject, case: StatisticsCase) -> None:
    """Entries in another order have the same aggregate, in the same bits."""
    call, reverse = case.call(), case.call("entries.reverse()")
    first = aggregate(made(compression_statistics, call), call)
    second = aggregate(made(compression_statistics, reverse), reverse)
    compare(
        second,
        aggregate_of(case.entries),
        (*aggregate_of(case.entries),),
        reverse,
        "out.aggregate()",
    )
    for name in aggregate_of(case.entries):
        current_tally().comparisons["exact"] += 1
        if first[name] != second[name]:
            summary = f"{name} is {second[name]!r}, with the entries reversed {first[name]!r}"
            shown = f"print(out.aggregate()[{name!r}], 'expected', {first[name]!r})"
            raise ConformanceFailure("wrong figure", summary, call=reverse, shown_by=shown)


def assert_again(compression_statistics: Subject, case: StatisticsCase) -> None:
    """Asked again, after saving too, the aggregate is the same."""
    call = case.call()
    statistics, right = made(compression_statistics, call), aggregate_of(case.entries)
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(2):
            found = aggregate(statistics, call)
            compare(found, right, tuple(right), call, "(out.aggregate(), out.aggregate())[1]")
            compare_entries(found, case, call)
            save(statistics, directory, call)


# Files


def written(document: Mapping[str, Any]) -> str:
    """The text of a file: a field a line."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(document, Dumper=dumper, sort_keys=False)


def save(statistics: Any, directory: str, call: Call) -> None:
    """Write the file into a folder that is there."""
    with asking("out.save('.')", call):
        statistics.save(directory)


def read(directory: str, call: Call) -> Mapping[str, Any]:
    """What is in the file, by a parser that makes plain values alone."""
    path = Path(directory) / FILE_NAME
    shown = f"out.save('.'); print(open({FILE_NAME!r}).read())"
    if not path.is_file():
        has = ", ".join(sorted(child.name for child in Path(directory).iterdir())) or "nothing"
        summary = f"save() writes {has}, expected {FILE_NAME}"
        raise ConformanceFailure("missing file", summary, call=call, shown_by=shown)
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        summary = f"{FILE_NAME} is no plain YAML: {str(error).splitlines()[0]}"
        raise ConformanceFailure("unreadable file", summary, call=call, shown_by=shown) from None
    if not isinstance(found, Mapping):
        summary = f"{FILE_NAME} holds {type(found).__name__}, expected a mapping"
        raise ConformanceFailure("unreadable file", summary, call=call, shown_by=shown)
    return found


def compare_file(directory: str, case: StatisticsCase, call: Call) -> None:
    """Every field of the file is right, of the aggregate and of every entry."""
    found, right = read(directory, call), aggregate_of(case.entries)
    source = f"(out.save('.'), __import__('yaml').safe_load(open({FILE_NAME!r})))[1]"
    compare(found, right, tuple(right), call, source)
    compare_entries(found, case, call)


def assert_file(compression_statistics: Subject, case: StatisticsCase) -> None:
    """The file has every field, unrounded."""
    call = case.call()
    with tempfile.TemporaryDirectory() as directory:
        save(made(compression_statistics, call), directory, call)
        compare_file(directory, case, call)


def assert_file_replaced(compression_statistics: Subject, case: StatisticsCase) -> None:
    """Saving over an older file, and twice, leaves the new file alone."""
    call = case.call()
    with tempfile.TemporaryDirectory() as directory:
        longer = {"per_layer_stats": [{"older": f"entry {number}"} for number in range(400)]}
        older = document_of(case.entries) | longer
        (Path(directory) / FILE_NAME).write_text(written(older))
        statistics = made(compression_statistics, call)
        save(statistics, directory, call)
        compare_file(directory, case, call)
        save(statistics, directory, call)
        compare_file(directory, case, call)
        names = [child.name for child in Path(directory).iterdir()]
    current_tally().comparisons["exact"] += 1
    if names != [FILE_NAME]:
        summary = f"save() leaves {sorted(names)} in the folder"
        raise ConformanceFailure("other files", summary, call=call)


# Refusals


def assert_refused(compression_statistics: Subject, case: StatisticsCase, *edits: str) -> None:
    """Entries that cannot be raise, when they are given or at the latest when they are counted."""
    call = case.call(*edits)
    current_tally().comparisons["exact"] += 1
    try:
        statistics = made(compression_statistics, call)
        with tempfile.TemporaryDirectory() as directory:
            found = aggregate(statistics, call)
            save(statistics, directory, call)
    except ConformanceFailure as failure:
        if failure.kind.startswith("raised "):
            return
        raise
    ratio = found.get("total_compression_ratio")
    summary = f"a ratio of {ratio!r} is given where an error is due, after: {'; '.join(edits)}"
    shown = "print(out.aggregate())"
    raise ConformanceFailure("accepted", summary, call=call, shown_by=shown)
