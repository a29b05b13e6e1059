"""Checks of the file of results: its lines, the digests in them, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

from conformance.harness.failures import ConformanceFailure
from conformance.harness.subject import Subject
from conformance.harness.watcher_cases import WatcherCase
from conformance.harness.watcher_story import Story, as_json, counted, metrics

# Lines


def assert_lines(subject: Subject, case: WatcherCase) -> None:
    """A line for each, with name, step, digest and results."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.assert_results(case.names)
        for record in story.records():
            step = int(str(record.get("checkpoint")).removeprefix("checkpoint-"))
            if type(record.get("step")) is not int or record["step"] != step:
                story.fail("wrong results", f"step is {record.get('step')!r}, expected {step}")
            if not isinstance(record.get("digest"), str) or not record["digest"]:
                story.fail("wrong results", f"digest is {record.get('digest')!r}, expected text")
            if "error" in record:
                story.fail("wrong results", f"there is an error: {record['error']!r}")


VALUES = (
    "{'loss': 0.1, 'ppl': 2.718281828459045, 'tiny': 5e-324, 'huge': 1.7976931348623157e308}",
    "{'tokens': 2**63 + 1, 'negative': -(2**60) - 1, 'zero': 0, 'minus': -0.0}",
    "{'exact, \"match\"': 1 / 3, 'Größe\\n±\\u2028': 1e-7, '': 3, 'a.b/c': 123456789.123456789}",
    "{}",
    "{'accuracy': 1.0, 'correct': 1}",
)


def assert_values(subject: Subject, case: WatcherCase, *values: str) -> None:
    """What ``evaluate`` gives is in the file, exactly."""
    source = values[case.which % len(values)]
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, f"lambda: {source}")
        story.watch()
        story.poll(*case.names)
        found = of(story, case.chosen)
        expected = eval(source)
        if as_json(found) != as_json(expected):  # tells 1 from 1.0, and keeps every digit
            story.fail("wrong results", f"results are {found!r}, expected {expected!r}")
        counted()


def of(story: Story, name: str) -> Any:
    """The results of a checkpoint; fails unless there is one line."""
    found = [record["results"] for record in story.results() if record.get("checkpoint") == name]
    if len(found) != 1:
        story.fail("wrong results", f"{len(found)} lines have results of {name}, expected 1")
    return found[0]


NESTED = (
    "{'arc': {'acc,none': 0.25, 'acc_norm,none': 1 / 3}, 'wiki': {'ppl': {'word': 12.5}}}",
    "{'loss': 0.5, 'by_layer': [0.25, 1 / 3, 2], 'task': 'arc', 'greedy': True, 'none': None}",
)


def assert_own_results(subject: Subject, case: WatcherCase) -> None:
    """The results of each checkpoint are its own, whatever was evaluated before."""
    with Story(subject, case) as story:
        for name in reversed(case.names):
            story.write(name)
            story.watch()
            story.poll(name)
        story.write(case.chosen, more=2)
        story.poll(case.chosen, because="which was replaced")
        expected = {name: [metrics(case.code(name))] for name in case.names}
        expected[case.chosen].append(metrics(story.codes[case.chosen]))
        for name, values in expected.items():
            found = [r["results"] for r in story.results() if r.get("checkpoint") == name]
            if as_json(found) != as_json(values):
                story.fail("wrong results", f"results of {name} are {found}, expected {values}")
        counted()


def assert_only_appended(subject: Subject, case: WatcherCase) -> None:
    """Every byte of a line stays where it is."""
    with Story(subject, case, attempts="2") as story:
        before = b""
        for name in (case.chosen, *case.others):
            story.write(name)
            story.acts(name, "raising(RuntimeError('no'))")
            story.watch()
            for _ in range(2):
                story.poll(name)
                content = story.content()
                counted()
                if not content.startswith(before):
                    story.fail("rewritten", "lines that were there before are changed")
                added = content[len(before) :]
                if added.count(b"\n") != 1 or not added.endswith(b"\n"):
                    story.fail("wrong results", f"an evaluation adds {added[:200]!r}, not one line")
                before = content
            if case.which % 3 == 0:
                story.do(f"rewrite({OTHER_SPACES})")
                before = story.content()
        story.poll()
        if story.content() != before:
            story.fail("rewritten", "a poll without evaluations changes the file")


OTHER_SPACES = "lambda line: json.dumps({'by': 'another', **line}, separators=(' , ', ' : '))"


def assert_place(subject: Subject, case: WatcherCase, place: str) -> None:
    """Results in a folder that is not there, or in the directory itself."""
    with Story(subject, case, place=place) as story:
        if case.which % 2:
            story.do("os.rmdir(directory)")
        story.watch()
        story.poll()
        story.write_all()
        story.poll(*case.names)
        story.poll()
        story.watch()
        story.poll()
        story.assert_results(case.names)


UNWRITABLE = (
    "{'loss': object()}",
    "{'loss': 0.5, 'name': b'bytes'}",
    "{'loss': {1.5, 2.5}}",
    "[1, 2]",
    "0.5",
)


def assert_unwritable(subject: Subject, case: WatcherCase) -> None:
    """What is no mapping of names to numbers is a failure of that checkpoint."""
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, f"lambda: {UNWRITABLE[case.which % len(UNWRITABLE)]}")
        story.watch()
        story.poll(*case.names)
        story.assert_results(case.others, because="where one evaluation gave no metrics")
        found = [record.get("checkpoint") for record in story.errors()]
        if found != [case.chosen]:
            story.fail("wrong results", f"errors are of {found}, expected {case.chosen}")


def assert_not_a_number(subject: Subject, case: WatcherCase) -> None:
    """A loss that is not finite is kept, in Python's spelling, or refused; never another number."""
    source = ("torch.nan", "torch.inf", "-torch.inf")[case.which % 3]
    with Story(subject, case, attempts="1") as story:
        story.write_all()
        story.acts(case.chosen, f"lambda: {{'loss': {source}}}")
        story.watch()
        story.poll(*case.names, because=f"of which {case.chosen} has a loss that is not finite")
        story.watch()
        story.poll()
        found = [r for r in story.records() if r.get("checkpoint") == case.chosen]
        if len(found) != 1:
            story.fail("wrong results", f"{len(found)} lines are about {case.chosen}, expected 1")
        results = found[0].get("results", {})
        value = results.get("loss") if isinstance(results, dict) else results
        if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
            story.fail("wrong results", f"the loss is {value!r}, expected {source}")


# Digests


def digests(story: Story) -> dict[str, list[str]]:
    """The digests of results, by checkpoint."""
    found: dict[str, list[str]] = {}
    for record in story.results():
        found.setdefault(record.get("checkpoint"), []).append(record.get("digest"))
    return found


def assert_digests_differ(subject: Subject, case: WatcherCase) -> None:
    """All checkpoints have the same names, shapes and sizes of files, and other weights."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.write(case.chosen, more=1)
        story.poll(case.chosen)
        found = [digest for each in digests(story).values() for digest in each]
        counted()
        if len(set(found)) != len(found):
            story.fail("wrong digest", f"{len(found)} different weights have digests {found}")


def assert_digest_of_each_file(subject: Subject, case: WatcherCase) -> None:
    """One element of one file is changed, and nothing else; its length stays."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        name = case.chosen
        story.do(f"change_one({name!r}, {case.which})")
        if case.which % 2:
            story.watch()
        before = len(story.log())
        story.do("polled = watcher.poll()")
        shown = [each["name"] for each in story.log()[before:]]
        if shown != [name]:
            story.fail("not evaluated", f"{name} has other weights, and evaluated are {shown}")
        one, two = digests_of_records(story, name)
        if one == two:
            story.fail("wrong digest", f"{name} has other weights, and digest {one} again")
        counted()


def digests_of_records(story: Story, name: str) -> tuple[str, str]:
    """The digests of two lines about a checkpoint."""
    found = [r.get("digest") for r in story.records() if r.get("checkpoint") == name]
    if len(found) != 2:
        story.fail("wrong results", f"{len(found)} lines are about {name}, expected 2")
    return found[0], found[1]


def assert_digest_of_weights(subject: Subject, case: WatcherCase) -> None:
    """The same files in another folder, at another time, have the same digest."""
    with Story(subject, case) as story:
        chosen, copy = case.chosen, "checkpoint-5000"
        story.write_all()
        story.do(f"write({copy!r}, {case.kind(chosen)}, {story.codes[chosen]})")
        story.do(f"os.utime(os.path.join(directory, {copy!r}, 'config.json'), (1, 1))")
        story.codes[copy] = story.codes[chosen]
        story.watch()
        story.poll(*case.names, copy)
        found = digests(story)
        counted()
        if found.get(copy) != found.get(chosen):
            summary = f"the same weights have digests {found.get(chosen)} and {found.get(copy)}"
            story.fail("wrong digest", summary)


def assert_replaced(subject: Subject, case: WatcherCase) -> None:
    """A checkpoint that has other weights is evaluated again, by this watcher or the next."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.write(case.chosen, more=4)
        if case.which % 2:
            story.watch()
        story.poll(case.chosen, because="which was replaced")
        story.poll()
        found = [r["results"] for r in story.results() if r.get("checkpoint") == case.chosen]
        expected = [metrics(case.code(case.chosen) + more) for more in (0, 4)]
        if as_json(found) != as_json(expected):
            story.fail("wrong results", f"{case.chosen} has {found}, expected {expected}")


def assert_replaced_meanwhile(subject: Subject, case: WatcherCase) -> None:
    """A checkpoint that is replaced while it is evaluated is evaluated again."""
    chosen = case.chosen
    with Story(subject, case) as story:
        story.write_all()
        code = story.codes[chosen]
        story.acts(chosen, f"lambda: write({chosen!r}, {case.kind(chosen)}, {code + 6})")
        story.watch()
        story.poll(*case.names)
        story.codes[chosen] = code + 6
        if case.which % 2:
            story.watch()
        story.poll(chosen, because="which was replaced while it was evaluated")
        story.poll()
        found = [r["results"] for r in story.results() if r.get("checkpoint") == chosen]
        if as_json(metrics(code + 6)) not in [as_json(each) for each in found]:
            story.fail("wrong results", f"{chosen} has {found}, not those of its weights")


# Refused


def assert_refuses_attempts(subject: Subject, case: WatcherCase) -> None:
    """Fewer than one attempt."""
    with Story(subject, case) as story:
        story.watch()
        value = (0, -1, -3)[case.which % 3]
        error = raised(story, lambda: story.watch(attempts=str(value)))
        counted()
        if error is None:
            story.fail("accepted", f"attempts={value} raises nothing")


def raised(story: Story, act: Any) -> Exception | None:
    """The exception of the implementation that something raises, if it does."""
    try:
        act()
    except ConformanceFailure as failure:
        if failure.kind.startswith("raised ") and isinstance(failure.__cause__, Exception):
            return failure.__cause__
        raise
    return None


GARBAGE = (
    b"{'checkpoint': 'checkpoint-1'}",
    b'{"checkpoint": "checkpoint-900", "step": 900, "dig',
    b"<html>",
    b"\xff\xfe\x00",
    b'{"a": 1}{"b": 2}',
)


def assert_refuses_garbage(subject: Subject, case: WatcherCase, *, named: bool) -> None:
    """A line in the middle that is not JSON: nothing is evaluated, and the file stays as it is."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.assert_results(case.names)
        lines = story.content().split(b"\n")
        number = case.which % (len(lines) - 1)
        lines.insert(number, GARBAGE[case.which % len(GARBAGE)])
        damaged = b"\n".join(lines)
        story.do(f"open(results, 'wb').write({damaged!r})")
        story.write(case.chosen, more=5)
        before = len(story.log())

        def act() -> None:
            story.watch()
            story.do("polled = watcher.poll()")

        error = raised(story, act)
        counted()
        if error is None:
            story.fail("accepted", f"line {number + 1} of the results is not JSON, nothing raises")
        if story.content() != damaged:
            story.fail("rewritten", "a file of results that is refused was changed")
        if len(story.log()) != before:
            story.fail("evaluated", "a checkpoint is evaluated where the results cannot be read")
        said = str(error).replace(str(story.path("results").parent), "")
        if named and not (re.search(rf"\b{number + 1}\b", said) and "results.jsonl" in said):
            summary = f"the error names not results.jsonl and line {number + 1}: {said[:200]}"
            story.fail("unclear error", summary)
