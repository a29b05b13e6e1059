"""Checks of parallel layers: outputs, gradients, what is held, what is communicated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.communication import collectives, ready_to_count
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.parallel_cases import LayerCall, LayerCase
from conformance.harness.parallel_oracle import (
    Dense,
    dense_of_group,
    held,
    named_weights,
    output_part,
)
from conformance.harness.parallel_shown import (
    DRAWN,
    SUMMED,
    backward_shown,
    called_twice,
    communication,
    compared_with,
    run_shown,
    shown_by_layer,
    upstream_lines,
    weights_spoilt,
)
from conformance.harness.rank_pool import on_ranks
from conformance.harness.requirement import current_tally
from conformance.harness.shown import after, differing, made_by, shown_on_rank
from conformance.harness.subject import Subject, changes_caught, errors_named

# On the ranks


@dataclass
class Ran:
    """What a layer did on one rank."""

    outputs: tuple[Any, ...] = ()
    again: tuple[Any, ...] = ()
    """The outputs of a second call with the same arguments, if one was made."""
    input_gradient: Tensor | None = None
    shards: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    collectives: Counter[str] = field(default_factory=Counter)


def run_layer(
    subject: Subject,
    arguments: list[Any],
    options: dict[str, Any],
    inputs: list[tuple[Tensor, ...]],
    upstream: list[tuple[Tensor, ...]] | None = None,
    want: tuple[str, ...] = (),
) -> Ran:
    """Make the layer on this rank, and call it with the rank's own inputs.

    With ``upstream``, gradients at the outputs of each rank, backward too. ``want`` names further
    things to do: ``shards``, ``collectives``, ``twice``, ``forget`` (the caller's weights are spoilt
    before the layer is called), ``reset`` (the weights are drawn anew, after the same seed).
    """
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    kind, weights = arguments
    if "forget" in want:  # the case's own are not to be spoilt
        weights = {name: weight.clone() for name, weight in weights.items()}
    with changes_caught(list(weights.values())):
        layer = subject(kind, weights, **options)
    if not callable(layer):
        found = type(layer).__name__
        raise ConformanceFailure("wrong type", f"parallel_linear gives {found}, not a layer")
    if "forget" in want:
        for weight in weights.values():
            weight.fill_(torch.nan)
    x = [each.clone() for each in inputs[rank]]
    if upstream is not None and x[0].is_floating_point():
        x[0].requires_grad_()
    ran = Ran()
    watched = changes_caught(x)
    with watched, errors_named("the layer"), torch.set_grad_enabled(upstream is not None):
        if "collectives" in want:
            with collectives() as counts:
                outputs = as_tuple(layer(*x))
            ran.collectives = counts
        else:
            outputs = as_tuple(layer(*x))
        ran.outputs = tuple(detached(out) for out in outputs)
        if "twice" in want:
            ran.again = tuple(detached(out) for out in as_tuple(layer(*x)))
    if upstream is not None:
        with errors_named("the backward pass"):
            torch.autograd.backward(outputs, upstream[rank])
        ran.input_gradient = x[0].grad
        ran.gradients = told(layer, "gradients")
    if "reset" in want:
        reset(layer)
    if "shards" in want:
        ran.shards = told(layer, "shards")
    return ran


def reset(layer: Any) -> None:
    """Draw the weights anew, after one seed on every rank; declined where that is not offered."""
    method = getattr(layer, "reset_parameters", None)
    if method is None:
        raise Declined("the layer has no method reset_parameters")
    torch.manual_seed(7)
    with errors_named("reset_parameters()"):
        method()


def as_tuple(output: Any) -> tuple[Any, ...]:
    """One output as a tuple of one."""
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


def detached(output: Any) -> Any:
    """A copy of a tensor that can travel; anything else as its type's name."""
    return output.detach().clone() if isinstance(output, Tensor) else type(output).__name__


def told(layer: Any, name: str) -> dict[str, Tensor]:
    """What ``layer.shards()`` or ``layer.gradients()`` gives; declined where there is none."""
    method = getattr(layer, name, None)
    if method is None:
        raise Declined(f"the layer has no method {name}")
    with errors_named(f"{name}()"):
        result = method()
    if not isinstance(result, Mapping):
        raise ConformanceFailure(
            "wrong type", f"{name}() gives {type(result).__name__}, not a mapping"
        )
    return {key: value.detach().clone() for key, value in result.items()}


# In the test


def run(
    parallel_linear: Subject,
    call: LayerCall,
    *,
    backward: bool = False,
    want: tuple[str, ...] = (),
) -> list[Ran]:
    """What the call's layer does on every rank."""
    case = call.case
    arguments, options = call.values()
    upstream = upstream_of(call) if backward else None
    with run_shown(call, backward=backward), failing_at(call):
        return on_ranks(
            parallel_linear,
            case.ranks,
            run_layer,
            arguments,
            options,
            call.named("inputs"),
            upstream,
            want,
        )


def upstream_of(call: LayerCall) -> list[tuple[Tensor, ...]]:
    """The gradients at the outputs of each rank."""
    lines = tuple(upstream_lines(call))
    ranks = (replace(call, lines=(f"rank = {rank}", *lines)) for rank in range(call.case.ranks))
    return [tuple(each.named("upstream")) for each in ranks]


def assert_outputs(ran: list[Ran], call: LayerCall) -> None:
    """Every rank has its part of what one process with the full weights computes."""
    case = call.case
    for rank, each in enumerate(ran):
        whole = dense_of_group(call, rank // case.size)
        if len(each.outputs) != whole.outputs:
            found = f"rank {rank} gives {len(each.outputs)} outputs, expected {whole.outputs}"
            number = (
                f"print(len(out) if isinstance(out, tuple) else 1, '- expected {whole.outputs}')"
            )
            raise ConformanceFailure("wrong type", found, call=call, shown_by=number)
        for number, output in enumerate(each.outputs):
            part = lambda full: output_part(case, number, full, rank % case.size)  # noqa: B023
            expected = whole.expectation(f"output {number}", part)
            name = named(case, rank, "output" if whole.outputs == 1 else f"output {number}")
            source = "out" if whole.outputs == 1 else f"out[{number}]"
            with shown_on_rank(rank, case.ranks):
                assert_value(output, expected, call, name, source)


def named(case: LayerCase, rank: int, what: str) -> str:
    """What is compared, with its rank where there are several."""
    return what if case.ranks == 1 else f"{what} of rank {rank}"


def assert_value(output: Any, expected: Any, call: LayerCall, name: str, source: str) -> None:
    """A tensor of the expected shape in the call's dtype, within the limits."""
    wide = call.case.kind == "cross_entropy" and name.startswith("output")
    dtype = torch.promote_types(call.dtype, torch.float32) if wide else call.dtype
    found = output
    if isinstance(output, Tensor) and wide and output.dtype == call.dtype:
        dtype = call.dtype
    shape = tuple(expected.value.shape)
    assert_tensor(found, shape, dtype, torch.device("cpu"), call=call, name=name, source=source)
    assert_close_to(found, expected, call, name=name, source=source)


def assert_layer(parallel_linear: Subject, case: LayerCase, *edits: str) -> None:
    """Every rank's output is its part of the full layer's."""
    call = case.call(*edits)
    assert_outputs(run(parallel_linear, call), call)


def assert_ranks_identical(parallel_linear: Subject, case: LayerCase) -> None:
    """The ranks of a group have the same output, bit for bit."""
    call = case.call()
    ran = run(parallel_linear, call)
    assert_outputs(ran, call)
    for rank, each in enumerate(ran):
        first = rank // case.size * case.size
        because = f"ranks {first} and {rank} hold the sum of the same parts"
        with made_by(call, then=compared_with(first)):
            assert_identical(each.outputs[0], ran[first].outputs[0], call, because=because)


def assert_partial_results(parallel_linear: Subject, case: LayerCase) -> None:
    """What the ranks return without a reduction has the output as its sum."""
    call = replace(case, reduce_results=False).call()
    ran = run(parallel_linear, call)
    whole = dense_of_group(call, 0).expectation("output 0")
    total = torch.zeros_like(whole.value)
    for rank, each in enumerate(ran):
        like = (tuple(whole.value.shape), call.dtype, torch.device("cpu"))
        name = named(case, rank, "output")
        with shown_on_rank(rank, case.ranks):
            assert_tensor(each.outputs[0], *like, call=call, name=name, source="out")
        total += each.outputs[0].to(torch.float64)
    with after(*SUMMED), shown_on_rank(0, case.ranks):
        assert_close_to(total, whole, call, name="sum over the ranks", source="total")


def assert_gradients(
    parallel_linear: Subject, case: LayerCase, *, of: tuple[str, ...] | None = None
) -> None:
    """Gradients of the input and of every weight are those of one process, each rank its part.

    ``of`` names the weights to look at; default: all, and the input.
    """
    call = case.call()
    ran = run(parallel_linear, call, backward=True)
    assert_outputs(ran, call)
    for rank, each in enumerate(ran):
        whole = dense_of_group(call, rank // case.size)
        if of is None and "input" in whole.values:
            with backward_shown(call), shown_on_rank(rank, case.ranks):
                assert_input_gradient(each, whole, call, rank)
        for name in named_weights(case, call.named("weights")):
            if of is not None and name not in of:
                continue
            with backward_shown(call), shown_on_rank(rank, case.ranks):
                assert_weight_gradient(each, whole, call, rank, name)


def assert_weight_gradient(ran: Ran, whole: Dense, call: LayerCall, rank: int, name: str) -> None:
    """The gradient of a weight of the rank is its part of the full one."""
    case = call.case
    if name not in ran.gradients:
        found = ", ".join(ran.gradients) or "none"
        summary = f"gradients() of rank {rank} has no {name}: {found}"
        shown_by = "print(list(gradients))"
        raise ConformanceFailure("missing weight", summary, call=call, shown_by=shown_by)
    expected = whole.expectation(name, lambda full: held(case, name, full, rank % case.size))
    gradient = without_padding(ran.gradients[name], expected.value, case)
    what, source = named(case, rank, f"gradient of {name}"), f"gradients[{name!r}]"
    assert_value(gradient, expected, call, what, source)


def assert_input_gradient(ran: Ran, whole: Dense, call: LayerCall, rank: int) -> None:
    """The gradient of the rank's input is its part of the full one."""
    case, member = call.case, rank % call.case.size
    split = case.kind == "norm" or (case.kind == "row" and case.input_is_parallel)
    part = lambda full: full
    if split:
        part = lambda full: full.chunk(case.size, -1)[member]
    elif case.kind == "cross_entropy":
        rows = case.vocab_rows
        part = lambda full: full[:, member * rows :][:, :rows]
    name = named(case, rank, "gradient of the input")
    if ran.input_gradient is None:
        shown_by = "print(x[0].grad, '- expected a gradient')"
        summary = f"{name} is missing"
        raise ConformanceFailure("no gradient", summary, call=call, shown_by=shown_by)
    assert_value(ran.input_gradient, whole.expectation("input", part), call, name, "x[0].grad")


def without_padding(part: Tensor, expected: Tensor, case: LayerCase) -> Tensor:
    """A share of the vocabulary without the rows behind the last token, if it has them."""
    padded = case.kind in ("embedding", "head") and part.ndim and len(part) == case.vocab_rows
    return part[: len(expected)] if padded else part


# What is held


def coded(case: LayerCase) -> tuple[str, ...]:
    """Lines that number the elements of all weights, exactly in float32."""
    return (
        "sizes = [t.numel() for t in weights.values()]",
        "starts = [sum(sizes[:i]) + 1 for i in range(len(sizes))]",
        "weights = {k: torch.arange(s, s + t.numel(), dtype=torch.float32).view(t.shape)"
        " for s, (k, t) in zip(starts, weights.items())}",
    )


def assert_held(parallel_linear: Subject, case: LayerCase) -> None:
    """Every rank holds the elements of its part and no others, each in its place."""
    call = case.call(*coded(case))
    ran = run(parallel_linear, call, want=("shards",))
    full = named_weights(case, call.named("weights"))
    for rank, each in enumerate(ran):
        for name, weight in full.items():
            with (
                after("shards = out.shards()"),
                shown_on_rank(rank, case.ranks),
                shown_by_layer(call, "print(shards)"),
            ):
                if name not in each.shards:
                    found = ", ".join(each.shards) or "none"
                    summary = f"shards() of rank {rank} has no {name}: {found}"
                    raise ConformanceFailure("missing weight", summary, call=call)
                expected = held(case, name, weight, rank % case.size)
                assert_elements(each.shards[name], expected, full, named(case, rank, name), call)


def assert_elements(
    part: Tensor, expected: Tensor, full: Mapping[str, Tensor], name: str, call: LayerCall
) -> None:
    """A part holds the expected elements; what stands behind a vocabulary is zero."""
    current_tally().comparisons["exact"] += 1
    whole, part = part, without_padding(part, expected, call.case)
    if len(part) < len(whole) and bool((whole[len(part) :] != 0).any()):
        raise ConformanceFailure("wrong elements", f"{name}: padding is not zero", call=call)
    if part.shape != expected.shape:
        summary = f"{name} has shape {list(part.shape)}, expected {list(expected.shape)}"
        raise ConformanceFailure("wrong shape", summary, call=call)
    wrong = (part != expected).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        summary = (
            f"{name}{list(at)} holds {decoded(float(part[at]), full)}, expected "
            f"{decoded(float(expected[at]), full)}; {len(wrong)} of {part.numel()} elements are wrong"
        )
        raise ConformanceFailure("wrong elements", summary, call=call)


def decoded(number: float, full: Mapping[str, Tensor]) -> str:
    """Which element a number is the code of."""
    for name, weight in full.items():
        found = (weight == number).nonzero()
        if len(found):
            return f"{name}{found[0].tolist()}"
    return f"{number:g}, which is no element"


def assert_own_part(parallel_linear: Subject, case: LayerCase) -> None:
    """The layer does not read the caller's weights again."""
    call = case.call()
    with made_by(weights_spoilt(call)):
        assert_outputs(run(parallel_linear, call, want=("forget",)), call)


def assert_twice(parallel_linear: Subject, case: LayerCase) -> None:
    """A second call with the same input gives the same bits."""
    call = case.call()
    for rank, each in enumerate(run(parallel_linear, call, want=("twice",))):
        for number, (one, two) in enumerate(zip(each.outputs, each.again)):
            because = f"output {number} of rank {rank} of a second call"
            at = f"[{number}]" if len(each.outputs) > 1 else ""
            shown = differing(f"out{at}", f"first{at}")
            with shown_on_rank(rank, case.ranks), made_by(called_twice(call), then=shown):
                assert_identical(two, one, call, because=because)


def assert_drawn(parallel_linear: Subject, case: LayerCase) -> None:
    """Weights drawn at random are alike on ranks that hold the same, and on no others."""
    call = case.call(*coded(case))
    ran = run(parallel_linear, call, want=("reset", "shards"))
    for name, weight in named_weights(case, call.named("weights")).items():
        codes = [held(case, name, weight, member) for member in range(case.size)]
        for one in range(case.size):
            for other in range(one + 1, case.size):
                current_tally().comparisons["exact"] += 1
                rows = min(len(codes[one]), len(codes[other]))
                alike = torch.equal(ran[one].shards[name][:rows], ran[other].shards[name][:rows])
                expected = torch.equal(codes[one], codes[other])
                if rows and alike != expected:
                    found = "draw the same" if alike else "draw different numbers for one"
                    summary = f"ranks {one} and {other} {found} {name}"
                    with shown_by_layer(call, DRAWN):
                        raise ConformanceFailure("wrong initialisation", summary)


# Communication


def assert_communicates(parallel_linear: Subject, case: LayerCase, **expected: int) -> None:
    """A forward pass makes these collectives and no others."""
    ready_to_count()
    call = case.call()
    for rank, each in enumerate(run(parallel_linear, call, want=("collectives",))):
        current_tally().comparisons["exact"] += 1
        found = as_reductions(each.collectives)
        if found != expected:
            made = f"{named(case, rank, 'forward')} makes {counted(found)}"
            summary = f"{made}, expected {counted(expected)}"
            with shown_on_rank(rank, case.ranks), made_by(communication(call)):
                raise ConformanceFailure("wrong communication", summary)


def as_reductions(made: Mapping[str, int]) -> dict[str, int]:
    """Counts where a reduce-scatter with an all-gather is the all-reduce that it makes together."""
    pairs = min(made.get("reduce_scatter", 0), made.get("all_gather", 0))
    both = {"reduce_scatter": -pairs, "all_gather": -pairs, "all_reduce": pairs}
    total = {kind: made.get(kind, 0) + both.get(kind, 0) for kind in {*made, *both}}
    return {kind: number for kind, number in total.items() if number}


def counted(collectives_made: Mapping[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(collectives_made.items())) or "nothing"


# Bad input


def assert_refused(
    parallel_linear: Subject, case: LayerCase, *edits: str, sizes: tuple[int, ...] = ()
) -> None:
    """Making the layer raises, on every rank, an exception that names the sizes."""
    call = case.call(*edits)
    arguments, options = call.values()
    with failing_at(call):
        errors = on_ranks(parallel_linear, case.ranks, refusal, arguments, options)
    for rank, error in enumerate(errors):
        current_tally().comparisons["exact"] += 1
        name = named(case, rank, "the layer")
        with shown_by_layer(call, "print('accepted:', type(out).__name__)"):
            if error is None:
                raise ConformanceFailure("accepted", f"{name} is made of sizes that do not fit")
            missing = [size for size in sizes if str(size) not in error]
            if missing:
                summary = f"the error does not name {missing[0]}: {error[:200]}"
                raise ConformanceFailure("unclear error", summary)


def refusal(subject: Subject, arguments: list[Any], options: dict[str, Any]) -> str | None:
    """The text of the exception with which the layer is refused on this rank; None if it is not."""
    try:
        subject(*arguments, **options)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return str(failure.__cause__)
    return None
