"""A measurement that gives what is written down, for tests of the gate's course and verdicts."""

import math
from dataclasses import dataclass, field

import numpy as np

from conformance.gate.decide import judged
from conformance.gate.rule import Rule
from conformance.gate.samples import Samples

SLOW, FAST, EQUAL = {"head": math.log(1.06)}, {"head": math.log(0.94)}, {}
WIDE = {"width": 0.2}


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


def judged_one(screen=None, confirm=None, rule=None):
    """The judgement of one benchmark of which this is measured."""
    measure = Scripted({"decode": screen or {}}, {"decode": confirm or {}})
    (judgement,) = judged(measure, ["decode"], rule or Rule())
    return judgement
