"""Calls whose lines write files: what they define is kept for a few calls, then the files go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from conformance.harness.calls import Call

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
