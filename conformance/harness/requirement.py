"""The ``requirement`` decorator: a rule with a stable slug, and one test that checks it."""

from __future__ import annotations

import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hypothesis.errors import Flaky

from conformance.contracts import CONTRACTS
from conformance.harness import gpu_lane, profiles
from conformance.harness.deadline import DEFAULT_SECONDS, HARD_FACTOR, deadline
from conformance.harness.failures import (
    DIED,
    ConformanceFailure,
    Declined,
    HarnessError,
    Inconclusive,
    NotRun,
    TimedOut,
)
from conformance.harness.subject import Subject

if TYPE_CHECKING:
    from conformance.harness.numerics import Measured

Level = Literal["core", "extended"]

Drawn = Mapping[str, Any]
"""What Hypothesis drew for one run of a test: the ``case``, and whatever else the test takes."""

_SLUG = re.compile(r"[a-z_]+(\.[a-z0-9-]+)+")


@dataclass
class Tally:
    """What one run of a requirement did."""

    drawn: int = 0
    executed: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    inconclusive: Counter[str] = field(default_factory=Counter)
    not_run: Counter[str] = field(default_factory=Counter)
    """Cases that this machine has not the hardware or the memory for."""
    telling: int = 0
    """Executed cases in which no two axes that a bug could confuse have the same size."""
    confusable: Counter[str] = field(default_factory=Counter)
    comparisons: Counter[str] = field(default_factory=Counter)
    """Comparisons by lane."""
    hangs: int = 0
    """Calls on several ranks that did not end."""
    closest: float = 0.0
    """The largest error statistic seen, as a share of its limit."""
    errors: list[Measured] = field(default_factory=list)
    """How far off each comparison was, for the numerics ledger."""
    failing: list[Drawn] = field(default_factory=list)
    """The first case that failed, and the last, which is the smallest."""
    deadly: list[Drawn] = field(default_factory=list)
    """Cases in which a rank died."""

    def note_failing(self, drawn: Drawn, kind: str) -> None:
        """Keep a case that failed."""
        self.failing[1:] = [drawn]
        if kind == DIED:
            self.deadly.append(drawn)

    def spare(self, drawn: Drawn) -> None:
        """Raise where ranks died so often that no case that is new is worth starting others."""
        if len(self.deadly) >= ENOUGH_DEATHS and drawn not in self.deadly:
            raise Inconclusive("ranks died in earlier cases of this requirement")


_tally: ContextVar[Tally | None] = ContextVar("tally", default=None)
_drawn: ContextVar[list[Drawn] | None] = ContextVar("drawn", default=None)
"""Takes the cases in place of their being checked."""


def current_tally() -> Tally:
    """The tally of the running requirement; a throw-away one outside."""
    return _tally.get() or Tally()


@dataclass
class Requirement:
    """One rule of a contract and the test that checks it."""

    slug: str
    contract: str
    level: Level
    rule: str
    source: str
    smoke: bool
    gpu: bool
    several_ranks: bool
    """Whether one rank would say nothing: with fewer GPUs than ranks it does not run there."""
    test: Callable
    body: Callable
    """The check of one case, as it is written."""
    confusable_by_design: frozenset[str]
    last_tally: Tally = field(default_factory=Tally)

    @property
    def on_device(self) -> bool:
        """Whether the contract computes on a device."""
        return CONTRACTS[self.contract].on_device

    def check(self, method: Callable, *, seconds: float | None = None) -> Tally:
        """Run the test against ``method`` (bound, or a :class:`Subject`), outside or inside pytest.

        Raises :class:`ConformanceFailure` when the rule is broken, :class:`Declined` when no case
        was taken on, :class:`Inconclusive` when none could tell, :class:`HarnessError` when the
        cases that were drawn prove nothing.
        """
        self.test(**{self.contract: method, "seconds": seconds})
        return self.last_tally

    def check_case(self, subject: Subject, drawn: Drawn) -> None:
        """Check one case alone; it counts for nothing."""
        case = drawn["case"]
        if subject.device == "cuda":
            gpu_lane.settle_arithmetic()
            case, _ = gpu_lane.on_the_gpus_there_are(case, self.several_ranks)
        token = _tally.set(Tally())
        try:
            self.body(**{**drawn, "case": case, self.contract: subject})
        finally:
            _tally.reset(token)

    def drawn_cases(self, subject: Subject) -> list[Drawn]:
        """The cases that the gate draws for this device, none of which is run."""
        test = self.test.__wrapped__
        drawn: list[Drawn] = []
        token = _drawn.set(drawn)
        test._hypothesis_internal_use_settings = profiles.PROFILES["gate"]
        test._hypothesis_internal_use_seed = None
        try:
            with profiles.without_local_constants():
                test(**{self.contract: subject})
        finally:
            _drawn.reset(token)
        return drawn

    def lint(self, tally: Tally) -> None:
        """Raise unless the executed cases could have shown the bug that the rule is about."""
        if tally.executed == 0:
            if tally.declined:
                raise Declined("; ".join(tally.declined))
            if tally.not_run:
                raise NotRun("; ".join(tally.not_run))
            if tally.inconclusive:
                raise Inconclusive("; ".join(tally.inconclusive))
            raise HarnessError(f"{self.slug} drew no case at all")
        if tally.telling == 0:
            seen = ", ".join(sorted(tally.confusable))
            message = f"every case that ran was degenerate ({seen})"
            if tally.declined:
                raise Inconclusive(f"{message}; declined: {'; '.join(tally.declined)}")
            if tally.not_run:
                raise NotRun(f"{message}; not run: {'; '.join(tally.not_run)}")
            if tally.drawn < ENOUGH_CASES:
                raise Inconclusive(f"{message}, of the {tally.drawn} that were drawn")
            raise HarnessError(f"{self.slug}: {message}")


ENOUGH_DEATHS = 20
"""After so many of one requirement it runs no further cases: new ranks take half a second each."""

ENOUGH_CASES = 10
"""With fewer cases (a profile of one's own) none being telling is chance; with more, our fault."""

REGISTRY: dict[str, Requirement] = {}

DEFAULT_DEADLINE: dict[str, float | None] = {"seconds": None}
"""What the user asks for; None leaves it to the device."""


def requirement(
    slug: str,
    *,
    source: str,
    level: Level = "core",
    smoke: bool = False,
    gpu: bool = False,
    several_ranks: bool = False,
    confusable: set[str] = frozenset(),
) -> Callable[[Callable], Callable]:
    """Register the decorated test under ``slug`` (``contract.topic.rule``, stable for ever).

    The test takes the contract's name as its fixture and, through ``hypothesis.given``, a ``case``;
    its docstring states the rule. ``confusable`` names the coincidences of a case (see
    ``confusable()`` of the case classes) that belong to the rule and do not make it degenerate.
    ``gpu`` is for rules that only a CUDA device can be held to, ``several_ranks`` for those that one
    rank cannot break.
    """
    if not _SLUG.fullmatch(slug) or slug.split(".")[0] not in CONTRACTS:
        raise HarnessError(f"{slug!r} is not contract.topic.rule")

    def register(test: Callable) -> Callable:
        if slug in REGISTRY and REGISTRY[slug].test.__wrapped__ is not test:
            raise HarnessError(f"two requirements are called {slug}")
        record = Requirement(
            slug=slug,
            contract=slug.split(".")[0],
            level=level,
            rule=" ".join(inspect.getdoc(test).split()),
            source=source,
            smoke=smoke,
            gpu=gpu,
            several_ranks=several_ranks,
            test=test,
            body=test.hypothesis.inner_test,
            confusable_by_design=frozenset(confusable),
        )
        test.hypothesis.inner_test = _counted(record, test.hypothesis.inner_test)

        @functools.wraps(test)
        def run(*, seconds: float | None = None, **subjects: Any) -> None:
            _run(record, test, subjects, seconds)

        run.requirement = record
        record.test = run
        REGISTRY[slug] = record
        return run

    return register


def _bound(on_gpu: bool, seconds: float | None) -> tuple[float, float]:
    """The deadline of a requirement in seconds, and how many times it a process may take."""
    asked = seconds or DEFAULT_DEADLINE["seconds"]
    if on_gpu:
        return asked or gpu_lane.SECONDS, gpu_lane.HARD_FACTOR
    return asked or DEFAULT_SECONDS, HARD_FACTOR


def _run(
    record: Requirement, test: Callable, subjects: Mapping[str, Any], seconds: float | None
) -> None:
    record.last_tally = tally = Tally()
    wrapped = {name: Subject.of(name, method) for name, method in subjects.items()}
    # Hypothesis fixes the settings of a test when it is decorated; ours are chosen for each run.
    test._hypothesis_internal_use_settings = profiles.active()
    test._hypothesis_internal_use_seed = profiles.seed()
    token = _tally.set(tally)
    on_gpu = wrapped[record.contract].device == "cuda"
    try:
        with deadline(*_bound(on_gpu, seconds)), profiles.without_local_constants():
            try:
                test(**wrapped)
            except BaseExceptionGroup as group:
                raise _failure_among(group) from None
    except (ConformanceFailure, gpu_lane.DeviceLost) as error:
        failure = error.ended if isinstance(error, gpu_lane.DeviceLost) else error
        failure.requirement = record
        failure.import_lines = wrapped[record.contract].import_lines
        raise failure from failure.__cause__
    except TimedOut as error:
        failure = ConformanceFailure("timed out", f"{record.slug} was {error}")
        failure.requirement = record
        if on_gpu:  # what it waits for may still be running there
            gpu_lane.marked(failure, gpu_lane.TIMED_OUT)
        raise failure from None
    finally:
        _tally.reset(token)
    record.lint(tally)


def _failure_among(group: BaseExceptionGroup) -> BaseException:
    """The failure in a group of Hypothesis: one of many, or one that did not fail again."""
    failures, _ = group.split(ConformanceFailure)
    if failures is None:
        return group
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(group, Flaky):
        failure.details += ("the case did not fail again: the result depends on earlier calls",)
    return failure


def _counted(record: Requirement, inner: Callable) -> Callable:
    """``inner``, with its cases counted and declined cases taken for what they are."""

    @functools.wraps(inner)
    def body(*args: Any, case: Any, **kwargs: Any) -> None:
        others = {name: value for name, value in kwargs.items() if name != record.contract}
        if (drawn := _drawn.get()) is not None:
            drawn.append({"case": case, **others})
            return
        tally = current_tally()
        tally.drawn += 1
        subject: Subject = kwargs[record.contract]
        calls_before = subject.calls.total()
        on_gpu = subject.device == "cuda"
        if on_gpu:
            gpu_lane.settle_arithmetic()
        by_design = record.confusable_by_design
        try:
            tally.spare({"case": case, **others})
            if on_gpu:
                case, fewer = gpu_lane.on_the_gpus_there_are(case, record.several_ranks)
                by_design |= fewer
            inner(*args, case=case, **kwargs)
            if subject.calls.total() == calls_before:
                raise HarnessError(f"{record.slug} never called the implementation on {case!r}")
        except (Declined, NotImplementedError) as error:
            tally.declined[str(error) or "NotImplementedError"] += 1
        except Inconclusive as error:
            tally.inconclusive[str(error)] += 1
        except NotRun as error:
            tally.not_run[str(error)] += 1
        except Exception as error:
            if isinstance(error, ConformanceFailure):
                tally.note_failing({"case": case, **others}, error.kind)
            lost = gpu_lane.lost_by(error) if on_gpu else None
            if lost is None:
                raise
            raise lost from None
        else:
            tally.executed += 1
            confusable = case.confusable() - by_design
            tally.confusable.update(confusable)
            tally.telling += not confusable

    return body


def all_requirements() -> dict[str, Requirement]:
    """Every requirement by slug, in the order of the files; imports the requirement files."""
    import importlib

    for contract in CONTRACTS:
        importlib.import_module(f"conformance.test_{contract}")
    return dict(REGISTRY)
