"""``python -m conformance bugs --matrix FILE``: what catches each planted bug, as a Markdown page.

A section a contract with a row a bug; then the requirements by how many bugs they catch. It reads what
was measured, ``fixtures/kill_matrix.json``, and runs nothing.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MOST_NAMED = 4
"""Requirements that a row names before it says how many more there are."""

ALONE = "without low precision"
"""Heading of the column that tells whether the semantic and exact lanes catch a bug alone."""

INTRODUCTION = """\
# The kill matrix

{bugs} documented bugs are planted over the reference; {caught} are caught, {alone} of them also without
the comparisons in bfloat16 and float16. Of {requirements} requirements {failing} fail for at least one
bug, {with_one} for exactly one.

The other {others} fail for none of these bugs, which do not break their rules. For each of them
`meta_tests/` has a near miss, a mistake of a line or two that no catalogue lists, for which it fails
(`test_requirements_can_fail.py`). {gpu} of them run on a GPU alone, where this was not measured.

Of some contracts a bug meets only the first cases of each requirement, to keep the measurement short,
and all cases of the requirement whose rule it breaks: others may catch it that its row does not count.

This page is written by `python -m conformance bugs --matrix docs/kill_matrix.md` from
`fixtures/kill_matrix.json`. Any bug can be run: `pytest conformance --impl known-bug:ID` must fail.
"""

Row = Mapping[str, Any]


def run(file: str) -> int:
    """Write the page; the exit status, 4 where it cannot be written."""
    from conformance.__main__ import bugs, requirements
    from conformance.harness.data import DataMissing
    from reference_impl.atomic_files import write_atomically

    try:
        text = page(bugs(), requirements())
        write_atomically(file, lambda out: out.write(text.encode()))
    except (DataMissing, ImportError) as error:
        print(f"conformance: {' '.join(str(error).split())}", file=sys.stderr)
        return 4
    except OSError as error:
        print(f"conformance: --matrix {file}: {error.strerror or error}", file=sys.stderr)
        return 4
    return 0


def page(bugs: list[Row], requirements: list[Row]) -> str:
    """The page of all ``bugs`` and ``requirements``, as ``python -m conformance`` lists them."""
    planted = [row for row in bugs if row["status"] == "planted"]
    caught = catches(planted)
    lines = [*_head(planted, requirements, caught)]
    for contract in dict.fromkeys(row["contract"] for row in requirements):
        lines += _contract_section(contract, [b for b in planted if b["contract"] == contract])
    unplanted = [row for row in bugs if row["status"] != "planted"]
    if unplanted:
        lines += _unplanted_section(unplanted)
    lines += _requirements_section(requirements, caught)
    return "\n".join(lines) + "\n"


def catches(planted: Iterable[Row]) -> dict[str, list[str]]:
    """The ids of the bugs that each requirement catches."""
    found: dict[str, list[str]] = {}
    for bug in planted:
        for slug in bug["caught_by"] or ():
            found.setdefault(slug, []).append(bug["id"])
    return found


def _head(
    planted: list[Row], requirements: list[Row], caught: Mapping[str, list[str]]
) -> Iterator[str]:
    number = sum(bool(bug["caught_by"]) for bug in planted)
    alone = sum(bool(bug["without_precision_lane"]) for bug in planted)
    none = [row for row in requirements if row["slug"] not in caught]
    gpu = sum(row["gpu"] for row in none)
    yield from INTRODUCTION.format(
        bugs=len(planted),
        caught=number,
        alone=alone,
        requirements=len(requirements),
        failing=len(requirements) - len(none),
        with_one=sum(len(bugs) == 1 for bugs in caught.values()),
        others=len(none),
        gpu=gpu,
    ).splitlines()
    yield ""
    yield "| contract | bugs | caught | requirements |"
    yield "| --- | ---: | ---: | ---: |"
    by_contract = Counter(row["contract"] for row in requirements)
    for contract, total in by_contract.items():
        bugs = [bug for bug in planted if bug["contract"] == contract]
        number = sum(bool(bug["caught_by"]) for bug in bugs)
        yield f"| [`{contract}`](#{contract}) | {len(bugs)} | {number} | {total} |"
    yield ""


def _contract_section(contract: str, bugs: list[Row]) -> Iterator[str]:
    yield f"## {contract}"
    yield ""
    yield f"| bug | what it does | documented in | breaks | caught by | also by | {ALONE} |"
    yield "| --- | --- | --- | --- | ---: | --- | --- |"
    for bug in bugs:
        cells = (
            f"`{bug['id']}`",
            cell(bug["mechanism"]),
            source_cell(bug["source"]),
            f"`{short(bug['breaks'], contract)}`",
            *_caught_cells(bug, contract),
            {True: "yes", False: "no", None: ""}[bug["without_precision_lane"]],
        )
        yield f"| {' | '.join(cells)} |"
    yield ""


def _caught_cells(bug: Row, contract: str) -> tuple[str, str]:
    """How many requirements catch a bug, and the first of them beside the one whose rule it breaks."""
    if bug["caught_by"] is None:
        return "", "not measured"
    if not bug["caught_by"]:
        return "**0**", "nothing"
    others = [slug for slug in bug["caught_by"] if slug != bug["breaks"]]
    shown = [f"`{short(slug, contract)}`" for slug in others[:MOST_NAMED]]
    more = len(others) - len(shown)
    return str(len(bug["caught_by"])), ", ".join(shown) + (f", {more} more" if more else "")


def _unplanted_section(rows: list[Row]) -> Iterator[str]:
    yield "## Not planted"
    yield ""
    yield "| bug | what it does | documented in | why |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        why = cell(row["reason"] or row["status"])
        yield f"| `{row['id']}` | {cell(row['title'])} | {source_cell(row['source'])} | {why} |"
    yield ""


def _requirements_section(
    requirements: list[Row], caught: Mapping[str, list[str]]
) -> Iterator[str]:
    slugs = [row["slug"] for row in requirements]
    gpu = {row["slug"] for row in requirements if row["gpu"]}
    yield "## Requirements"
    yield ""
    yield "### By the number of bugs that they catch"
    yield ""
    yield "| bugs | requirements | |"
    yield "| ---: | ---: | --- |"
    by_number: dict[int, list[str]] = {}
    for slug in slugs:
        by_number.setdefault(len(caught.get(slug, ())), []).append(slug)
    for number in sorted(by_number.keys() - {0, 1}, reverse=True):
        names = ", ".join(f"`{slug}`" for slug in by_number[number])
        yield f"| {number} | {len(by_number[number])} | {names} |"
    yield ""
    yield "### That catch one"
    yield ""
    yield "| requirement | bug |"
    yield "| --- | --- |"
    for slug in by_number.get(1, ()):
        yield f"| `{slug}` | `{caught[slug][0]}` |"
    yield ""
    yield "### That no planted bug fails"
    yield ""
    yield "Each fails for a near miss."
    yield ""
    by_contract: dict[str, list[str]] = {}
    for row in requirements:
        if row["slug"] not in caught:
            by_contract.setdefault(row["contract"], []).append(row["slug"])
    for contract, uncaught in by_contract.items():
        names = (f"`{short(slug, contract)}`{' (GPU)' if slug in gpu else ''}" for slug in uncaught)
        yield f"- {contract}, {len(uncaught)}: {', '.join(names)}"


def short(slug: str, contract: str) -> str:
    """A slug where the contract is known from the heading."""
    return slug.removeprefix(f"{contract}.")


def cell(text: str) -> str:
    """Text as one cell of a table, whatever it holds."""
    line = " ".join(text.split())
    return re.sub(r"([|<>*_`\\\[\]])", r"\\\1", line)


_REFERENCE = re.compile(r"\b([\w.-]+/[\w.-]+)#(\d+)\b")


def source_cell(source: str | None) -> str:
    """A source, with issues and pull requests of GitHub as links."""
    if not source:
        return ""
    parts, last = [], 0
    for found in _REFERENCE.finditer(source):
        repository, number = found.groups()
        parts.append(cell(source[last : found.start()]))
        if last < found.start() and source[found.start() - 1] == " ":
            parts.append(" ")
        link = f"https://github.com/{repository}/issues/{number}"
        parts.append(f"[{cell(repository)}#{number}]({link})")
        last = found.end()
    rest = source[last:]
    parts.append((" " if rest.startswith(" ") and last else "") + cell(rest))
    return "".join(parts)
