"""Saves of sharded models that break off at any moment: a checkpoint that can be loaded is left.

A process saves over a checkpoint and is interrupted in every way that there is; each time the
checkpoint before or the one after is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from conformance.harness.calls import Call, Course, course
from conformance.harness.failures import DIED, ConformanceFailure, NotRun, failing_at
from conformance.harness.flat_checkpoint_cases import CheckpointCase
from conformance.harness.flat_folders import files_of, folder
from conformance.harness.flat_stories import Attempt, Material, Session, Story, same
from conformance.harness.interruptions import (
    CRASHED,
    DONE,
    IMPORTS,
    RAISED,
    Interruption,
    at_change,
    at_size,
    crash,
    in_child,
    stop_before,
    told_in_child,
)
from conformance.harness.rank_pool import on_ranks, under_torchrun
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject

MOST_EVENTS = 300
"""After so many changes of files a save is not followed any further."""


@dataclass
class Interrupted:
    """A model that saves over a checkpoint again and again, and what must be there after each time."""

    saving: Session
    loading: Session
    states: Mapping[str, Attempt]
    """What comes of loading the checkpoint before and the one after."""
    place: Path
    times: int = 0

    def survives(self, interruption: Interruption) -> bool:
        """Whether the save went through; fails if neither checkpoint is there, or no other follows."""
        self.times += 1
        directory = self.place / str(self.times) / "checkpoint"
        shutil.copytree(self.place / "old", directory)
        code = in_child(lambda: self.saving.driver.model.save(str(directory)), interruption)
        if code not in (CRASHED, RAISED, DONE):
            fail(interruption, f"the process that saved ended with status {code}")
        found = self.found(directory)
        if code == DONE and found != "new":
            fail(interruption, f"save() raises nothing, and then {found}")
        if found not in self.states:
            fail(interruption, found)
        self.saving.save(directory)
        found = self.found(directory)
        if found != "new":
            fail(interruption, f"after another save, {found}")
        return code == DONE

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


def fail(interruption: Interruption, problem: str) -> NoReturn:
    """Raise a failure, on a rank: what it is shown by is the interrupted save alone."""
    summary = f"save over a checkpoint, {interruption.what}: {problem}"
    shown_by = "\n".join(told_in_child("saving.save(f'{folder}/one')", interruption))
    raise ConformanceFailure("lost checkpoint", summary, shown_by=shown_by)


def break_off(subject: Subject, material: Material, place: Path, raises: bool) -> None:
    """Save over a checkpoint, broken off in every way."""
    saving, loading = Session(subject, material), Session(subject, material)
    for name, number in (("old", 0), ("new", 1)):
        saving.train(number)
        saving.save(place / name)
    states = {name: loading.attempt(place / name, 2) for name in ("old", "new")}
    broken = Interrupted(saving, loading, states, place)
    for opened in (False, True):
        for number in range(MOST_EVENTS):
            if broken.survives(at_change(number, raises=raises, opened=opened)):
                break
    for size in telling_sizes(place / "new"):
        broken.survives(at_size(size, raises=raises))


def telling_sizes(directory: Path) -> Iterator[int]:
    """None, half and all but one of the bytes of each file."""
    sizes = [path.stat().st_size for path in files_of(directory)]
    yield from sorted({part for each in sizes for part in (0, each // 2, max(0, each - 1))})


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
    with folder() as place, failing_at(call):
        try:
            on_ranks(flat_shards, 1, break_off, Material.of(call), place, raises)
        except ConformanceFailure as failure:
            if failure.kind == "lost checkpoint":
                failure.call = broken_off(call, failure.shown_by)
                failure.shown_by = "print(out, \"- expected ['old' or 'new', 'new']\")"
            raise
    current_tally().comparisons["exact"] += 1


PROGRAM = f"""\
{IMPORTS}
import copy, shutil, tempfile
made = tempfile.TemporaryDirectory()
folder = made.name
def train(trained, n):
    trained.backward((trained.forward(inputs[0][n]).float() * upstream[0][n]).sum(), last=True)
    trained.step()
def state(name):
    loaded = model()
    try: loaded.load(f'{{folder}}/{{name}}')
    except BaseException as error: return f'{{type(error).__name__}}: {{error}}'
    train(loaded, 2)
    return {{n: p.detach().clone() for n, p in loaded.full_parameters().items()}}
def found():
    this, both = state('one'), {{'old': state('old'), 'new': state('new')}}
    same = lambda that: all(torch.equal(this[n], that[n]) for n in that)
    return this if isinstance(this, str) else [name for name in both if same(both[name])]
saving = model()
for n, name in enumerate(('old', 'new')):
    train(saving, n)
    saving.save(f'{{folder}}/{{name}}')
_ = shutil.copytree(f'{{folder}}/old', f'{{folder}}/one')
INTERRUPTED
first = found()
saving.save(f'{{folder}}/one')
"""
"""A save in a process of its own that breaks off, and another one; what is loaded after each."""


def broken_off(call: Call, interrupted: str) -> Course:
    """The program, with this save that is interrupted."""
    options = "".join(f", {name}={source}" for name, source in call.options)
    made = f"model = lambda: flat_shards(copy.deepcopy(modules){options})"
    program = PROGRAM.replace("INTERRUPTED", interrupted)
    return course(call, made, *program.splitlines(), result="[first, found()]")


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


def die_saving(subject: Subject, material: Material, place: Path, rank: int, number: int) -> None:
    """Save over a checkpoint on ranks of which one dies."""
    session = Mortal(subject, material)
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
    rank, number = case.drawn["rank"] % case.saved_on, case.drawn["number"]
    with folder() as place, failing_at(story.base):
        arguments = Material.of(story.base), place, rank, number
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
