"""Runs the lines that reproduce failures, each against the bug and against the reference.

A process of its own, which has never differentiated anything: lines may fork. It reads ids of planted
bugs from its arguments and prints a line of JSON for each.
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.messages import reproduction
from conformance.harness.requirement import all_requirements
from conformance.known_bugs import PlantedBug, all_known_bugs

SECONDS = 60
FROM_BUG = (
    "from conformance.known_bugs import all_known_bugs as all_of",
    "adapter = all_of()[{!r}]",
)
FROM_REFERENCE = (
    "from conformance.implementations.reference import Reference",
    "adapter = Reference()",
)


def failure_of(bug: PlantedBug) -> dict[str, Any]:
    """How the requirement fails that a bug breaks, and the lines that reproduce it."""
    settings = profiles.without_shrinking(profiles.PROFILES["gate"])
    getter, made = FROM_BUG
    lines = (getter, f"{made.format(bug.id)}.make()", f"{bug.contract} = adapter.{bug.contract}")
    with profiles.temporarily(settings):
        try:
            all_requirements()[bug.breaks].check(getattr(bug.make(), bug.contract))
        except ConformanceFailure as failure:
            failure.import_lines = lines
            return {
                "kind": failure.kind,
                "ranks": getattr(failure.call.case, "ranks", 1),
                "lines": reproduction(failure),
            }
    raise AssertionError(f"{bug.breaks} passes for {bug.id}")


def of_reference(lines: list[str]) -> list[str]:
    """The same lines with the reference in the place of the bug."""
    getter, made = FROM_BUG
    begin = made.split("[", maxsplit=1)[0]
    return [
        FROM_REFERENCE[0]
        if line == getter
        else FROM_REFERENCE[1]
        if line.startswith(begin)
        else line
        for line in lines
    ]


def ran(lines: list[str]) -> dict[str, Any]:
    """What lines print, they or programs that they start, and the exception that they end with."""
    error = None
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as printed:
        os.dup2(printed.fileno(), 1)
        os.chdir(folder)
        with open(1, "w", closefd=False) as output, contextlib.redirect_stdout(output):
            try:
                exec(compile("\n".join(lines), "<reproduction>", "exec"), {"__name__": "__main__"})
            except BaseException as raised:
                error = type(raised).__name__, without_places(str(raised))
        os.chdir("/")
        printed.seek(0)
        return {"printed": without_places(printed.read()), "error": error}


def without_places(text: str) -> str:
    """Text without what is another in each process: addresses and names of temporary folders."""
    folders = rf"({re.escape(tempfile.gettempdir())}|/dev/shm)/[\w-]+"
    return re.sub(rf"0x[0-9a-f]+|{folders}", "…", text)


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` gives, done in a forked process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        signal.alarm(SECONDS)
        try:
            found = work()
        except BaseException as error:
            found = {"broken": f"{type(error).__name__}: {error}"}
        with open(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"broken": f"not finished in {SECONDS} s"}


def reproduced(bug: PlantedBug) -> dict[str, Any]:
    """A failure, and what its lines do with the bug and with the reference."""
    found = in_child(lambda: failure_of(bug))
    if "broken" not in found and found["ranks"] == 1:
        found["bug"] = in_child(lambda: ran(found["lines"]))
        found["reference"] = in_child(lambda: ran(of_reference(found["lines"])))
    return {"id": bug.id, **found}


def main() -> None:
    torch.set_num_threads(1)
    all_requirements()
    bugs = all_known_bugs()
    for id in sys.argv[1:]:
        print(json.dumps(reproduced(bugs[id])), flush=True)


if __name__ == "__main__":
    main()
