"""Checks of mixture-of-experts blocks: outputs, gradients, and what must not matter.

Tokens whose experts rounding might change are left out, by the oracle and here alike: they count
nothing in the output that is compared, nor in any gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.compare import assert_close_to, assert_different, assert_tensor
from conformance.harness.failures import ConformanceFailure, Inconclusive, failing_at
from conformance.harness.lanes import EXACT, in_every_lane, lane_of
from conformance.harness.moe_block_cases import BlockCase
from conformance.harness.moe_block_oracle import (
    block_choice,
    expected_block,
    expected_logits,
    inputs_of,
    mlp,
)
from conformance.harness.requirement import current_tally
from conformance.harness.shown import keep
from conformance.harness.subject import Subject


def run(moe_block: Subject, call: Call) -> Tensor:
    """The output [batch, tokens, hidden], which is a tensor, with shape, dtype and device checked."""
    arguments, options = call.values()
    with failing_at(call):
        output = moe_block(*arguments, **options)
    hidden = arguments[0]
    assert_tensor(output, tuple(hidden.shape), hidden.dtype, hidden.device, call=call)
    return output


def counted(output: Tensor, call: Call) -> Tensor:
    """The output as rows [N, H], zero for tokens whose choice is not clear; these are finite."""
    clear_N1 = block_choice(call).clear[:, None].to(output.device)
    if not bool(clear_N1.any()):
        raise Inconclusive("the choice is not clear for any token")
    rows_NH = output.flatten(0, 1)
    if not bool(torch.isfinite(torch.where(clear_N1, 0, rows_NH)).all()):
        summary = "the output is not finite"
        raise ConformanceFailure("non-finite", summary, call=call, lane=lane_of(call.dtype))
    return torch.where(clear_N1, rows_NH, 0)


def assert_output(output: Tensor, call: Call, *, shown: Call | None = None) -> None:
    """The output is the oracle's of ``call``; a failure shows the call ``shown``, if given."""
    expectation = expected_block(call).expectation("output 0")
    assert_close_to(counted(output, call), expectation, shown or call, name="rows of output")


def assert_matches(moe_block: Subject, case: BlockCase, *lines: str) -> None:
    """The output is the oracle's, after further lines, in every lane of the case."""

    def check(call: Call) -> None:
        call = call.then(*lines)
        assert_output(run(moe_block, call), call)

    in_every_lane(case, check, moe_block.device)


def assert_same_as(moe_block: Subject, case: BlockCase, *lines: str) -> None:
    """After ``lines``, which must not matter, the output is the oracle's without them."""

    def check(call: Call) -> None:
        edited = call.then(*lines)
        output = run(moe_block, edited)
        assert_output(output.flatten(0, 1)[None], call, shown=edited)

    in_every_lane(case, check, moe_block.device)


def assert_tokens_permuted(moe_block: Subject, case: BlockCase) -> None:
    """Tokens in another order, over all batch rows, have the same outputs in that order."""

    def check(call: Call) -> None:
        edited = call.then(
            f"order = torch.randperm({case.batch * case.tokens}, generator=g)",
            "hidden = hidden.flatten(0, 1)[order].view(hidden.shape)",
        )
        order = edited.named("order")
        output = run(moe_block, edited).flatten(0, 1)
        back = torch.zeros_like(output).index_copy(0, order.to(output.device), output)
        assert_output(back[None], call, shown=edited)

    in_every_lane(case, check, moe_block.device)


def assert_tokens_alone(moe_block: Subject, case: BlockCase) -> None:
    """Every token alone has the output that it has among others."""

    def check(call: Call) -> None:
        rows = []
        for row in range(case.batch):
            for token in range(case.tokens):
                place = f"[{row}:{row + 1}, {token}:{token + 1}]"
                rows.append(run(moe_block, call.then(f"hidden = hidden{place}")))
        assert_output(torch.cat(rows), call)

    in_every_lane(case, check, moe_block.device)


def assert_nan_stays(moe_block: Subject, case: BlockCase) -> None:
    """A token of NaN raises, or has NaN for its output and changes no other token's."""

    def check(call: Call) -> None:
        row, token = case.seed % case.batch, case.seed % case.tokens
        broken = call.then("hidden = hidden.clone()", f"hidden[{row}, {token}] = torch.nan")
        try:
            output = run(moe_block, broken).clone()
        except ConformanceFailure as failure:
            if failure.kind.startswith("raised "):
                return
            raise
        if not bool(output[row, token].isnan().any()):
            summary = f"the output of token {token} of row {row}, which is NaN, is finite"
            raise ConformanceFailure("hidden NaN", summary, call=broken)
        right = expected_block(call).values["output 0"].view(output.shape)
        output[row, token] = right[row, token].to(output)
        assert_output(output, call, shown=broken)

    in_every_lane(case, check, moe_block.device)


def assert_no_tokens(moe_block: Subject, case: BlockCase, edit: str) -> None:
    """Without tokens the output is empty, of the right shape."""
    in_every_lane(case, lambda call: run(moe_block, call.then(edit)), moe_block.device)


# Experts


def assert_experts_permuted(moe_block: Subject, case: BlockCase) -> None:
    """Experts and router rows in another order, together, give the same output."""
    names = ["router", "gate_up_proj", "down_proj"] + ["bias"] * (case.bias is not None)
    edit = f"{', '.join(names)} = (x[order] for x in ({', '.join(names)}))"
    order = f"order = torch.randperm({case.experts}, generator=g)"
    assert_same_as(moe_block, case, order, edit)


def assert_router_permuted(moe_block: Subject, case: BlockCase) -> None:
    """Router rows in another order give another output: that of the other experts."""

    def check(call: Call) -> None:
        edited = call.then("router = router.roll(1, 0)")
        output = run(moe_block, edited)
        because = "the output is the same with the rows of the router in another order"
        assert_different(output, run(moe_block, call), edited, because=because)
        assert_output(output, edited)

    in_every_lane(case, check, moe_block.device)


def assert_identical_experts(moe_block: Subject, case: BlockCase) -> None:
    """Where all experts are one and weights sum to 1, the output is that expert's."""

    def check(call: Call) -> None:
        same = call.then(
            *(
                f"{name} = {name}[:1].repeat({case.experts}, 1, 1)"
                for name in ("gate_up_proj", "down_proj")
            )
        )
        output = run(moe_block, same)
        hidden, _, gate_up, down = in_float64(same.values()[0])
        one = mlp(hidden.flatten(0, 1), gate_up[0], down[0])
        clear = block_choice(same).clear[:, None]
        expectation = expected_block(same).expectation("output 0")
        expectation = replace(expectation, value=torch.where(clear, one, 0))
        assert_close_to(counted(output, same), expectation, same, name="rows of output")

    in_every_lane(case, check, moe_block.device)


# Gradients


def run_gradients(moe_block: Subject, call: Call) -> dict[str, Tensor]:
    """The gradient of every tensor of the call; none that is missing."""
    arguments, options = call.values()
    leaves = {
        name: x.detach().clone().requires_grad_()
        for name, x in inputs_of(arguments, options).items()
    }
    if "shared" in options:
        options["shared"] = (leaves["shared gate_up_proj"], leaves["shared down_proj"])
    if "shared_gate" in options:
        options["shared_gate"] = leaves["shared_gate"]
    names = ("hidden", "router", "gate_up_proj", "down_proj")
    expected = expected_block(call)
    with torch.enable_grad(), failing_at(call):
        output = moe_block(*(leaves[name] for name in names), **options)
        assert_tensor(
            output, tuple(arguments[0].shape), arguments[0].dtype, arguments[0].device, call=call
        )
        rows = counted(output, call)
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if rows.requires_grad:
            upstream = expected.upstream[0].to(rows)
            if bool(block_choice(call).clear.all()):  # else the lines would have to leave rows out
                keep_gradients(call, output, leaves)
            found = torch.autograd.grad(rows, list(leaves.values()), upstream, allow_unused=True)
    for name, gradient in zip(leaves, found):
        if gradient is None:
            summary = f"no gradient reaches {name}"
            raise ConformanceFailure("no gradient", summary, call=call, lane=lane_of(call.dtype))
    return dict(zip(leaves, found))


def keep_gradients(call: Call, output: Tensor, names: Iterable[str]) -> None:
    """Note that gradients were asked for, under the names that the call's lines have."""
    written = {"shared gate_up_proj": "shared_gate_up", "shared down_proj": "shared_down"}
    gradients = {name: written.get(name, name) for name in names}
    keep(call, output, gradients=gradients, upstream_seed=call.case.seed)


def assert_gradients(moe_block: Subject, case: BlockCase, *names: str) -> None:
    """The gradients of these tensors, or of all, are the oracle's."""

    def check(call: Call) -> None:
        found, expected = run_gradients(moe_block, call), expected_block(call)
        for name in names or found:
            gradient, expectation = found[name], expected.expectation(name)
            assert_close_to(gradient, expectation, call, name=f"gradient of {name}")

    in_every_lane(case, check, moe_block.device)


def assert_unused_have_no_gradient(moe_block: Subject, case: BlockCase) -> None:
    """The gradients of experts that no token goes to are exactly zero."""

    def check(call: Call) -> None:
        choice = block_choice(call)
        if not bool(choice.clear.all()):
            raise Inconclusive("the choice is not clear for every token")
        unused = ~choice.chosen.any(0)
        if not bool(unused.any()):
            raise Inconclusive("every expert is chosen by a token")
        found = run_gradients(moe_block, call)
        current_tally().comparisons[EXACT] += 1
        for name in ("gate_up_proj", "down_proj"):
            gradient = found[name].cpu()[unused]
            if not bool((gradient == 0).all()):
                experts = unused.nonzero().flatten().tolist()
                summary = f"experts {experts} have no tokens, and a gradient of {name}"
                raise ConformanceFailure("wrong values", summary, call=call)

    in_every_lane(case, check, moe_block.device)


# Logits


def assert_logits(moe_block: Subject, case: BlockCase) -> None:
    """With ``return_logits`` the block gives the output and the logits of every token."""

    def check(call: Call) -> None:
        asked = call.then(return_logits="True")
        arguments, options = asked.values()
        with failing_at(asked):
            result: Any = moe_block(*arguments, **options)
        if not (isinstance(result, (tuple, list)) and len(result) == 2):
            summary = f"the block gives {type(result).__name__}, expected (output, logits)"
            raise ConformanceFailure("wrong type", summary, call=asked)
        output, logits = result
        hidden = arguments[0]
        assert_tensor(output, tuple(hidden.shape), hidden.dtype, hidden.device, call=asked)
        shape = (case.batch * case.tokens, case.experts)
        wide = isinstance(logits, Tensor) and logits.dtype == torch.float32
        dtype = torch.float32 if wide else hidden.dtype
        assert_tensor(logits, shape, dtype, hidden.device, call=asked, name="logits")
        assert_output(output, call, shown=asked)
        expectation = expected_logits(call).expectation("output 0")
        assert_close_to(logits, expectation, asked, name="router logits")

    in_every_lane(case, check, moe_block.device)
