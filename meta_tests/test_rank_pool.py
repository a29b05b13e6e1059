"""The pool of rank processes: every way in which a rank can fail ends in bounded time, named."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from fakes import LosesARank

from conformance.harness import rank_pool, requirement
from conformance.harness.deadline import deadline
from conformance.harness.failures import (
    ConformanceFailure,
    Declined,
    HarnessError,
    Inconclusive,
)
from conformance.harness.rank_pool import end_pools, on_ranks
from conformance.harness.requirement import Tally, all_requirements
from conformance.harness.subject import Subject, errors_named
from conformance.implementations.reference import Reference


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rank_pool, "PATIENCE", 3.0)
    monkeypatch.setattr(rank_pool, "GRACE", 0.5)
    end_pools()
    yield
    end_pools()


def method(*arguments):
    return arguments


def subject():
    return Subject("attention", method)


ASLEEP = 120
"""Seconds that a rank which hangs sleeps; nobody must wait for its end."""


def misbehave(subject, how, guilty=1):
    """One rank does something else than take part in the reduction."""
    if dist.get_rank() == guilty:
        if how == "exit":
            os._exit(3)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "sleep":
            time.sleep(ASLEEP)
        if how == "raise":
            with errors_named("the layer"):
                raise ValueError("rank is unhappy")
        if how == "decline":
            raise Declined("not on this rank")
        if how == "harness":
            raise KeyError("our own fault")
        if how == "print":
            print("x" * 1_000_000, flush=True)
            os.write(1, b"y" * 1_000_000)
        if how == "leave":
            return "early"
    total = torch.ones(1)
    dist.all_reduce(total)
    return float(total)


def failure_of(how, ranks=3):
    with deadline(ASLEEP / 2), pytest.raises(ConformanceFailure) as caught:
        on_ranks(subject(), ranks, misbehave, how)
    return caught.value


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_answers_in_rank_order(ranks):
    assert on_ranks(subject(), ranks, misbehave, "behave") == [float(ranks)] * ranks


def rank_and_process(subject):
    return dist.get_rank(), os.getpid(), int(torch.randint(1 << 30, (1,)))


def test_processes_stay_up_and_draw_other_numbers_each():
    one, two = (on_ranks(subject(), 3, rank_and_process) for _ in range(2))
    assert one == two, "the same processes, seeded alike before each call"
    assert [rank for rank, _, _ in one] == [0, 1, 2]
    assert len({number for _, _, number in one}) == 3
    assert os.getpid() not in {process for _, process, _ in one}


def test_one_rank_runs_here_and_without_a_group():
    assert on_ranks(subject(), 1, initialised_here) == [(False, os.getpid())]


def initialised_here(subject):
    return dist.is_initialized(), os.getpid()


def test_calls_are_counted():
    counted = subject()
    on_ranks(counted, 2, misbehave, "behave")
    assert counted.calls.total() == 1


@pytest.mark.parametrize(
    ("how", "ended"), [("exit", "with status 3"), ("signal", "by signal SIGSEGV")]
)
def test_a_rank_that_dies_is_named(how, ended):
    failure = failure_of(how)
    assert failure.kind == "rank died"
    assert failure.summary == f"rank 1 of 3: its process ended {ended}"
    if how == "signal":
        assert "in misbehave" in failure.details[0]


def test_a_rank_that_hangs_is_named_with_its_stack():
    failure = failure_of("sleep")
    assert failure.kind == "rank hung"
    assert failure.summary == "rank 1 of 3: did not answer within 3 s: it is busy or stuck"
    assert "in misbehave" in failure.details[0]
    assert any("rank 0: did not answer within 3 s: it waits" in each for each in failure.details)


def test_ranks_that_wait_for_each_other_are_told():
    failure = failure_of("leave")
    assert failure.kind == "ranks wait for each other"
    assert failure.summary.startswith("rank 0 of 3: did not answer within 3 s: it waits")


def test_an_exception_of_one_rank_is_that_of_the_call():
    failure = failure_of("raise")
    assert failure.kind == "raised ValueError"
    assert failure.summary == "rank 1 of 3: the layer raised ValueError: rank is unhappy"
    assert any("in misbehave" in each for each in failure.details)
    assert any("still waiting: 0, 2" in each for each in failure.details)


def test_a_call_that_hung_is_not_waited_for_again(monkeypatch):
    failure_of("sleep")
    monkeypatch.setattr(rank_pool.RankPool, "_answers", lambda pool: pytest.fail("is waited for"))
    with pytest.raises(ConformanceFailure, match="rank 1 of 3: did not answer within 3 s"):
        on_ranks(subject(), 3, misbehave, "sleep")


def test_other_calls_after_one_that_hung_are_given_up_sooner(monkeypatch):
    monkeypatch.setattr(rank_pool, "SHORT_PATIENCE", 1.0)
    failure_of("sleep")
    with pytest.raises(ConformanceFailure, match="rank 2 of 3: did not answer within 1 s"):
        on_ranks(subject(), 3, misbehave, "sleep", 2)


def test_a_requirement_runs_no_further_cases_after_two_that_hung(monkeypatch):
    monkeypatch.setattr(rank_pool, "SHORT_PATIENCE", 0.5)
    tally = Tally()
    monkeypatch.setattr(rank_pool, "current_tally", lambda: tally)
    for guilty in (0, 1):
        with pytest.raises(ConformanceFailure, match="did not answer"):
            on_ranks(subject(), 3, misbehave, "sleep", guilty)
    with pytest.raises(Inconclusive, match="hung in earlier cases"):
        on_ranks(subject(), 3, misbehave, "behave")


def test_a_requirement_runs_no_further_cases_after_some_in_which_ranks_died(monkeypatch):
    monkeypatch.setattr(requirement, "ENOUGH_DEATHS", 3)
    begun = []
    start = rank_pool.RankPool.start
    monkeypatch.setattr(rank_pool.RankPool, "start", lambda pool: (begun.append(pool), start(pool)))
    sums = all_requirements()["parallel_linear.row.sum"]
    with pytest.raises(ConformanceFailure, match="rank 1 of 2: its process ended") as caught:
        sums.check(LosesARank().parallel_linear)
    assert caught.value.kind == "rank died"
    assert len(sums.last_tally.deadly) <= 3 + AGAIN
    assert 3 <= len(begun) <= 3 + AGAIN


AGAIN = 3
"""Times that Hypothesis runs the smallest case once more, to be sure of it."""


def test_the_pool_is_whole_again_after_a_failure():
    before = on_ranks(subject(), 2, rank_and_process)
    failure_of("exit", ranks=2)
    after = on_ranks(subject(), 2, rank_and_process)
    assert {process for _, process, _ in before}.isdisjoint(process for _, process, _ in after)


def test_a_rank_that_declines_declines_the_case():
    with pytest.raises(Declined, match="not on this rank"):
        on_ranks(subject(), 2, misbehave, "decline")


def test_a_fault_of_the_harness_is_told_as_one():
    with pytest.raises(HarnessError, match="rank 1 of 2: KeyError"):
        on_ranks(subject(), 2, misbehave, "harness")


def test_what_ranks_print_is_dropped(capfd):
    assert on_ranks(subject(), 2, misbehave, "print") == [2.0, 2.0]
    assert capfd.readouterr() == ("", "")


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_process_outlives_its_pool():
    processes = [process for _, process, _ in on_ranks(subject(), 3, rank_and_process)]
    assert all(map(alive, processes))
    end_pools()
    assert not any(map(alive, processes))


def test_another_implementation_has_another_pool():
    one = on_ranks(subject(), 2, rank_and_process)
    two = on_ranks(Subject("attention", lambda *arguments: arguments), 2, rank_and_process)
    assert {p for _, p, _ in one}.isdisjoint(p for _, p, _ in two)
    assert not any(alive(process) for _, process, _ in one)


def what_it_closes_over(subject):
    return subject.method()


def test_ranks_have_whatever_the_implementation_is_made_of():
    unpicklable = (number for number in [7])
    assert on_ranks(Subject("attention", lambda: next(unpicklable)), 2, what_it_closes_over) == [
        7,
        7,
    ]


def test_memory_that_cases_reserved_does_not_keep_ranks_from_starting():
    requirements = all_requirements()
    huge = requirements["attention.memory.offsets-past-int32"]  # 180 GB that nobody touches
    huge.check(Reference().attention)
    assert on_ranks(subject(), 4, misbehave, "behave") == [4.0] * 4
