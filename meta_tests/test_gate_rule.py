"""The gate's rule: every verdict, what it takes, and what the run of it measures."""

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from noise_models import Machine, Noise

from conformance.gate.decide import decide, judged, session_of
from conformance.gate.evidence import Claim, claim, weigh
from conformance.gate.judgement import judge
from conformance.gate.rule import (
    PRESETS,
    Rule,
    Verdict,
    expected_false_flags,
    recommended_gate,
)
from conformance.gate.samples import Samples

QUIET = Noise(0.003, bias=0.002)
NAMES = ["decode", "prefill"]


def spread_over(pairs, rounds, centre, width=0.0, seed=0):
    """Medians of process pairs that lie within ``width`` of the centre, evenly and in random order."""
    offsets = np.random.default_rng(seed).permutation(np.linspace(-width, width, pairs))
    return np.broadcast_to(centre + offsets[:, None], (pairs, rounds)).copy()


@dataclass
class Scripted:
    """A ``Measure`` that gives what is written down, stage by stage, and keeps what it was asked."""

    screen: dict = field(default_factory=dict)
    confirm: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)

    def __call__(self, benchmarks, *, pairs, rounds, stage):
        self.asked.append((stage, tuple(benchmarks), pairs, rounds))
        wanted = getattr(self, stage)
        usual = {"head": 0.0, "control": 0.0, "slowed": math.log(1.05), "width": 0.002}
        found = {}
        for name in benchmarks:
            given = usual | wanted.get(name, {})
            sides = ("head", "control", "slowed")
            found[name] = Samples(
                *(
                    spread_over(pairs, rounds, given[side], given["width"], seed)
                    for seed, side in enumerate(sides)
                )
            )
        return found


def one(screen=None, confirm=None, rule=None):
    """The judgement of one benchmark of which this is measured."""
    measure = Scripted({"decode": screen or {}}, {"decode": confirm or {}})
    (judgement,) = judged(measure, ["decode"], rule or Rule())
    return judgement


SLOW, FAST, EQUAL = {"head": math.log(1.06)}, {"head": math.log(0.94)}, {}
WIDE = {"width": 0.2}


@pytest.mark.parametrize(
    ("screen", "confirm", "verdict"),
    [
        (EQUAL, None, "OK"),
        (SLOW, SLOW, "REGRESSED"),
        (FAST, FAST, "IMPROVED"),
        (SLOW, EQUAL, "OK"),
        (FAST, EQUAL, "OK"),
        (SLOW, FAST, "INCONCLUSIVE"),
        (FAST, SLOW, "INCONCLUSIVE"),
        (SLOW, WIDE, "INCONCLUSIVE"),
        (SLOW, SLOW | {"slowed": 0.0}, "REGRESSED"),
        (WIDE, None, "INCONCLUSIVE"),
        ({"slowed": 0.0}, {"slowed": 0.0}, "VOID"),
        ({"slowed": 0.0}, EQUAL, "OK"),
        ({"slowed": 0.0}, SLOW, "INCONCLUSIVE"),
        ({"control": 0.04}, {"control": 0.04}, "VOID"),
        ({"control": -0.04}, {"control": -0.04}, "VOID"),
        ({"control": 0.04}, {"control": -0.04}, "INCONCLUSIVE"),
        ({"control": 0.04}, EQUAL, "OK"),
        ({"control": 0.04} | SLOW, SLOW, "INCONCLUSIVE"),
        (SLOW, {"control": 0.04} | SLOW, "INCONCLUSIVE"),
        ({"head": 0.02}, {"head": 0.02}, "REGRESSED"),
        ({"head": 0.009}, None, "OK"),
    ],
)
def test_verdict(screen, confirm, verdict):
    found = one(screen, confirm)
    assert found.verdict == verdict
    assert (found.confirmation is not None) == (confirm is not None)
    assert found.reason.endswith(".")
    assert "\n" not in found.reason


def test_a_regression_needs_the_margin_and_not_only_a_bound_above_zero():
    assert one({"head": 0.008, "width": 0.0001}).verdict == "OK"
    assert one({"head": 0.011, "width": 0.0001}, {"head": 0.011, "width": 0.0001}).verdict == (
        "REGRESSED"
    )


def test_an_improvement_needs_the_margin_too():
    assert one({"head": -0.008, "width": 0.0001}).verdict == "OK"
    faster = {"head": -0.011, "width": 0.0001}
    assert one(faster, faster).verdict == "IMPROVED"


def test_ok_and_regressed_need_the_bound_and_not_the_estimate():
    """At 32 pairs of this width the bounds are 1.5 % off."""
    found = one({"head": 0.018, "slowed": 0.06, "width": 0.06})
    assert found.screen.margin < found.screen.head.estimate < math.log1p(0.03)
    assert found.verdict == "INCONCLUSIVE"
    assert "neither exceeds the margin" in found.reason


def test_a_margin_of_its_own_is_kept():
    rule = Rule(margin=0.04, detects=0.05, injected=0.08)
    slowed = {"slowed": math.log(1.08)}
    assert one({"head": 0.03} | slowed, None, rule).verdict == "OK"
    assert one({"head": 0.06} | slowed, {"head": 0.06} | slowed, rule).verdict == "REGRESSED"


def test_ok_needs_the_known_slowdown_found():
    """The head is well below what is to be detected; but so, nearly, is what was slowed on purpose."""
    found = one({"slowed": 0.045, "width": 0.01})
    assert found.verdict == "OK"
    hidden = one({"slowed": 0.02, "width": 0.06})
    assert hidden.screen.head.upper < math.log1p(0.03)
    assert hidden.verdict == "INCONCLUSIVE"
    assert "a known slowdown of 5 % is not told from the margin" in hidden.reason


def test_the_margin_grows_with_the_spread_of_two_copies():
    samples = Machine(Noise(0.0001, bias=0.04), seed=0).samples(np.random.default_rng(0), (3, 8, 5))
    for evidence in weigh(samples, Rule()):
        error = math.sqrt(math.pi / 3 / 8) * evidence.process_sd
        assert evidence.margin == pytest.approx(2 * error)
        assert evidence.margin > 0.01


def test_spreads_are_those_of_rounds_and_of_processes():
    noise = Noise(0.01 / math.sqrt(2), bias=0.03)
    samples = Machine(noise, seed=0).samples(np.random.default_rng(0), (200, 32, 9))
    found = weigh(samples, Rule())
    assert np.mean([each.round_sd for each in found]) == pytest.approx(0.01, rel=0.03)
    assert np.mean([each.process_sd for each in found]) == pytest.approx(0.03, rel=0.05)


@pytest.mark.parametrize(
    ("process_sd", "gate"),
    [(0.0, 0.03), (0.02, 0.03), (0.035, 0.05), (0.05, 0.10), (0.08, 0.10), (0.15, 0.20), (1, None)],
)
def test_the_spread_says_what_to_gate_at(process_sd, gate):
    assert recommended_gate(process_sd, Rule()) == gate


def test_a_noisy_benchmark_is_told_what_to_gate_at():
    noise = Noise(0.0001, bias=0.06)
    found = judged(Machine(noise, seed=1), NAMES, Rule())
    for judgement in found:
        if judgement.verdict is Verdict.INCONCLUSIVE:
            assert "so gate at 10 %" in judgement.reason
    assert Verdict.INCONCLUSIVE in {judgement.verdict for judgement in found}


def test_the_known_slowdown_is_judged_as_a_head_is():
    """The same numbers as head and as slowed copy: found in both or in neither."""
    samples = Machine(Noise(0.02, bias=0.02), seed=2).samples(np.random.default_rng(3), (500, 8, 5))
    as_head = weigh(Samples(samples.slowed, samples.control, samples.slowed), Rule())
    for evidence in as_head:
        if claim(evidence, Rule()) is not Claim.UNEQUAL:
            found = evidence.slowed.lower > evidence.margin
            assert (claim(evidence, Rule()) is Claim.REGRESSED) == found


# The course of a run


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
    assert one({"head": 0.5}, EQUAL).verdict == "OK"


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
    found = one()
    with pytest.raises(ValueError, match="decode: OK in the screen and one to confirm it"):
        judge("decode", Rule(), found.screen, found.screen)
    slow = one(SLOW, SLOW)
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
