"""What the gate says of one benchmark when the screen and its confirmation are taken together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conformance.gate.evidence import Claim, Evidence, claim, interval, percent
from conformance.gate.rule import Rule, Verdict, recommended_gate


@dataclass(frozen=True)
class Judgement:
    """What the gate says of one benchmark, and why."""

    benchmark: str
    verdict: Verdict
    reason: str
    """One sentence."""
    rule: Rule
    screen: Evidence
    """All of the screen's process pairs."""
    confirmation: Evidence | None
    """Fresh process pairs, if the screen claimed what must recur."""
    unequal: bool = False
    """Two copies of the base differed twice: nothing that was measured beside it can be trusted."""

    @property
    def recommended(self) -> float | None:
        """The smallest slowdown that the spread of two copies of the base lets be found, if any."""
        return recommended_gate(self.evidence.process_sd, self.rule)

    @property
    def pairs(self) -> int:
        """Process pairs measured, in both stages."""
        return self.screen.pairs + (self.confirmation.pairs if self.confirmation else 0)

    @property
    def evidence(self) -> Evidence:
        """That which decided: the confirmation, if there is one."""
        return self.confirmation or self.screen

    def as_json(self) -> dict[str, Any]:
        """The same in dicts, with differences as shares of the base's time."""
        return {
            "benchmark": self.benchmark,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "detects": self.rule.detects,
            "injected": self.rule.injected,
            "pairs": self.pairs,
            "recommended": self.recommended,
            "screen": self.screen.as_json(),
            "confirmation": self.confirmation.as_json() if self.confirmation else None,
        }


def judge(
    benchmark: str, rule: Rule, screen: Evidence, confirmation: Evidence | None = None
) -> Judgement:
    """The verdict from the last look of the screen and, if that claimed anything, its confirmation.

    A claim counts if fresh processes repeat it. If they do not, the screen's claim is dropped and their
    own bounds decide: OK, or else INCONCLUSIVE.
    """
    first = claim(screen, rule)
    if first.needs_confirmation != (confirmation is not None):
        found = "none" if confirmation is None else "one"
        raise ValueError(f"{benchmark}: {first.name} in the screen and {found} to confirm it")
    second = claim(confirmation, rule) if confirmation else None
    unequal = first is second is Claim.UNEQUAL and _same_side(screen, confirmation)
    verdict = Verdict.VOID if unequal else _verdict(first, second)
    if confirmation:
        reason = _confirmed(verdict, first, rule, screen, confirmation)
    else:
        reason = _screened(verdict, rule, screen)
    return Judgement(benchmark, verdict, reason, rule, screen, confirmation, unequal)


def _same_side(screen: Evidence, confirmation: Evidence) -> bool:
    """Whether the second copy of the base was slower both times, or faster both times."""
    return (screen.control.estimate > 0) == (confirmation.control.estimate > 0)


def _verdict(first: Claim, second: Claim | None) -> Verdict:
    """What the stages say together, where two copies of the base are not found to differ."""
    if first is second and first is not Claim.UNEQUAL:
        return Verdict.VOID if first is Claim.BLIND else Verdict[first.name]
    return Verdict.OK if Claim.OK in (first, second) else Verdict.INCONCLUSIVE


def _series(claimed: Claim, evidence: Evidence) -> str:
    """What a claim is about, in numbers."""
    name = {Claim.UNEQUAL: "control", Claim.BLIND: "slowed"}.get(claimed, "head")
    return interval(getattr(evidence, name))


def _screened(verdict: Verdict, rule: Rule, screen: Evidence) -> str:
    """Why, where the screen alone decides."""
    if verdict is Verdict.OK:
        return f"{interval(screen.head)}: a slowdown of {100 * rule.detects:g} % is excluded."
    if not screen.slowed.lower > screen.margin:
        what = (
            f"a known slowdown of {100 * rule.injected:g} % is not told from the margin of "
            f"{percent(screen.margin)}: {interval(screen.slowed)}"
        )
    else:
        what = (
            f"{interval(screen.head)} neither exceeds the margin of {percent(screen.margin)} "
            f"nor excludes a slowdown of {100 * rule.detects:g} %"
        )
    return f"after {screen.pairs} process pairs {what}{_advice(rule, screen)}."


def _advice(rule: Rule, evidence: Evidence) -> str:
    """What to gate at instead, if the machine is too noisy for the rule."""
    recommended = recommended_gate(evidence.process_sd, rule)
    if recommended is not None and recommended <= rule.detects:
        return ""
    spread = f"two copies of the base spread by {100 * evidence.process_sd:.1f} %"
    if recommended is None:
        return f"; {spread}, on which no gate holds"
    return f"; {spread}, so gate at {100 * recommended:g} %"


def _confirmed(
    verdict: Verdict, first: Claim, rule: Rule, screen: Evidence, confirmation: Evidence
) -> str:
    """Why, where fresh processes were asked to repeat what the screen claims."""
    found = f"{first.value}, {_series(first, screen)}"
    if verdict in (Verdict.OK, Verdict.INCONCLUSIVE):
        second = claim(confirmation, rule)
        return (
            f"the screen claims that {found}, which fresh processes do not repeat: "
            f"{_series(first, confirmation)}, {second.value}."
        )
    beyond = f"; the margin is {percent(confirmation.margin)}"
    return f"{found}, and in fresh processes {_series(first, confirmation)}{beyond}."
