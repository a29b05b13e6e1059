"""Checks of experts: against the oracle within rounding, and bit by bit where numbers are integers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.experts_cases import FLOATING, ExpertsCase
from conformance.harness.experts_oracle import (
    exact,
    expected,
    integer_upstream,
    integer_upstream_line,
)
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.gpt_subject import uninitialised_memory_is_nan
from conformance.harness.lanes import EXACT, in_every_lane, lane_of
from conformance.harness.requirement import current_tally
from conformance.harness.subject import Subject, bitwise_equal, changes_caught, errors_named

OUTPUT = "output 0"
"""What an oracle calls the output."""


# Running


def run(experts: Subject, call: Call) -> Tensor:
    """The output, with its type, shape, dtype and device checked."""
    arguments, options = call.values()
    with failing_at(call), dirty_memory(call):
        output = experts(*arguments, **options)
    hidden = arguments[0]
    assert_tensor(output, tuple(hidden.shape), hidden.dtype, hidden.device, call=call)
    return output


def run_gradients(
    experts: Subject, call: Call, upstream: Tensor, names: Sequence[str] = FLOATING
) -> dict[str, Tensor | None]:
    """The output, and the gradients of these inputs, which alone need one.

    None stands for a gradient where nothing reaches the input.
    """
    arguments, options = call.values()
    given = {
        name: x.detach().requires_grad_() if name in names else x
        for name, x in zip(call.arguments, arguments)
    }
    leaves = {name: given[name] for name in names}
    with failing_at(call), dirty_memory(call), torch.enable_grad():
        output = experts(*given.values(), **options)
        hidden = arguments[0]
        assert_tensor(output, tuple(hidden.shape), hidden.dtype, hidden.device, call=call)
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if output.requires_grad:
            with errors_named("the backward pass"), changes_caught(arguments):
                found = torch.autograd.grad(
                    output, list(leaves.values()), upstream.to(output), allow_unused=True
                )
    return {OUTPUT: output.detach(), **dict(zip(leaves, found))}


NAN_IN_NEW_MEMORY = "torch.use_deterministic_algorithms(True, warn_only=True)"
"""The line by which torch fills memory that nothing was written to, as it is during the call."""


@contextmanager
def dirty_memory(call: Call) -> Iterator[None]:
    """Memory that nothing was written to holds NaN, also what was freed just before."""
    case: ExpertsCase = call.case
    rows = case.tokens * max(case.slots, 1)
    for width in (case.hidden, case.intermediate, 2 * case.intermediate):
        torch.full((rows, width), torch.nan, dtype=call.dtype, device=call.named("hidden").device)
    with uninitialised_memory_is_nan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operations that are not deterministic
        yield


# Within rounding


def assert_matches_oracle(experts: Subject, case: ExpertsCase) -> None:
    """The output is what the oracle says, in every lane of ``case``."""

    def check(call: Call) -> None:
        assert_close_to(run(experts, call), expected(call).expectation(OUTPUT), call)

    in_every_lane(case, check, experts.device)


def assert_gradients(experts: Subject, case: ExpertsCase, names: Sequence[str] = FLOATING) -> None:
    """The gradients of these inputs are what the oracle says, in every lane of ``case``."""

    def check(call: Call) -> None:
        right = expected(call)
        (upstream,) = right.upstream
        found = run_gradients(experts, call, upstream)
        for name in names:
            with shown_as_gradient(name, call):
                gradient = arrived(found[name], name, call)
                about = f"gradient of {name}"
                assert_close_to(gradient, right.expectation(name), call, name=about)

    in_every_lane(case, check, experts.device)


def arrived(gradient: Tensor | None, name: str, call: Call) -> Tensor:
    """The gradient; it is a failure that there is none."""
    if gradient is None:
        summary = f"no gradient reaches {name}"
        raise ConformanceFailure("no gradient", summary, call=call, lane=lane_of(call.dtype))
    shape = tuple(call.named(name).shape)
    assert_tensor(
        gradient,
        shape,
        call.named(name).dtype,
        call.named(name).device,
        call=call,
        name=f"gradient of {name}",
    )
    return gradient


@contextmanager
def shown_as_gradient(
    name: str, call: Call, *edits: str, leaves: Sequence[str] = FLOATING
) -> Iterator[None]:
    """A failure's lines make the gradient of ``name`` and print it."""
    try:
        yield
    except ConformanceFailure as failure:
        shape = tuple(call.named("hidden").shape)
        line = f"torch.randn({shape}, generator=torch.Generator().manual_seed({call.case.seed}))"
        if call.case.integers:
            line = integer_upstream_line(call)
        device = call.named("hidden").device.type
        failure.call = call.then(
            *edits,
            f"for x in [{', '.join(leaves)}]: x.requires_grad_()",
            f"upstream = {line}"
            + f".to({call.dtype})" * (call.dtype != torch.float32)
            + f".to('{device}')" * (device != "cpu"),
        )
        failure.shown_by = f"print(torch.autograd.grad(out, {name}, upstream))"
        raise


# Bit by bit


def assert_exact(
    experts: Subject, case: ExpertsCase, *edits: str, rows: str | None = None
) -> Tensor:
    """The output is that of the oracle bit by bit; gives it.

    ``edits`` are lines that change what must not matter. ``rows`` is an expression of the lines that
    says which tokens are compared.
    """
    call = case.call(device=experts.device)
    changed = call.then(*edits)
    output = run(experts, changed)
    found, right = output, exact(call)[OUTPUT]
    if rows is not None:
        kept = eval(rows, changed.namespace())
        found, right = found[kept.to(found.device)], right[kept.cpu()]
    assert_equal(found, right, "output" if rows is None else f"output[{rows}]", changed)
    return output


def assert_exact_gradients(
    experts: Subject, case: ExpertsCase, *edits: str, names: Sequence[str] = FLOATING
) -> None:
    """The output and these gradients are those of the oracle bit by bit.

    Nothing reaching an input whose gradient is zero is as good as zeros.
    """
    call = case.call(device=experts.device)
    changed = call.then(*edits)
    found = run_gradients(experts, changed, integer_upstream(call))
    assert_equal(found[OUTPUT], exact(call)[OUTPUT], "output", changed)
    for name in names:
        right, gradient = exact(call)[name], found[name]
        if gradient is None and not right.any():
            continue
        with shown_as_gradient(name, call, *edits):
            gradient = arrived(gradient, name, changed)
            assert_equal(gradient, right, f"gradient of {name}", changed)


def assert_each_gradient(experts: Subject, case: ExpertsCase) -> None:
    """Every input that alone needs a gradient has the one that it has among the others."""
    call = case.call(device=experts.device)
    for name in FLOATING:
        found = run_gradients(experts, call, integer_upstream(call), (name,))
        with shown_as_gradient(name, call, leaves=(name,)):
            gradient = arrived(found[name], name, call)
            assert_equal(gradient, exact(call)[name], f"gradient of {name} alone", call)


NOTHING = 1e-20
"""Integer cases have no results below it but 0; an exponential that is cut off may leave 1e-36."""


def assert_equal(found: Tensor, right: Tensor, name: str, call: Call) -> None:
    """Fail unless every element has the value of the oracle, in float64."""
    current_tally().comparisons[EXACT] += 1
    here = found.detach().cpu().double()
    here = torch.where(here.abs() < NOTHING, 0, here)
    wrong = here != right
    if not bool(wrong.any()):
        return
    at = tuple(wrong.nonzero()[0].tolist())
    finite = bool(torch.isfinite(here).all())
    what = f"{name}{list(at)} is {float(here[at]):.9g}, expected {float(right[at]):.9g}"
    rows = wrong.flatten(1).any(1).nonzero().flatten().tolist() if wrong.ndim > 1 else []
    if not finite:
        call = call.then(NAN_IN_NEW_MEMORY)
    raise ConformanceFailure(
        "wrong values" if finite else "non-finite",
        f"{what}; {int(wrong.sum())} of {wrong.numel()} elements are wrong",
        details=(f"rows affected: {rows} of {len(wrong)}",),
        call=call,
        lane=EXACT,
        shown_by=f"print(out{list(at)}.item(), 'expected {float(right[at]):.9g}')"
        if name == "output"
        else "print(out)",
    )


def assert_expert_of_each_token(experts: Subject, case: ExpertsCase) -> None:
    """What expert e gives is e + 1 times what the first gives: the output names the expert."""
    tagged = (
        f"down_proj = down_proj[:1] * torch.arange(1.0, {case.experts + 1})[:, None, None]"
        f".to(down_proj)",
        "gate_up_proj = gate_up_proj[:1].repeat(len(gate_up_proj), 1, 1)",
    )
    call = case.call(device=experts.device).then(*tagged)
    output, right = run(experts, call).cpu().double(), exact(call)[OUTPUT]
    due = call.named("indices")[:, 0].tolist()
    for token, expert in enumerate(due):
        unit = right[token] / (expert + 1)
        others = [e for e in range(case.experts) if torch.equal(output[token], unit * (e + 1))]
        if others and expert not in others:
            raise ConformanceFailure(
                "wrong expert",
                f"token {token} has what expert {others[0]} gives, it goes to expert {expert}",
                call=call,
                lane=EXACT,
            )
    assert_equal(output, right, "output", call)


def assert_permuted(
    experts: Subject, case: ExpertsCase, order: str, edits: Sequence[str], *, outputs: bool
) -> None:
    """The output after ``edits`` is that before; its rows in ``order`` where ``outputs``."""
    first = assert_exact(experts, case)
    seeded = f"generator=torch.Generator().manual_seed({case.seed})"
    made = f"order = torch.randperm({order}, {seeded}).to(indices.device)"
    call = case.call(device=experts.device).then(made, *edits)
    wanted = first[call.named("order")] if outputs else first
    assert_identical(run(experts, call), wanted, call, because="another order changes the output")


def assert_split(experts: Subject, case: ExpertsCase) -> None:
    """Tokens in two calls have the outputs that they have in one."""
    whole, cut = assert_exact(experts, case), case.tokens // 3 + 1
    for part in (slice(None, cut), slice(cut, None)):
        bounds = f"{part.start or ''}:{part.stop or ''}"
        names = "hidden, indices, weights"
        made = f"{names} = (x[{bounds}] for x in ({names}))"
        call = case.call(device=experts.device).then(made)
        because = "tokens by themselves have other outputs than among others"
        assert_identical(run(experts, call), whole[part], call, because=because)


def assert_scaled(experts: Subject, case: ExpertsCase) -> None:
    """Weights times a power of two give outputs times that power, in every bit."""

    def check(call: Call) -> None:
        once = run(experts, call)
        more = call.then("weights = 4 * weights")
        because = "4 times the weights do not give 4 times the output"
        assert_identical(run(experts, more), 4 * once, more, because=because)

    in_every_lane(case, check, experts.device)


def assert_equal_experts(experts: Subject, case: ExpertsCase) -> None:
    """With all experts equal and weights that sum to 1, a token has what one expert gives."""
    alike = (
        "gate_up_proj, down_proj = (x[:1].repeat(len(x), 1, 1) for x in (gate_up_proj, down_proj))",
        f"weights = torch.tensor([0.5, 0.25, 0.125, 0.125])[:{case.slots}].to(weights)"
        f".repeat({case.tokens}, 1)",
        "weights[:, -1] += 1 - weights.sum(-1)",
    )
    call = case.call(device=experts.device).then(*alike)
    one = call.then("indices, weights = indices[:, :1] * 0, weights[:, :1] * 0 + 1")
    assert_equal(run(experts, call), exact(one)[OUTPUT], "output", call)


def assert_connected(experts: Subject, case: ExpertsCase, *edits: str) -> None:
    """The output requires a gradient, and every input gets one: zeros."""
    call = case.call(device=experts.device).then(*edits)
    found = run_gradients(experts, call, torch.ones(tuple(call.named("hidden").shape)))
    for name in FLOATING:
        with shown_as_gradient(name, call):
            gradient = arrived(found[name], name, call)
            assert_equal(
                gradient, torch.zeros(gradient.shape).double(), f"gradient of {name}", call
            )


def assert_two_runs(experts: Subject, case: ExpertsCase) -> None:
    """The same inputs give the same bits, also after a call with other inputs in between.

    On other devices than the CPU, where sums may be in any order, the same within rounding.
    """

    def check(call: Call) -> None:
        first = run(experts, call).clone()
        (hidden, indices, weights, gate_up_proj, down_proj), options = call.values()
        experts(hidden.flip(0) * 2, indices, weights + 1, gate_up_proj, down_proj, **options)
        second = run(experts, call)
        if experts.device == "cpu":
            assert_identical(second, first, call, because="a second run differs")
        assert_close_to(second, expected(call).expectation(OUTPUT), call)

    in_every_lane(case, check, experts.device)


def assert_output_of_every_dtype(experts: Subject, case: ExpertsCase) -> None:
    """The output has the shape and dtype of hidden, and is finite."""

    def check(call: Call) -> None:
        output = run(experts, call)
        if not bool(torch.isfinite(output).all()):
            raise ConformanceFailure("non-finite", "the output is not finite", call=call)

    in_every_lane(case, check, experts.device)


def assert_own_memory(experts: Subject, case: ExpertsCase) -> None:
    """What one call returned is not written to by the next."""
    call = case.call(device=experts.device)
    first = run(experts, call)
    kept = first.clone()
    other = run(experts, call.then("hidden = -hidden"))
    if not bitwise_equal(first, kept):
        raise ConformanceFailure(
            "changed output", "a later call changes what was returned", call=call
        )
    assert_equal(other, exact(call.then("hidden = -hidden"))[OUTPUT], "output", call)


def assert_refused(experts: Subject, case: ExpertsCase, *edits: str, **options: str) -> None:
    """The case is computed as it is, and raises an exception after ``edits`` or with ``options``."""
    assert_exact(experts, case)
    call = case.call(device=experts.device).then(*edits, **options)
    arguments, given = call.values()
    current_tally().comparisons[EXACT] += 1
    try:
        with failing_at(call):
            experts(*arguments, **given)
    except Declined as reason:
        if not isinstance(reason.__cause__, NotImplementedError):
            raise
        return
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised"):
            raise
        return
    wrong = edits[-1] if edits else ", ".join(f"{n}={value}" for n, value in options.items())
    raise ConformanceFailure("accepted", f"no exception for {wrong}", call=call, lane=EXACT)
