"""``python -m conformance``: what the suite knows, the regression gate, and a repository's start."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from conformance.gate import command as gate
from conformance.reports import command as reports
from conformance.scaffold import command as scaffold


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; the exit status is 4 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description="What the conformance suite knows, and whether code got slower. The suite "
        "itself runs under pytest: pytest --pyargs conformance --impl NAME",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--json", action="store_true", help="as JSON")
        if name == "bugs":
            command.add_argument("--matrix", metavar="FILE", help="write the matrix as a page")
    about = "tell whether the head is slower than the base"
    gate.add_options(commands.add_parser("gate", help=about, description=gate.__doc__))
    about = "write an adapter, tests and workflows into a repository"
    scaffold.add_options(commands.add_parser("init", help=about, description=scaffold.__doc__))
    for name, (add_options, about) in REPORTS.items():
        add_options(commands.add_parser(name, help=about, description=reports.__doc__))
    options = parser.parse_args(arguments)
    if options.command in REPORTS:
        return reports.run(options)
    if options.command == "gate":
        return gate.run(options)
    if options.command == "init":
        return scaffold.run(options)
    if options.command == "bugs" and options.matrix:
        from conformance import kill_matrix_page

        return kill_matrix_page.run(options.matrix)
    from conformance.harness.data import DataMissing

    try:
        rows = COMMANDS[options.command][0]()
    except (DataMissing, ImportError) as error:
        print(f"conformance: {' '.join(str(error).split())}", file=sys.stderr)
        return 4
    try:
        if options.json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            for line in TEXT[options.command](rows):
                print(line)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        sys.stderr.close()
    return 0


def version() -> dict[str, Any]:
    """Version of the suite and of what it runs on."""
    from conformance import __version__
    from conformance.harness.environment import describe_environment

    described = describe_environment("")
    return {"conformance": __version__, **{k: described[k] for k in ("python", "torch", "pytest")}}


def impls() -> list[dict[str, Any]]:
    """The bundled adapters."""
    from conformance.implementations import BUNDLED

    return [{"name": b.name, "target": b.target, "summary": b.summary} for b in BUNDLED.values()]


def requirements() -> list[dict[str, Any]]:
    """Every requirement, in the order of the files."""
    from conformance.harness.runner import suite_requirements

    return [
        {
            "slug": r.slug,
            "level": r.level,
            "contract": r.contract,
            "rule": r.rule,
            "source": r.source,
            "smoke": r.smoke,
            "gpu": r.gpu,
        }
        for r in suite_requirements().values()
    ]


def bugs() -> list[dict[str, Any]]:
    """The kill matrix: every entry of the catalogue and every planted bug, and what catches it."""
    from conformance.harness.data import catalogue, kill_matrix
    from conformance.known_bugs import NOT_EXPRESSIBLE, all_known_bugs

    planted, matrix = all_known_bugs(), kill_matrix()
    entries = catalogue()
    rows = []
    for id, entry in entries.items():
        variants = [bug for bug in planted.values() if bug.entry == id]
        rows += [_planted_row(bug, entry, matrix) for bug in variants]
        if not variants:
            reason = NOT_EXPRESSIBLE.get(id)
            rows.append(
                {
                    "id": id,
                    "entry": id,
                    "contract": None,
                    "status": "not planted" if reason is None else "not expressible",
                    "reason": reason,
                    "breaks": None,
                    "caught_by": [],
                    "without_precision_lane": None,
                    "title": entry["title"],
                    "mechanism": None,
                    "source": entry["source"],
                }
            )
    rows += [_planted_row(b, {}, matrix) for b in planted.values() if b.entry not in entries]
    return rows


def _planted_row(bug: Any, entry: dict[str, Any], matrix: dict[str, Any]) -> dict[str, Any]:
    measured = matrix.get(bug.id)
    return {
        "id": bug.id,
        "entry": bug.entry,
        "contract": bug.contract,
        "status": "planted",
        "reason": None,
        "breaks": bug.breaks,
        "caught_by": list(measured.get("caught_by", [])) if measured else None,
        "without_precision_lane": measured.get("without_precision_lane") if measured else None,
        "title": entry.get("title", bug.mechanism),
        "mechanism": bug.mechanism,
        "source": entry.get("source"),
    }


def _impl_lines(rows: list[dict[str, Any]]) -> Iterable[str]:
    width = max(len(row["name"]) for row in rows)
    return (f"{row['name']:<{width}}  {row['summary']}" for row in rows)


def _requirement_lines(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield f"{row['slug']}  ({row['level']})"
        yield f"    {row['rule']}"
        yield f"    source: {row['source']}"


def _bug_lines(rows: list[dict[str, Any]]) -> Iterable[str]:
    for row in rows:
        yield f"{row['id']}: {row['title']}" + (f" ({row['source']})" if row["source"] else "")
        if row["status"] == "planted":
            caught = row["caught_by"]
            by = "not measured" if caught is None else ", ".join(caught) or "NOTHING"
            yield f"    planted in {row['contract']}, breaks {row['breaks']}; caught by {by}"
        else:
            yield f"    {row['status']}" + (f": {row['reason']}" if row["reason"] else "")
    planted = [row for row in rows if row["status"] == "planted"]
    caught = sum(bool(row["caught_by"]) for row in planted)
    other = len({row["entry"] for row in rows if row["status"] != "planted"})
    alone = sum(bool(row["without_precision_lane"]) for row in planted)
    unmeasured = sum(row["caught_by"] is None for row in planted)
    yield (
        f"{len({row['entry'] for row in rows})} entries; {len(planted)} bugs planted, "
        f"{caught} caught, {alone} of them by the semantic and exact lanes alone"
        f"{f', {unmeasured} not measured' if unmeasured else ''}; {other} entries not planted"
    )


REPORTS = {
    "report": (reports.add_report_options, "show one report, several, or what changed"),
    "merge": (reports.add_merge_options, "make one report of a run that was split over runners"),
}

COMMANDS = {
    "impls": (impls, "list the bundled adapters"),
    "requirements": (requirements, "list the requirements with rule and source"),
    "bugs": (bugs, "list the known bugs, whether each is planted, and what catches it"),
    "version": (version, "show versions"),
}

TEXT = {
    "impls": _impl_lines,
    "requirements": _requirement_lines,
    "bugs": _bug_lines,
    "version": lambda row: (f"{name} {value}" for name, value in row.items()),
}

if __name__ == "__main__":
    sys.exit(main())
