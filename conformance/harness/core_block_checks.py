"""Checks of blocks of shared cores: outputs, logits, gradients, parameters, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.core_block_cases import FACTOR_NAMES, BlockCase
from conformance.harness.core_cases import PROJECTIONS
from conformance.harness.core_oracle import block_inputs, block_of
from conformance.harness.core_subject import (
    as_line,
    asking,
    assert_stored,
    backward_lines,
    by_element,
    compare_gradient,
    held,
    made,
    moved,
    raises,
)
from conformance.harness.failures import ConformanceFailure
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import current_tally
from conformance.harness.shown import after
from conformance.harness.subject import Subject, reject_alias
from conformance.harness.tolerance import Expectation

# Outputs


def output(block: nn.Module, call: Call, hidden: Tensor, source: str = "out(hidden)") -> Tensor:
    """The output for ``hidden``, and the logits where they are asked for, of the right types."""
    case: BlockCase = call.case
    with asking(source, call, hidden):
        found = block(hidden)
        if not case.return_logits:
            if isinstance(found, (tuple, list)):
                summary = f"the block gives {type(found).__name__}, expected a bare tensor"
                raise ConformanceFailure("wrong type", summary, call=call)
            found = (found,)
        elif not isinstance(found, tuple) or len(found) != 2:
            summary = f"the block gives {type(found).__name__}, expected (output, logits)"
            raise ConformanceFailure("wrong type", summary, call=call)
        assert_tensor(found[0], tuple(hidden.shape), hidden.dtype, hidden.device, call=call)
        if hidden.numel():
            reject_alias(found[0], [hidden])
    return found if case.return_logits else found[0]


def compare(found: Tensor, expected: Expectation, call: Call, what: str, source: str) -> None:
    """A tensor is within the limits."""
    with asking(source, call):
        assert_close_to(found, expected, call, name=what)


def compare_output(block: nn.Module, call: Call, right: Call | None = None) -> None:
    """The output is what the factors (of another call, if any) give, and so are the logits."""
    truth = block_of(right or call)
    with torch.no_grad():
        found = output(block, call, call.named("hidden"))
    if call.case.return_logits:
        found, logits = found
        shape = truth.values["output 1"].shape
        with asking("out(hidden)[1]", call):
            wide = isinstance(logits, Tensor) and logits.dtype == torch.float32
            dtype = torch.float32 if wide else call.dtype
            assert_tensor(logits, tuple(shape), dtype, found.device, call=call, name="logits")
        expected = truth.expectation("output 1")
        compare(logits, expected, call, "the logits", "out(hidden)[1]")
    source = "out(hidden)[0]" if call.case.return_logits else "out(hidden)"
    compare(found, truth.expectation("output 0"), call, "the output", source)


def assert_output(shared_core_block: Subject, case: BlockCase, *edits: str) -> None:
    """The output is the weighted sum over the dense experts, in every lane."""

    def check(call: Call) -> None:
        call = replace(call, lines=(*call.lines, *edits))
        compare_output(made(shared_core_block, call), call)

    in_every_lane(case, check, shared_core_block.device)


def assert_dense(shared_core_block: Subject, case: BlockCase) -> None:
    """With U = 0 all experts are one, and with weights that sum to 1 the block is a gated MLP."""
    edits = [f"{p} |= {{k: 0 * {p}[k] for k in ('u_in', 'u_out')}}" for p in PROJECTIONS]
    call = case.call(torch.float32, shared_core_block.device, *edits)
    block, x = made(shared_core_block, call), call.named("hidden").to("cpu", torch.float64)
    gate, up, down = (call.named(p)["core"].to("cpu", torch.float64) for p in PROJECTIONS)
    act = x @ gate.mT
    mlp = (act / (1 + torch.exp(-act)) * (x @ up.mT)) @ down.mT
    with torch.no_grad():
        found = output(block, call, call.named("hidden"))
    limits = block_of(call).expectation("output 0")
    compare(found, replace(limits, value=mlp), call, "the output", "out(hidden)")


def assert_no_tokens(shared_core_block: Subject, case: BlockCase) -> None:
    """No tokens give no tokens, in the shape that was given."""
    call = case.call(torch.float32, shared_core_block.device)
    with torch.no_grad():
        output(made(shared_core_block, call), call, call.named("hidden"))


def assert_permuted(shared_core_block: Subject, case: BlockCase) -> None:
    """Tokens in another order, and in one row, have the outputs that they had."""
    call = case.call(torch.float32, shared_core_block.device)
    block, hidden = made(shared_core_block, call), call.named("hidden")
    order = torch.arange(hidden.shape[0] * hidden.shape[1]).flip(0).roll(case.seed % 5)
    order = order.to(hidden.device)
    source = f"out(hidden.flatten(0, 1)[{order.tolist()}][None])[0]"
    with torch.no_grad():
        found = output(block, call, hidden.flatten(0, 1)[order][None], source)
    restored = torch.empty_like(found[0])
    restored[order] = found[0]
    expected = block_of(call).expectation("output 0")
    compare(restored.view_as(hidden), expected, call, "the output, put in order", source)


def assert_independent(shared_core_block: Subject, case: BlockCase) -> None:
    """A token alone has the output that it has among others."""
    call = case.call(torch.float32, shared_core_block.device)
    block, hidden = made(shared_core_block, call), call.named("hidden")
    found = torch.empty_like(hidden)
    with torch.no_grad():
        for row in range(hidden.shape[0]):
            for token in range(hidden.shape[1]):
                source = f"out(hidden[{row} : {row + 1}, {token} : {token + 1}])"
                alone = hidden[row : row + 1, token : token + 1].contiguous()
                found[row, token] = output(block, call, alone, source)[0, 0]
    expected = block_of(call).expectation("output 0")
    compare(found, expected, call, "the output, a token at a time", "out(hidden[:1, :1])")


def assert_twice(shared_core_block: Subject, case: BlockCase) -> None:
    """A second call, after one with other tokens, gives the same bits."""
    call = case.call(torch.float32, shared_core_block.device)
    block, hidden = made(shared_core_block, call), call.named("hidden")
    with torch.no_grad():
        first = output(block, call, hidden).clone()
        output(block, call, 1 - 2 * hidden, "out(1 - 2 * hidden)")
        assert_identical(output(block, call, hidden), first, call, because="a second call")


# Gradients


def assert_gradients(shared_core_block: Subject, case: BlockCase, *names: str) -> None:
    """Gradients of these inputs are those of the dense experts.

    ``names``: ``hidden``, ``router``, or the ends of names of factors, such as ``core`` or ``v_in``.
    """
    call = case.call(torch.float32, shared_core_block.device)
    truth, block = block_of(call), made(shared_core_block, call)
    found = backward(block, call, truth.upstream[0])
    lines = backward_lines(call, "hidden", "[out(hidden)]")
    for name in found:
        if name.split(".")[-1] in names:
            compare_gradient(found[name], truth.expectation(name), name, call, *lines)


def backward(block: nn.Module, call: Call, upstream: Tensor) -> dict[str, Tensor | None]:
    """The gradients of the input and of every factor, after a backward pass."""
    hidden = call.named("hidden").clone().requires_grad_()
    with torch.enable_grad():
        found = output(block, call, hidden)
        with asking("out(hidden)", call):
            torch.autograd.backward(found, upstream.to(hidden.device))
    return by_element(block, parameters_of(call), call) | {"hidden": hidden.grad}


def parameters_of(call: Call) -> dict[str, Tensor]:
    """The router and the factors."""
    return {name: given for name, given in block_inputs(call).items() if name != "hidden"}


def assert_unselected_get_nothing(shared_core_block: Subject, case: BlockCase) -> None:
    """Wrappers of experts that no token has chosen get no gradient; those of the others do."""
    call = case.call(torch.float32, shared_core_block.device)
    truth, block = block_of(call), made(shared_core_block, call)
    found = backward(block, call, truth.upstream[0])
    current_tally().comparisons["exact"] += 1
    for name in FACTOR_NAMES:
        if name.endswith(".core"):
            continue
        right = truth.values[name]
        for expert in range(case.experts):
            chosen = bool((right[expert] != 0).any())
            if bool((found[name][expert] != 0).any()) != chosen:
                has = "no gradient" if chosen else "a gradient"
                summary = f"{name} of expert {expert}, which is {'' if chosen else 'not '}chosen"
                shown = "out(hidden).sum().backward()"
                shown += "; print([(n, p.grad) for n, p in out.named_parameters()])"
                message = f"{summary}, has {has}"
                raise ConformanceFailure("wrong gradient", message, call=call, shown_by=shown)


# Parameters


def assert_parameters(shared_core_block: Subject, case: BlockCase, *moves: str) -> None:
    """The block holds the router and the factors, each core once, now and after moves."""
    call = case.call(torch.float32, shared_core_block.device)
    assert_stored(made(shared_core_block, call), case.total, call, "as it is made")
    for move in moves:
        block = moved(made(shared_core_block, call), move, call)
        with after(as_line(move)):
            assert_stored(block, case.total, call, move)


def assert_factors_are_parameters(shared_core_block: Subject, case: BlockCase) -> None:
    """Each element of the router and of the factors is one of a Parameter, and no other is."""
    call = case.call(torch.float32, shared_core_block.device)
    block = made(shared_core_block, call)
    found = sum(p.numel() for p in block.parameters() if p.requires_grad)
    current_tally().comparisons["exact"] += 1
    if found != case.total:
        summary = f"the block has parameters of {found} elements, expected {case.total}"
        shown = "print({n: p.shape for n, p in out.named_parameters()})"
        raise ConformanceFailure("wrong parameters", summary, call=call, shown_by=shown)
    by_element(block, parameters_of(call), call)


def assert_own_values(shared_core_block: Subject, case: BlockCase) -> None:
    """What becomes of the tensors that were given changes nothing of the block."""
    call = case.call(torch.float32, shared_core_block.device)
    arguments, options = call.values()
    router, *projections = arguments
    given = router.clone(), *({k: t.clone() for k, t in p.items()} for p in projections)
    with asking("out", call):
        block = shared_core_block(*given, **options)
    for tensor in (given[0], *(t for p in given[1:] for t in p.values())):
        tensor.fill_(7.0)
    listed = "(router, *gate_proj.values(), *up_proj.values(), *down_proj.values())"
    with after(f"for t in {listed}: t.fill_(7.0)"):
        compare_output(block, call)


def assert_state_restored(shared_core_block: Subject, case: BlockCase) -> None:
    """A block of other values that loads the state gives the same bits as the one that saved it."""
    call = case.call(torch.float32, shared_core_block.device)
    other = replace(case, seed=case.seed + 1).call(torch.float32, shared_core_block.device)
    block, second = made(shared_core_block, call), made(shared_core_block, other)
    with asking("out.load_state_dict(out.state_dict())", call):
        second.load_state_dict({name: tensor.clone() for name, tensor in held(block).items()})
    hidden = call.named("hidden")
    with torch.no_grad():
        one, two = output(block, call, hidden), output(second, call, hidden)
    because = "the output of the block that loaded the state, and of the one that saved it"
    assert_identical(two, one, call, because=because)


# Refusals


def assert_refused(
    shared_core_block: Subject,
    case: BlockCase,
    edits: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> None:
    """Making the block, or calling it, raises an exception."""
    call = case.call(torch.float32, shared_core_block.device, *edits).then(**(options or {}))

    def use() -> None:
        with torch.no_grad():
            made(shared_core_block, call)(call.named("hidden"))

    raises(use, "the block is made and gives an output", call, "print(out(hidden))")
