"""The search for the known bug that a failure is."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

from conformance.diagnosis.agreement import agree
from conformance.diagnosis.candidates import Candidate, candidates, caught_by, pairs
from conformance.diagnosis.observation import FAILED, PASSED, SILENT, Observation, observe
from conformance.diagnosis.signatures import signatures
from conformance.harness.deadline import deadline
from conformance.harness.failures import DIED, HUNG, WAITING, ConformanceFailure, TimedOut
from conformance.harness.gpu_lane import TIMED_OUT
from conformance.harness.requirement import Drawn, Requirement, all_requirements
from conformance.harness.subject import Subject, first_line

SECONDS = 10.0
"""Time for all failures of a contract, in all processes of a run together."""

SHARE = 0.5
"""Of the time that is left a failure may take so much; the ones after it need some."""

OWN_SHARE = 0.25
"""Of a failure's time the implementation itself may take so much; the rest is for known bugs."""

TOO_SHORT = 0.1
"""Seconds with which no search is begun."""

NO_TIME = "the time for known bugs was used by other failures of the contract"

MOST_NAMED = 3
"""So many bugs that cannot be told apart are named; more of them are no diagnosis."""

CONFIRMING_REQUIREMENTS = 4
"""Requirements that a bug fails, of which the implementation must not pass a case either."""

TELLING_REQUIREMENTS = 6
"""Other requirements that are looked at to tell bugs apart that fit alike."""

NOT_REPEATED = (TIMED_OUT, HUNG, WAITING, DIED)
"""Kinds of failure that a second run of the case would wait for as long again."""


@dataclass(frozen=True)
class Diagnosis:
    """What a failure is, as far as it can be told."""

    named: tuple[Candidate, ...] = ()
    """Known bugs that do the same; more than one cannot be told apart."""
    seen: tuple[str, ...] = ()
    """Observations where no known bug fits."""
    cases: int = 0
    """Cases on which the implementation and those bugs did the same."""
    seconds: float = 0.0
    note: str | None = None


@dataclass
class Clock:
    """The time that a contract's diagnoses may still take in this process."""

    left: float
    ends: float = 0.0

    @contextmanager
    def running(self, share: float):
        """Take time from what is left, and not more than a share of it."""
        began = time.monotonic()
        self.ends = began + self.left * share
        try:
            yield
        finally:
            self.left = max(0.0, self.left - (time.monotonic() - began))

    @property
    def remaining(self) -> float:
        """Seconds until the time that was taken is over."""
        return self.ends - time.monotonic()


@dataclass
class Memory:
    """What earlier failures of the contract in this process were."""

    clock: Clock
    explained_by: list[Candidate] = field(default_factory=list)
    note: str | None = None
    """Why the search that found them was not finished: others may fit where they do."""


_memories: dict[str, Memory] = {}


def diagnose(
    requirement: Requirement,
    subject: Subject,
    failure: ConformanceFailure,
    failing: list[Drawn],
    *,
    seconds: float = SECONDS,
) -> Diagnosis:
    """What the failure of a requirement is; ``failing`` are its cases, the smallest last.

    ``seconds`` are those of all failures of the contract in this process.
    """
    memory = _memories.setdefault(requirement.contract, Memory(Clock(seconds)))
    if memory.clock.left < TOO_SHORT:
        return Diagnosis(seen=signatures(failure), note=NO_TIME)
    began = time.monotonic()
    with memory.clock.running(SHARE):
        search = Search(requirement, subject, memory.clock)
        try:
            with deadline(max(memory.clock.remaining, 0.0) + OVERTIME, HARD_FACTOR):
                search.run(failing, memory.explained_by)
        except TimedOut:
            search.cut = True
        except Exception as error:  # the failure has to be reported, whatever the search met
            if not search.over():  # where time ended while cases were drawn, Hypothesis is confused
                search.broke = f"the search ended with {type(error).__name__}: {first_line(error)}"
    note = search.note() or (memory.note if search.known_before else None)
    if search.named:
        memory.explained_by, memory.note = search.named, note
    named = tuple(search.named) if len(search.named) <= MOST_NAMED else ()
    seen = () if named else search.hints() + signatures(search.largest_failure() or failure)
    return Diagnosis(
        named=named,
        seen=seen,
        cases=search.agreed if named else 0,
        seconds=round(time.monotonic() - began, 2),
        note=note,
    )


OVERTIME = 1.0
"""Seconds in which the case that runs when the time is over may still end."""

HARD_FACTOR = 6
"""A planted bug that never returns ends the process after so many times the time it had."""


def forget() -> None:
    """Begin anew, as at the start of a run."""
    _memories.clear()


class Search:
    """One search: cases on which implementation and bugs are compared, and what fitted so far."""

    def __init__(self, requirement: Requirement, subject: Subject, clock: Clock) -> None:
        self.requirement, self.subject, self.clock = requirement, subject, clock
        self.own: list[tuple[Drawn, Observation]] = []
        """What the implementation does on each case, the smallest failing one first."""
        self.named: list[Candidate] = []
        self.known_before = False
        """Whether what is named explained an earlier failure, so that nothing else was tried."""
        self.refuted: list[str] = []
        """Sentences on bugs that fit here, and which the implementation cannot have."""
        self.agreed = 0
        self.tried = self.all = 0
        self.cut = False
        self.broke: str | None = None

    def run(self, failing: list[Drawn], likely: list[Candidate]) -> None:
        """Name the bugs that do what the implementation does."""
        self._observe_own(failing)
        if not self.own or self.own[0][1].ended != FAILED:
            return
        self._keep_fitting(likely)
        self.known_before = bool(self.named)
        if self.known_before:
            return
        singles = candidates(self.requirement)
        self.all = len(singles)
        self._keep_fitting(singles, count=True)
        self._refute()
        if len(self.named) > 1:
            self._tell_apart()
        if not self.named and not self.refuted:
            self._keep_fitting(pairs(self._in_part(singles)), most=1)
            self._refute()

    def _observe_own(self, failing: list[Drawn]) -> None:
        """What the implementation does on the failing cases and those that the gate draws."""
        cases = [*failing[::-1], *self.requirement.drawn_cases(self.subject)]
        enough = self.clock.remaining * (1 - OWN_SHARE)
        for case in _distinct(cases):
            if self.own and self.clock.remaining < enough:
                return
            seen = observe(self.requirement, self.subject, case)
            if seen.ended != SILENT:
                self.own.append((case, seen))

    def _keep_fitting(
        self, tried: Iterable[Candidate], *, count: bool = False, most: int | None = None
    ) -> None:
        """Name those that agree wherever they say something, on the smallest failing case at least."""
        for candidate in tried:
            if self.over() or len(self.named) == most:
                return
            agreed = self._agrees(candidate)
            self.tried += count
            if agreed:
                self.named.append(candidate)
                self.agreed = max(self.agreed, agreed)

    def _agrees(self, candidate: Candidate) -> int:
        """The number of cases that a bug agrees on; 0 where it does otherwise on one of them."""
        subject = candidate.subject(self.subject.device)
        agreed = 0
        for case, mine in self.own if subject is not None else ():
            same = not self.over() and agree(mine, observe(self.requirement, subject, case, mine))
            if same is False or (same is None and not agreed):
                return 0
            agreed += same is True
        return agreed

    def _in_part(self, singles: list[Candidate]) -> list[Candidate]:
        """The bugs that agree on some failing case before those that agree on none."""
        some: list[Candidate] = []
        for candidate in singles:
            subject = candidate.subject(self.subject.device)
            for case, mine in self.own if subject is not None else ():
                if self.over():
                    return some
                if mine.ended != FAILED:
                    continue
                if agree(mine, observe(self.requirement, subject, case, mine)):
                    some.append(candidate)
                    break
        return [*some, *(each for each in singles if each not in some)]

    def _refute(self) -> None:
        """Drop bugs that fail a case of another requirement which the implementation passes."""
        for candidate in list(self.named):
            slug = self._passes_what_fails(candidate)
            if slug is not None:
                self.named.remove(candidate)
                names = " with ".join(candidate.ids)
                self.refuted.append(
                    f"the same as {names} gives on {self.agreed} cases, but that fails {slug}, "
                    "and this does not"
                )

    def _passes_what_fails(self, candidate: Candidate) -> str | None:
        subject = candidate.subject(self.subject.device)
        slugs = [slug for bug in candidate.bugs for slug in (bug.breaks, *caught_by(bug.id))]
        others = [slug for slug in dict.fromkeys(slugs) if slug != self.requirement.slug]
        for slug in others[:CONFIRMING_REQUIREMENTS]:
            requirement = all_requirements()[slug]
            for case in () if requirement.gpu else requirement.drawn_cases(self.subject):
                if self.over():
                    return None
                mine = observe(requirement, self.subject, case)
                if mine.ended == FAILED:
                    break
                theirs = observe(requirement, subject, case, mine)
                if (mine.ended, theirs.ended) == (PASSED, FAILED):
                    return slug
        return None

    def _tell_apart(self) -> None:
        """Of bugs that fit alike keep those that fit on requirements, too, that some of them pass."""
        for slug in _dividing(self.named)[:TELLING_REQUIREMENTS]:
            fitting = self.named
            requirement = all_requirements()[slug]
            subjects = [candidate.subject(self.subject.device) for candidate in fitting]
            votes = [0] * len(fitting)
            for case in _distinct(requirement.drawn_cases(self.subject)):
                if self.over():
                    return
                mine = observe(requirement, self.subject, case)
                for index, subject in enumerate(subjects):
                    votes[index] += agree(mine, observe(requirement, subject, case, mine)) is False
            left = [candidate for candidate, against in zip(fitting, votes) if not against]
            self.named = left or fitting
            if len(self.named) == 1:
                return

    def over(self) -> bool:
        """Whether the time is over; then the search is cut."""
        if self.clock.remaining <= 0:
            self.cut = True
        return self.cut

    def largest_failure(self) -> ConformanceFailure | None:
        """The failure with the most compared elements: a small case shows the least."""
        failures = [seen.failure for _, seen in self.own if seen.ended == FAILED]
        with_output = [f for f in failures if f.compared is not None]
        return max(with_output, key=lambda f: f.compared.found.numel(), default=None)

    def hints(self) -> tuple[str, ...]:
        """Known bugs that do the same here, and are no diagnosis."""
        if len(self.named) <= MOST_NAMED:
            return tuple(self.refuted[:MOST_NAMED])
        some = ", ".join(candidate.ids[0] for candidate in self.named[:MOST_NAMED])
        return (f"{len(self.named)} known bugs do the same here, {some} among them",)

    def note(self) -> str | None:
        """Why the search was not finished, if it was not."""
        if self.broke or not self.cut:
            return self.broke
        tried = f"{self.tried} of {self.all} known bugs" if self.all else "no known bug"
        return f"time was over with {tried} tried"


def _dividing(fitting: list[Candidate]) -> list[str]:
    """Requirements that some of the bugs fail and others pass."""
    failed = [set(caught_by(candidate.ids[0])) for candidate in fitting]
    some = set().union(*failed) - set.intersection(*failed)
    return [slug for slug, record in all_requirements().items() if slug in some and not record.gpu]


def _distinct(cases: Iterable[Drawn]) -> list[Drawn]:
    return list({repr(case): case for case in cases}.values())
