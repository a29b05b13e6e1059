"""The oracle of cached attention: one pass over the whole sequence, and the checks of the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.attention_checks import floor_variants as attention_variants
from conformance.harness.cached_cases import CachedCall, CachedCase
from conformance.harness.calls import in_float64
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import in_every_lane
from conformance.harness.memo import remembered
from conformance.harness.rotary_checks import floor_variants as rotary_variants
from conformance.harness.rotary_checks import rotation_noise
from conformance.harness.subject import Subject, changes_caught, errors_named, reject_alias
from conformance.harness.tolerance import Expectation, expect
from reference_impl.attention import Attention
from reference_impl.rotary import yarn_score_factor


class _Recorded(Attention):
    """The reference, keeping its scores and weights for the noise estimate."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        self.kept_scores = torch.where(visible_BHQK, scores_BHQK, 0)
        self.kept_weights = weights
        return weights, lse

    def combine(self, weights_BHQK, v_BHKE):
        self.kept_values = v_BHKE
        return super().combine(weights_BHQK, v_BHKE)


def inputs_of(call: CachedCall) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """The whole q, k, v, and which tokens are real (None: all)."""
    tensors = tuple(call.named(name) for name in ("q", "k", "v"))
    return tensors, call.named("key_valid") if call.case.padded else None


def token_positions(call: CachedCall) -> Tensor:
    """The position [batch, tokens] of each real token in its row; -1 for padding."""
    (q, _, _), valid = inputs_of(call)
    if valid is None:
        return torch.arange(q.shape[2]).repeat(q.shape[0], 1)
    valid = valid.cpu()
    return torch.where(valid, valid.cumsum(-1) - 1, -1)


def attention_options(call: CachedCall, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one causal pass over the whole sequence."""
    positions = token_positions(call)
    scale = options.get("scale")
    if scale is None:
        scale = call.case.head_dim**-0.5
    return {
        "causal": True,
        "window": options.get("window"),
        "scale": scale * yarn_score_factor(options["rotary"].get("scaling")),
        "sinks": options.get("sinks"),
        "q_positions": positions,
        "k_positions": positions,
    }


@remembered
def expected_output(call: CachedCall) -> Expectation:
    """What the oracle says of the output [batch, q_heads, tokens, value_dim]; 0 at padding."""
    tensors, _ = inputs_of(call)
    q, k, v = in_float64(tensors)
    _, given = call.values()
    options, positions = in_float64(given), token_positions(call)
    at = positions.clamp(min=0)
    q, q_noise = rotation_noise(q, at, options["rotary"], call.dtype)
    k, k_noise = rotation_noise(k, at, options["rotary"], call.dtype)
    recorded, how = _Recorded(), attention_options(call, options)
    value = recorded.attention(q, k, v, **how)
    # An error of a score moves the output by its weight times the distance of value and output.
    k, k_noise = (recorded.expand_kv_heads(x, q.shape[1]) for x in (k, k_noise))
    over_keys = q_noise.square() @ k.square().transpose(-1, -2)
    over_queries = q.square() @ k_noise.square().transpose(-1, -2)
    score_noise = recorded.kept_scores.square() + how["scale"] ** 2 * (over_keys + over_queries)
    weights, values = recorded.kept_weights.square(), recorded.kept_values
    moved = weights * score_noise
    through_scores = (
        moved @ values.square()
        - 2 * value * (moved @ values)
        + value.square() * moved.sum(-1, keepdim=True)
    )
    rounding = weights @ values.square() + through_scores.clamp(min=0)
    real = (positions >= 0)[:, None, :, None]
    variants = [
        torch.where(real, _run_rounded(call, rotary_variants(call.dtype)[0], attention), 0)
        for attention in attention_variants(call.dtype)
    ]
    noise = torch.where(real, value.abs() + rounding.sqrt(), 0)
    return expect(torch.where(real, value, 0), variants, noise, call.dtype)


def _run_rounded(call: CachedCall, rotary: Any, attention: Attention) -> Tensor:
    (q, k, v), _ = inputs_of(call)
    _, options = call.values()
    at = token_positions(call).clamp(min=0)
    q, k = (rotary.rotary(x.cpu(), at, **options["rotary"]) for x in (q, k))
    how = attention_options(call, options)
    how = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in how.items()}
    return attention.attention(q, k, v.cpu(), **how)


def new_cache(cached_attention: Subject, call: CachedCall) -> Callable[..., Tensor]:
    """An empty cache of the implementation."""
    _, options = call.values()
    with failing_at(call):
        step = cached_attention(**options)
    if not callable(step):
        found = type(step).__name__
        raise ConformanceFailure("wrong type", f"expected a callable, found {found}", call=call)
    return step


def run_step(step: Callable[..., Tensor], call: CachedCall, begin: int, end: int) -> Tensor:
    """The output of one step, checked; zeros where its tokens are padding."""
    tensors, valid = inputs_of(call)
    q, k, v = (tensor[:, :, begin:end].contiguous() for tensor in tensors)
    options = {} if valid is None else {"key_valid": valid[:, begin:end].contiguous()}
    inputs = [q, k, v, *options.values()]
    with failing_at(call), changes_caught(inputs), errors_named("step"):
        output = step(q, k, v, **options)
    shape, name = (*q.shape[:3], v.shape[3]), f"output of tokens {begin} to {end - 1}"
    assert_tensor(output, shape, q.dtype, q.device, call=call, name=name)
    with failing_at(call):
        reject_alias(output, inputs)
    if valid is not None:
        output = torch.where(valid[:, None, begin:end, None], output, 0)
    return output


def run_all(cached_attention: Subject, call: CachedCall) -> Tensor:
    """The outputs of all steps of a new cache, one after another."""
    step = new_cache(cached_attention, call)
    return torch.cat([run_step(step, call, *bounds) for bounds in call.named("steps")], dim=2)


def assert_steps_match(cached_attention: Subject, case: CachedCase) -> None:
    """Every step gives what one pass over the whole sequence does, in every lane of ``case``."""

    def check(call: CachedCall) -> None:
        assert_close_to(run_all(cached_attention, call), expected_output(call), call)

    in_every_lane(case, check, cached_attention.device)


def assert_rows_as_alone(cached_attention: Subject, case: CachedCase) -> None:
    """Each row of a padded batch gives what it gives alone and without padding."""

    def check(call: CachedCall) -> None:
        together = run_all(cached_attention, call)
        alone = torch.zeros_like(together)
        for row, padding in enumerate(case.padding()):
            alone[row, :, padding:] = run_all(cached_attention, row_call(call, row))[0]
        # The oracle of the batch holds each row as it is alone.
        assert_close_to(alone, expected_output(call), call, name="output of each row alone")
        assert_close_to(together, expected_output(call), call)

    in_every_lane(case, check, cached_attention.device)


def row_call(call: CachedCall, row: int) -> CachedCall:
    """The steps of one batch row without its padding."""
    padding = call.case.padding()[row]
    return replace(
        call,
        lines=(
            *call.lines,
            f"q, k, v = (x[{row}:{row + 1}, :, {padding}:] for x in (q, k, v))",
            f"steps = [(max(a - {padding}, 0), b - {padding}) for a, b in steps]",
        ),
        case=replace(call.case, padded=False),
    )


def assert_caches_independent(cached_attention: Subject, case: CachedCase) -> None:
    """Two caches that are stepped in turn each give what they give alone."""

    def check(call: CachedCall) -> None:
        other = call.then("q, k, v = (x.flip(2) * 0.5 for x in (q, k, v))")
        calls = (call, other)
        steps = [new_cache(cached_attention, each) for each in calls]
        outputs: list[list[Tensor]] = [[], []]
        for bounds in call.named("steps"):
            for step, each, parts in zip(steps, calls, outputs):
                parts.append(run_step(step, each, *bounds))
        for each, parts in zip(calls, outputs):
            assert_close_to(torch.cat(parts, dim=2), expected_output(each), each)

    in_every_lane(case, check, cached_attention.device)


def assert_steps_deterministic(cached_attention: Subject, case: CachedCase) -> None:
    """Two new caches given the same steps give the same bits."""

    def check(call: CachedCall) -> None:
        first, second = (run_all(cached_attention, call) for _ in range(2))
        assert_identical(second, first, call, because="the same steps are repeated in a new cache")

    in_every_lane(case, check, cached_attention.device)
