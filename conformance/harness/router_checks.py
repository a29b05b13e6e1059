"""Checks of routers: which experts are chosen, their weights, gradients, and the balancing loss.

Slots of a token may be in any order, so both sides are brought into the order of experts. Which
experts are right is decided first, exactly, wherever no rounding can change it; their weights are
then compared with the oracle's weights of the experts that were chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, dtype_name
from conformance.harness.compare import assert_close_to, assert_tensor
from conformance.harness.failures import ConformanceFailure, Inconclusive, failing_at
from conformance.harness.lanes import EXACT, in_every_lane, lane_of
from conformance.harness.requirement import current_tally
from conformance.harness.router_cases import RouterCase
from conformance.harness.router_oracle import (
    UNCLEAR,
    VANISHED,
    expected_choice,
    expected_loss,
    expected_weights,
)
from conformance.harness.subject import Subject

SHOWN = "print(out)"


@dataclass
class Routed:
    """What a router gives, in the order of slots."""

    weights_TK: Tensor
    indices_TK: Tensor
    loss: Tensor | None = None

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """Weights and experts [T, K] in the order of experts."""
        indices_TK, order_TK = self.indices_TK.sort(dim=-1)
        return self.weights_TK.gather(-1, order_TK), indices_TK

    def chosen(self, experts: int) -> Tensor:
        """Which experts each token goes to, bool [T, E] on the CPU."""
        indices_TK = self.indices_TK.cpu()
        nothing = torch.zeros(len(indices_TK), experts, dtype=torch.bool)
        return nothing.scatter(-1, indices_TK, True)


def run(moe_router: Subject, call: Call, *arguments: Tensor) -> Routed:
    """Route, with types, shapes, dtypes and the range of indices checked.

    ``arguments`` take the place of the logits of the call.
    """
    given, options = call.values()
    logits = (arguments or given)[0]
    with failing_at(call):
        result = moe_router(logits, **options)
    return checked(result, logits, call, with_loss=bool(options.get("return_balancing_loss")))


def checked(result: Any, logits: Tensor, call: Call, *, with_loss: bool) -> Routed:
    """The result as what it must be: (weights, indices) or (weights, indices, loss)."""
    parts = 3 if with_loss else 2
    if not (isinstance(result, (tuple, list)) and len(result) == parts):
        found = type(result).__name__
        if isinstance(result, (tuple, list)):
            found += f" of {len(result)}"
        expected = "(weights, indices, loss)" if with_loss else "(weights, indices)"
        summary = f"the router gives {found}, expected {expected}"
        raise ConformanceFailure("wrong type", summary, call=call, lane=lane_of(call.dtype))
    weights, indices = result[:2]
    shape = (len(logits), call.values()[1]["top_k"])
    wide = isinstance(weights, Tensor) and weights.dtype == torch.float32
    dtype = torch.float32 if wide else logits.dtype
    assert_tensor(weights, shape, dtype, logits.device, call=call, name="weights")
    assert_tensor(indices, shape, torch.int64, logits.device, call=call, name="indices")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < logits.shape[-1]:
        summary = f"indices go from {int(indices.min())} to {int(indices.max())}"
        raise ConformanceFailure("wrong experts", summary, call=call, shown_by=SHOWN)
    if not with_loss:
        return Routed(weights, indices)
    loss = result[2]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConformanceFailure("wrong type", "the loss is not a scalar tensor", call=call)
    return Routed(weights, indices, loss)


# Which experts


def assert_right_experts(routed: Routed, call: Call) -> Tensor:
    """Each token has its best experts, each once; what was chosen, bool [T, E]."""
    expected = expected_choice(call)
    current_tally().comparisons[EXACT] += 1
    chosen = assert_each_once(routed, call)
    wrong = (chosen != expected.chosen).any(-1) & expected.clear
    if bool(wrong.any()):
        _wrong_experts(int(wrong.nonzero()[0]), chosen, expected.chosen, call)
    if dict(call.options).get("groups") is None:
        _assert_as_good(chosen, call)
    return chosen


def _assert_as_good(chosen: Tensor, call: Call) -> None:
    """Where several choices are as good, one of those was made."""
    expected = expected_choice(call)
    got = torch.where(chosen, expected.ranked, torch.inf).amin(-1)
    due = torch.where(expected.chosen, expected.ranked, torch.inf).amin(-1)
    allowance = 4 * UNCLEAR * (1 + due.abs()) + VANISHED
    wrong = got < due - allowance
    if bool(wrong.any()):
        _wrong_experts(int(wrong.nonzero()[0]), chosen, expected.chosen, call)


def assert_each_once(routed: Routed, call: Call) -> Tensor:
    """No token goes to an expert twice; what was chosen, bool [T, E]."""
    logits = call.values()[0][0]
    chosen = routed.chosen(logits.shape[-1])
    wrong = chosen.sum(-1) != routed.indices_TK.shape[-1]
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        summary = f"token {token} goes to experts {routed.indices_TK[token].tolist()}, one twice"
        shown = f"print(out[1][{token}], 'expected each expert once')"
        raise ConformanceFailure("wrong experts", summary, call=call, shown_by=shown)
    return chosen


def _wrong_experts(token: int, chosen: Tensor, expected: Tensor, call: Call) -> None:
    found, due = (which[token].nonzero().flatten().tolist() for which in (chosen, expected))
    raise ConformanceFailure(
        "wrong experts",
        f"token {token} goes to experts {found}, expected {due}",
        details=(f"{int((chosen != expected).any(-1).sum())} of {len(chosen)} tokens differ",),
        call=call,
        lane=lane_of(call.dtype),
        shown_by=f"print(out[1][{token}].sort().values, 'expected {due}')",
    )


def assert_lowest_index(moe_router: Subject, case: RouterCase) -> None:
    """Of experts with equal scores those with the lowest index are chosen."""

    def check(call: Call) -> None:
        chosen, expected = assert_each_once(run(moe_router, call), call), expected_choice(call)
        current_tally().comparisons[EXACT] += 1
        wrong = (chosen != expected.chosen).any(-1)
        if bool(wrong.any()):
            _wrong_experts(int(wrong.nonzero()[0]), chosen, expected.chosen, call)

    in_every_lane(case, check, moe_router.device)


# Weights


def assert_routed(routed: Routed, call: Call) -> None:
    """Experts and weights are right."""
    chosen = assert_right_experts(routed, call)
    weights, _ = routed.by_expert()
    expectation = expected_weights(call, chosen).expectation(routed.weights_TK.dtype)
    assert_close_to(weights, expectation, call, name="weights by expert")


def assert_routes(moe_router: Subject, case: RouterCase) -> None:
    """Experts and weights are right, in every lane of the case."""
    in_every_lane(case, lambda call: assert_routed(run(moe_router, call), call), moe_router.device)


def assert_chooses(moe_router: Subject, case: RouterCase) -> None:
    """The right experts are chosen, whatever their weights."""

    def check(call: Call) -> None:
        assert_right_experts(run(moe_router, call), call)

    in_every_lane(case, check, moe_router.device)


def assert_weights_of_experts(moe_router: Subject, case: RouterCase) -> None:
    """The weight in each slot is that of the expert in that slot, whatever was chosen."""

    def check(call: Call) -> None:
        routed = run(moe_router, call)
        chosen = assert_each_once(routed, call)
        expectation = expected_weights(call, chosen).expectation(routed.weights_TK.dtype)
        assert_close_to(routed.by_expert()[0], expectation, call, name="weights by expert")

    in_every_lane(case, check, moe_router.device)


def assert_sum_is_one(moe_router: Subject, case: RouterCase) -> None:
    """A token's weights sum to the scaling factor."""

    def check(call: Call) -> None:
        routed = run(moe_router, call)
        chosen = assert_each_once(routed, call)
        expectation = expected_weights(call, chosen).expectation(routed.weights_TK.dtype)
        total = routed.weights_TK.double().sum(-1)
        limit = call.values()[1]["top_k"] * expectation.limits.largest
        current_tally().comparisons[lane_of(call.dtype)] += 1
        wrong = ~((total - case.scaling).abs() <= limit)
        if bool(wrong.any()):
            token = int(wrong.nonzero()[0])
            summary = f"the weights of token {token} sum to {total[token]:.6g}"
            raise ConformanceFailure(
                "wrong values",
                f"{summary}, expected {case.scaling}",
                call=call,
                lane=lane_of(call.dtype),
                shown_by=f"print(out[0].sum(-1), 'expected {case.scaling}')",
            )

    in_every_lane(case, check, moe_router.device)


def assert_one(moe_router: Subject, case: RouterCase) -> None:
    """Every weight is 1, or as near as the product with a reciprocal comes."""

    def check(call: Call) -> None:
        routed = run(moe_router, call)
        assert_right_experts(routed, call)
        off = (routed.weights_TK.double() - 1).abs()
        if not bool((off <= torch.finfo(routed.weights_TK.dtype).eps).all()):
            found = routed.weights_TK.flatten().tolist()
            summary = f"weights are {found}, expected 1, for x / x is 1"
            raise ConformanceFailure("wrong values", summary, call=call, lane=lane_of(call.dtype))

    in_every_lane(case, check, moe_router.device)


def assert_same_shifted(moe_router: Subject, case: RouterCase, *lines: str) -> None:
    """Experts and weights are those without ``lines``, which make the same routing of other input."""

    def check(call: Call) -> None:
        shifted = call.then(*lines)
        routed = run(moe_router, shifted)
        chosen, expected = assert_each_once(routed, shifted), expected_choice(call)
        # Both calls are clear: where one is not, rounding may choose differently after a shift.
        clear = expected.clear & expected_choice(shifted).clear
        if not bool(clear.any()):
            raise Inconclusive("the choice is not clear for any token")
        current_tally().comparisons[EXACT] += 1
        wrong = (chosen != expected.chosen).any(-1) & clear
        if bool(wrong.any()):
            _wrong_experts(int(wrong.nonzero()[0]), chosen, expected.chosen, shifted)
        expectation = expected_weights(shifted, chosen).expectation(routed.weights_TK.dtype)
        assert_close_to(routed.by_expert()[0], expectation, shifted, name="weights by expert")

    in_every_lane(case, check, moe_router.device)


def assert_routes_edited(moe_router: Subject, case: RouterCase, *lines: str) -> None:
    """As :func:`assert_routes`, for the call after further lines."""

    def check(call: Call) -> None:
        edited = call.then(*lines)
        assert_routed(run(moe_router, edited), edited)

    in_every_lane(case, check, moe_router.device)


def assert_tokens_independent(moe_router: Subject, case: RouterCase) -> None:
    """A token alone is routed as it is among others."""

    def check(call: Call) -> None:
        for token in range(case.tokens):
            alone = call.then(f"logits = logits[{token}:{token + 1}]")
            assert_routed(run(moe_router, alone), alone)

    in_every_lane(case, check, moe_router.device)


# Gradients


def run_gradient(
    moe_router: Subject, call: Call, value: Callable[[Routed], tuple[Tensor, Tensor]], what: str
) -> tuple[Routed, Tensor]:
    """The gradient of the logits of what ``value`` gives, a tensor and the gradient at it."""
    logits = call.values()[0][0].detach().clone().requires_grad_()
    with torch.enable_grad():
        routed = run(moe_router, call, logits)
        output, upstream = value(routed)
        gradient = None
        if output.requires_grad:
            with failing_at(call):
                (gradient,) = torch.autograd.grad(output, logits, upstream, allow_unused=True)
    if gradient is None:
        summary = f"no gradient reaches the logits from {what}"
        raise ConformanceFailure("no gradient", summary, call=call, lane=dtype_name(call.dtype))
    return routed, gradient


def assert_gradient(moe_router: Subject, case: RouterCase) -> None:
    """The gradient of the logits through the weights is the oracle's."""

    def check(call: Call) -> None:
        (at,) = expected_weights(call, expected_choice(call).chosen).rounded.upstream

        def value(routed: Routed) -> tuple[Tensor, Tensor]:
            weights, _ = routed.by_expert()
            return weights, at.to(weights)

        routed, gradient = run_gradient(moe_router, call, value, "the weights")
        chosen = assert_right_experts(routed, call)
        expectation = expected_weights(call, chosen).gradient()
        assert_close_to(gradient, expectation, call, name="gradient of logits")

    in_every_lane(case, check, moe_router.device)


# The balancing loss


def _clear_everywhere(call: Call) -> None:
    if not bool(expected_choice(call).clear.all()):
        raise Inconclusive("the loss depends on a choice that is not clear")


def assert_loss(moe_router: Subject, case: RouterCase) -> None:
    """The loss is the oracle's."""

    def check(call: Call) -> None:
        _clear_everywhere(call)
        loss = run(moe_router, call).loss.reshape(1)
        expectation = expected_loss(call).expectation("output 0")
        assert_close_to(loss, expectation, call, name="loss", source="out[2].reshape(1)")

    in_every_lane(case, check, moe_router.device)


def assert_loss_is(
    moe_router: Subject, case: RouterCase, expected: Callable[[Call], float]
) -> None:
    """The loss is a number that the rule tells without an oracle."""

    def check(call: Call) -> None:
        _clear_everywhere(call)
        loss = float(run(moe_router, call).loss.detach())
        due = expected(call)
        limit = expected_loss(call).expectation("output 0").limits.largest
        current_tally().comparisons[lane_of(call.dtype)] += 1
        if not abs(loss - due) <= limit:
            summary = f"the loss is {loss:.6g}, expected {due:.6g}"
            shown = f"print(out[2].item(), 'expected {due:.6g}')"
            raise ConformanceFailure(
                "wrong values", summary, call=call, lane=lane_of(call.dtype), shown_by=shown
            )

    in_every_lane(case, check, moe_router.device)


def assert_loss_gradient(moe_router: Subject, case: RouterCase) -> None:
    """The gradient of the logits through the loss is the oracle's."""

    def check(call: Call) -> None:
        _clear_everywhere(call)
        expected = expected_loss(call)
        (at,) = expected.upstream

        def value(routed: Routed) -> tuple[Tensor, Tensor]:
            loss = routed.loss.reshape(1)
            return loss, at.to(loss)

        _, gradient = run_gradient(moe_router, call, value, "the loss")
        assert_close_to(gradient, expected.expectation("logits"), call, name="gradient of logits")

    in_every_lane(case, check, moe_router.device)


# NaN, and what is refused


def assert_nan_is_seen(moe_router: Subject, case: RouterCase) -> None:
    """NaN in one token raises, or is in its weights; other tokens are routed as ever."""

    def check(call: Call) -> None:
        token, expert = case.seed % case.tokens, case.seed % case.experts
        broken = call.then("logits = logits.clone()", f"logits[{token}, {expert}] = torch.nan")
        try:
            routed = run(moe_router, broken)
        except ConformanceFailure as failure:
            if failure.kind.startswith("raised "):
                return
            raise
        current_tally().comparisons[EXACT] += 1
        if not bool(routed.weights_TK[token].isnan().any()):
            found = routed.weights_TK[token].tolist()
            summary = f"token {token} has NaN among its logits, and weights {found}"
            shown = f"print(out[0][{token}], 'expected NaN')"
            raise ConformanceFailure("hidden NaN", summary, call=broken, shown_by=shown)
        rest = [other for other in range(case.tokens) if other != token]
        others = call.then(f"logits = logits[{rest}]")
        assert_routed(Routed(routed.weights_TK[rest], routed.indices_TK[rest]), others)

    in_every_lane(case, check, moe_router.device)


def assert_refused(moe_router: Subject, case: RouterCase, *lines: str, **options: str) -> None:
    """An exception comes for these options."""
    call = case.call(torch.float32, moe_router.device).then(*lines, **options)
    arguments, given = call.values()
    try:
        result = moe_router(*arguments, **given)
    except ConformanceFailure as failure:
        if not failure.kind.startswith("raised "):
            raise
        current_tally().comparisons[EXACT] += 1
        return
    del result
    summary = f"{call.source()} was accepted, expected an exception"
    raise ConformanceFailure("accepted", summary, call=call)
