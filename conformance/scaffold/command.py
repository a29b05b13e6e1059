"""``python -m conformance init [FOLDER]``: write what a repository needs to be held to the suite.

An adapter whose functions have the contracts' signatures, tests that run the requirements, the table
``[tool.conformance]``, and a workflow for pull requests. No file that exists is changed, except that
the table is put at the end of ``pyproject.toml``; where something is in the way nothing is written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from conformance.harness.data import DataMissing
from conformance.scaffold.files import CannotWrite, Extended, NewFile, check, write
from conformance.scaffold.settings_table import TableError

USAGE = 4
"""Exit status for a user's mistake."""


class UnknownContract(ValueError):
    """A contract that there is not; the message is one line."""


@dataclass(frozen=True)
class Step:
    """What is to become of one file."""

    path: Path
    file: NewFile | Extended | None
    """What is to be written; None where the file is left as it is."""
    note: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("folder", nargs="?", default=".", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--contracts",
        default="attention",
        metavar="NAMES",
        help="contracts that the adapter is to offer, with commas between them (attention)",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="also a workflow for a runner with a CUDA device"
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="the workflow for pull requests on four runners at once",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be written, and write nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Write the files and print what became of each; the exit status, 4 for a user's mistake."""
    folder = options.folder
    try:
        contracts = contracts_of(options.contracts)
        steps = plan(folder, contracts, gpu=options.gpu, split=options.split)
        files = [step.file for step in steps if step.file is not None]
        check(folder, files)
        if not options.dry_run:
            write(folder, files)
    except (CannotWrite, DataMissing, TableError, UnknownContract) as error:
        print(f"conformance init: {error}", file=sys.stderr)
        return USAGE
    print("\n".join(lines(folder, steps, dry_run=options.dry_run)))
    return 0


def contracts_of(text: str) -> list[str]:
    """The contracts that an option names, in the suite's order."""
    from conformance.contracts import CONTRACTS

    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in CONTRACTS:
            known = ", ".join(CONTRACTS)
            raise UnknownContract(f"--contracts: there is no contract {name!r}; there are {known}")
    return [name for name in CONTRACTS if name in asked]


def plan(
    folder: Path, contracts: list[str], *, gpu: bool = False, split: bool = False
) -> list[Step]:
    """What is to become of every file; :class:`TableError` for a broken pyproject.toml."""
    from conformance.scaffold import adapter, in_repository, workflows

    new = {
        f"{adapter.MODULE}.py": adapter.skeleton(contracts),
        "tests/test_conformance.py": in_repository.tests(contracts),
        "tests/conftest.py": in_repository.FIXTURE,
        workflows.ACTION: workflows.action(),
        workflows.CPU_GATE: workflows.cpu_gate(split=split),
        **({workflows.GPU_GATE: workflows.gpu_gate()} if gpu else {}),
    }
    why = {"tests/conftest.py": "give it a fixture called implementation, see docs/adapters.md"}
    steps = [_new(folder / path, text, why.get(path, "")) for path, text in new.items()]
    return [steps[0], _settings(folder / "pyproject.toml", contracts), *steps[1:]]


def _new(path: Path, text: str, why: str) -> Step:
    if path.is_file() or path.is_symlink():
        return Step(path, None, "it exists" + (f"; {why}" if why else ""))
    return Step(path, NewFile(path, text.encode()))


def _settings(path: Path, contracts: list[str]) -> Step:
    from conformance.scaffold import settings_table

    if path.is_dir() or not path.exists():
        return Step(path, NewFile(path, settings_table.table(contracts).encode()))
    try:
        before = path.read_bytes()
    except OSError as error:
        raise CannotWrite(f"{path.name} cannot be read: {error.strerror or error}") from None
    if settings_table.has_table(settings_table.parse(before)):
        return Step(path, None, "it has a table [tool.conformance]")
    after = settings_table.appended(before, settings_table.table(contracts))
    return Step(path, Extended(path, before, after))


def lines(folder: Path, steps: Iterable[Step], *, dry_run: bool) -> Iterable[str]:
    """What the command prints: a line a file, and what comes next."""
    from conformance.scaffold.adapter import MODULE

    words = ("would write", "would extend") if dry_run else ("wrote", "extended")
    for step in steps:
        path = step.path.relative_to(folder).as_posix()
        if step.file is None:
            yield f"left {path}: {step.note}"
        else:
            yield f"{words[isinstance(step.file, Extended)]} {path}"
    yield (
        f"next: call your code in {MODULE}.py, then "
        f"python -m pytest --pyargs conformance --impl {MODULE} --smoke"
    )
