"""Lines that show what a check of a block with experts on several ranks has seen.

Every rank runs the same lines; ``rank`` is the number of the process that runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from conformance.harness.calls import Call, course
from conformance.harness.expert_parallel_cases import EXPERTS, NAMES, ParallelBlockCase
from conformance.harness.moe_block_oracle import block_choice
from conformance.harness.shown import after, made_by


def shown(call: Call, counts: tuple[int, ...] = ()) -> Call:
    """The call as each rank makes it, with so many experts each or with the same number."""
    case: ParallelBlockCase = call.case
    rank = "rank" if case.ranks > 1 else "0"
    number = case.experts // case.ranks
    mine = f"first, number = {number} * {rank}, {number}"
    if counts:
        mine = f"first, number = sum({counts}[:{rank}]), {counts}[{rank}]"
    lines = (mine, *(f"{name} = {name}[first:first + number]" for name in EXPERTS))
    return replace(call.then(*lines), contract="expert_parallel_block")


@contextmanager
def backward_shown(call: Call) -> Iterator[None]:
    """A failure in here is of a backward pass, or seen after it, in the ``grad`` of an argument."""
    with made_by(shown(call).then(*backward_lines(call))), after("out.backward(upstream)"):
        yield


def backward_lines(call: Call) -> tuple[str, ...]:
    """Lines that ask for gradients, and leave that of the output in ``upstream``."""
    case: ParallelBlockCase = call.case
    unclear = (~block_choice(call).clear).nonzero().flatten().tolist()
    shape = (case.batch * case.tokens, case.hidden)
    lines = [
        f"for each in ({', '.join(NAMES)}): each.requires_grad_()",
        f"gu = torch.Generator().manual_seed({case.seed})",
        f"upstream = torch.randn({shape}, generator=gu).to({call.dtype})",
        *([f"upstream[{unclear}] = 0  # rounding may choose other experts"] if unclear else []),
        "upstream = upstream.view(hidden.shape)",
    ]
    return tuple(lines)


def edited_between(call: Call, edit: str, name: str) -> Call:
    """Makes a call, edits its arguments and makes it again; what is looked at is ``name``.

    That is left in ``out``, and what it was before the edit in ``before``.
    """
    block = shown(call).source()
    if name == "output":
        return course(shown(call), f"before = {block}", edit, result=block)
    lines = (
        *backward_lines(call),
        f"{block}.backward(upstream)",
        f"before, {name}.grad = {name}.grad, None",
        f"with torch.no_grad():\n    {edit}",
        f"{block}.backward(upstream)",
    )
    return course(shown(call), *lines, result=f"{name}.grad")
