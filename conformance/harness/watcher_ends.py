"""Checks of what is left when a process ends at any moment, and of processes side by side."""

from __future__ import annotations

import signal

from conformance.harness.subject import Subject
from conformance.harness.watcher_cases import WatcherCase
from conformance.harness.watcher_checks import assert_gave
from conformance.harness.watcher_story import Story, counted

# Lines that are broken off


def assert_torn(subject: Subject, case: WatcherCase, encoded: str | None = None) -> None:
    """The last line is broken off at any length."""
    *before, last = case.names
    with Story(subject, case) as story:
        story.write(*before)
        story.watch()
        story.poll(*before)
        story.write(last)
        story.poll(last)
        story.assert_results(case.names, "before a line is broken off")
        if encoded is not None:
            story.do(f"rewrite({encoded})")
        whole = story.do("whole = open(results, 'rb').read()")
        begin = whole.rfind(b"\n", 0, len(whole) - 1) + 1
        lengths = torn_lengths(whole[begin:], case.which)
        for length in lengths:
            story.do(f"tear({length})")
            story.watch()
            done = length == len(whole) - begin - 1  # only its end is missing: either is right
            seen = len(story.log())
            story.do("polled = watcher.poll()")
            shown = story.log()[seen:]
            because = f"whose line was broken off after {length} bytes"
            story.assert_shown(shown, [last] if shown or not done else [], because)
            if not story.content().startswith(whole[:begin]):
                story.fail("rewritten", "lines before the one that was broken off are changed")
            story.do(f"write('checkpoint-5000', single, {case.first + 60})")
            story.codes["checkpoint-5000"] = case.first + 60
            story.poll("checkpoint-5000", because="which came after a line was broken off")
            story.assert_results([*case.names, "checkpoint-5000"])
            story.watch()
            story.poll(because="which has results")
            story.do("remove('checkpoint-5000')")
            story.do("_ = open(results, 'wb').write(whole)")


def torn_lengths(line: bytes, which: int) -> list[int]:
    """Where a line is broken off: its ends, in the middle of characters, and one more place."""
    size = len(line) - 1
    inside = [i for i in range(1, size) if line[i] & 0xC0 == 0x80]
    chosen = [inside[which % len(inside)]] if inside else [1 + which % (size - 1)]
    return sorted({(1, size - 1, size)[which % 3], *chosen})


WITH_CHARACTERS = (
    "lambda line: json.dumps({'host': 'nœud-é', **line, 'by': '雪'}, ensure_ascii=False)"
)


def assert_torn_alone(subject: Subject, case: WatcherCase) -> None:
    """The only line of the file is broken off."""
    with Story(subject, case) as story:
        story.write(case.chosen)
        story.watch()
        story.poll(case.chosen)
        story.assert_results([case.chosen], "before a line is broken off")
        story.do(f"tear({1 + case.which % (len(story.content()) - 3)})")
        story.watch()
        story.poll(case.chosen, because="whose line was broken off")
        story.assert_results([case.chosen])


def assert_torn_failure(subject: Subject, case: WatcherCase) -> None:
    """The line of a failure is broken off: that attempt is not counted, and there is no such line."""
    with Story(subject, case, attempts="2") as story:
        story.write(case.chosen)
        story.acts(case.chosen, *["raising(RuntimeError('no'))"] * 2)
        story.watch()
        story.poll(case.chosen)
        story.poll(case.chosen)
        assert_errors(story, 2)
        first = story.content().index(b"\n") + 1
        story.do(f"tear({1 + case.which % (len(story.content()) - first - 3)})")
        story.watch()
        story.poll(case.chosen, because="of which one failure is on record")
        story.assert_results([case.chosen])
        assert_errors(story, 1)


def assert_errors(story: Story, number: int) -> None:
    """So many failures are on record."""
    if len(story.errors()) != number:
        story.fail("wrong results", f"{len(story.errors())} errors, expected {number}")


CHILD = "in_child({})"
NEW = "checkpoint_watcher(directory, evaluate, results=results).poll()"
DIED, ENDED = 77, 0


def assert_dies_evaluating(subject: Subject, case: WatcherCase) -> None:
    """The process ends in an evaluation."""
    done = case.names[: case.names.index(case.chosen)]
    with Story(subject, case, attempts="1") as story:
        story.write_all()
        story.acts(case.chosen, f"lambda: os._exit({DIED})")
        story.do(f"status = {CHILD.format(f'lambda: {NEW}')}")
        assert_ended(story, DIED)
        shown = story.log()
        story.assert_shown(shown, [*done, case.chosen], "until the process ended")
        story.acts(case.chosen)
        story.watch()
        story.poll(*case.names[len(done) :], because="after a process ended in an evaluation")
        story.assert_results(case.names)
        story.poll()


def assert_ended(story: Story, *allowed: int) -> int:
    """How the process ended; fails where it raised."""
    counted()
    status = story.namespace["status"]
    if status not in allowed:
        story.fail("ended", f"a process that polls ended with status {status}")
    return status


EVENTS = 3
"""In how many cases all events are tried together."""


def assert_dies_at_files(subject: Subject, case: WatcherCase) -> None:
    """The process ends where it opens, locks, renames, or removes a file."""
    for number in range(case.which % EVENTS, 60, EVENTS):
        with Story(subject, case) as story:
            story.write_all()
            act = f"dying_at({number}, lambda: {NEW})"
            story.do(f"status = {CHILD.format(act)}")
            status = assert_ended(story, DIED, ENDED)
            assert_finishes(story)
        if status == ENDED:
            return


def assert_finishes(story: Story) -> None:
    """Another watcher does the rest, and nothing that has a line again."""
    names = story.case.names
    content = story.content()
    done = [name for name in names if f'"{name}"'.encode() in content[: content.rfind(b"\n") + 1]]
    before = [each["name"] for each in story.log()]
    for name in before[:-1]:
        if name not in done:
            story.fail("lost results", f"{name} was evaluated before {before[-1]} and has no line")
    story.watch()
    polled = story.do("polled = watcher.poll()")
    shown = story.log()[len(before) :]
    rest = [name for name in names if name not in done]
    if content and not content.endswith(b"\n") and [each["name"] for each in shown] == rest[1:]:
        rest = rest[1:]  # of whose line only the end was missing
    story.assert_shown(shown, rest, "after a process ended")
    assert_gave(story, polled, rest)
    story.assert_results(names)
    story.poll()


def assert_dies_writing(subject: Subject, case: WatcherCase) -> None:
    """The process is killed when a part of a line is written."""
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, f"dying_in_write({(0, 1, 17, 60, 100)[case.which % 5]})")
        story.do(f"status = {CHILD.format(f'lambda: {NEW}')}")
        if assert_ended(story, -signal.SIGXFSZ, ENDED) == ENDED:
            story.fail("ended", "a line of results is written in fewer bytes than it needs")
        story.acts(case.chosen)
        assert_finishes(story)


def assert_two_processes(subject: Subject, case: WatcherCase) -> None:
    """Two processes poll at the same time."""
    slow = "lambda: __import__('time').sleep(0.02)"
    with Story(subject, case) as story:
        story.write_all()
        for name in case.names:
            story.acts(name, slow)
        story.do(f"status = in_children(2, lambda: {NEW})")
        assert_ended(story, ENDED)
        shown = sorted((each["name"] for each in story.log()), key=case.names.index)
        if shown != case.names:
            story.fail("evaluated", f"two processes evaluate {shown}")
        story.assert_results(case.names)
        story.watch()
        story.poll(because="which one of two processes has evaluated")
