"""Checks that checkpoints which are not whole are left for later, whatever is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from conformance.harness import watcher_program
from conformance.harness.subject import Subject
from conformance.harness.watcher_cases import WatcherCase
from conformance.harness.watcher_story import Story

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
METADATA = "compressed_metadata.json"

Damage = Callable[[Story, str], None]
"""Takes something from the checkpoint that it is given."""


def weight_files(story: Story, name: str) -> list[str]:
    """The files of tensors of a checkpoint, by their paths in it."""
    files = getattr(watcher_program, story.case.kind(name))(1)
    return [path for path in files if not path.endswith(".json")]


def picked(story: Story, choices: list[str]) -> str:
    """One of them, by the case's number."""
    return choices[story.case.which // 5 % len(choices)]


def without(*paths: str) -> Damage:
    """Some files are not there yet."""
    return lambda story, name: story.write(name, without=paths)


def without_weights(story: Story, name: str) -> None:
    """No file of weights is there, nor what names them."""
    story.write(name, without=[*weight_files(story, name), INDEX, METADATA])


def without_one(story: Story, name: str) -> None:
    """One of the files of weights is not there, which a file names."""
    choices = [path for path in weight_files(story, name) if not path.startswith("non_moe")]
    story.write(name, without=[picked(story, choices)])


def without_others(story: Story, name: str) -> None:
    """The weights that are not of experts are not there."""
    choices = [path for path in weight_files(story, name) if path.startswith("non_moe")]
    story.write(name, without=choices)


def without_layer(story: Story, name: str) -> None:
    """The folder of a layer is not there."""
    layer = picked(story, [f"layer_{i}/" for i in watcher_program.LAYERS])
    story.write(name, without=[p for p in weight_files(story, name) if p.startswith(layer)])


def assert_left(subject: Subject, case: WatcherCase, damage: Damage) -> None:
    """It is left for later, takes no attempt, and holds nothing up; then it is evaluated."""
    chosen = case.chosen
    with Story(subject, case, attempts="1") as story:
        story.write_all()
        damage(story, chosen)
        story.watch()
        story.poll(*case.others)
        story.poll()
        if any(record.get("checkpoint") == chosen for record in story.records()):
            story.fail("partial", f"there is a line about {chosen}, which is not whole")
        if case.which % 2:
            story.watch()
        story.complete(chosen)
        story.poll(chosen, because="which is whole now")
        story.poll()
        story.assert_results(case.names)


def assert_cut_left(
    subject: Subject, case: WatcherCase, paths: Callable[[Story, str], list[str]]
) -> None:
    """A file is left for later at every shorter length that there is to try."""
    chosen = case.chosen
    with Story(subject, case, attempts="1") as story:
        story.write_all()
        path = picked(story, paths(story, chosen))
        story.watch()
        for number, length in enumerate(shorter(story.path("directory") / chosen / path)):
            story.do(f"cut({chosen!r}, {path!r}, {length})")
            due = case.others if number == 0 else []
            story.poll(*due, because=f"where {path} has {length} bytes")
        story.complete(chosen)
        story.poll(chosen, because="which is whole now")
        story.assert_results(case.names)


def shorter(path: Path) -> list[int]:
    """Lengths at which a file may be broken off, the longest one first."""
    size = os.path.getsize(path)
    lengths = {size - 1, size // 2, size // 3, 8, 4, 1, 0}
    if path.suffix == ".safetensors":
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        lengths |= {size - 4, header + 1, header, header - 1}
    return sorted((length for length in lengths if length < size), reverse=True)


def config_file(story: Story, name: str) -> list[str]:
    """The configuration."""
    return [CONFIG]


def index_file(story: Story, name: str) -> list[str]:
    """The index of shards."""
    return [INDEX]


def metadata_file(story: Story, name: str) -> list[str]:
    """The metadata of a compressed model."""
    return [METADATA]


def too_long(story: Story, name: str) -> None:
    """A file has some bytes more than its header says."""
    path = picked(story, weight_files(story, name))
    story.write(name)
    path = f"os.path.join(directory, {name!r}, {path!r})"
    story.do(f"open({path}, 'ab').write(bytes({1 + story.case.which % 9}))")


def assert_each_layout(subject: Subject, case: WatcherCase) -> None:
    """Whole checkpoints of this layout are evaluated."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.assert_results(case.names)


def assert_vanishing(subject: Subject, case: WatcherCase) -> None:
    """A checkpoint is removed while an earlier one is evaluated, and may come again."""
    first, *_, last = case.names
    with Story(subject, case, attempts="1") as story:
        story.write_all()
        story.acts(first, f"lambda: remove({last!r})")
        story.watch()
        rest = [name for name in case.names if name != last]
        story.poll(*rest, because=f"and {last} vanishes meanwhile")
        story.poll()
        story.assert_results(rest, because=f"where {last} vanished")
        if any(record.get("checkpoint") == last for record in story.records()):
            story.fail("partial", f"there is a line about {last}, which was not there")
        story.write(last, more=1)
        story.poll(last, because="which is there again")


def assert_removed_stays_done(subject: Subject, case: WatcherCase) -> None:
    """Lines of checkpoints that are gone by now are in nobody's way."""
    with Story(subject, case) as story:
        story.write(*case.others)
        story.watch()
        story.poll(*case.others)
        for name in case.others:
            story.do(f"remove({name!r})")
        story.write(case.chosen)
        story.watch()
        story.poll(case.chosen)
        story.assert_results(case.names)
