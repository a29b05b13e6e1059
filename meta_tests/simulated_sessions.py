"""What the gate says, in whole sessions, on machines that do not exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from unittest import mock

import numpy as np
from markdown_tables import markdown, share, shares
from noise_models import MACHINES, Machine, Noise

from conformance.gate.decide import judged, session_of
from conformance.gate.judgement import Judgement
from conformance.gate.rule import PRESETS, Rule, Verdict
from conformance.gate.statistics import standard_error

EFFECTS = (0.03, 0.05, 0.10)


@dataclass(frozen=True)
class Place:
    """A machine, and what is gated on it."""

    noise: Noise
    rule: Rule


PLACES = {
    "gpu quiet": Place(replace(MACHINES["gpu quiet"], bias=0.003), PRESETS["gpu"]),
    "gpu typical": Place(replace(MACHINES["gpu typical"], bias=0.005), PRESETS["gpu"]),
    "gpu shared": Place(replace(MACHINES["gpu shared"], bias=0.02), PRESETS["gpu"]),
    "cpu dedicated": Place(replace(MACHINES["cpu dedicated"], bias=0.01), PRESETS["cpu"]),
    "cpu cloud": Place(replace(MACHINES["cpu cloud"], bias=0.02), PRESETS["shared"]),
    "cpu cloud, strict": Place(replace(MACHINES["cpu cloud"], bias=0.02), PRESETS["gpu"]),
    "heavy tails": Place(Noise(0.01, bias=0.01, student=True), PRESETS["gpu"]),
    "two speeds of processes": Place(Noise(0.007, 0.03, slow_processes=0.5), PRESETS["gpu"]),
    "head alone stalls": Place(Noise(0.007, bias=0.003, head_stalls=0.15), PRESETS["gpu"]),
    "1 % pairs, 1 % bias": Place(Noise(0.01 / 2**0.5, bias=0.01), PRESETS["gpu"]),
}
"""``strict`` gates a machine at less than its spread allows."""

BARS = "1 % pairs, 1 % bias"
"""At which the gate promises to find 3 and 5 %."""

SESSIONS, FEWER_SESSIONS, BENCHMARKS = 1000, 200, 50
"""Sessions without a slowdown on each of the five machines, and on each other; benchmarks in each."""
CHUNK = 2500


def judgements(place: Place, effect: float, number: int, **machine: float) -> list[Judgement]:
    """So many benchmarks judged by the gate, whose heads are all slower by ``effect``."""
    found: list[Judgement] = []
    for start in range(0, number, CHUNK):
        names = [f"b{start + i}" for i in range(min(CHUNK, number - start))]
        measure = Machine(place.noise, 6, effect, place.rule.injected, **machine)
        found += judged(measure, names, place.rule)
    return found


@dataclass(frozen=True)
class Outcome:
    """What the gate says on a machine: shares of judgements by verdict, cost, and of all sessions."""

    verdicts: dict[Verdict, float]
    pairs: float
    """Process pairs a benchmark, on average."""
    void_sessions: float
    by_estimate: float
    """Sessions in which the A/A estimate alone, without its bound, is beyond the margin somewhere."""
    number: int

    def __getitem__(self, verdict: Verdict) -> float:
        return self.verdicts.get(verdict, 0.0)


def outcome(found: Sequence[Judgement]) -> Outcome:
    """The shares, and those of sessions of ``BENCHMARKS`` judgements each."""
    sessions = [found[i : i + BENCHMARKS] for i in range(0, len(found), BENCHMARKS)]
    counts = Counter(each.verdict for each in found)
    beyond = [any(abs(j.screen.control.estimate) > j.screen.margin for j in s) for s in sessions]
    return Outcome(
        {verdict: count / len(found) for verdict, count in counts.items()},
        sum(each.pairs for each in found) / len(found),
        float(np.mean([session_of(s).verdict is Verdict.VOID for s in sessions])),
        float(np.mean(beyond)),
        len(found),
    )


@cache
def gate_run(place: str, effect: float) -> Outcome:
    """What the gate says on this machine of heads that are slower by this share."""
    number = 1000 if effect else BENCHMARKS * (SESSIONS if place in MACHINES else FEWER_SESSIONS)
    return outcome(judgements(PLACES[place], effect, number))


def table_of_false_alarms() -> str:
    """What the gate says where no head is slower."""
    header = ["machine", "detects", "false REGRESSED", "false IMPROVED", "OK", "INCONCLUSIVE"]
    header += ["sessions VOID", "pairs", "sessions with an A/A estimate beyond the margin"]
    rows = []
    for name, place in PLACES.items():
        run = gate_run(name, 0.0)
        false = [
            f"{round(run[v] * run.number)} of {run.number}"
            for v in (Verdict.REGRESSED, Verdict.IMPROVED)
        ]
        rest = map(share, (run[Verdict.OK], run[Verdict.INCONCLUSIVE], run.void_sessions))
        detects = f"{100 * place.rule.detects:g} %"
        rows.append([name, detects, *false, *rest, f"{run.pairs:.1f}", share(run.by_estimate)])
    return markdown(header, rows)


def table_of_detection() -> str:
    """What the gate says where heads are slower."""
    header = ["machine", "detects"]
    header += [f"{100 * e:g} %: REGRESSED / OK / INCONCLUSIVE (pairs)" for e in EFFECTS]
    rows = []
    for name, place in PLACES.items():
        runs = [gate_run(name, effect) for effect in EFFECTS]
        cells = [
            shares(run[v] for v in (Verdict.REGRESSED, Verdict.OK, Verdict.INCONCLUSIVE))
            + f" ({run.pairs:.0f})"
            for run in runs
        ]
        rows.append([name, f"{100 * place.rule.detects:g} %", *cells])
    return markdown(header, rows)


# What the margin is made of

MARGIN_BIASES = (0.003, 0.005, 0.01, 0.02)


def of_medians(values: np.ndarray) -> np.ndarray:
    """The other reading of "standard deviation of A/A": that of one process pair."""
    return np.std(values, axis=-1, ddof=1)


@cache
def margins(number: int = 2000) -> dict[tuple[float, str], list[float]]:
    """By process bias and reading: the median margin, and how often 3 and 5 % are found."""
    found = {}
    for bias in MARGIN_BIASES:
        place = Place(Noise(0.01 / 2**0.5, bias=bias), PRESETS["gpu"])
        for reading in ("process medians", "estimate"):
            with mock.patch(
                "conformance.gate.evidence.standard_error",
                of_medians if reading == "process medians" else standard_error,
            ):
                runs = [judgements(place, effect, number) for effect in EFFECTS[:2]]
            margin = float(np.median([each.screen.margin for each in runs[0]]))
            power = [outcome(run)[Verdict.REGRESSED] for run in runs]
            found[bias, reading] = [float(np.expm1(margin)), *power]
    return found


def table_of_margins() -> str:
    """The two readings beside each other."""
    header = ["bias sd"]
    header += [
        f"2 x sd of the {r}: margin, 3 % / 5 % found" for r in ("process medians", "estimate")
    ]
    rows = []
    for bias in MARGIN_BIASES:
        cells = [margins()[bias, r] for r in ("process medians", "estimate")]
        rows.append([f"{100 * bias:g} %", *(f"{100 * c[0]:.1f} %, {shares(c[1:])}" for c in cells)])
    return markdown(header, rows)


# Broken measurements

BROKEN = {
    "second copy of the base 0.5 % slower": {"unequal": 0.005},
    "second copy of the base 2 % slower": {"unequal": 0.02},
    "second copy of the base 4 % slower": {"unequal": 0.04},
    "no slowdown shows": {"seen": 0.0},
    "half of a slowdown shows": {"seen": 0.5},
}


@cache
def broken(number: int = 1000) -> dict[tuple[str, str], Outcome]:
    """On two machines, heads slower by 10 %, where the measurement is broken in some way."""
    return {
        (name, how): outcome(judgements(PLACES[name], 0.10, number, **machine))
        for name in ("gpu typical", "gpu shared")
        for how, machine in BROKEN.items()
    }


def table_of_broken() -> str:
    """Verdicts on heads that are slower by 10 %."""
    header = [
        "machine",
        "what is broken",
        "REGRESSED",
        "OK",
        "INCONCLUSIVE",
        "VOID",
        "sessions VOID",
    ]
    verdicts = (Verdict.REGRESSED, Verdict.OK, Verdict.INCONCLUSIVE, Verdict.VOID)
    rows = [
        [name, how, *(share(run[v]) for v in verdicts), share(run.void_sessions)]
        for (name, how), run in broken().items()
    ]
    return markdown(header, rows)
