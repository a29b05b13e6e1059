"""Checks of blocks whose experts are on several ranks: the oracle is the whole block on one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.differentiated import Differentiated
from conformance.harness.expert_parallel_cases import EXPERTS, NAMES, REPLICATED, ParallelBlockCase
from conformance.harness.expert_parallel_shown import backward_shown, edited_between, shown
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import in_every_lane
from conformance.harness.moe_block_checks import counted
from conformance.harness.moe_block_oracle import block_choice, expected_block
from conformance.harness.parallel_shown import compared_with
from conformance.harness.rank_pool import on_ranks
from conformance.harness.requirement import current_tally
from conformance.harness.shown import differing, made_by, shown_on_rank
from conformance.harness.subject import Subject, errors_named
from conformance.harness.tolerance import Expectation, expect

# On the ranks


@dataclass
class Ran:
    """What a rank has got."""

    output: Any
    gradients: dict[str, Tensor | None]


def run_block(
    subject: Subject,
    arguments: list[Tensor],
    options: dict[str, Any],
    upstream: Tensor | None,
    part: tuple[int, ...] = (),
) -> Ran:
    """Call the block on this rank with its own experts, and make a backward pass if asked to.

    ``part`` says how many experts each rank has, where that is not the same.
    """
    import torch.distributed as dist

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    hidden, router, gate_up, down = arguments
    counts = part or (len(router) // size,) * size
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    given = [x.clone() for x in (hidden, router, gate_up[mine], down[mine])]
    leaves = [x.requires_grad_(upstream is not None) for x in given]
    with torch.set_grad_enabled(upstream is not None):
        output = subject(*leaves, **options)
    if upstream is None:
        return Ran(output.detach() if isinstance(output, Tensor) else output, {})
    with errors_named("the backward pass"):
        found = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    return Ran(output.detach(), dict(zip(NAMES, found)))


def run(subject: Subject, call: Call, *, backward: bool = False) -> list[Ran]:
    """What every rank has got; outputs have been checked to be tensors as they must be."""
    arguments, options = call.values()
    upstream = upstream_of(call) if backward else None
    with backward_shown(call) if backward else nullcontext(), failing_at(shown(call)):
        found = on_ranks(subject, call.case.ranks, run_block, arguments, options, upstream)
    hidden = arguments[0]
    for each in found:
        like = (tuple(hidden.shape), hidden.dtype, hidden.device)
        assert_tensor(each.output, *like, call=shown(call))
    return found


def upstream_of(call: Call) -> Tensor:
    """The gradient of the output; zero for tokens whose choice of experts is not clear."""
    rows_NH = expected_block(call).upstream[0] * block_choice(call).clear[:, None]
    return rows_NH.to(call.dtype).view(call.values()[0][0].shape)


def part_of(whole: Differentiated, name: str, part: slice) -> Expectation:
    """The expectation of some experts' gradient."""
    variants = [whole.variants[name][part]] if name in whole.variants else []
    return expect(whole.values[name][part], variants, whole.noise[name][part], whole.dtype)


def assert_outputs(expert_parallel_block: Subject, case: ParallelBlockCase, *lines: str) -> None:
    """Every rank has the whole output, after further lines that must not matter."""

    def check(call: Call) -> None:
        edited = call.then(*lines)
        expectation = expected_block(call).expectation("output 0")
        for rank, each in enumerate(run(expert_parallel_block, edited)):
            name = f"output of rank {rank}"
            found = counted(each.output, call)
            with shown_on_rank(rank, case.ranks):
                assert_close_to(
                    found, expectation, shown(edited), name=name, source="out.flatten(0, 1)"
                )

    in_every_lane(case, check, "cpu")


def assert_gradients(expert_parallel_block: Subject, case: ParallelBlockCase, *names: str) -> None:
    """Every rank has complete gradients of what is replicated, and those of its own experts."""

    def check(call: Call) -> None:
        whole, number = expected_block(call), case.experts // case.ranks
        for rank, each in enumerate(run(expert_parallel_block, call, backward=True)):
            mine = slice(rank * number, (rank + 1) * number)
            for name in names:
                part = slice(None) if name in REPLICATED else mine
                gradient = each.gradients[name]
                what, source = f"gradient of {name} on rank {rank}", f"{name}.grad"
                with backward_shown(call), shown_on_rank(rank, case.ranks):
                    if gradient is None:
                        shown_by = f"print({source}, '- expected a gradient')"
                        raise ConformanceFailure("no gradient", f"no {what}", shown_by=shown_by)
                    expected = part_of(whole, name, part)
                    assert_close_to(gradient, expected, shown(call), name=what, source=source)

    in_every_lane(case, check, "cpu")


def assert_replicas_equal(expert_parallel_block: Subject, case: ParallelBlockCase) -> None:
    """Outputs, and gradients of what is replicated, are the same bits on every rank."""
    call = case.call(torch.float32)
    first, *others = run(expert_parallel_block, call, backward=True)
    for rank, each in enumerate(others, 1):
        for name, one, other in (
            ("output", first.output, each.output),
            *((name, first.gradients[name], each.gradients[name]) for name in REPLICATED),
        ):
            because = f"{name} of rank {rank} and of rank 0"
            source = "out" if name == "output" else f"{name}.grad"
            with backward_shown(call), made_by(call, then=compared_with(0, source)):
                assert_identical(other, one, call, because=because)


def assert_idle_experts_do_nothing(expert_parallel_block: Subject, case: ParallelBlockCase) -> None:
    """NaN in experts that no token goes to reaches no output, and no gradient but none of theirs."""
    call = case.call(torch.float32)
    unused = (~block_choice(call).chosen.any(0)).nonzero().flatten().tolist()
    edited = call.then(f"for x in ({', '.join(EXPERTS)}): x[{unused}] = torch.nan")
    plain = run(expert_parallel_block, call, backward=True)
    arguments, options = edited.values()
    upstream = upstream_of(call)
    with failing_at(shown(edited)):
        found = on_ranks(expert_parallel_block, case.ranks, run_block, arguments, options, upstream)
    mine = f"[e - first for e in {unused} if first <= e < first + number]"
    edit = f"for x in ({', '.join(EXPERTS)}): x[{mine}] = torch.nan"
    for rank, (one, other) in enumerate(zip(plain, found)):
        for name, before, after in (
            ("output", one.output, other.output),
            *((name, one.gradients[name], other.gradients[name]) for name in NAMES),
        ):
            what = name if name == "output" else f"gradient of {name}"
            because = f"{what} of rank {rank} with NaN in experts without tokens"
            again = edited_between(call, edit, name)
            with (
                shown_on_rank(rank, case.ranks),
                made_by(again, then=differing("out", "before")),
            ):
                assert_identical(after, before, call, because=because)


def assert_refused(expert_parallel_block: Subject, case: ParallelBlockCase) -> None:
    """Experts that do not add up raise an exception on every rank."""
    call = case.call(torch.float32)
    arguments, options = call.values()
    number = case.experts // case.ranks
    for counts in ((number - 1,) * case.ranks, (number, *(number - 1,) * (case.ranks - 1))):
        with failing_at(shown(call, counts)):
            errors = on_ranks(
                expert_parallel_block, case.ranks, refusal, arguments, options, None, counts
            )
        for rank, error in enumerate(errors):
            current_tally().comparisons["exact"] += 1
            if error is None:
                summary = f"rank {rank} goes on with {counts} of {case.experts} experts"
                raise ConformanceFailure("accepted", summary, call=shown(call, counts))


def refusal(subject: Subject, *arguments: Any) -> str | None:
    """The text of the exception that the call ends with on this rank; None if it does not."""
    try:
        run_block(subject, *arguments)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return str(failure.__cause__)
    return None
