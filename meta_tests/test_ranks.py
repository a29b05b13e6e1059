"""The ranks of a group: one alone, all in one process, and those of torch.distributed."""

import subprocess
import sys
import threading

import pytest
import torch
from command_line import ROOT, environment

from conformance.harness.rank_pool import on_ranks
from conformance.harness.subject import Subject
from reference_impl import ranks as ranks_module
from reference_impl.ranks import (
    OneRank,
    RankFailed,
    agree,
    copy_to_ranks,
    current_ranks,
    gather_from_ranks,
    in_process,
    reduce_from_ranks,
)


def every_operation(ranks):
    """What each collective gives on this rank, with the gradients of the differentiable ones."""
    own = torch.arange(3, dtype=torch.float64) + 10 * ranks.rank
    results = {
        "exchange": ranks.exchange({"rank": ranks.rank}),
        "gather": ranks.gather(own),
        "all_reduce": ranks.all_reduce(own),
        "all_gather": ranks.all_gather(own),
        "all_gather rows": ranks.all_gather(own[None], dim=0),
        "broadcast": ranks.broadcast(own, ranks.size - 1),
        "own": own,
    }
    for name, function in {
        "copy": copy_to_ranks,
        "reduce": reduce_from_ranks,
        "gathered": gather_from_ranks,
    }.items():
        x = own.clone().requires_grad_()
        out = function(x, ranks)
        out.backward(torch.arange(out.numel(), dtype=torch.float64) + 1)
        results[name], results[f"gradient of {name}"] = out.detach(), x.grad
    if ranks.size % 2 == 0:
        half = ranks.split(2)
        results["half"] = (half.rank, half.size, half.all_reduce(own))
    return results


def expected_of_every_operation(rank, size):
    owns = [torch.arange(3, dtype=torch.float64) + 10 * r for r in range(size)]
    total, joined = sum(owns), torch.cat(owns)
    up = torch.arange(3, dtype=torch.float64) + 1
    own_part = torch.arange(3 * size, dtype=torch.float64)[3 * rank : 3 * rank + 3] + 1
    expected = {
        "exchange": [{"rank": r} for r in range(size)],
        "gather": owns,
        "all_reduce": total,
        "all_gather": joined,
        "all_gather rows": torch.stack(owns),
        "broadcast": owns[-1],
        "own": owns[rank],
        "copy": owns[rank],
        "gradient of copy": up * size,
        "reduce": total,
        "gradient of reduce": up,
        "gathered": joined,
        "gradient of gathered": own_part,
    }
    if size % 2 == 0:
        first = rank // 2 * 2
        expected["half"] = (rank % 2, 2, owns[first] + owns[first + 1])
    return expected


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


def assert_all_as_expected(results):
    for rank, found in enumerate(results):
        expected = expected_of_every_operation(rank, len(results))
        assert found.keys() == expected.keys()
        for name in expected:
            assert equal(found[name], expected[name]), (rank, name, found[name], expected[name])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives_in_one_process(size):
    assert_all_as_expected(in_process(size, every_operation))


def on_a_rank(subject):
    return every_operation(current_ranks())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_of_torch_distributed(size):
    assert_all_as_expected(on_ranks(Subject("attention", on_a_rank), size, on_a_rank))


def test_ranks_of_nobody():
    # Outside a group and outside torchrun there is one rank.
    assert isinstance(current_ranks(), OneRank)


@pytest.mark.parametrize("size", [0, 3, 5])
def test_groups_that_do_not_divide_the_ranks_are_refused(size):
    with pytest.raises(RankFailed, match=f"cannot be split into groups of {size}"):
        in_process(4, lambda ranks: ranks.split(size))


def test_one_process_adds_in_the_order_of_the_ranks():
    parts = [1e16, 1.0, -1e16, 1.0]
    (first, *others) = in_process(
        4, lambda ranks: ranks.all_reduce(torch.tensor(parts[ranks.rank], dtype=torch.float64))
    )
    assert float(first) == ((parts[0] + parts[1]) + parts[2]) + parts[3]
    assert all(torch.equal(first, other) for other in others)


def test_results_are_new_tensors():
    def program(ranks):
        own = torch.zeros(2)
        for made in (ranks.all_reduce(own), ranks.gather(own)[ranks.rank], ranks.broadcast(own)):
            made += 1
        return own

    for size in (1, 2):
        for own in in_process(size, program):
            assert own.eq(0).all()


def test_a_rank_that_raises_ends_all_and_is_named():
    def program(ranks):
        if ranks.rank == 2:
            raise ValueError("no such thing")
        return ranks.all_reduce(torch.ones(1))

    before = threading.active_count()
    with pytest.raises(RankFailed, match="rank 2 of 3: no such thing"):
        in_process(3, program)
    assert threading.active_count() == before


def test_a_rank_that_leaves_early_does_not_hang_the_others(monkeypatch):
    monkeypatch.setattr(ranks_module, "PATIENCE", 0.5)

    def program(ranks):
        return None if ranks.rank else ranks.all_reduce(torch.ones(1))

    with pytest.raises(RankFailed, match="rank 0 of 2"):
        in_process(2, program)


def test_gradients_are_recorded_as_the_caller_does():
    with torch.no_grad():
        assert in_process(2, lambda ranks: torch.is_grad_enabled()) == [False, False]
    assert in_process(2, lambda ranks: torch.is_grad_enabled()) == [True, True]


def test_an_error_of_one_rank_is_raised_by_all():
    def program(ranks):
        try:
            agree(ranks, ValueError("bad file") if ranks.rank == 1 else None)
        except (ValueError, RuntimeError) as error:
            return type(error), str(error)

    assert in_process(3, program) == [
        (RuntimeError, "rank 1 of 3: bad file"),
        (ValueError, "bad file"),
        (RuntimeError, "rank 1 of 3: bad file"),
    ]


UNDER_TORCHRUN = """
import torch
from reference_impl.ranks import current_ranks
ranks = current_ranks()
assert (ranks.rank, ranks.size) == (torch.distributed.get_rank(), 2)
assert ranks.exchange(ranks.rank) == [0, 1]
assert current_ranks().size == 2  # the group that exists is used as it is
torch.distributed.destroy_process_group()
"""


def test_the_group_of_torchrun_is_used(tmp_path):
    script = tmp_path / "under_torchrun.py"
    script.write_text(UNDER_TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    run = subprocess.run(
        torchrun, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-3000:]
