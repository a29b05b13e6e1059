"""The ways in which a requirement ends other than by passing."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conformance.diagnosis import Diagnosis
    from conformance.harness.calls import Call
    from conformance.harness.compared import Compared
    from conformance.harness.requirement import Requirement


HUNG, WAITING, DIED = "rank hung", "ranks wait for each other", "rank died"
"""Kinds of failure. A rank that waits in a collective is not to blame where another is stuck."""


class ConformanceFailure(AssertionError):
    """The implementation breaks the rule that is being checked.

    ``kind`` is one of a few stable phrases (``wrong values``, ``non-finite``, ``wrong shape`` …) that
    a ledger entry can name; ``summary`` is one line; ``details`` are further lines; ``call`` is the
    :class:`~conformance.harness.calls.Call` that failed; ``shown_by`` is the line of Python that
    shows the fault after that call, which leaves its result in ``out`` (and ``lse``); ``compared`` is
    the output that is not as expected.
    """

    def __init__(
        self,
        kind: str,
        summary: str,
        *,
        details: tuple[str, ...] = (),
        call: Call | None = None,
        lane: str = "exact",
        shown_by: str = "print(out)",
        compared: Compared | None = None,
    ) -> None:
        super().__init__(summary)
        self.kind = kind
        self.summary = summary
        self.details = details
        self.call = call
        self.lane = lane
        self.shown_by = shown_by
        self.compared = compared
        self.diagnosis: Diagnosis | None = None
        self.requirement: Requirement | None = None
        self.import_lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The whole message: rule, case, what was found, and lines that reproduce it."""
        from conformance.harness.messages import failure_message

        return failure_message(self)


class TimedOut(BaseException):
    """The deadline of a requirement passed.

    Not an Exception: neither an adapter's ``except Exception`` nor Hypothesis's shrinking keeps it.
    """


class NotOffered(unittest.SkipTest):
    """The implementation has no method of this contract."""


class Declined(unittest.SkipTest):
    """The implementation does not take on this case, or any case of a requirement."""


class Inconclusive(unittest.SkipTest):
    """The requirement ran, but no case could have told right from wrong."""


class NotRun(unittest.SkipTest):
    """The requirement needs hardware or memory that this machine lacks."""


class HarnessError(RuntimeError):
    """The suite itself is broken; nothing is said about the implementation."""


@contextmanager
def failing_at(call: Call) -> Iterator[None]:
    """A failure that knows no call, such as a changed input or an exception, is one of ``call``."""
    try:
        yield
    except ConformanceFailure as failure:
        failure.call = failure.call or call
        raise
