"""A bound on the time of one requirement, so that a hanging implementation cannot hang the run."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from contextlib import contextmanager

from conformance.harness.failures import TimedOut

DEFAULT_SECONDS = 120.0

HARD_FACTOR = 3
"""A call that never returns to Python ends the process after this many times the deadline."""

AFTERWARDS = 10.0
"""Seconds at least that a call which was interrupted has to come to its end, on a busy machine too."""

AGAIN = 0.05
"""Seconds after which the deadline is raised again, where Python has dropped it."""

_stacks: list[int] = []


def stacks_go_to(descriptor: int) -> None:
    """Print the stacks of a process that has to be ended to this file, for stderr is captured."""
    _stacks[:] = [descriptor]


@contextmanager
def deadline(seconds: float, hard_factor: float = HARD_FACTOR):
    """Raise :class:`TimedOut` in the body after ``seconds``; end the process after so many times it.

    Works in the main thread of a POSIX system, where signals arrive; elsewhere there is no bound.
    Code that does not return to the interpreter cannot be interrupted: then the process prints the
    stack of every thread and exits, and the report has no footer.
    """
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(signum, frame):
        raise TimedOut(f"not finished after {seconds:g} s")

    def dropped(unraisable):
        # A finaliser, or what runs beside a fork, is where the signal came: nothing is raised there
        if isinstance(unraisable.exc_value, TimedOut):
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            hook(unraisable)

    before, hook = signal.signal(signal.SIGALRM, stop), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        # By its number: sys.stderr may have been replaced by something that is no file.
        stacks = _stacks[0] if _stacks else 2
        last = max(seconds * hard_factor, seconds + AFTERWARDS)
        faulthandler.dump_traceback_later(last, exit=True, file=stacks)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook
