"""Checkpoints of sharded models that are damaged, of another model, or only partly written.

Nothing is known of the files: whatever is done to them, loading raises an exception on every rank, or
all that was saved is there all the same.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.failures import ConformanceFailure, Inconclusive
from conformance.harness.flat_checkpoint_cases import CheckpointCase
from conformance.harness.flat_checks import assert_parameters
from conformance.harness.flat_folders import done_once, files_of, folder
from conformance.harness.flat_stories import OTHER_VALUES, Attempt, Story, same
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal

# What is done to a directory


def emptied(path: Path) -> None:
    """A file has no bytes left."""
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    """A file has only its first half."""
    os.truncate(path, path.stat().st_size // 2)


def cut_short(path: Path) -> None:
    """A file lacks its last bytes."""
    os.truncate(path, max(0, path.stat().st_size - 5))


def missing(path: Path) -> None:
    """A file is not there."""
    path.unlink()


def of_zeros(path: Path) -> None:
    """A file has its length and only zeros, as after a power failure."""
    path.write_bytes(bytes(path.stat().st_size))


def exchanged(one: Path, two: Path) -> None:
    """Two files of one size are in each other's place."""
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def copied(one: Path, two: Path) -> None:
    """A file is a copy of another one of the same size."""
    two.write_bytes(one.read_bytes())


FILE_DAMAGES = (truncated, missing, emptied, cut_short, of_zeros)
"""What happens to a file."""
PLACE_DAMAGES = (exchanged, copied)
"""What happens to two files of one size."""


def no_directory(directory: Path) -> None:
    """The directory is not there."""
    shutil.rmtree(directory)


def nothing_in_it(directory: Path) -> None:
    """The directory is empty."""
    shutil.rmtree(directory)
    directory.mkdir()


def a_file_instead(directory: Path) -> None:
    """What should be a directory is a file."""
    shutil.rmtree(directory)
    directory.write_bytes(b"checkpoint")


def only_others(directory: Path) -> None:
    """Whatever is in the directory has nothing to do with a checkpoint."""
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "README.md").write_text("# Notes")


WHOLE_DAMAGES = (no_directory, nothing_in_it, a_file_instead, only_others)
"""What happens to the directory."""
NAMED_DAMAGES = (truncated, missing, emptied, no_directory, nothing_in_it)
"""Those after which an error has a file, or the directory, to name."""

Damage = Callable[..., None]


@dataclass(frozen=True)
class Damaged:
    """A copy of a checkpoint that is damaged."""

    directory: Path
    what: str
    names: tuple[str, ...]
    """The files that it happened to, or the directory."""
    paths: tuple[str, ...]
    """Theirs in the checkpoint."""


def damaged_copies(one: Path, damage: Damage) -> list[Damaged]:
    """Copies of a checkpoint, of which each has the damage at another place."""
    places: list[tuple[Path, ...]]
    files = files_of(one)
    if damage in FILE_DAMAGES:
        places = [(path,) for path in files]
    elif damage in PLACE_DAMAGES:
        places = [pair for pair in combinations(files, 2) if alike_outside(*pair)]
    else:
        places = [(one,)]
    made = []
    for number, paths in enumerate(places):
        copy = one.parent / f"{damage.__name__}-{number}" / one.name
        shutil.copytree(one, copy)
        inside = tuple(str(path.relative_to(one)) for path in paths)
        damage(*(copy / path for path in inside))
        names = tuple(path.name for path in paths)
        what = f"{' '.join(damage.__doc__.split())[:-1]}: {', '.join(names)}"
        made.append(Damaged(copy, what, names, inside))
    return made


def copying(damage: Damage, copies: list[Damaged]) -> tuple[str, ...]:
    """Lines that make the same copies of the checkpoint ``one``."""
    signature, _, *does = inspect.getsource(damage).splitlines()  # without the docstring
    lines = [
        "import os, shutil; from pathlib import Path",
        signature,
        *does,
        "def damaged_copy(name, *paths):",
    ]
    lines += ["    shutil.copytree(folder / 'one', folder / name)"]
    lines += [f"    {damage.__name__}(*(folder / name / path for path in paths))"]
    for copy in copies:
        name = "/".join(copy.directory.parts[-2:])
        lines.append(f"damaged_copy({', '.join(map(repr, (name, *copy.paths)))})")
    return tuple(lines)


def alike_outside(one: Path, two: Path) -> bool:
    """Whether two files have one size and different contents."""
    return one.stat().st_size == two.stat().st_size and one.read_bytes() != two.read_bytes()


# Refused


def attempts_at(
    story: Story, place: Path, damage: Damage
) -> tuple[list[Attempt], list[tuple[Damaged, list[Attempt]]], list[Tensor]]:
    """What comes of loading a checkpoint, and each of its damaged copies, on every rank.

    Last are the outputs of a new model.
    """
    case = story.case
    story.on(case.saved_on, ("train", 0), ("save", place / "one"))
    copies = done_once(damaged_copies, place / "one", damage)
    if not copies:
        raise Inconclusive("the checkpoint has no two files of one size")
    story.tell(*copying(damage, copies))
    loads = [("attempt", copy.directory) for copy in copies]
    gave = story.loads(case.loaded_on, ("outputs", 0), ("attempt", place / "one"), *loads)
    for each in gave:
        if each[1].error is not None:
            summary = f"an undamaged checkpoint is refused: {each[1].error[:200]}"
            raise ConformanceFailure("refused", summary, call=story.call)
    outputs, undamaged, *others = zip(*gave, strict=True)
    return list(undamaged), list(zip(copies, map(list, others), strict=True)), list(outputs)


def drawn_damage(case: CheckpointCase, damages: tuple[Damage, ...]) -> Damage:
    """One of the kinds of damage, by the case's drawn number."""
    return damages[case.drawn["kind"] % len(damages)]


def assert_refused_or_whole(
    flat_shards: Subject, case: CheckpointCase, damages: tuple[Damage, ...]
) -> None:
    """A damaged checkpoint is refused on every rank, or is loaded as the undamaged one is."""
    story = Story(flat_shards, case)
    with folder() as place:
        undamaged, found, _ = attempts_at(story, place, drawn_damage(case, damages))
        for copy, attempts in found:
            if refused(attempts):
                continue
            if damages is WHOLE_DAMAGES:
                summary = f"a checkpoint is loaded although: {copy.what}"
                raise ConformanceFailure("accepted", summary, call=story.call)
            for rank, (attempt, right) in enumerate(zip(attempts, undamaged, strict=True)):
                for what in ("parameters", "later"):
                    assert_same_state(
                        getattr(attempt, what), getattr(right, what), story, rank, copy.what
                    )


def refused(attempts: list[Attempt]) -> bool:
    """Whether loading raised an exception: on all ranks if it did on one."""
    current_tally().comparisons["exact"] += 1
    return attempts[0].error is not None


def assert_same_state(
    found: dict[str, Tensor], right: dict[str, Tensor], story: Story, rank: int, what: str
) -> None:
    """Parameters of a damaged checkpoint that was not refused are those of the undamaged one."""
    if not same(found, right):
        name = next(name for name in right if not bitwise_equal(found[name], right[name]))
        summary = f"rank {rank} loads other values of {name} although: {what}"
        raise ConformanceFailure("accepted", summary, call=story.call)


def assert_unharmed(flat_shards: Subject, case: CheckpointCase) -> None:
    """After loading was refused the model is as it was or refuses to be used, and can load again."""
    story = Story(flat_shards, case)
    with folder() as place:
        undamaged, found, outputs = attempts_at(story, place, drawn_damage(case, FILE_DAMAGES))
        for _, attempts in found:
            if refused(attempts):
                assert_as_it_was(story, story.other, attempts, outputs)
        bad, _ = found[-1]
        later = ("load", place / "one"), ("train", 1), ("parameters",)
        again = story.loads(case.loaded_on, ("try_load", bad.directory), *later)
        for rank, (parameters, right) in enumerate(zip(again, undamaged, strict=True)):
            when = f"of rank {rank} of a model that was refused another checkpoint before"
            assert_parameters([parameters], right.later, story.call, when=when)


def assert_as_it_was(
    story: Story, call: Call, attempts: list[Attempt], outputs: list[Tensor]
) -> None:
    """Models that were refused a checkpoint have their parameters and outputs, or do not give any."""
    before = given(call)
    for rank, attempt in enumerate(attempts):
        when = f"of rank {rank} after loading was refused"
        if attempt.parameters is not None:
            assert_parameters([attempt.parameters], before, story.call, when=when)
        if attempt.later is not None and not bitwise_equal(attempt.later, outputs[rank]):
            summary = f"outputs {when} are not those of before"
            raise ConformanceFailure("half loaded", summary, call=story.call)


def given(call: Call) -> dict[str, Tensor]:
    """The parameters of the modules that a call's lines make in the end."""
    whole = nn.Sequential(*call.named("modules"))
    return {name: p.detach() for name, p in whole.named_parameters()}


def assert_names_file(flat_shards: Subject, case: CheckpointCase) -> None:
    """The error names the file that is damaged, a parameter, or the directory if that is wrong."""
    story = Story(flat_shards, case)
    damage = drawn_damage(case, NAMED_DAMAGES)
    with folder() as place:
        _, found, _ = attempts_at(story, place, damage)
        for copy, attempts in found:
            if refused(attempts):
                names = (*copy.names, *case.names())
                if damage is missing:  # who lists a directory finds that something is missing in it
                    names += (str(copy.directory),)
                assert_said(story, attempts, names, copy.what)


def assert_said(story: Story, attempts: list[Attempt], names: tuple[str, ...], what: str) -> None:
    """Fail unless the error of every rank has one of the names."""
    for rank, attempt in enumerate(attempts):
        if not any(name in attempt.error for name in names):
            listed = " or ".join(names[:2])
            summary = f"the error of rank {rank} does not name {listed}: {attempt.error[:200]}"
            details = (f"{what}",)
            raise ConformanceFailure("unclear error", summary, details=details, call=story.call)


# Of another model


@dataclass(frozen=True)
class OtherModel:
    """A model that does not fit a checkpoint, and what an error names."""

    saved: Call
    loading: Call
    names: tuple[str, ...]
    what: str


TRANSPOSED = "modules[1].unused = nn.Parameter(modules[1].unused.data.T.contiguous())"
RENAMED = "modules[1].register_parameter('other', modules[1]._parameters.pop('unused'))"


def other_model(case: CheckpointCase) -> OtherModel:
    """One of the ways in which the checkpoint of one model does not fit another."""
    case = replace(case, unused=False, tied=False)
    more, tied = replace(case, unused=True), replace(case, tied=True)
    longer, wider = replace(case, vocab=case.vocab + 1), replace(case, hidden=case.hidden + 1)
    deeper = replace(case, blocks=case.blocks + 1)
    last = case.blocks + 1
    embedding = ("0.0.weight", f"{last}.1.weight", f"{last}.1.bias")
    inner = tuple(name for name in case.names() if name.startswith("1."))
    both = (*case.names(), *deeper.names())
    ways = [
        (more, more, ("1.unused",), "a parameter is transposed", TRANSPOSED),
        (more, more, ("1.unused", "1.other"), "a parameter has another name", RENAMED),
        (case, more, ("1.unused",), "a parameter is missing"),
        (more, case, ("1.unused",), "a parameter is unknown"),
        (tied, case, (f"{last}.1.weight",), "the head is the embedding"),
        (case, longer, embedding, "the vocabulary is one token smaller"),
        (case, wider, inner, "a block is one channel narrower"),
        (case, deeper, both, "a block is missing"),
        (deeper, case, both, "there is a block too much"),
    ]
    saved, loading, names, what, *edits = ways[case.drawn["kind"] % len(ways)]
    return OtherModel(saved.call(), loading.call(OTHER_VALUES, *edits), names, what)


def attempts_of_other_model(
    flat_shards: Subject, case: CheckpointCase, place: Path
) -> tuple[Story, OtherModel, list[Attempt], list[Tensor]]:
    """What comes of loading the checkpoint of one model into another."""
    other = other_model(case)
    story = Story(flat_shards, case)
    story.on(case.saved_on, ("save", place / "one"), of=other.saved)
    steps = ("outputs", 0), ("attempt", place / "one")
    gave = story.on(case.loaded_on, *steps, of=other.loading)
    outputs, attempts = zip(*gave, strict=True)
    return story, other, list(attempts), list(outputs)


def assert_other_model_refused(flat_shards: Subject, case: CheckpointCase) -> None:
    """The checkpoint of another model is refused on every rank, and the model is as it was."""
    with folder() as place:
        story, other, attempts, outputs = attempts_of_other_model(flat_shards, case, place)
        if not refused(attempts):
            summary = f"the checkpoint of another model is loaded although {other.what}"
            raise ConformanceFailure("accepted", summary, call=story.call)
        assert_as_it_was(story, other.loading, attempts, outputs)


def assert_names_parameter(flat_shards: Subject, case: CheckpointCase) -> None:
    """The error names a parameter that does not fit."""
    with folder() as place:
        story, other, attempts, _ = attempts_of_other_model(flat_shards, case, place)
        if not refused(attempts):
            raise Inconclusive("the checkpoint was not refused")
        assert_said(story, attempts, other.names, other.what)
