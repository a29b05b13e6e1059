"""The planted bugs that could explain a failure, the likeliest first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from conformance.harness.requirement import Requirement
from conformance.harness.subject import Subject
from conformance.known_bugs import PlantedBug, all_known_bugs


@dataclass(frozen=True)
class Candidate:
    """A planted bug, or two of them in one implementation."""

    bugs: tuple[PlantedBug, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the bugs."""
        return tuple(bug.id for bug in self.bugs)

    def subject(self, device: str) -> Subject | None:
        """The contract's method of a fresh implementation; None where two do not go together."""
        contract = self.bugs[0].contract
        try:
            planted = self._make()
            return Subject(contract, getattr(planted, contract), device=device)
        except Exception:
            return None

    def _make(self) -> Any:
        if len(self.bugs) == 1:
            return self.bugs[0].make()
        # Bugs replace parts of the reference, so that one class has both as long as each passes on
        # what the other replaces. Where one hides the other, the pair is the one bug again.
        return type("Both", tuple(bug.make for bug in self.bugs), {})()


def candidates(requirement: Requirement) -> list[Candidate]:
    """Every planted bug of the contract: those that break this rule, those it caught, the others."""

    def distance(bug: PlantedBug) -> int:
        if bug.breaks == requirement.slug:
            return 0
        return 1 if requirement.slug in caught_by(bug.id) else 2

    own = [bug for bug in all_known_bugs().values() if bug.contract == requirement.contract]
    return [Candidate((bug,)) for bug in sorted(own, key=distance)]


def pairs(singles: list[Candidate]) -> Iterator[Candidate]:
    """Two bugs in one implementation, in the order of ``singles``, early ones with each other first.

    Both ways round: which of the two classes comes first decides whose part is asked first.
    """
    for a, b in sorted(permutations(range(len(singles)), 2), key=lambda pair: (max(pair), pair)):
        (one,), (other,) = singles[a].bugs, singles[b].bugs
        # Where one class is a base of the other, the pair is the one bug again.
        if not (issubclass(one.make, other.make) or issubclass(other.make, one.make)):
            yield Candidate((one, other))


def caught_by(id: str) -> tuple[str, ...]:
    """Slugs of the requirements that catch a planted bug, as far as it was measured."""
    return tuple(_kill_matrix().get(id, {}).get("caught_by", ()))


@functools.cache
def _kill_matrix() -> dict[str, dict[str, Any]]:
    from conformance.harness.data import kill_matrix

    return kill_matrix()
