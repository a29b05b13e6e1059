"""The course of a gate run: what is measured, when, and what is said of all benchmarks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from noise_models import Machine, Noise
from scripted_measure import EQUAL, FAST, SLOW, WIDE, Scripted, judged_one

from conformance.gate.decide import decide, judged, session_of
from conformance.gate.evidence import weigh
from conformance.gate.judgement import judge
from conformance.gate.rule import (
    PRESETS,
    Rule,
    Verdict,
    expected_false_flags,
)
from conformance.gate.samples import Samples

NAMES = ["decode", "prefill"]


def test_pairs_are_doubled_up_to_the_cap_for_what_is_inconclusive_alone():
    measure = Scripted({"noisy": WIDE})
    session = decide(measure, ["quiet", "noisy"], Rule())
    assert measure.asked == [
        ("screen", ("quiet", "noisy"), 8, 5),
        ("screen", ("noisy",), 8, 5),
        ("screen", ("noisy",), 16, 5),
    ]
    assert session.judgements["noisy"].pairs == 32
    assert session.pairs == 40


def test_a_cap_that_is_no_power_of_two_is_kept():
    measure = Scripted({"noisy": WIDE})
    decide(measure, ["noisy"], Rule(pairs=8, pairs_cap=20))
    assert [pairs for _, _, pairs, _ in measure.asked] == [8, 8, 4]


def test_a_claim_is_confirmed_with_fresh_pairs_and_more_rounds():
    measure = Scripted({"slow": SLOW}, {"slow": SLOW})
    session = decide(measure, ["slow", "equal"], Rule())
    assert measure.asked[1:] == [("confirm", ("slow",), 15, 10)]
    assert session.judgements["slow"].confirmation.pairs == 15


def test_a_claim_that_took_more_pairs_is_confirmed_with_as_many():
    assert [Rule().pairs_to_confirm(n) for n in (8, 16, 32)] == [15, 16, 32]


def test_the_confirmation_decides_on_its_own_data():
    """A screen that is far off is not pooled with the confirmation."""
    assert judged_one({"head": 0.5}, EQUAL).verdict == "OK"


def test_each_benchmark_has_its_own_rule():
    rules = {"decode": Rule(), "prefill": Rule(pairs=10, rounds=3)}
    measure = Scripted()
    session = decide(measure, NAMES, rules)
    assert measure.asked == [("screen", ("decode",), 8, 5), ("screen", ("prefill",), 10, 3)]
    assert session.judgements["prefill"].rule.pairs == 10


def test_progress_is_told_before_each_step():
    lines = []
    decide(Scripted({"decode": SLOW}, {"decode": SLOW}), NAMES, Rule(), lines.append)
    assert lines == [
        "screen: 8 process pairs of 2 benchmarks, 5 rounds each",
        "confirm: 15 process pairs of 1 benchmark, 10 rounds each",
    ]


def test_together_or_in_parts_a_benchmark_is_judged_alike():
    """What a simulation of many sessions at once rests on."""
    names = [str(i) for i in range(60)]
    machine = Machine(Noise(0.02, bias=0.02), seed=5, effect=0.02)
    whole = {
        stage: machine.samples(np.random.default_rng(seed), (60, 32, rounds))
        for seed, (stage, rounds) in enumerate([("screen", 5), ("confirm", 10)])
    }

    def replay():
        taken = dict.fromkeys(names, 0)

        def measure(benchmarks, *, pairs, rounds, stage):
            found = {}
            for name in benchmarks:
                start = taken[name] if stage == "screen" else 0
                part = slice(start, start + pairs)
                taken[name] += pairs
                sides = vars(whole[stage]).values()
                found[name] = Samples(*(side[int(name), part] for side in sides))
            return found

        return measure

    together = judged(replay(), names, Rule())
    apart = [judgement for name in names for judgement in judged(replay(), [name], Rule())]
    assert [j.as_json() for j in together] == [j.as_json() for j in apart]
    assert len({j.verdict for j in together}) >= 3


# The verdict on all


@pytest.mark.parametrize(
    ("screen", "verdict"),
    [
        ([EQUAL, EQUAL], "OK"),
        ([EQUAL, SLOW], "REGRESSED"),
        ([WIDE, SLOW], "REGRESSED"),
        ([EQUAL, WIDE], "INCONCLUSIVE"),
        ([FAST, WIDE], "INCONCLUSIVE"),
        ([FAST, EQUAL], "IMPROVED"),
        ([FAST, SLOW], "REGRESSED"),
        ([EQUAL, {"slowed": 0.0}], "INCONCLUSIVE"),
        ([{"slowed": 0.0}, {"slowed": 0.0}], "VOID"),
        ([EQUAL, {"control": 0.04}], "VOID"),
        ([SLOW, {"control": 0.04}], "VOID"),
    ],
)
def test_verdict_on_all(screen, verdict):
    given = dict(zip(NAMES, screen))
    session = decide(Scripted(given, given), NAMES, Rule())
    assert session.verdict == verdict
    assert session.reason.endswith(".")


def test_unequal_copies_void_every_judgement_and_say_what_it_would_be():
    given = {"decode": SLOW, "prefill": {"control": 0.04}}
    session = decide(Scripted(given, given), NAMES, Rule())
    assert {j.verdict for j in session.judgements.values()} == {Verdict.VOID}
    assert "two copies of the base differ in prefill" in session.reason
    assert "by itself REGRESSED: the head is slower" in session.judgements["decode"].reason


def test_session_is_json_without_infinities():
    given = {"decode": SLOW, "prefill": WIDE}
    session = decide(Scripted(given, given), NAMES, Rule())
    found = json.loads(json.dumps(session.as_json(), allow_nan=False))
    assert found["verdict"] == "REGRESSED"
    assert found["comparisons"] == 2
    decode, _prefill = found["judgements"]
    assert decode["screen"]["head"]["estimate"] == pytest.approx(0.06)
    assert decode["screen"]["slowed"]["estimate"] == pytest.approx(0.05)
    assert decode["confirmation"]["pairs"] == 15


def test_an_infinite_bound_is_null_in_json():
    session = decide(Scripted(), NAMES, Rule(pairs=8))
    (judgement, _) = session.judgements.values()
    few = weigh(Samples(*np.zeros((3, 1, 3, 5))), Rule())[0]
    found = replace(judgement, screen=few).as_json()["screen"]["head"]
    assert found == {"estimate": 0.0, "lower": None, "upper": None}


def test_expected_false_flags_are_those_of_both_stages():
    """At one look of 7 pairs, and 7 to confirm: 2^-14 for each benchmark."""
    rule = Rule(pairs=7, pairs_cap=7, confirm_pairs=7)
    assert expected_false_flags([rule] * 50) == pytest.approx(50 * 2**-14)
    assert expected_false_flags([Rule()] * 50) < 0.014
    assert decide(Scripted(), NAMES, rule).expected_false_flags == pytest.approx(2 * 2**-14)


# What is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 0.0}, "0 < alpha < 0.5"),
        ({"alpha": math.nan}, "0 < alpha < 0.5"),
        ({"pairs": 0}, "1 <= pairs <= pairs_cap"),
        ({"pairs": 64}, "1 <= pairs <= pairs_cap"),
        ({"pairs": 6}, "6 process pairs give no bound at alpha = 0.01: expected 7 or more"),
        ({"confirm_pairs": 6}, "expected 7 or more"),
        ({"confirm_pairs": 0}, "confirm_pairs >= 1"),
        ({"rounds": 0}, "one round or more"),
        ({"margin": 0.001}, "margin >= 0.01"),
        ({"margin": 0.03}, "margin < detects"),
        ({"margin": math.nan}, "margin >= 0.01"),
        ({"injected": 0.03}, "detects < injected"),
        ({"injected": math.inf}, "detects < injected"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as refused:
        Rule(**wrong)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_inject_more_than_they_detect(preset):
    rule = PRESETS[preset]
    assert rule.margin < rule.detects < rule.injected


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        ([], Rule(), "no benchmarks to compare"),
        (["a", "b", "a"], Rule(), "benchmarks are named twice: a"),
        (["a", "b"], {"a": Rule()}, "no rule for b"),
    ],
)
def test_benchmarks_that_cannot_be_judged_are_refused(names, rule, message):
    with pytest.raises(ValueError, match=message):
        decide(Scripted(), names, rule)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: replace(s, control=s.control[:7]),
            r"prefill: expected control of 8 process pairs",
        ),
        (lambda s: replace(s, head=s.head[:, 0]), r"prefill: expected head .* found \[8\]"),
        (lambda s: replace(s, head=s.head * np.nan), r"prefill: head: expected finite"),
        (lambda s: replace(s, slowed=s.slowed + np.inf), r"prefill: slowed: expected finite"),
    ],
)
def test_samples_that_were_not_asked_for_are_refused_by_name(damage, message):
    def measure(benchmarks, **asked):
        found = Scripted()(benchmarks, **asked)
        found["prefill"] = damage(found["prefill"])
        return {name: each for name, each in found.items() if each is not None}

    with pytest.raises(ValueError, match=message) as refused:
        decide(measure, NAMES, Rule())
    assert "\n" not in str(refused.value)


def test_a_confirmation_belongs_to_a_claim():
    found = judged_one()
    with pytest.raises(ValueError, match="decode: OK in the screen and one to confirm it"):
        judge("decode", Rule(), found.screen, found.screen)
    slow = judged_one(SLOW, SLOW)
    with pytest.raises(ValueError, match="decode: REGRESSED in the screen and none to confirm it"):
        judge("decode", Rule(), slow.screen)


def test_a_session_of_nothing_is_void():
    session = session_of([])
    assert (session.verdict, session.reason) == ("VOID", "no benchmark could be measured.")


def test_a_session_on_a_noisy_machine_says_what_to_gate_at():
    assert decide(Scripted(), NAMES, Rule()).advice is None
    noisy = decide(Scripted({"decode": {"width": 0.12}}), NAMES, Rule())
    assert noisy.advice.startswith("in decode two copies of the base spread by up to 7.7 %")
    assert noisy.advice.endswith("gate them at 10 %.")
    hopeless = decide(Scripted({"decode": {"width": 2.0}}), NAMES, Rule())
    assert hopeless.advice.endswith("no gate holds on this machine.")


def test_a_session_of_judgements_keeps_their_order():
    found = judged(Scripted(), ["z", "a", "m"], Rule())
    assert list(session_of(found).judgements) == ["z", "a", "m"]


@pytest.mark.parametrize(
    ("screen", "measurements"),
    [({}, 1), ({"head": 0.04, "width": 0.1}, 2), (SLOW, 2)],
    ids=["at once", "where more pairs were asked for", "where a claim was to be confirmed"],
)
def test_a_benchmark_that_cannot_be_measured_any_more_is_left_out(screen, measurements):
    calls = []

    def measure(benchmarks, **asked):
        calls.append(benchmarks)
        found = Scripted(screen={"prefill": screen})(benchmarks, **asked)
        if len(calls) == measurements:
            assert found.pop("prefill")
        return found

    found = decide(measure, ["prefill", "decode"], Rule())
    assert list(found.judgements) == ["decode"]
    assert found.verdict == Verdict.OK
    assert len(calls) == measurements
