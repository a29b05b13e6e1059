"""Checks of shared-core layers: outputs, weights, precision, folds, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.core_cases import (
    EDITED,
    EXAMPLE_OUTPUTS,
    EXAMPLE_WEIGHTS,
    NEW_CORE,
    CoreCase,
    ExampleCase,
)
from conformance.harness.core_oracle import one_rounding, outputs_of, update_of, weights_of
from conformance.harness.core_subject import (
    asking,
    compare_outputs,
    compare_weights,
    core_of,
    experts_of,
    held,
    made,
    output,
    raises,
    weight,
)
from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.lanes import in_every_lane
from conformance.harness.requirement import current_tally
from conformance.harness.shown import after
from conformance.harness.subject import Subject

# Outputs and weights


def assert_example(shared_core: Subject, case: ExampleCase) -> None:
    """Two experts that are worked by hand, exactly: every number is a small integer."""
    call = case.call()
    layer = made(shared_core, call)
    for expert, (rows, values) in enumerate(zip(EXAMPLE_WEIGHTS, EXAMPLE_OUTPUTS)):
        for source, found, expected in (
            (f"out.reconstruct({expert})", weight(layer, expert, call), rows),
            (f"out(x, {expert})", output(layer, call.named("x"), expert, call), values),
        ):
            with asking(source, call):
                right = torch.tensor(expected, dtype=torch.float32)
                assert_identical(found, right, call, because=f"worked by hand, {source}")


def assert_outputs(shared_core: Subject, case: CoreCase) -> None:
    """Every expert's rows are those of its dense weight, in every lane."""
    check = lambda call: compare_outputs(made(shared_core, call), call)
    in_every_lane(case, check, shared_core.device)


def assert_weights(shared_core: Subject, case: CoreCase) -> None:
    """Every expert's weight is the product, in every lane."""
    check = lambda call: compare_weights(made(shared_core, call), call)
    in_every_lane(case, check, shared_core.device)


def assert_both(shared_core: Subject, case: CoreCase, *edits: str) -> None:
    """Outputs and weights, with lines that change the factors."""
    call = case.call(torch.float32, shared_core.device, *edits)
    layer = made(shared_core, call)
    compare_outputs(layer, call)
    compare_weights(layer, call)


def assert_in_float64(shared_core: Subject, case: CoreCase) -> None:
    """A layer in float64 computes in float64."""
    call = case.call(torch.float64, shared_core.device)
    layer = made(shared_core, call)
    compare_outputs(layer, call)
    compare_weights(layer, call)


def assert_no_rows(shared_core: Subject, case: CoreCase) -> None:
    """No rows give no rows, of the width of the output."""
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    for expert in experts_of(call):
        output(layer, call.named("x"), expert, call)


def assert_twice(shared_core: Subject, case: CoreCase) -> None:
    """Asked again, with other experts asked between, an expert gives the same bits."""
    call = case.call(torch.float32, shared_core.device)
    layer, x = made(shared_core, call), call.named("x")
    ask = lambda expert: (output(layer, x, expert, call), weight(layer, expert, call))
    first = [ask(expert) for expert in experts_of(call)]
    for expert in reversed(experts_of(call)):
        for one, two in zip(first[expert], ask(expert)):
            assert_identical(two, one, call, because=f"expert {expert}, asked again")


def assert_core_alone(shared_core: Subject, case: CoreCase) -> None:
    """With U = 0 on both sides the weight of every expert is the core, bit for bit."""
    edit = "u_in, u_out = torch.zeros_like(u_in), torch.zeros_like(u_out)"
    call = case.call(getattr(torch, case.dtype), shared_core.device, edit)
    layer = made(shared_core, call)
    for expert in experts_of(call):
        found = weight(layer, expert, call)
        because = f"the weight of expert {expert} and the core, with U = 0"
        with asking(f"out.reconstruct({expert})", call):
            assert_identical(found, call.named("core"), call, because=because)


def assert_low_rank(shared_core: Subject, case: CoreCase) -> None:
    """W − C has no more than 2 r singular values that are more than rounding."""
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    for expert in experts_of(call):
        found = weight(layer, expert, call).to("cpu", torch.float64)
        update = found - call.named("core").to("cpu", torch.float64)
        beyond = torch.linalg.svdvals(update)[2 * case.rank :]
        expected = weights_of(call).expectation(f"output {expert}")
        limit = expected.limits.root_mean_square * found.numel() ** 0.5
        current_tally().comparisons["semantic"] += 1
        if float(beyond.max()) > limit:
            summary = (
                f"W - C of expert {expert} has a singular value of {float(beyond.max()):.3g} beyond "
                f"the first {2 * case.rank}; rounding makes {limit:.3g}"
            )
            shown = f"print(torch.linalg.svdvals(out.reconstruct({expert}) - core))"
            raise ConformanceFailure("wrong rank", summary, call=call, shown_by=shown)


OTHER_FACTORS = (
    "n = u_in.shape[-1]",
    "a = (torch.diag(1 + 0.5 * torch.arange(n)) + 0.5 * r(n, n).triu(1)).double()",
    "b = torch.linalg.inv(a).mT",
    "u_in, v_in, u_out, v_out = ((t.double() @ m).float()"
    " for t, m in ((u_in, a), (v_in, b), (u_out, b), (v_out, a)))",
)
"""Lines that give other factors of the same products: U A and V A⁻ᵀ, rounded once."""


def assert_only_products_count(shared_core: Subject, case: CoreCase) -> None:
    """Other factors with the same products U Vᵀ give the same outputs and weights.

    The limits are those of the other factors, which may be larger and cancel more.
    """
    plain = case.call(torch.float32, shared_core.device)
    call = case.call(torch.float32, shared_core.device, *OTHER_FACTORS)
    layer, experts = made(shared_core, call), tuple(experts_of(call))
    rows, weights = outputs_of(call, experts), weights_of(call)
    for expert in experts:
        name = f"output {expert}"
        right = outputs_of(plain, experts).values[name]
        y = output(layer, call.named("x"), expert, call)
        with asking(f"out(x, {expert})", call):
            expected = replace(rows.expectation(name), value=right)
            assert_close_to(y, expected, call, name=f"the output of expert {expert}")
        right = weights_of(plain).values[name]
        found = weight(layer, expert, call)
        with asking(f"out.reconstruct({expert})", call):
            expected = replace(weights.expectation(name), value=right)
            assert_close_to(found, expected, call, name=f"the weight of expert {expert}")


# Low precision

SMALL_UPDATES = (
    "u_in, u_out = ({size:g} * v / v.square().sum(-1, keepdim=True) for v in (v_in, v_out))"
)
"""The line that gives every diagonal element of U Vᵀ one size, less than 16 bits have beside 1."""


def small_updates(case: CoreCase, device: str) -> Call:
    """A call with wrappers that are the identity in the case's 16 bits, and not in 32."""
    size = {"bfloat16": 0.75 * 2.0**-8, "float16": 0.75 * 2.0**-11}[case.dtype]
    return case.call(getattr(torch, case.dtype), device, SMALL_UPDATES.format(size=size))


def assert_small_updates_kept(shared_core: Subject, case: CoreCase) -> None:
    """Updates too small for 16 bits beside the identity are in the weights."""
    call = small_updates(case, shared_core.device)
    layer = made(shared_core, call)
    for expert in experts_of(call):
        found = weight(layer, expert, call)
        with asking(f"out.reconstruct({expert})", call):
            expected = one_rounding(call, expert)
            assert_close_to(found, expected, call, name=f"the weight of expert {expert}")


def assert_small_updates_folded(shared_core: Subject, case: CoreCase) -> None:
    """Updates too small for 16 bits beside the core are in the folded factors."""
    call = small_updates(case, shared_core.device)
    layer = made(shared_core, call)
    base, a, b = (x.to("cpu", torch.float64) for x in folded(layer, call))
    core = call.named("core").to("cpu", torch.float64)
    for expert in experts_of(call):
        with asking(FOLDED.format(expert=expert) + " - core", call):
            update = base + a[expert] @ b[expert] - core
            name = f"base + A B - C of expert {expert}"
            assert_close_to(update, update_of(call, expert), call, name=name)


# Folds


def folded(layer: nn.Module, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """What ``fold`` gives, of the right shapes; declined where there is none."""
    if getattr(layer, "fold", None) is None:
        raise Declined("the layer has no method fold")
    core = call.named("core")
    d_out, d_in = core.shape
    experts, _, rank = call.named("u_in").shape
    with asking("out.fold()", call), torch.no_grad():
        found = layer.fold()
        if not isinstance(found, (tuple, list)) or len(found) != 3:
            summary = f"fold() gives {type(found).__name__}, expected base, A and B"
            raise ConformanceFailure("wrong type", summary, call=call)
        shapes = ((d_out, d_in), (experts, d_out, 2 * rank), (experts, 2 * rank, d_in))
        for name, tensor, shape in zip(("base", "A", "B"), found, shapes):
            assert_tensor(tensor, shape, core.dtype, core.device, call=call, name=name)
    return tuple(x.detach() for x in found)


FOLDED = "(lambda base, a, b: base + a[{expert}] @ b[{expert}])(*(t.double() for t in out.fold()))"
"""Python that gives the weight of an expert from the fold, in float64."""


def compare_fold(layer: nn.Module, call: Call, right: Call | None = None) -> None:
    """base + A_e B_e is the weight of every expert."""
    base, a, b = (x.to("cpu", torch.float64) for x in folded(layer, call))
    for expert in experts_of(call):
        with asking(FOLDED.format(expert=expert), call):
            expected = weights_of(right or call).expectation(f"output {expert}")
            found = base + a[expert] @ b[expert]
            assert_close_to(found, expected, call, name=f"base + A B of expert {expert}")


def assert_fold(shared_core: Subject, case: CoreCase) -> None:
    """base + A_e B_e is every expert's weight, in every lane."""
    check = lambda call: compare_fold(made(shared_core, call), call)
    in_every_lane(case, check, shared_core.device)


def assert_fold_twice(shared_core: Subject, case: CoreCase) -> None:
    """Folding again gives the same bits, and the right ones."""
    call = case.call(torch.float32, shared_core.device)
    layer = made(shared_core, call)
    first = [x.clone() for x in folded(layer, call)]
    again = folded(layer, call)
    for name, one, two in zip(("base", "A", "B"), first, again):
        with asking("(out.fold(), out.fold())", call):
            assert_identical(two, one, call, because=f"{name} of a second fold")
    compare_fold(layer, call)


def assert_fold_changes_nothing(shared_core: Subject, case: CoreCase) -> None:
    """Folding leaves state, outputs and weights as they were."""
    call = case.call(torch.float32, shared_core.device)
    layer, x = made(shared_core, call), call.named("x")
    state = {name: tensor.clone() for name, tensor in held(layer).items()}
    before = [(output(layer, x, e, call), weight(layer, e, call)) for e in experts_of(call)]
    folded(layer, call)
    for name, tensor in held(layer).items():
        because = f"{name} after fold()"
        if name not in state:
            raise ConformanceFailure("changed state", f"{name} is new after fold()", call=call)
        assert_identical(tensor, state[name], call, because=because)
    for expert, (rows, full) in enumerate(before):
        because = f"expert {expert} before and after fold()"
        assert_identical(output(layer, x, expert, call), rows, call, because=because)
        assert_identical(weight(layer, expert, call), full, call, because=because)


def assert_fold_is_fresh(shared_core: Subject, case: CoreCase) -> None:
    """Folding after the core was changed in place folds the new core."""
    call = case.call(torch.float32, shared_core.device)
    edited = case.call(torch.float32, shared_core.device, NEW_CORE)
    layer = made(shared_core, call)
    folded(layer, call)
    with torch.no_grad():
        core_of(layer, call).copy_(edited.named("core"))
    with after("out.fold()", *EDITED):
        compare_fold(layer, call, edited)


# Refusals


def assert_refused(
    shared_core: Subject, case: CoreCase, *edits: str, options: Mapping[str, str] | None = None
) -> None:
    """Making a layer of factors that do not belong together raises an exception."""
    call = case.call(torch.float32, shared_core.device, *edits).then(**(options or {}))
    raises(lambda: made(shared_core, call), "the layer is made", call, "print(out)")


def assert_expert_refused(shared_core: Subject, case: CoreCase, expert: int) -> None:
    """An expert that there is not raises an exception, in the call and in ``reconstruct``."""
    call = case.call(torch.float32, shared_core.device)
    layer, x = made(shared_core, call), call.named("x")
    for source, ask in (
        (f"out(x, {expert})", lambda: layer(x, expert)),
        (f"out.reconstruct({expert})", lambda: layer.reconstruct(expert)),
    ):
        raises(ask, f"{source} is given, of {case.experts} experts", call, f"print({source})")
