"""Comparing one tensor with what the oracle expects of it."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.harness.calls import Call, dtype_name
from conformance.harness.compared import Compared, axes_of
from conformance.harness.failures import ConformanceFailure, Inconclusive
from conformance.harness.lanes import EXACT, lane_of
from conformance.harness.numerics import measured
from conformance.harness.requirement import current_tally
from conformance.harness.subject import bitwise_equal
from conformance.harness.tolerance import Expectation, measure


def assert_tensor(
    output: object,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    call: Call,
    name: str = "output",
    source: str | None = None,
) -> None:
    """``output`` is a tensor of this shape and dtype on this device.

    ``source`` is ``output`` as Python, after the call that leaves its result in ``out``; it may be
    left out for the result itself.
    """
    lane = lane_of(call.dtype)
    source = source or ("out" if name == "output" else None)
    if not isinstance(output, Tensor):
        found = type(output).__name__
        raise ConformanceFailure(
            "wrong type",
            f"{name} is {found}, expected a tensor",
            call=call,
            lane=lane,
            shown_by=property_shown(f"type({source})", "a tensor", source),
        )
    for what, found, expected in (
        ("shape", list(output.shape), list(shape)),
        ("dtype", dtype_name(output.dtype), dtype_name(dtype)),
        ("device", output.device.type, device.type),
    ):
        if found != expected:
            raise ConformanceFailure(
                f"wrong {what}",
                f"{name} has {what} {found}, expected {expected}",
                call=call,
                lane=lane,
                shown_by=property_shown(f"{source}.{what}", str(expected), source),
            )


def property_shown(asked: str, expected: str, source: str | None) -> str:
    """The line that prints what is asked of ``source``, or all where it is not known as Python."""
    return f"print({asked}, 'expected {expected}')" if source else "print(out)"


def assert_close_to(
    actual: Tensor,
    expectation: Expectation,
    call: Call,
    *,
    name: str = "output",
    source: str | None = None,
) -> None:
    """``actual`` is within the limits of ``expectation``, finite where it is, infinite where it is.

    ``source`` is ``actual`` as Python, after the call that leaves its result in ``out``; it may be
    left out where the name says it. Raises :class:`Inconclusive` for an ill-conditioned case.
    """
    expected, lane = expectation.value, lane_of(call.dtype)
    if not expected.numel():
        raise Inconclusive(f"{name} is empty")
    found = actual.detach().to("cpu", torch.float64)
    compared = Compared(name, axes_of(call.contract, name, found.ndim), found, expectation)
    finite = torch.isfinite(expected)
    bad = torch.where(finite, ~torch.isfinite(found), found != expected)
    if bool(bad.any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ConformanceFailure(
            "non-finite",
            f"{name}{list(at)} is {found[at]:.6g}, expected {expected[at]:.6g}",
            details=(f"{int(bad.sum())} of {bad.numel()} elements are not finite as they must be",),
            call=call,
            lane=lane,
            shown_by=shown_by(name, at, expected, source),
            compared=compared,
        )
    if expectation.ill_conditioned:
        raise Inconclusive("ill-conditioned: rounding alone may change the result beyond use")
    statistics = measure(actual, expected)
    tally = current_tally()
    tally.comparisons[lane] += 1
    tally.errors.append(measured(call, name, lane, statistics, expectation.floor))
    over = statistics.exceeds(expectation.limits)
    if not over:
        tally.closest = max(tally.closest, statistics.ratio(expectation.limits))
        return
    raise ConformanceFailure(
        "wrong values",
        f"{name} differs from the oracle: {statistics.worst(expectation.limits)}",
        details=(*statistics.table(expectation.limits), *where_worst(found, expected, name)),
        call=call,
        lane=lane,
        shown_by=shown_by(name, worst_index(found, expected), expected, source),
        compared=compared,
    )


def worst_index(found: Tensor, expected: Tensor) -> tuple[int, ...]:
    """Where the absolute error is largest."""
    error = torch.where(torch.isfinite(expected), (found - expected).abs(), 0)
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))


def shown_by(name: str, at: tuple[int, ...], expected: Tensor, source: str | None) -> str:
    """The line that prints one element of an output beside what it must be."""
    if source is None and name in ("output", "features", "logits"):
        source = "out"
    elif source is None and name.isidentifier():
        source = name
    value = f"{source}{list(at)}.item()" if source else "out"
    return f"print({value}, 'expected {name}{list(at)}: {expected[at]:.9g}')"


def where_worst(found: Tensor, expected: Tensor, name: str) -> tuple[str, ...]:
    """Lines that say where the error is, for tensors with up to four axes."""
    error = torch.where(torch.isfinite(expected), (found - expected).abs(), 0)
    at = worst_index(found, expected)
    lines = [f"worst at {name}{list(at)}: {found[at]:.6g}, expected {expected[at]:.6g}"]
    if error.ndim == 4:
        tolerance = float(error.max()) / 10
        for axis, label in ((0, "batch rows"), (1, "heads"), (2, "tokens")):
            others = tuple(a for a in range(4) if a != axis)
            wrong = (error.amax(others) > tolerance).nonzero().flatten().tolist()
            if len(wrong) < error.shape[axis]:
                lines.append(f"{label} affected: {wrong} of {error.shape[axis]}")
    return tuple(lines)


def assert_identical(actual: Tensor, expected: Tensor, call: Call, *, because: str) -> None:
    """``actual`` equals ``expected`` bit by bit; ``because`` completes the message."""
    current_tally().comparisons[EXACT] += 1
    if bitwise_equal(actual.detach(), expected.detach()):
        return
    differs = (actual != expected).nonzero()
    at = tuple(differs[0].tolist()) if len(differs) else ()
    raise ConformanceFailure(
        "not identical",
        f"{because}: {len(differs)} of {actual.numel()} elements differ, the first at {list(at)}: "
        f"{float(actual[at]):.9g} and {float(expected[at]):.9g}",
        call=call,
        lane=EXACT,
    )


def assert_different(actual: Tensor, other: Tensor, call: Call, *, because: str) -> None:
    """``actual`` differs from ``other`` somewhere."""
    current_tally().comparisons[EXACT] += 1
    if bitwise_equal(actual.detach(), other.detach()):
        raise ConformanceFailure("no effect", because, call=call, lane=EXACT)
