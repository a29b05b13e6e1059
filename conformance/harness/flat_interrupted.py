"""Saves of sharded models that break off at any moment: a checkpoint that can be loaded is left.

A process saves over a checkpoint and ends, or meets an error, at each change of files that it makes,
and when a file has reached some size; then the checkpoint before or the one after is loaded.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call, Course, course
from conformance.harness.failures import DIED, ConformanceFailure, NotRun, failing_at
from conformance.harness.flat_checkpoint_cases import CheckpointCase
from conformance.harness.flat_damage import same
from conformance.harness.flat_folders import files_of, folder
from conformance.harness.flat_stories import Attempt, Session, Story
from conformance.harness.rank_pool import forked, on_ranks, under_torchrun
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject

CRASHED, RAISED, DONE = 77, 66, 0
"""How a process that saves ends."""
MOST_EVENTS = 300
"""After so many changes of files a save is not followed any further."""
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


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


def crash() -> NoReturn:
    """End the process at once."""
    os._exit(CRASHED)


def disk_full() -> NoReturn:
    """What happens when nothing more can be written."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def largest_file(size: int, *, raises: bool) -> None:
    """Let no file grow beyond ``size``: the process is killed, or writing raises an exception.

    Of files that are not written by Python itself there are no events; these have the kernel's.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN if raises else signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_child(session: Session, directory: Path, prepare: Callable[[], None]) -> int:
    """Save in a process of its own that ``prepare`` spoils; how it ended."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        raise NotRun("saving is interrupted in a fork, which a process that uses CUDA cannot be")
    child = forked()
    if not child:
        status = RAISED
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)  # the deadline is the parent's
            torch.set_num_threads(1)  # the threads of the parent are not here
            prepare()
            session.driver.model.save(str(directory))
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


@dataclass
class Interrupted:
    """A model that saves over a checkpoint again and again, and what must be there after each time."""

    saving: Session
    loading: Session
    states: Mapping[str, Attempt]
    """What comes of loading the checkpoint before and the one after."""
    place: Path
    times: int = 0
    lines: tuple[str, ...] = ()
    """What the latest save was spoiled with."""

    def survives(self, what: str, prepare: Callable[[], None], lines: tuple[str, ...]) -> bool:
        """Whether the save went through; fails if neither checkpoint is there, or no other follows.

        ``lines`` do what ``prepare`` does.
        """
        self.lines = lines
        self.times += 1
        directory = self.place / str(self.times) / "checkpoint"
        shutil.copytree(self.place / "old", directory)
        code = in_child(self.saving, directory, prepare)
        if code not in (CRASHED, RAISED, DONE):
            self.fail(what, f"the process that saved ended with status {code}")
        found = self.found(directory)
        if code == DONE and found != "new":
            self.fail(what, f"save() raises nothing, and then {found}")
        if found not in self.states:
            self.fail(what, found)
        self.saving.save(directory)
        found = self.found(directory)
        if found != "new":
            self.fail(what, f"after another save, {found}")
        return code == DONE

    def fail(self, what: str, problem: str) -> NoReturn:
        """Raise a failure."""
        summary = f"save over a checkpoint, {what}: {problem}"
        # The line that shows it is known where the call is; from here the lines of this save travel.
        raise ConformanceFailure("lost checkpoint", summary, shown_by="\n".join(self.lines))

    def found(self, directory: Path) -> str:
        """Which of the checkpoints is in a directory, or what comes instead."""
        attempt = self.loading.attempt(directory, 2)
        if attempt.error is not None:
            return f"loading raises {attempt.error[:150]}"
        for name, state in self.states.items():
            if same(attempt.parameters, state.parameters) and same(attempt.later, state.later):
                return name
        if any(same(attempt.parameters, state.parameters) for state in self.states.values()):
            return "the state of the optimizer is that of neither checkpoint"
        return "what is loaded is neither checkpoint"


def break_off(
    subject: Subject,
    modules: list[nn.Module],
    options: dict[str, Any],
    inputs: list[Tensor],
    upstream: list[Tensor],
    place: Path,
    raises: bool,
) -> None:
    """Save over a checkpoint, broken off in every way."""
    making = subject, modules, options, inputs, upstream
    saving, loading = Session(*making), Session(*making)
    for name, number in (("old", 0), ("new", 1)):
        saving.train(number)
        saving.save(place / name)
    states = {name: loading.attempt(place / name, 2) for name in ("old", "new")}
    broken = Interrupted(saving, loading, states, place)
    stop, how = (disk_full, "an error") if raises else (crash, "ended")
    for number in range(MOST_EVENTS):
        prepare, lines = partial(stop_before, number, stop), stopping(number, raises=raises)
        if broken.survives(f"{how} at change {number} of files", prepare, lines):
            break
    for number in range(MOST_EVENTS):
        prepare = partial(stop_before, number, stop, opened=True)
        lines = stopping(number, raises=raises, opened=True)
        if broken.survives(f"{how} after opening file {number}", prepare, lines):
            break
    files = [path.stat().st_size for path in files_of(place / "new")]
    for size in sorted({part for each in files for part in (0, each // 2, max(0, each - 1))}):
        prepare = partial(largest_file, size, raises=raises)
        broken.survives(f"{how} when a file has {size} bytes", prepare, limiting(size, raises))


def need_own_processes() -> None:
    """Decline to end ranks that somebody else has started."""
    if under_torchrun():
        raise NotRun(
            "a save is broken off by ending its process, and these are not the suite's own"
        )


def assert_survives(flat_shards: Subject, case: CheckpointCase, *, raises: bool = False) -> None:
    """Whenever a save over a checkpoint breaks off, the one before or the one after is loaded."""
    need_own_processes()
    call = case.call()
    [modules], options = call.values()
    batches = [call.named(name)[0] for name in ("inputs", "upstream")]
    with folder() as place, failing_at(call):
        try:
            on_ranks(flat_shards, 1, break_off, modules, options, *batches, place, raises)
        except ConformanceFailure as failure:
            if failure.kind == "lost checkpoint":
                failure.call = broken_off(call, failure.shown_by.splitlines())
                failure.shown_by = "print(out, \"- expected ['old' or 'new', 'new']\")"
            raise
    current_tally().comparisons["exact"] += 1


# As lines

PROGRAM = """\
import copy, os, resource, shutil, signal, sys, tempfile
made = tempfile.TemporaryDirectory()
folder = made.name
def train(trained, n):
    trained.backward((trained.forward(inputs[0][n]).float() * upstream[0][n]).sum(), last=True)
    trained.step()
def state(name):
    loaded = model()
    try: loaded.load(f'{folder}/{name}')
    except BaseException as error: return f'{type(error).__name__}: {error}'
    train(loaded, 2)
    return {n: p.detach().clone() for n, p in loaded.full_parameters().items()}
def found():
    this, both = state('one'), {'old': state('old'), 'new': state('new')}
    same = lambda that: all(torch.equal(this[n], that[n]) for n in that)
    return this if isinstance(this, str) else [name for name in both if same(both[name])]
saving = model()
for n, name in enumerate(('old', 'new')):
    train(saving, n)
    saving.save(f'{folder}/{name}')
_ = shutil.copytree(f'{folder}/old', f'{folder}/one')
if not os.fork():
    try:
SPOILED
        saving.save(f'{folder}/one')
    finally: os._exit(0)
_ = os.wait()
first = found()
saving.save(f'{folder}/one')
"""
"""A save in a process of its own that breaks off, and another one; what is loaded after each."""


def broken_off(call: Call, spoiled: list[str]) -> Course:
    """The program, in which these lines spoil the save."""
    options = "".join(f", {name}={source}" for name, source in call.options)
    made = f"model = lambda: flat_shards(copy.deepcopy(modules){options})"
    program = PROGRAM.replace("SPOILED", "\n".join(f"        {line}" for line in spoiled))
    return course(call, made, *program.splitlines(), result="[first, found()]")


def stopping(number: int, *, raises: bool, opened: bool = False) -> tuple[str, ...]:
    """Lines that do as :func:`stop_before`."""
    stop = "raise OSError(28, 'No space left on device')" if raises else f"os._exit({CRASHED})"
    changes = "opens" if opened else f"opens or event in {CHANGES!r}"
    before = ("        os.open(given[0], given[2])",) if opened else ()
    return (
        "writing, seen = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, []",
        "def hook(event, given):",
        "    opens = event == 'open' and isinstance(given[2], int) and given[2] & writing",
        f"    if {changes}: seen.append(event)",
        f"    if ({changes}) and len(seen) == {number + 1}:",
        *before,
        f"        {stop}",
        "sys.addaudithook(hook)",
    )


def limiting(size: int, raises: bool) -> tuple[str, ...]:
    """Lines that do as :func:`largest_file`."""
    return (
        f"signal.signal(signal.SIGXFSZ, signal.{'SIG_IGN' if raises else 'SIG_DFL'})",
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))",
    )


# One of several ranks


class Mortal(Session):
    """A model of which one rank dies while it saves."""

    def save_and_die(self, directory: Path, rank: int, number: int) -> None:
        """Save; one rank ends at the change of files with this number."""
        forget = stop_before(number, crash) if self.rank == rank else None
        try:
            self.save(directory)
        finally:
            if forget is not None:
                forget()


def die_saving(
    subject: Subject,
    modules: list[nn.Module],
    options: dict[str, Any],
    inputs: list[Tensor],
    upstream: list[Tensor],
    place: Path,
    rank: int,
    number: int,
) -> None:
    """Save over a checkpoint on ranks of which one dies."""
    session = Mortal(subject, modules, options, inputs, upstream)
    session.train(0)
    session.save(place / "old")
    session.save(place / "one")
    session.train(1)
    session.save(place / "new")
    session.save_and_die(place / "one", rank, number)


def assert_survives_rank(flat_shards: Subject, case: CheckpointCase) -> None:
    """When one rank dies in a save over a checkpoint, the one before or after is loaded."""
    need_own_processes()
    story = Story(flat_shards, case)
    [modules], options = story.base.values()
    batches = [story.base.named(name)[0] for name in ("inputs", "upstream")]
    rank, number = case.drawn["rank"] % case.saved_on, case.drawn["number"]
    with folder() as place, failing_at(story.base):
        arguments = (modules, options, *batches, place, rank, number)
        try:
            on_ranks(flat_shards, case.saved_on, die_saving, *arguments)
        except ConformanceFailure as failure:
            if failure.kind != DIED:
                raise
        names = ("old", "new", "one")
        gave = story.loads(case.loaded_on, *(("attempt", place / name, 2) for name in names))
        for attempts in gave:
            old, new, found = attempts
            what = f"rank {rank} of {case.saved_on} died at its change {number} of files"
            if found.error is not None:
                summary = f"{what}, and loading raises {found.error[:200]}"
                raise ConformanceFailure("lost checkpoint", summary, call=story.call)
            if not any(
                same(found.parameters, each.parameters) and same(found.later, each.later)
                for each in (old, new)
            ):
                summary = f"{what}, and what is loaded is neither checkpoint"
                raise ConformanceFailure("lost checkpoint", summary, call=story.call)
        current_tally().comparisons["exact"] += 1
