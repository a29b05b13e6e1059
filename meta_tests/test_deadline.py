"""The bound on the time of a requirement, where Python drops the exception that ends it."""

import signal
import sys
import time

import pytest

from conformance.harness.deadline import deadline
from conformance.harness.failures import TimedOut

SOON, LONG = 0.1, 5.0
"""Seconds; after ten the process would be ended."""


class Finalised:
    """Its finaliser takes until the deadline has come: what is raised there is dropped."""

    def __del__(self):
        wait()


def wait():
    """Come back after a time that no test takes, unless something is raised here."""
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass


def test_a_deadline_that_comes_in_a_finaliser_is_raised_after_it():
    """Else what hangs after it would hang for good."""

    def hangs():
        finalised = Finalised()
        del finalised
        wait()

    with pytest.raises(TimedOut), deadline(SOON):
        hangs()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_else_is_dropped_is_told_as_before(monkeypatch):
    """Another exception goes where it went, within a deadline and after it."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: told.append(each.exc_type))

    class Wrong:
        def __del__(self):
            raise KeyError

    with deadline(LONG):
        Wrong()
    Wrong()
    assert told == [KeyError, KeyError]


def test_nothing_is_left_of_a_deadline():
    """Neither the alarm, nor who is told of it."""
    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with deadline(LONG):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before
