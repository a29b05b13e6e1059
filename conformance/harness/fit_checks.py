"""Checks of fitting a shared core: everything is computed again in float64 from what is returned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.compare import assert_identical, assert_tensor
from conformance.harness.core_cases import FACTORS
from conformance.harness.failures import ConformanceFailure, Declined, failing_at
from conformance.harness.fit_cases import FitCase
from conformance.harness.requirement import current_tally
from conformance.harness.shown import preceded_by
from conformance.harness.subject import Subject, reject_alias
from conformance.harness.tolerance import STEP_ERROR

STEP = STEP_ERROR[torch.float32]
"""Sixteen roundings of float32: how far an element of a reconstruction may be off, relatively."""


# Asking


def fitted(subject: Subject, call: Call) -> dict[str, Tensor]:
    """The factors, of the right shapes, in float32 and finite."""
    return factors_of(asked(subject, call), call)


def asked(subject: Subject, call: Call) -> Any:
    """What the fit gives."""
    (experts,), options = call.values()
    with failing_at(call):
        return subject(experts, **options)


def factors_of(found: Any, call: Call) -> dict[str, Tensor]:
    """The factors of a result, checked."""
    experts, case = call.named("experts"), call.case
    number, d_out, d_in = experts.shape
    shapes = {"core": (d_out, d_in)}
    for side, width in (("in", d_in), ("out", d_out)):
        shapes |= dict.fromkeys((f"u_{side}", f"v_{side}"), (number, width, case.rank))
    factors = {}
    for name in FACTORS:
        factor = getattr(found, name, None)
        shown = replace(call, dtype=torch.float32)
        assert_tensor(
            factor, shapes[name], torch.float32, experts.device, call=shown, name=f"out.{name}"
        )
        factors[name] = factor.detach().cpu()
        if not bool(torch.isfinite(factors[name]).all()):
            raise ConformanceFailure("non-finite", f"{name} has values that are not", call=call)
    return factors


def rebuilt(factors: dict[str, Tensor]) -> Tensor:
    """The reconstructions [experts, d_out, d_in] in float64, from matrices that are written out."""
    core, u_in, v_in, u_out, v_out = (factors[name].double() for name in FACTORS)
    outer = torch.eye(len(core)) + torch.einsum("eor,epr->eop", u_out, v_out)
    inner = torch.eye(core.shape[1]) + torch.einsum("edr,ecr->edc", u_in, v_in)
    return torch.einsum("eop,pd,edc->eoc", outer, core, inner)


def exact(call: Call) -> Tensor:
    """The experts in float64."""
    return call.named("experts").detach().cpu().double()


def norm(x: Tensor) -> float:
    """The root of the sum of squares."""
    return float(x.square().sum().sqrt())


def mean_error(call: Call) -> float:
    """‖W − mean‖ over all experts."""
    experts = exact(call)
    return norm(experts - experts.mean(0))


def error_of(factors: dict[str, Tensor], call: Call) -> float:
    """‖W − Ŵ‖ over all experts."""
    return norm(exact(call) - rebuilt(factors))


def bad(kind: str, summary: str, call: Call, shown_by: str = "print(out)") -> ConformanceFailure:
    """A failure of this call."""
    if kind == "worse" and shown_by == "print(out)":
        shown_by = ERROR
    return ConformanceFailure(kind, summary, call=call, shown_by=shown_by)


ERROR = """\
side = lambda u, v: torch.eye(u.shape[1]) + u.double() @ v.double().mT
found = side(out.u_out, out.v_out) @ out.core.double() @ side(out.u_in, out.v_in)
error = lambda found: (experts - found).norm().item()
print('error', error(found), '- expected not above that of the mean', error(experts.mean(0)))"""
"""Lines that print how far the reconstructions are off the experts, and how far their mean is."""


def counted() -> None:
    """Count one comparison of the exact lane."""
    current_tally().comparisons["exact"] += 1


# The beginning


def assert_mean(subject: Subject, case: FitCase) -> None:
    """No steps: every reconstruction is the mean of the experts.

    A sum of E float32 numbers in any order is off by at most E · 2⁻²⁴ of the sum of their sizes.
    """
    call = case.call(device=subject.device)
    found, experts = rebuilt(fitted(subject, call)), exact(call)
    limit = (len(experts) + 1) * 2.0**-24 * experts.abs().mean(0)
    counted()
    error = (found - experts.mean(0)).abs()
    if bool((error > limit).any()):
        at = list(torch.unravel_index((error - limit).argmax(), error.shape))
        where = [int(i) for i in at]
        summary = f"reconstruction{where} is off the mean by {float(error[tuple(where)]):.3g}"
        raise bad("wrong values", summary, call, "print(out.core - experts.float().mean(0))")


def assert_random_v(subject: Subject, case: FitCase) -> None:
    """At the beginning U is zero and V is random of variance 1 / rank, another for each expert."""
    call = case.call(device=subject.device)
    factors = fitted(subject, call)
    counted()
    for side in ("in", "out"):
        u, v = factors[f"u_{side}"], factors[f"v_{side}"]
        if bool(u.any()):
            raise bad("wrong values", f"u_{side} is not zero before any step", call)
        if len(v.flatten().unique()) < 0.9 * v.numel():
            raise bad("wrong values", f"v_{side} holds numbers again and again", call)
        spread = float(v.double().square().mean()) * case.rank
        # Of n normal numbers the mean square is 1 ± 6 · (2 / n)^½, in all but one of 10⁹ draws.
        allowed = 6 * (2 / v.numel()) ** 0.5
        if abs(spread - 1) > allowed:
            summary = f"v_{side} has a variance of {spread:.3g} / rank, expected 1 / rank"
            raise bad("wrong values", summary, call, f"print(out.v_{side}.square().mean())")


# How good it is


def assert_never_worse(subject: Subject, case: FitCase) -> None:
    """What is returned is as close to the experts as the mean, up to the rounding of a comparison."""
    call = case.call(device=subject.device)
    found, start = error_of(fitted(subject, call), call), mean_error(call)
    counted()
    # Whoever compares in float32 knows every residual up to STEP of the weight.
    if not found <= start + STEP * norm(exact(call)):
        raise bad("worse", f"the error is {found:.6g}, that of the mean {start:.6g}", call)


def assert_equal_experts(subject: Subject, case: FitCase) -> None:
    """Experts that are all equal are reconstructed to the last bits, whatever is fitted."""
    call = case.call(device=subject.device)
    found, experts = rebuilt(fitted(subject, call)), exact(call)
    counted()
    # The mean of E equal numbers is that number up to E roundings; then every gradient is noise.
    limit = (len(experts) + 15) * 2.0**-24 * norm(experts)
    if norm(found - experts) > limit:
        error = norm(found - experts) / norm(experts)
        raise bad("wrong values", f"equal experts are off by {error:.3g} of themselves", call)


def assert_recovers(subject: Subject, case: FitCase, *, share: float) -> None:
    """Experts that are a core between wrappers of this rank are found again."""
    call = case.call(device=subject.device)
    found, start = error_of(fitted(subject, call), call), mean_error(call)
    counted()
    if not found <= share * start:
        summary = f"the error is {found / start:.3g} of the mean's, at most {share} was possible"
        raise bad("not fitted", summary, call)


def assert_rank_counts(subject: Subject, case: FitCase) -> None:
    """A larger rank fits random experts better, by far more than chance."""
    errors = []
    for rank in (1, min(case.d_in, case.d_out)):
        call = replace(case, rank=rank).call(device=subject.device)
        errors.append(error_of(fitted(subject, call), call))
    counted()
    if not errors[1] < 0.9 * errors[0]:
        raise bad(
            "not fitted", f"the error is {errors[0]:.4g} at rank 1, then {errors[1]:.4g}", call
        )


# History


def history_of(found: Any, call: Call) -> Sequence[float]:
    """The losses; declined by a fit that does not tell them."""
    history = getattr(found, "history", None)
    if history is None:
        raise Declined("gives no history")
    counted()
    if len(history) != call.case.steps + 1:
        summary = f"history has {len(history)} losses for {call.case.steps} steps"
        raise bad("wrong history", summary, call, "print(len(out.history))")
    return [float(loss) for loss in history]


def assert_is_loss(loss: float, error: float, what: str, call: Call) -> None:
    """A loss is the square of an error, known as float32 can know it."""
    experts = exact(call)
    # Residuals are off by STEP of the weights, and a sum of n squares by n · 2⁻²⁴ of itself.
    apart, share = STEP * norm(experts), experts.numel() * 2.0**-24
    low, high = max(error - apart, 0) ** 2 * (1 - share), (error + apart) ** 2 * (1 + share)
    if not low <= loss <= high:
        summary = f"history says {loss:.8g} of {what}, which is {error**2:.8g}"
        raise bad("wrong history", summary, call, "print(out.history[0], min(out.history))")


def assert_history(subject: Subject, case: FitCase) -> None:
    """The first loss is the mean's, summed over experts and elements."""
    call = case.call(device=subject.device)
    history = history_of(asked(subject, call), call)
    assert_is_loss(history[0], mean_error(call), "the mean", call)


def assert_best_of_history(subject: Subject, case: FitCase) -> None:
    """The loss of what is returned is the smallest in the history."""
    call = case.call(device=subject.device)
    found = asked(subject, call)
    factors, history = factors_of(found, call), history_of(found, call)
    assert_is_loss(min(history), error_of(factors, call), "the best step", call)


# Random numbers


def bits(factors: dict[str, Tensor]) -> Tensor:
    """All factors in a row."""
    return torch.cat([factors[name].flatten() for name in FACTORS])


def assert_same_seed(subject: Subject, case: FitCase) -> None:
    """The same seed gives the same bits, whatever is fitted and drawn between."""
    call = case.call(device=subject.device)
    other = replace(case, seed=case.seed + 1).call(device=subject.device, seed="8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = fitted(subject, call)
        torch.manual_seed(2)
        fitted(subject, other)
        torch.rand(5)
        again = fitted(subject, call)
    assert_identical(bits(again), bits(first), call, because="fitted again with the same seed")


def assert_no_memory(subject: Subject, case: FitCase) -> None:
    """Experts of the same shapes that are fitted one after another do not meet."""
    fitted(subject, case.call(device=subject.device))
    with preceded_by(case.call(device=subject.device)):
        assert_never_worse(subject, replace(case, seed=case.seed + 1))


def assert_other_seed(subject: Subject, case: FitCase) -> None:
    """Another seed gives other wrappers."""
    one, other = (case.call(device=subject.device, seed=seed) for seed in ("3", "4"))
    first, second = fitted(subject, one), fitted(subject, other)
    for name in ("v_in", "v_out"):
        counted()
        if torch.equal(first[name], second[name]):
            raise bad("no effect", f"{name} is the same for seeds 3 and 4", other)


STATE_KEPT = "print('as before:', torch.equal(torch.get_rng_state(), before), '- expected True')"


def random_state(call: Call) -> Call:
    """The call after a line that keeps the global random state."""
    return call.then("before = torch.get_rng_state()")


def assert_global_state(subject: Subject, case: FitCase) -> None:
    """The global random state, and whether gradients are recorded, are as they were."""
    call = case.call(device=subject.device)
    call.values()
    for enabled in (True, False):
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(enabled):
            torch.manual_seed(case.seed)
            before = torch.get_rng_state()
            fitted(subject, call)
            counted()
            if not torch.equal(torch.get_rng_state(), before):
                summary = "the global random state was changed"
                raise bad("changed state", summary, random_state(call), STATE_KEPT)
            if torch.is_grad_enabled() != enabled:
                raise bad("changed state", "the recording of gradients was changed", call)


# Tensors


def assert_dtypes(subject: Subject, case: FitCase) -> None:
    """Experts of 16 bits are fitted in float32, as the same numbers in float32 are."""
    call = case.call(device=subject.device)
    wide = call.then("experts = experts.float()")
    found, expected = fitted(subject, call), fitted(subject, replace(wide, dtype=torch.float32))
    because = f"experts in {case.dtype}, and the same numbers in float32"
    assert_identical(bits(found), bits(expected), call, because=because)


def assert_detached(subject: Subject, case: FitCase) -> None:
    """Factors are plain tensors in memory of their own, also of experts that record gradients."""
    for edit in ((), ("experts.requires_grad_()",)):
        call = case.call(*edit, device=subject.device)
        found = asked(subject, call)
        for name in FACTORS:
            factor = getattr(found, name)
            counted()
            if factor.requires_grad or factor.grad_fn is not None:
                raise bad("records gradients", f"{name} is part of a graph", call)
            with failing_at(call):
                reject_alias(factor, [call.named("experts")])
    if call.named("experts").grad is not None:
        raise bad("changed input", "the experts have been given a gradient", call)


def assert_in_range(subject: Subject, case: FitCase) -> None:
    """Every step ends in finite factors of the right shapes, and the input is as it was."""
    call = case.call(device=subject.device)
    factors = fitted(subject, call)
    counted()
    error = error_of(factors, call)
    if not error <= mean_error(call) + STEP * norm(exact(call)):
        raise bad("worse", f"the error is {error:.6g}", call)


def assert_refused(subject: Subject, case: FitCase, *edits: str, **options: str) -> None:
    """An exception; the same case is fitted without the edits."""
    fitted(subject, case.call(device=subject.device))
    call = case.call(*edits, device=subject.device, **options)
    counted()
    try:
        asked(subject, call)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        return
    raise bad("accepted", "what cannot be fitted is accepted", call)
