"""Ways in which a save breaks off, as they are done to a process of its own and as lines tell them.

The process ends, or meets an error, at a change of files that it makes, or when a file has reached
some size.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from conformance.harness.failures import NotRun
from conformance.harness.rank_pool import forked

CRASHED, RAISED, DONE = 77, 66, 0
"""How a process that saves ends."""
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Interruption:
    """What breaks off a save, and the lines that do the same."""

    what: str
    begin: Callable[[], Any]
    """Called before the save, in the process that saves."""
    lines: tuple[str, ...]
    """They know the modules of :data:`IMPORTS`."""


IMPORTS = "import os, resource, signal, sys"


def at_change(number: int, *, raises: bool = False, opened: bool = False) -> Interruption:
    """The process ends, or an exception is raised, as :func:`stop_before` says."""
    where = f"after opening file {number}" if opened else f"at change {number} of files"
    stop = disk_full if raises else crash
    return Interruption(
        f"{'an error' if raises else 'ended'} {where}",
        partial(stop_before, number, stop, opened=opened),
        _stopping(number, raises=raises, opened=opened),
    )


def at_size(size: int, *, raises: bool = False) -> Interruption:
    """No file grows beyond ``size`` bytes: the process is killed, or writing raises an exception."""
    handler = "SIG_IGN" if raises else "SIG_DFL"
    return Interruption(
        f"{'an error' if raises else 'ended'} when a file has {size} bytes",
        partial(_largest_file, size, raises=raises),
        (
            f"signal.signal(signal.SIGXFSZ, signal.{handler})",
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))",
        ),
    )


def stop_before(
    number: int, stop: Callable[[], None], *, opened: bool = False
) -> Callable[[], None]:
    """Call ``stop`` before the change of files with this number, from 0, that Python makes.

    With ``opened`` only files that are opened to be written count, and are opened before. Gives what
    ends the counting; the hook itself stays for as long as the process lives.
    """
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if not (opens or (event in CHANGES and not opened)):
            return
        seen[0] += 1
        if seen[0] == number + 1:
            if opened and isinstance(arguments[0], (str, bytes)):
                with suppress(OSError):
                    os.close(os.open(arguments[0], arguments[2]))
            stop()

    sys.addaudithook(hook)
    return lambda: seen.__setitem__(0, number + 1)


def _stopping(number: int, *, raises: bool, opened: bool) -> tuple[str, ...]:
    """Lines that do as :func:`stop_before`."""
    changes = "opens" if opened else f"opens or event in {CHANGES!r}"
    stop = "raise OSError(28, 'No space left on device')" if raises else f"os._exit({CRASHED})"
    return (
        "writing, seen = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, []",
        "def hook(event, given):",
        "    opens = event == 'open' and isinstance(given[2], int) and given[2] & writing",
        f"    if not ({changes}): return",
        "    seen.append(event)",
        f"    if len(seen) == {number + 1}:",
        *(("        os.open(given[0], given[2])",) if opened else ()),
        f"        {stop}",
        "sys.addaudithook(hook)",
    )


def crash() -> NoReturn:
    """End the process at once."""
    os._exit(CRASHED)


def disk_full() -> NoReturn:
    """What happens when nothing more can be written."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _largest_file(size: int, *, raises: bool) -> None:
    """Of files that are not written by Python itself there are no events; these have the kernel's."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN if raises else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_child(save: Callable[[], Any], interruption: Interruption) -> int:
    """Save in a process of its own that is interrupted; how it ended."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise NotRun("saving is interrupted in a fork, which a process that uses CUDA cannot be")
    child = forked()
    if not child:
        status = RAISED
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the deadline is the parent's
            torch.set_num_threads(1)  # the threads of the parent are not here
            interruption.begin()
            save()
            status = DONE
        finally:
            os._exit(status)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    code = os.waitstatus_to_exitcode(status)
    return CRASHED if code == -signal.SIGXFSZ else code


def told_in_child(save: str, interruption: Interruption) -> tuple[str, ...]:
    """Lines that do as :func:`in_child`."""
    return (
        "if not os.fork():",
        "    try:",
        *(f"        {line}" for line in interruption.lines),
        f"        {save}",
        "    finally: os._exit(0)",
        "_ = os.wait()",
    )
