"""Checks of watchers: which checkpoints are evaluated, in which order, how often, and failures."""

from __future__ import annotations

import ast
import os

from conformance.harness.subject import Subject
from conformance.harness.watcher_cases import WatcherCase
from conformance.harness.watcher_story import Story, counted

# Order, and what poll() gives


def assert_numeric_order(subject: Subject, case: WatcherCase) -> None:
    """All checkpoints of a run, in one poll."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names, because="of steps that are numbers")


def assert_order_of_results(subject: Subject, case: WatcherCase) -> None:
    """Their lines."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        found = [record.get("checkpoint") for record in story.records()]
        if found != case.names:
            story.fail("wrong order", f"the lines are of {found}, expected {case.names}")


def assert_gives_names(subject: Subject, case: WatcherCase) -> None:
    """What polls give: names of those that were evaluated now, without those that failed."""
    with Story(subject, case, attempts="2") as story:
        story.watch()
        assert_gave(story, story.poll(), [])
        story.write_all()
        story.acts(case.chosen, "raising(RuntimeError('no memory'))")
        assert_gave(story, story.poll(*case.names), case.others)
        assert_gave(story, story.poll(case.chosen), [case.chosen])
        assert_gave(story, story.poll(), [])


def assert_gave(story: Story, polled: object, names: list[str]) -> None:
    """Fail unless a poll gave these names."""
    counted()
    try:
        found = list(polled)  # type: ignore[call-overload]
    except TypeError:
        story.fail("wrong type", f"poll() gives a {type(polled).__name__}, expected a sequence")
    if isinstance(polled, str) or found != names:
        story.fail("wrong names", f"poll() gives {polled!r}, expected {names!r}")


# Once


def assert_once(subject: Subject, case: WatcherCase) -> None:
    """Several polls of one watcher."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        for _ in range(3):
            story.poll(because="which was done before")
        story.assert_results(case.names)


def assert_once_over_restarts(subject: Subject, case: WatcherCase) -> None:
    """Several watchers, one after another."""
    first, *later = case.names
    with Story(subject, case) as story:
        story.write(first)
        story.watch()
        story.poll(first)
        story.write(*reversed(later))
        for names in (later, []):
            story.watch()
            story.poll(*names, because="after a restart")
        story.assert_results(case.names)


OTHER_LINES = (
    "lambda line: json.dumps(dict(reversed(line.items())) | {'seconds': 2.5})",
    "lambda line: json.dumps({'host': 'nœud\\u2028\\x85', **line}, ensure_ascii=False)",
    "lambda line: json.dumps(line, separators=(',', ':'), sort_keys=True)",
    "lambda line: '  ' + json.dumps({**line, 'config': {'results': None}}) + ' '",
)
"""How another watcher may write the same."""


def assert_once_by_any(subject: Subject, case: WatcherCase) -> None:
    """Results in the form in which another watcher may have written them."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.do(f"rewrite({OTHER_LINES[case.which % len(OTHER_LINES)]})")
        story.watch()
        story.poll(because="whose results another watcher has written")


def assert_once_side_by_side(subject: Subject, case: WatcherCase) -> None:
    """Two watchers that were made before either polled, in turns."""
    first, *later = case.names
    with Story(subject, case) as story:
        story.write(first)
        story.watch()
        story.do("one = watcher")
        story.watch()
        story.poll(first)
        story.write(*later)
        story.do("watcher, two = one, watcher")
        story.poll(*later, because="by the one of two watchers that polls second")
        story.do("watcher = two")
        story.poll(because="by the one of two watchers that polled first")
        story.assert_results(case.names)


def assert_other_results(subject: Subject, case: WatcherCase) -> None:
    """What was evaluated is told by the results alone."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        story.do("results = os.path.join(folder.name, 'other.jsonl')")
        story.watch()
        story.poll(*case.names, because="of which another file has the results")
        story.assert_results(case.names)


def assert_later_ones(subject: Subject, case: WatcherCase) -> None:
    """Checkpoints that come while the watcher lives, the ones before as well as those behind."""
    with Story(subject, case) as story:
        story.watch()
        for name in (case.chosen, *reversed(case.others)):
            story.write(name)
            story.poll(name, because="which is new")
        story.assert_results(case.names)


def assert_same_weights_twice(subject: Subject, case: WatcherCase) -> None:
    """Two checkpoints with the same weights."""
    with Story(subject, case) as story:
        first, second, *_ = case.names
        story.write(first)
        code, layout = story.codes[first], case.kind(first)
        story.watch()
        story.poll(first)
        story.do(f"write({second!r}, {layout}, {code})")
        story.codes[second] = code
        story.poll(second, because="whose weights another checkpoint has too")
        story.assert_results([first, second])


# Names and folders

OTHER_NAMES = (
    "checkpoint-12.tmp",
    ".checkpoint-12.x.tmp",
    "checkpoint-best",
    "checkpoint-",
    "checkpoint-1-old",
    "checkpoint--5",
    "checkpoint-+5",
    "checkpoint-3.5",
    "checkpoint-1e3",
    "checkpoint-1_0",
    "checkpoint-²",
    "checkpoint-7 ",
    "checkpoint-7\n",
    "checkpoint",
    "checkpoint_7",
    "Checkpoint-7",
    "tmp-checkpoint-7",
    "global-step-checkpoint-7",
    "7",
)


def assert_other_names(subject: Subject, case: WatcherCase) -> None:
    """Folders of other names hold whole checkpoints."""
    with Story(subject, case) as story:
        story.write_all()
        for name in OTHER_NAMES:
            story.do(f"write({name!r}, single, 999)")
        story.watch()
        story.poll(*case.names)
        story.poll()


def assert_files_and_links(subject: Subject, case: WatcherCase) -> None:
    """Files, and links under other names or to nothing."""
    with Story(subject, case) as story:
        story.write_all()
        chosen = case.chosen
        for line in (
            "open(os.path.join(directory, 'checkpoint-3333'), 'w').close()",
            f"os.symlink({chosen!r}, os.path.join(directory, 'latest'))",
            f"os.symlink({chosen!r}, os.path.join(directory, 'checkpoint-last'))",
            "os.symlink('nothing', os.path.join(directory, 'checkpoint-4444'))",
            "open(os.path.join(directory, 'trainer_state.json'), 'w').close()",
        ):
            story.do(line)
        story.watch()
        story.poll(*case.names)


def assert_step_zero(subject: Subject, case: WatcherCase) -> None:
    """A checkpoint of step 0."""
    with Story(subject, case) as story:
        story.do(f"write('checkpoint-0', single, {case.first + 200})")
        story.codes["checkpoint-0"] = case.first + 200
        story.write_all()
        story.watch()
        story.poll("checkpoint-0", *case.names)
        steps = [record.get("step") for record in story.results()]
        if steps != [0, *sorted(case.steps)]:
            story.fail("wrong results", f"the steps are {steps}")


def assert_directory_later(subject: Subject, case: WatcherCase) -> None:
    """No directory yet, an empty one, and one with checkpoints."""
    with Story(subject, case) as story:
        story.do("os.rmdir(directory)")
        story.watch()
        story.poll(because="where no directory is")
        if case.which % 2:
            story.do("os.makedirs(directory, exist_ok=True)")
            story.poll(because="where nothing is")
        story.write_all()
        story.poll(*case.names, because="which came after the watcher")


def assert_path(subject: Subject, case: WatcherCase) -> None:
    """What ``evaluate`` is given."""
    with Story(subject, case) as story:
        story.write_all()
        story.watch()
        story.poll(*case.names)
        for each in story.log():
            counted()
            if each["path"][0] not in "'\"":
                story.fail("wrong type", f"evaluate() is given {each['path']}, expected a str")
            right = story.path("directory") / each["name"]
            if os.path.realpath(ast.literal_eval(each["path"])) != os.path.realpath(right):
                story.fail("wrong path", f"the path is not that of {each['name']} in the directory")


# Failures

EXCEPTIONS = (
    ("RuntimeError('out of memory')", "RuntimeError", "out of memory"),
    ("OSError(28, 'No space left on device')", "OSError", "No space left on device"),
    ("ValueError('first line\\nsecond line')", "ValueError", "first line"),
    ("KeyError('é\\u2028ß')", "KeyError", "é"),
    ("AssertionError()", "AssertionError", ""),
    ("type('CudaError', (Exception,), {})('device \"lost\"')", "CudaError", "lost"),
    ("ZeroDivisionError('\\udc80 cannot be encoded')", "ZeroDivisionError", "cannot be encoded"),
    ("StopIteration()", "StopIteration", ""),
)
"""Source, and what the error must name."""


def assert_others_go_on(subject: Subject, case: WatcherCase) -> None:
    """One fails."""
    with Story(subject, case) as story:
        story.write_all()
        error, *_ = EXCEPTIONS[case.which % len(EXCEPTIONS)]
        story.acts(case.chosen, f"raising({error})")
        story.watch()
        story.poll(*case.names, because=f"of which {case.chosen} raises")
        story.assert_results(case.others, because=f"where {case.chosen} raised")


def assert_error_recorded(subject: Subject, case: WatcherCase) -> None:
    """A line for a failure says of what, and how."""
    source, kind, message = EXCEPTIONS[case.which % len(EXCEPTIONS)]
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, f"raising({source})")
        story.watch()
        story.poll(*case.names)
        errors = story.errors()
        if len(errors) != 1:
            story.fail("wrong results", f"{len(errors)} lines have an error, expected 1")
        (found,) = errors
        expected = {"checkpoint": case.chosen, "step": int(case.chosen.split("-")[1])}
        for name, value in expected.items():
            if found.get(name) != value:
                story.fail("wrong results", f"{name} is {found.get(name)!r}, expected {value!r}")
        if not isinstance(found.get("digest"), str) or not found["digest"]:
            story.fail("wrong results", f"digest is {found.get('digest')!r}")
        if kind not in str(found["error"]) or message not in str(found["error"]):
            story.fail("wrong results", f"error is {found['error']!r}, expected {kind}: {message}")


def assert_tried_again(subject: Subject, case: WatcherCase) -> None:
    """It is tried at the next poll and not in the same one; then it is done."""
    with Story(subject, case, attempts=str(case.attempts + 2)) as story:
        story.write_all()
        failures = 1 + case.which % (case.attempts + 1)
        story.acts(case.chosen, *["raising(OSError('busy'))"] * failures)
        story.watch()
        story.poll(*case.names)
        for number in range(failures):
            if case.which % 3 == 0:
                story.watch()
            story.poll(case.chosen, because=f"after {number + 1} failures")
        for _ in range(2):
            story.poll(because="which has results")
        story.assert_results(case.names)
        if len(story.errors()) != failures:
            story.fail("wrong results", f"{len(story.errors())} errors, expected {failures}")


def assert_attempts(subject: Subject, case: WatcherCase, *, restarts: bool) -> None:
    """A checkpoint that always fails is tried so many times in all."""
    given = {"attempts": str(case.attempts)}
    if not restarts and case.which % 3 == 0:
        given["attempts"] = ""  # the default
    attempts = int(given["attempts"] or 3)
    with Story(subject, case, **given) as story:
        story.write_all()
        story.acts(case.chosen, *["raising(RuntimeError('no'))"] * 9)
        story.watch()
        story.poll(*case.names)
        for number in range(1, attempts + 2):
            if restarts and (case.which >> number) % 2:
                story.watch()
            due = [case.chosen] if number < attempts else []
            story.poll(*due, because=f"which failed {min(number, attempts)} times of {attempts}")
        story.assert_results(case.others)
        if len(story.errors()) != attempts:
            story.fail("wrong results", f"{len(story.errors())} errors, expected {attempts}")


def assert_more_attempts(subject: Subject, case: WatcherCase) -> None:
    """A watcher with more attempts goes on where another gave up."""
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, *["raising(RuntimeError('no'))"] * (case.attempts + 1))
        story.watch()
        story.poll(*case.names)
        for _ in range(case.attempts - 1):
            story.poll(case.chosen)
        story.poll(because="which failed as often as it may")
        story.watch(attempts=str(case.attempts + 2))
        for left in (2, 1):
            story.poll(case.chosen, because=f"which has {left} attempts left")
        story.assert_results(case.names)


def assert_attempts_of_weights(subject: Subject, case: WatcherCase) -> None:
    """Failures of weights that were replaced do not count."""
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, *["raising(RuntimeError('no'))"] * case.attempts)
        story.watch()
        story.poll(*case.names)
        for _ in range(case.attempts - 1):
            story.poll(case.chosen)
        story.write(case.chosen, more=3)
        if case.which % 2:
            story.watch()
        story.poll(case.chosen, because="which was replaced after it failed")
        story.assert_results(case.names)


def assert_interrupt_goes_through(subject: Subject, case: WatcherCase) -> None:
    """What ends the process is not a failure of a checkpoint."""
    kind = (KeyboardInterrupt, SystemExit)[case.which % 2]
    with Story(subject, case) as story:
        story.write_all()
        story.acts(case.chosen, f"raising({kind.__name__}())")
        story.watch()
        story.do("watcher")  # the next line is told, and done here: what it raises must come
        story.lines.append("polled = watcher.poll()")
        try:
            story.namespace["watcher"].poll()
        except kind:
            pass
        except Exception as error:
            story.fail("swallowed", f"{kind.__name__} becomes {type(error).__name__}: {error}")
        else:
            story.fail("swallowed", f"{kind.__name__} of an evaluation does not end poll()")
        done = case.names[: case.names.index(case.chosen)]
        story.assert_shown(story.log(), [*done, case.chosen], "until it was interrupted")
        story.assert_results(done, because="of those before the interrupted one")
        if story.errors():
            story.fail("wrong results", f"an interruption is recorded: {story.errors()[0]}")
        if case.which % 4 < 2:
            story.watch()
        story.poll(*case.names[len(done) :], because="after an interruption")
        story.assert_results(case.names)


# Any sequence


class Expected:
    """What a watcher must do, written as the rules say: the model of a story."""

    def __init__(self, attempts: int) -> None:
        self.attempts = attempts
        self.there: dict[str, int] = {}
        """Whole checkpoints, and the weights of each."""
        self.done: list[tuple[str, int]] = []
        self.failed: list[tuple[str, int]] = []

    def due(self) -> list[str]:
        """The names that the next poll evaluates."""
        names = sorted(self.there, key=lambda name: int(name.split("-")[1]))
        return [name for name in names if self.is_due((name, self.there[name]))]

    def is_due(self, key: tuple[str, int]) -> bool:
        """Whether a checkpoint is to be evaluated."""
        return key not in self.done and self.failed.count(key) < self.attempts


def assert_any_sequence(subject: Subject, case: WatcherCase) -> None:
    """Whatever happens one after another: writing, replacing, removing, failing, restarting."""
    expected, number = Expected(case.attempts), case.which
    failing: set[str] = set()
    with Story(subject, case) as story:
        story.watch()
        for turn in range(10):
            number, event = divmod(number * 7 + 3 + turn, 6)
            number += case.first * (turn + 1)
            name = case.names[number % len(case.names)]
            happen(story, expected, name, ("write", "half", "remove", "restart")[event % 4], turn)
            if event > 3 and name in expected.there and name not in failing:
                story.acts(name, "raising(RuntimeError('no'))")
                failing.add(name)
            due = expected.due()
            polled = story.poll(*due)
            for each in due:
                known = expected.failed if each in failing else expected.done
                known.append((each, expected.there[each]))
            assert_gave(story, polled, [each for each in due if each not in failing])
            failing -= set(due)
        assert_recorded(story, expected)


def happen(story: Story, expected: Expected, name: str, event: str, turn: int) -> None:
    """One event of a story."""
    if event == "restart":
        story.watch()
    elif event == "write":
        story.write(name, more=turn)
        expected.there[name] = story.codes[name]
    elif event == "half":
        story.write(name, more=turn, without=["config.json"])
        expected.there.pop(name, None)
    elif name in expected.there:
        story.do(f"remove({name!r})")
        del expected.there[name]


def assert_recorded(story: Story, expected: Expected) -> None:
    """Fail unless the lines are those of the story."""
    for what, records, keys in (
        ("results", story.results(), expected.done),
        ("errors", story.errors(), expected.failed),
    ):
        found = [record.get("checkpoint") for record in records]
        names = [name for name, _ in keys]
        if found != names:
            story.fail("wrong results", f"{what} are of {found}, expected {names}")
        digests = {(r["checkpoint"], r.get("digest")) for r in records}
        if len(digests) != len(set(keys)):
            story.fail("wrong results", f"{what} have {len(digests)} digests of {len(set(keys))}")
