"""Process pairs: who is timed when, on what, and what becomes of a side that refuses."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conformance.gate.decide import decide
from conformance.gate.measuring import BASE, CONTROL, HEAD, LOST, ORDERS, SLOWED, ProcessPairs
from conformance.gate.rows import drift, not_offered, row_of
from conformance.gate.rule import Rule
from conformance.gate.sides import GateError, Side
from conformance.gate.worker import DECLINED, NOT_OFFERED, RAISED, WRONG
from conformance.gate.workers import Refusal, WorkerLost

HERE = Path.cwd()
NAMES = ["prefill", "decode"]
SECONDS = 1e-3
COUNTERS = {"launches": 3, "peak_bytes": 100}


class Machine:
    """Makes workers that compute nothing, take scripted times, and keep what they were asked."""

    def __init__(
        self, slower=None, refuse=None, counters=None, origin="elsewhere", clocks=None, copies=()
    ):
        self.slower = slower or {}
        """Share by which an implementation is slower than SECONDS."""
        self.refuse = refuse or {}
        """(implementation, request, benchmark) to an exception, or to a count-down and one."""
        self.counters = counters or {}
        self.origin = origin
        self.clocks = clocks or {}
        """The clock of the multiprocessors in MHz while an implementation is timed."""
        self.copies = list(copies)
        """What a copy of the device does, each time it is asked for."""
        self.log = []
        self.started = 0

    def start(self, side, device, threads):
        self.started += 1
        return Worker(self, side, self.started)

    def timed(self):
        """(worker, benchmark, request) of every timing, in order."""
        return [entry for entry in self.log if entry[2]["do"] == "time"]


class Worker:
    def __init__(self, machine, side, number):
        self.machine, self.side, self.number = machine, side, number
        self.benchmark, self.waiting, self.ended = None, None, False

    def wait_until_ready(self):
        pass

    def end(self):
        self.ended = True

    def told(self, name, **arguments):
        return self.ask(name, **arguments)

    def ask(self, name, **arguments):
        self.request(name, **arguments)
        return self.answer()

    def request(self, name, **arguments):
        assert not self.ended
        assert self.waiting is None
        self.waiting = (name, arguments)

    def answer(self):
        (name, arguments), self.waiting = self.waiting, None
        if name == "open":
            self.benchmark = arguments["benchmark"]
        request = {"do": name, **arguments}
        self.machine.log.append((self, self.benchmark, request))
        planned = self.machine.refuse.get((self.side.implementation, name, self.benchmark))
        if planned is not None:
            planned[0] -= 1
            if planned[0] < 0:
                raise planned[1]
        return getattr(self, name)(**arguments)

    def open(self, benchmark, seed):
        pass

    close = check = lambda self: None

    def time(self, turn, launches, delay):
        slower = self.machine.slower.get(self.side.implementation, 0.0)
        seconds = [SECONDS * (1 + slower) + delay] * launches
        return {"seconds": seconds, "sm_clock": self.machine.clocks.get(self.side.implementation)}

    def anchors(self):
        return {"copy": self.machine.copies.pop(0) if self.machine.copies else 1e9}

    def fingerprint(self):
        return {"id": "fake"}

    def counters(self):
        return COUNTERS | self.machine.counters.get(self.side.implementation, {})

    def origin(self, under):
        return {"file": "adapter.py", "version": "1", "below": self.machine.origin}


def pairs_of(machine, *, device="cpu", checked_out=None, **options):
    sides = (Side(name, name, HERE, checked_out=checked_out) for name in ("old", "new"))
    injected = dict.fromkeys(NAMES, 0.05)
    return ProcessPairs(
        *sides, device=device, threads=1, injected=injected, start=machine.start, **options
    )


def test_every_side_comes_in_every_place_and_after_every_other():
    for place in range(4):
        assert {order[place] for order in ORDERS} == {BASE, HEAD, CONTROL, SLOWED}
    after = Counter(pair for order in ORDERS for pair in pairwise(order))
    assert len(after) == 12
    assert set(after.values()) == {1}


def test_every_pair_is_of_fresh_processes_and_both_orders_are_balanced():
    machine = Machine()
    pairs = pairs_of(machine)
    names = pairs.prepare(NAMES)
    assert machine.started == 4
    pairs(names, pairs=4, rounds=4, stage="screen")
    assert machine.started == 4 + 4 * 4
    found = pairs.found["decode"]
    assert len(found.base_first) == len(found.head_first) == 8


def test_the_sides_of_a_pair_have_the_same_inputs_and_no_other_pair_has_them():
    machine = Machine()
    pairs = pairs_of(machine)
    names = pairs.prepare(NAMES)
    machine.log.clear()
    pairs(names, pairs=2, rounds=1, stage="screen")
    pairs(names, pairs=2, rounds=1, stage="confirm")
    opened = [(b, request["seed"]) for _, b, request in machine.log if request["do"] == "open"]
    seeds = Counter(opened)
    assert set(seeds.values()) == {4}
    assert len({seed for _, seed in seeds}) == 4
    turns = {(w.number, request["turn"]) for w, b, request in machine.timed() if b == "decode"}
    assert {turn for _, turn in turns} == {0}


def test_all_sides_do_the_same_and_are_checked_after_timing():
    """What one of them did otherwise would show in its times."""
    machine = Machine()
    pairs = pairs_of(machine)
    names = pairs.prepare(["decode"])
    machine.log.clear()
    pairs(names, pairs=1, rounds=1, stage="screen")
    asked = [request["do"] for _, _, request in machine.log]
    expected = ["open"] * 4 + ["time"] * (4 + 4) + ["check"] * 4 + ["close"] * 4
    assert asked == [*expected, "anchors"]


def test_the_other_side_is_first_in_the_confirmation():
    def first(stage):
        machine = Machine()
        pairs = pairs_of(machine)
        names = pairs.prepare(NAMES)
        machine.log.clear()
        pairs(names[:1], pairs=1, rounds=1, stage=stage)
        # The first four make the processes warm.
        return [worker.side.implementation for worker, _, _ in machine.timed()[4:]]

    assert first("screen") == first("confirm")[::-1]


def test_ratios_are_those_of_the_times_and_the_slowed_control_has_its_delay():
    machine = Machine(slower={"new": 0.3})
    pairs = pairs_of(machine)
    names = pairs.prepare(NAMES)
    found = pairs(names, pairs=2, rounds=3, stage="screen")["prefill"]
    assert found.head.shape == found.control.shape == found.slowed.shape == (2, 3)
    assert np.allclose(found.head, math.log(1.3))
    assert np.allclose(found.control, 0)
    assert np.allclose(found.slowed, math.log(1.05))


def test_delays_keep_their_share_when_the_machine_becomes_slower():
    machine = Machine()
    pairs = pairs_of(machine, slow_head=0.2)
    names = pairs.prepare(NAMES)
    machine.slower = {"old": 1.0, "new": 1.0}
    found = pairs(names, pairs=1, rounds=2, stage="screen")["decode"]
    assert np.allclose(found.slowed, math.log(1.05))
    assert np.allclose(found.head, math.log(1.2))


def test_the_head_can_be_slowed_on_purpose():
    pairs = pairs_of(Machine(), slow_head=0.1)
    names = pairs.prepare(NAMES)
    assert np.allclose(pairs(names, pairs=1, rounds=1, stage="screen")["decode"].head, np.log(1.1))


def test_short_launches_are_repeated_until_a_round_is_long_enough():
    pairs = pairs_of(Machine())
    pairs.prepare(NAMES)
    assert pairs.plans["decode"].launches == 5  # of 1 ms each, where 2 would fill a round
    pairs = pairs_of(Machine(slower={"old": -0.875}))
    pairs.prepare(NAMES)
    assert pairs.plans["decode"].launches == 16


def test_what_is_as_short_as_launching_it_is_not_gated_on_a_gpu():
    pairs = pairs_of(Machine(slower={"old": -0.99}), device="cuda")
    assert pairs.prepare(NAMES) == []
    row = row_of("decode", pairs, None, [])
    assert (row.verdict, row.reason) == (
        "INCONCLUSIVE",
        "the base: too short: a launch takes 10.0 µs, and is not told from launching it",
    )


# Refusals


def refusing(side, request, kind, *, after=0):
    """A machine on which one side refuses a request about decode, at first or later."""
    error = WorkerLost("died") if kind == LOST else Refusal(kind, "why")
    return Machine(refuse={(side, request, "decode"): [after, error]})


@pytest.mark.parametrize("kind", [WRONG, RAISED, DECLINED, NOT_OFFERED, LOST])
@pytest.mark.parametrize("request_", ["open", "check", "time"])
def test_what_the_base_computes_and_the_head_does_not_is_a_regression(kind, request_):
    pairs = pairs_of(refusing("new", request_, kind))
    names = pairs.prepare(NAMES)
    session = decide(pairs, names, Rule(pairs=7, pairs_cap=7))
    assert list(session.judgements) == ["prefill"]
    row = row_of("decode", pairs, session, [])
    assert row.verdict == "REGRESSED"
    assert row.reason.startswith(f"the head: {kind}: ")
    assert row_of("prefill", pairs, session, []).verdict == "OK"


@pytest.mark.parametrize("kind", [WRONG, RAISED, LOST])
def test_where_the_base_is_wrong_there_is_nothing_to_compare_with(kind):
    pairs = pairs_of(refusing("old", "open", kind))
    assert pairs.prepare(NAMES) == ["prefill"]
    assert row_of("decode", pairs, None, []).verdict == "VOID"
    assert not_offered(NAMES, pairs) == {}


@pytest.mark.parametrize("kind", [DECLINED, NOT_OFFERED])
def test_what_the_base_does_not_offer_is_not_compared(kind):
    pairs = pairs_of(refusing("old", "open", kind))
    assert pairs.prepare(NAMES) == ["prefill"]
    assert not_offered(NAMES, pairs) == {"decode": "why"}


@pytest.mark.parametrize(("kind", "more"), [(LOST, 1), (RAISED, 1), (WRONG, 0)])
def test_a_process_that_is_lost_or_raised_is_made_up_for_by_fresh_ones(kind, more):
    machine = refusing("new", "time", kind, after=1)
    pairs = pairs_of(machine)
    names = pairs.prepare(["decode", "prefill"])
    found = pairs(names, pairs=3, rounds=1, stage="screen")
    assert list(found) == ["prefill"]
    assert found["prefill"].head.shape == (3, 1)
    assert machine.started == 4 * (1 + 3 + more)


def test_a_worse_deterministic_metric_regresses_whatever_the_times_are():
    machine = Machine(slower={"new": -0.3}, counters={"new": {"launches": 4}})
    pairs = pairs_of(machine)
    names = pairs.prepare(NAMES)
    session = decide(pairs, names, Rule(pairs=7, pairs_cap=7))
    row = row_of("decode", pairs, session, [])
    assert row.verdict == "REGRESSED"
    assert row.reason.startswith("launches: 4, the base has 3; by time IMPROVED: ")
    accepted = row_of("decode", pairs, session, ["launches"])
    assert accepted.verdict == "IMPROVED"
    assert [str(change) for change in accepted.changes] == ["launches: 4, the base has 3"]


@pytest.mark.parametrize(
    ("clocks", "verdict"),
    [
        ({}, "REGRESSED"),
        ({"old": 1980, "new": 1980}, "REGRESSED"),
        ({"old": 1980}, "REGRESSED"),  # read on one side alone: nothing to be said
        ({"old": 1980, "new": 1800}, "INCONCLUSIVE"),
    ],
)
def test_a_slower_clock_is_not_taken_for_slower_code(clocks, verdict):
    machine = Machine(slower={"new": 0.1}, clocks=clocks)
    pairs = pairs_of(machine)
    names = pairs.prepare(NAMES)
    session = decide(pairs, names, Rule())
    assert session.judgements["decode"].verdict == "REGRESSED"
    row = row_of("decode", pairs, session, [])
    assert row.verdict == verdict
    assert row.reason.startswith("slower in time but not in cycles") == (verdict != "REGRESSED")


def test_the_machine_is_watched_at_the_beginning_and_after_each_stage():
    pairs = pairs_of(Machine(copies=[1e9, 1.04e9, 1.06e9]))
    names = pairs.prepare(NAMES)
    pairs(names, pairs=2, rounds=1, stage="screen")
    assert drift(pairs.anchors) == []
    pairs(names, pairs=2, rounds=1, stage="confirm")
    assert drift(pairs.anchors) == [
        "the machine's own copy moved by 6 % during the run, between 1e+09 and 1.06e+09 a second"
    ]


# Revisions


def test_a_revision_from_which_nothing_is_imported_is_refused():
    pairs = pairs_of(Machine(origin=None), checked_out=HERE)
    message = "old: old imports nothing from the revision (it is adapter.py)"
    with pytest.raises(GateError) as raised:
        pairs.prepare(NAMES)
    assert message in str(raised.value)


def test_an_adapter_need_not_come_from_a_revision():
    pairs = pairs_of(Machine(origin=None))
    assert pairs.prepare(NAMES) == NAMES
    assert pairs.origins[BASE] == {"file": "adapter.py", "version": "1", "below": None}
