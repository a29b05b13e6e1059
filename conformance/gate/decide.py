"""The course of a gate run: screen, more pairs where it is inconclusive, confirmation, verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conformance.gate.evidence import SERIES, Claim, Evidence, claim, weigh
from conformance.gate.judgement import Judgement, judge
from conformance.gate.rule import Rule, Verdict, expected_false_flags
from conformance.gate.samples import Measure, Samples, Stage

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """What a gate run says, of each benchmark and of all."""

    verdict: Verdict
    reason: str
    """One sentence."""
    judgements: dict[str, Judgement]
    """By benchmark, in the order in which they were asked for."""
    comparisons: int
    """How many heads were compared with their base."""
    expected_false_flags: float
    """So many of them are REGRESSED on average, at most, if none is slower."""
    pairs: int
    """Process pairs measured, over all benchmarks and both stages."""
    advice: str | None
    """One sentence where two copies of the base spread too much for what is to be detected."""

    def as_json(self) -> dict[str, Any]:
        """The same in dicts and lists that ``json`` writes."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "comparisons": self.comparisons,
            "expected_false_flags": self.expected_false_flags,
            "pairs": self.pairs,
            "advice": self.advice,
            "judgements": [judgement.as_json() for judgement in self.judgements.values()],
        }


def decide(
    measure: Measure,
    benchmarks: Sequence[str],
    rule: Rule | Mapping[str, Rule],
    progress: Progress = lambda line: None,
) -> Session:
    """Measure and judge these benchmarks, by one rule or each by its own.

    ``progress`` gets a line before each step. Raises ValueError, in one line, for benchmarks without a
    rule and for samples that are not what was asked for.
    """
    return session_of(judged(measure, benchmarks, rule, progress))


def judged(
    measure: Measure,
    benchmarks: Sequence[str],
    rule: Rule | Mapping[str, Rule],
    progress: Progress = lambda line: None,
) -> list[Judgement]:
    """Measure and judge each benchmark by itself.

    Everything is screened; what is inconclusive is measured again with as many pairs as it has, up to
    the cap; what is claimed must recur in fresh processes. A benchmark that ``measure`` leaves out, at
    any time, is not judged: it could not be measured, and who measures knows why.
    """
    rules = rules_of(benchmarks, rule)
    samples = _measured(measure, rules, progress, "screen", {b: rules[b].pairs for b in rules})
    rules = {b: r for b, r in rules.items() if b in samples}
    screens = _weighed(samples, rules)
    while more := {
        b: min(2 * screens[b].pairs, rules[b].pairs_cap) - screens[b].pairs
        for b in rules
        if claim(screens[b], rules[b]) is Claim.OPEN and screens[b].pairs < rules[b].pairs_cap
    }:
        new = _measured(measure, rules, progress, "screen", more)
        rules = {b: r for b, r in rules.items() if b in new or b not in more}
        for benchmark, each in new.items():
            samples[benchmark] = samples[benchmark].and_more(each)
        screens |= _weighed({b: samples[b] for b in new}, rules)
    claimed = {
        b: rules[b].pairs_to_confirm(screens[b].pairs)
        for b in rules
        if claim(screens[b], rules[b]).needs_confirmation
    }
    fresh = _measured(measure, rules, progress, "confirm", claimed)
    rules = {b: r for b, r in rules.items() if b in fresh or b not in claimed}
    confirmations = _weighed(fresh, rules)
    return [judge(b, rules[b], screens[b], confirmations.get(b)) for b in rules]


def rules_of(benchmarks: Sequence[str], rule: Rule | Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule of each benchmark, in their order."""
    if not benchmarks:
        raise ValueError("no benchmarks to compare")
    if twice := [b for b, times in Counter(benchmarks).items() if times > 1]:
        raise ValueError(f"benchmarks are named twice: {', '.join(twice)}")
    if isinstance(rule, Rule):
        return dict.fromkeys(benchmarks, rule)
    if without := [b for b in benchmarks if b not in rule]:
        raise ValueError(f"no rule for {', '.join(without)}")
    return {benchmark: rule[benchmark] for benchmark in benchmarks}


def _measured(
    measure: Measure,
    rules: dict[str, Rule],
    progress: Progress,
    stage: Stage,
    pairs: dict[str, int],
) -> dict[str, Samples]:
    """So many new process pairs of each benchmark; those that need as many are measured together."""
    found = {}
    for (count, rounds), names in _alike(
        pairs,
        lambda b: (
            pairs[b],
            rules[b].rounds if stage == "screen" else rules[b].confirm_rounds,
        ),
    ):
        what = f"{len(names)} benchmark" + "s" * (len(names) > 1)
        progress(f"{stage}: {count} process pairs of {what}, {rounds} rounds each")
        given = measure(names, pairs=count, rounds=rounds, stage=stage)
        for benchmark in names:
            if benchmark not in given:
                continue
            for name in SERIES:
                shape = np.shape(getattr(given[benchmark], name))
                if shape != (count, rounds):
                    raise ValueError(
                        f"{benchmark}: expected {name} of {count} process pairs and {rounds} rounds, "
                        f"found {list(shape)}"
                    )
            found[benchmark] = given[benchmark]
    return found


def _weighed(samples: dict[str, Samples], rules: dict[str, Rule]) -> dict[str, Evidence]:
    """The evidence of each benchmark; those alike in shape and rule are weighed together."""
    found = {}
    for (rule, _), names in _alike(samples, lambda b: (rules[b], samples[b].head.shape)):
        stacked = Samples(*(np.stack([getattr(samples[b], n) for b in names]) for n in SERIES))
        try:
            found |= zip(names, weigh(stacked, rule))
        except ValueError:
            for benchmark in names:  # name the benchmark that is wrong
                _weigh_one(benchmark, samples[benchmark], rule)
            raise
    return found


def _weigh_one(benchmark: str, samples: Samples, rule: Rule) -> None:
    """Weigh one, and name it if it cannot be weighed."""
    try:
        weigh(Samples(*(getattr(samples, n)[None] for n in SERIES)), rule)
    except ValueError as error:
        raise ValueError(f"{benchmark}: {error}") from None


def _alike(names: Mapping[str, Any], key: Callable[[str], Any]) -> Iterator[tuple[Any, list[str]]]:
    """The names by their key, in the order of first appearance."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return iter(groups.items())


def session_of(judgements: Sequence[Judgement]) -> Session:
    """The verdict on all benchmarks of a run.

    Two copies of the base that differ, twice, void everything, for whatever made them differ was there
    for all. What is wrong with one benchmark, or too noisy in it, stays its own.
    """
    unequal = [each.benchmark for each in judgements if each.unequal]
    if unequal:
        why = f"two copies of the base differ in {_named(unequal)}"
        judgements = [_void(each, why) for each in judgements]
    verdict, reason = _overall(judgements)
    return Session(
        verdict,
        f"{why}, so nothing that was measured can be trusted." if unequal else reason,
        {each.benchmark: each for each in judgements},
        len(judgements),
        expected_false_flags([each.rule for each in judgements]),
        sum(each.pairs for each in judgements),
        _advice(judgements),
    )


def _advice(judgements: Sequence[Judgement]) -> str | None:
    """What to gate at where the machine is noisier than the rule can bear."""
    noisy = [j for j in judgements if j.recommended is None or j.recommended > j.rule.detects]
    if not noisy:
        return None
    least = max((j.recommended for j in noisy), key=lambda share: share or math.inf)
    gate = f"gate them at {100 * least:g} %" if least else "no gate holds on this machine"
    spread = max(j.evidence.process_sd for j in noisy)
    return (
        f"in {_named([j.benchmark for j in noisy])} two copies of the base spread by up to "
        f"{100 * spread:.1f} % from process to process, too much to find what is to be detected nine "
        f"times in ten: {gate}."
    )


def _void(judgement: Judgement, why: str) -> Judgement:
    """The same in a session that is void."""
    if judgement.verdict is Verdict.VOID:
        return judgement
    reason = f"the session is void, {why}; by itself {judgement.verdict}: {judgement.reason}"
    return replace(judgement, verdict=Verdict.VOID, reason=reason)


def _overall(judgements: Sequence[Judgement]) -> tuple[Verdict, str]:
    """The verdict on all, and why: the first that holds for one is that of all.

    But VOID only if it holds for all, and INCONCLUSIVE if it holds for some.
    """
    by_verdict = {v: [j.benchmark for j in judgements if j.verdict is v] for v in Verdict}
    counts = ", ".join(f"{len(names)} {v}" for v, names in by_verdict.items() if names)
    if not judgements:
        return Verdict.VOID, "no benchmark could be measured."
    if len(by_verdict[Verdict.VOID]) == len(judgements):
        return Verdict.VOID, "no benchmark shows its known slowdown, so none would show another."
    for verdict, blamed in (
        (Verdict.REGRESSED, (Verdict.REGRESSED,)),
        (Verdict.INCONCLUSIVE, (Verdict.INCONCLUSIVE, Verdict.VOID)),
        (Verdict.IMPROVED, (Verdict.IMPROVED,)),
    ):
        names = [name for each in blamed for name in by_verdict[each]]
        if names:
            return verdict, f"{counts}: {_named(names)}."
    return Verdict.OK, f"{counts}: no benchmark is slower by what it is to detect."


def _named(names: Sequence[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
