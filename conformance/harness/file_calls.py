"""Calls whose lines write files: what they define is kept for a few calls, then the files go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from conformance.harness.calls import Call, Course, course

KEPT = 8
_namespaces: dict[tuple[str, ...], dict[str, Any]] = {}
"""What the lines of the latest calls define: each holds a checkpoint in memory and on disk."""


def _execute(lines: tuple[str, ...]) -> dict[str, Any]:
    if lines not in _namespaces:
        while len(_namespaces) >= KEPT:
            _forget(next(iter(_namespaces)))
        namespace: dict[str, Any] = {"torch": torch}
        exec(compile("\n".join(lines), "<reproduction>", "exec"), namespace)
        _namespaces[lines] = namespace
    _namespaces[lines] = _namespaces.pop(lines)  # the latest one used is forgotten last
    return _namespaces[lines]


def _forget(lines: tuple[str, ...]) -> None:
    """Free the files at once: the functions of a namespace and the namespace refer to each other."""
    namespace = _namespaces.pop(lines)
    namespace["folder"].cleanup()
    namespace.clear()


@dataclass(frozen=True)
class FileCall(Call):
    """A call on files that its lines write into ``folder``, a TemporaryDirectory.

    What is then done with the result completes the source text.
    """

    done: str = ""

    def namespace(self) -> dict[str, Any]:
        """See :meth:`Call.namespace`."""
        return _execute(self.lines)

    def source(self) -> str:
        """The call, and what is done with its result."""
        return super().source() + self.done


# What is done to files and may be refused, as lines

CONTENTS = (
    "import contextlib, pathlib",
    "contents = lambda: {str(p.relative_to(folder.name)): p.read_bytes()"
    " for p in pathlib.Path(folder.name).rglob('*') if p.is_file()}",
    "before = contents()",
)
AFTERWARDS = "after = contents()"
CHANGED = "[name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]"
NOT_CHANGED = "print('changed files:', sorted(out), '- expected none')"


def files_changed(
    call: Call, *acts: str, first: tuple[str, ...] = (), last: tuple[str, ...] = ()
) -> Course:
    """What files below ``folder`` are changed by acts, each of which may raise.

    ``first`` and ``last`` are done before and after them.
    """
    tried = (f"with contextlib.suppress(Exception): {act}" for act in acts)
    return course(call, *CONTENTS, *first, *tried, *last, AFTERWARDS, result=CHANGED)


def room_for(size: int) -> tuple[str, ...]:
    """Lines after which no file can have more bytes, as on a full disk, until :data:`ROOM_AGAIN`."""
    return (
        "import resource",
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)",
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, limits[1]))",
    )


ROOM_AGAIN = "resource.setrlimit(resource.RLIMIT_FSIZE, limits)"


def code_executed(call: Call, *acts: str) -> Course:
    """Whether one of the acts, each of which may raise, has executed what a file of ours holds."""
    tried = (f"with contextlib.suppress(Exception): {act}" for act in acts)
    found = "[*pathlib.Path(folder.name).rglob('*.executed')] != []"
    return course(call, "import contextlib, pathlib", *tried, result=found)


NOT_EXECUTED = "print('executed:', out, '- expected False')"


def rewritten(before: bytes, after: bytes) -> tuple[str, ...]:
    """Lines that make the bytes of ``source`` others: what the two have in common is not told."""
    begin = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), None)
    if begin is None:
        begin = min(len(before), len(after))
    longest = min(len(before), len(after)) - begin
    tails = zip(reversed(before), reversed(after))
    end = next((i for i, (a, b) in enumerate(tails) if a != b or i == longest), longest)
    middle = after[begin : len(after) - end]
    return (
        "data = open(source, 'rb').read()",
        f"_ = open(source, 'wb').write(data[:{begin}] + {middle!r} + data[{len(before) - end}:])",
    )
