"""Checks of what a shared-core layer holds: one core, its state, gradients, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_identical, assert_tensor
from conformance.harness.core_cases import EDITED, NEW_CORE, SPOILT, CoreCase
from conformance.harness.core_oracle import layer_inputs, outputs_of, weights_of
from conformance.harness.core_subject import (
    as_line,
    asking,
    assert_stored,
    backward_lines,
    by_element,
    compare_gradient,
    compare_outputs,
    compare_weights,
    core_of,
    experts_of,
    held,
    made,
    moved,
    output,
    own,
    stored,
    weight,
)
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import current_tally
from conformance.harness.shown import after
from conformance.harness.subject import Subject, errors_named

# One core


def assert_core_is_a_parameter(shared_core: Subject, case: CoreCase) -> None:
    """``core`` is a Parameter of the module that has the values that were given."""
    call = case.call(getattr(torch, case.dtype), shared_core.device)
    layer = made(shared_core, call)
    core = core_of(layer, call)
    if not any(core is parameter for parameter in layer.parameters()):
        summary = "out.core is not among out.parameters()"
        raise ConformanceFailure("no parameter", summary, call=call, shown_by="print(out.core)")
    given = call.named("core")
    with asking("out.core", call):
        shape = tuple(given.shape)
        assert_tensor(core, shape, given.dtype, given.device, call=call, name="core")
        assert_identical(core, given, call, because="out.core and the core that was given")


def assert_one_core(shared_core: Subject, case: CoreCase, *moves: str) -> None:
    """The module holds the core once, now and after every move."""
    call = case.call(torch.float32, shared_core.device)
    assert_stored(made(shared_core, call), case.total, call, "as it is made")
    for move in moves:
        layer = moved(made(shared_core, call), move, call)
        with after(as_line(move)):
            core_of(layer, call)
            assert_stored(layer, case.total, call, move)


def assert_edited(shared_core: Subject, case: CoreCase, *moves: str) -> None:
    """Every expert has a core that is changed in place, now or after a move that changes no value."""
    call = case.call(torch.float32, shared_core.device)
    edited = case.call(torch.float32, shared_core.device, NEW_CORE)
    for move in moves or (None,):
        layer = made(shared_core, call)
        compare_outputs(layer, call)  # whatever is kept of the old core is there now
        weight(layer, 0, call)
        if move is not None:
            layer = moved(layer, move, call).to(torch.float32)
        with torch.no_grad(), failing_at(call), errors_named("out.core.copy_"):
            core_of(layer, call).copy_(edited.named("core"))
        moves_made = () if move is None else (as_line(move), "out = out.float()")
        with after("out(x, 0)", *moves_made, *EDITED):
            compare_outputs(layer, call, edited)
            compare_weights(layer, call, edited)


def assert_own_values(shared_core: Subject, case: CoreCase) -> None:
    """What becomes of the tensors that were given changes no value of the layer."""
    call = case.call(torch.float32, shared_core.device)
    arguments, options = call.values()
    given, named = own(arguments), own(options)
    with failing_at(call):
        layer = shared_core(*given, **named)
    for tensor in (*given, *named.values()):
        tensor.fill_(7.0)
    names = ", ".join((*call.arguments, *named))
    with after(f"for t in ({names}): t.fill_(7.0)"):
        compare_outputs(layer, call)
        compare_weights(layer, call)


def assert_state_once(shared_core: Subject, case: CoreCase) -> None:
    """The state dictionary has every parameter, and the core once."""
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    with asking("out.state_dict()", call):
        found = sum(t.numel() for t in held(layer).values() if t.is_floating_point())
    current_tally().comparisons["exact"] += 1
    if found != case.total:
        summary = f"the state dictionary has {found} elements, expected {case.total}"
        shown = "print({k: v.shape for k, v in out.state_dict().items()})"
        raise ConformanceFailure("wrong state", summary, call=call, shown_by=shown)


def assert_state_restored(shared_core: Subject, case: CoreCase, *, safetensors: bool) -> None:
    """A layer of other values that loads the state gives the same bits as the one that saved it."""
    from safetensors.torch import load, save

    call = case.call(torch.float32, shared_core.device)
    layer, x = made(shared_core, call), call.named("x")
    other = case.call(torch.float32, shared_core.device, NEW_CORE, *SPOILT)
    second = made(shared_core, other)
    with asking("out.state_dict()", call):
        state = {name: tensor.clone() for name, tensor in held(layer).items()}
    if safetensors:
        with asking("__import__('safetensors.torch').torch.save(out.state_dict())", call):
            tensors = {name: tensor.contiguous() for name, tensor in held(layer).items()}
            state = load(save(tensors))
    with asking("out.load_state_dict(out.state_dict())", call):
        second.load_state_dict(state)
    for expert in experts_of(call):
        for one, two in (
            (output(layer, x, expert, call), output(second, x, expert, call)),
            (weight(layer, expert, call), weight(second, expert, call)),
        ):
            because = (
                f"expert {expert} of the layer that loaded the state, and of the one that saved"
            )
            assert_identical(two, one, call, because=because)


# Gradients


def assert_gradients(
    shared_core: Subject, case: CoreCase, *, of: Sequence[str], experts: tuple[int, ...] = ()
) -> None:
    """Gradients of these inputs after some experts were called (default: all of them)."""

    def check(call: Call) -> None:
        chosen = experts or tuple(experts_of(call))
        truth = outputs_of(call, chosen)
        layer = made(shared_core, call)
        x = call.named("x").clone().requires_grad_()
        with asking("out(x, 0)", call), torch.enable_grad():
            outputs = [layer(x, expert) for expert in chosen]
            torch.autograd.backward(outputs, [up.to(x.device) for up in truth.upstream])
        found = found_gradients(layer, call, of) | {"x": x.grad}
        for name in of:
            lines = backward_lines(call, "x", f"[out(x, e) for e in {chosen}]")
            compare_gradient(found[name], truth.expectation(name), name, call, *lines)

    only_float32 = any(name not in ("x", "core") for name in of)
    if only_float32:
        check(case.call(torch.float32, shared_core.device))
    else:
        in_every_lane(case, check, shared_core.device)


def found_gradients(layer: nn.Module, call: Call, of: Sequence[str]) -> dict[str, Tensor | None]:
    """Gradients by factor, where an implementation may hold these in other shapes."""
    found: dict[str, Tensor | None] = {"core": core_of(layer, call).grad}
    if any(name not in ("x", "core") for name in of):
        found = by_element(layer, layer_inputs(call), call) | found
    return found


def assert_unused_experts_get_nothing(shared_core: Subject, case: CoreCase) -> None:
    """Wrappers and biases of experts that were not called have no gradient, or exact zeros."""
    call = case.call(torch.float32, shared_core.device)
    layer, x = made(shared_core, call), call.named("x")
    used = case.seed % case.experts
    with asking(f"out(x, {used})", call), torch.enable_grad():
        layer(x, used).square().sum().backward()
    gradients = by_element(layer, layer_inputs(call), call)
    current_tally().comparisons["exact"] += 1
    for name, gradient in gradients.items():
        for expert in experts_of(call) if name != "core" else ():
            if (expert == used) != bool((gradient[expert] != 0).any()):
                has = "no gradient" if expert == used else "a gradient"
                summary = f"{name} of expert {expert} has {has} after expert {used} was called"
                shown = f"out(x, {used}).sum().backward()"
                shown += "; print([(n, p.grad) for n, p in out.named_parameters()])"
                raise ConformanceFailure("wrong gradient", summary, call=call, shown_by=shown)


def assert_gradients_of_weights(shared_core: Subject, case: CoreCase) -> None:
    """``reconstruct`` is differentiable with respect to every factor."""
    call = case.call(torch.float32, shared_core.device)
    truth, layer = weights_of(call), made(shared_core, call)
    with asking("out.reconstruct(0)", call), torch.enable_grad():
        weights = [layer.reconstruct(expert) for expert in experts_of(call)]
        if not all(found.requires_grad for found in weights):
            summary = "what reconstruct() gives has no gradient"
            raise ConformanceFailure("no gradient", summary, call=call)
        torch.autograd.backward(weights, [up.to(weights[0].device) for up in truth.upstream])
    factors = {name: given for name, given in layer_inputs(call).items() if name != "bias"}
    found = by_element(layer, factors, call)
    for name in factors:
        listed = f"[out.reconstruct(e) for e in range({len(weights)})]"
        lines = backward_lines(call, "x", listed)
        compare_gradient(found[name], truth.expectation(name), name, call, *lines)


# Counts


def counts(layer: nn.Module, call: Call) -> Mapping[str, Any]:
    """What ``count_parameters`` gives; declined where there is none."""
    if getattr(layer, "count_parameters", None) is None:
        raise Declined("the layer has no method count_parameters")
    with asking("out.count_parameters()", call):
        found = layer.count_parameters()
    if not isinstance(found, Mapping):
        summary = f"count_parameters() gives {type(found).__name__}, expected a mapping"
        raise ConformanceFailure("wrong type", summary, call=call)
    return found


def expect_count(
    found: Mapping[str, Any], name: str, expected: float, call: Call, roundings: int = 0
) -> None:
    """A count is exact; a ratio is off by a few roundings of a float, of what it is made of."""
    current_tally().comparisons["exact"] += 1
    shown = f"print(out.count_parameters()[{name!r}], 'expected', {expected!r})"
    if name not in found:
        raise ConformanceFailure("missing count", f"{name} is missing", call=call, shown_by=shown)
    limit = roundings * 2.0**-53
    if found[name] == expected or abs(float(found[name]) - expected) <= limit:
        return
    summary = f"{name} is {found[name]!r}, expected {expected!r}"
    raise ConformanceFailure("wrong count", summary, call=call, shown_by=shown)


CAST = "out = out.to(torch.bfloat16)"


def assert_counts(shared_core: Subject, case: CoreCase, *names: str) -> None:
    """These counts are exact, as they are and in another dtype."""
    exact = {
        "core": case.d_in * case.d_out,
        "wrapper_params_per_expert": case.of_an_expert,
        "total_wrapper": case.experts * case.of_an_expert,
        "total": case.total,
        "original": case.original,
    }
    ratio = case.total / case.original
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    for cast in (False, True):
        if cast:
            layer.to(torch.bfloat16)
        found = counts(layer, call)
        for name in names:
            with after(CAST) if cast else nullcontext():
                if name == "compression_ratio":
                    expect_count(found, name, ratio, call, roundings=4 * max(1, round(ratio)))
                elif name == "reduction_percentage":
                    percent = 100 * (case.original - case.total) / case.original
                    roundings = 8 * round(100 * (1 + ratio))
                    expect_count(found, name, percent, call, roundings)
                else:
                    expect_count(found, name, exact[name], call)


def assert_total_is_what_is_stored(shared_core: Subject, case: CoreCase) -> None:
    """``total`` is the number of elements that the module holds."""
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    expect_count(counts(layer, call), "total", stored(held(layer)), call)
