"""The oracle of attention, its rounding floor, and the assertions that requirements are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, dtype_name, in_float64
from conformance.harness.compare import assert_close_to, assert_tensor
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import in_every_lane
from conformance.harness.memo import remembered
from conformance.harness.shown import keep
from conformance.harness.subject import Subject
from conformance.harness.tolerance import Expectation, expect
from reference_impl.attention import Attention, merge_attention


class _Recorded(Attention):
    """The reference, keeping its scores and weights for the noise estimate."""

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        self.kept_scores = torch.where(visible_BHQK & torch.isfinite(scores_BHQK), scores_BHQK, 0)
        self.kept_weights = weights
        return weights, lse

    def combine(self, weights_BHQK, v_BHKE):
        self.kept_values = v_BHKE
        return super().combine(weights_BHQK, v_BHKE)


@dataclass
class _Rounded(Attention):
    """Eager attention in ``dtype``: every intermediate result is stored in it."""

    dtype: torch.dtype
    scaled: str = "scores"
    """What the scale multiplies: ``scores``, ``queries`` or ``keys``."""

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)

    def scores(self, q_BHQD, k_BHKD, scale):
        if self.scaled == "queries":
            return self.round(self.round(q_BHQD * scale) @ k_BHKD.transpose(-1, -2))
        if self.scaled == "keys":
            return self.round(q_BHQD @ self.round(k_BHKD * scale).transpose(-1, -2))
        return self.round(self.round(q_BHQD @ k_BHKD.transpose(-1, -2)) * scale)

    def cap(self, scores_BHQK, softcap):
        return self.round(super().cap(scores_BHQK, softcap))

    def add_bias(self, scores_BHQK, bias):
        return self.round(super().add_bias(scores_BHQK, bias))

    def combine(self, weights_BHQK, v_BHKE):
        return self.round(super().combine(self.round(weights_BHQK), v_BHKE))


@dataclass
class _Blockwise(Attention):
    """Fused attention: scores in float32, probabilities stored in ``dtype`` before the values."""

    dtype: torch.dtype

    def softmax(self, scores_BHQK, visible_BHQK, sinks):
        weights, lse = super().softmax(scores_BHQK, visible_BHQK, sinks)
        peak = torch.where(visible_BHQK, scores_BHQK, -torch.inf).amax(-1, keepdim=True)
        unnormalised = torch.exp(torch.where(torch.isneginf(peak), 0, peak) - lse[..., None])
        unnormalised = torch.where(torch.isfinite(unnormalised), unnormalised, 1)
        rounded = (weights / unnormalised).to(self.dtype).to(weights.dtype)
        return rounded * unnormalised, lse


def floor_variants(dtype: torch.dtype) -> list[Attention]:
    """Correct ways to compute attention in ``dtype`` that differ in where they round."""
    if dtype == torch.float32:  # one order is enough: the predicted noise is far larger
        return [_Rounded(dtype)]
    orders = [_Rounded(dtype, scaled) for scaled in ("scores", "queries", "keys")]
    return [*orders, _Blockwise(dtype)]


@remembered
def oracle_output(call: Call) -> Tensor:
    """The output in float64, without limits, for checks that need none."""
    arguments, options = in_float64(call.values())
    return Attention().attention(*arguments, **options)


@remembered
def expected_output(call: Call) -> Expectation:
    """What the oracle says of the output [batch, q_heads, q_len, value_dim] of ``call``."""
    arguments, options = in_float64(call.values())
    options.pop("return_lse", None)
    recorded = _Recorded()
    value = recorded.attention(*arguments, **options)
    noise = output_noise(recorded, value)
    variants = [_run_on_cpu(steps, call, return_lse=False) for steps in floor_variants(call.dtype)]
    return expect(value, variants, noise, call.dtype)


def output_noise(recorded: _Recorded, value: Tensor) -> Tensor:
    """Error of the output when every step is off by one part in one, errors being independent.

    A probability p and the product p v are off by themselves; an error of the score s moves the
    output by p s (v - output).
    """
    weights_squared = recorded.kept_weights.square()
    moved = weights_squared * recorded.kept_scores.square()
    values = recorded.kept_values
    through_scores = (
        moved @ values.square()
        - 2 * value * (moved @ values)
        + value.square() * moved.sum(-1, keepdim=True)
    )
    rounding = weights_squared @ values.square() + through_scores.clamp(min=0)
    return value.abs() + rounding.sqrt()


@remembered
def expected_lse(call: Call) -> Expectation:
    """What the oracle says of the log-sum-exp [batch, q_heads, q_len] of ``call``."""
    arguments, options = in_float64(call.values())
    recorded = _Recorded()
    _, value = recorded.attention(*arguments, **{**options, "return_lse": True})
    spread = (recorded.kept_weights * (1 + recorded.kept_scores.abs())).square().sum(-1).sqrt()
    noise = 1 + torch.where(torch.isfinite(value), value.abs(), 0) + spread
    variants = [_run_on_cpu(s, call, return_lse=True)[1] for s in floor_variants(call.dtype)]
    return expect(value, variants, noise, call.dtype)


def _run_on_cpu(steps: Attention, call: Call, **more: Any) -> Any:
    arguments, options = call.values()
    on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    return steps.attention(*on_cpu, **{**options, **more})


def run(attention: Subject, call: Call) -> Tensor:
    """The output of the implementation, with its type, shape, dtype and device checked."""
    arguments, options = call.values()
    options.pop("return_lse", None)
    with failing_at(call):
        output = attention(*arguments, **options)
    q, _, v = arguments
    assert_tensor(output, (*q.shape[:3], v.shape[3]), q.dtype, q.device, call=call)
    keep(call, output)
    return output


def run_with_lse(attention: Subject, call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the implementation, both checked."""
    arguments, options = call.values()
    result = attention(*arguments, **{**options, "return_lse": True})
    call = call.then(return_lse="True")
    if not (isinstance(result, tuple) and len(result) == 2):
        raise ConformanceFailure(
            "wrong type", f"expected (output, lse), found {type(result).__name__}", call=call
        )
    q, _, v = arguments
    assert_tensor(result[0], (*q.shape[:3], v.shape[3]), q.dtype, q.device, call=call)
    assert_tensor(result[1], q.shape[:3], torch.float32, q.device, call=call, name="lse")
    return result


def assert_matches_oracle(attention: Subject, case: Any) -> None:
    """The output is within the floor of the oracle, in every lane of ``case``."""

    def check(call: Call) -> None:
        assert_close_to(run(attention, call), expected_output(call), call)

    in_every_lane(case, check, attention.device)


@remembered
def rows_without_keys(call: Call) -> Tensor:
    """Which queries see no key, bool [batch, q_heads, q_len]."""
    arguments, options = in_float64(call.values())
    return torch.isneginf(Attention().attention(*arguments, **{**options, "return_lse": True})[1])


def assert_close_where_keys_are_seen(output: Tensor, expectation: Expectation, call: Call) -> None:
    """``output`` is right in rows that see a key, and finite in all.

    What a row without a key gives is a rule of its own (``attention.empty-row``).
    """
    empty = rows_without_keys(call)[..., None].to(output.device)
    replaced = torch.where(empty & torch.isfinite(output), expectation.value.to(output), output)
    assert_close_to(replaced, expectation, call)


def assert_matches_oracle_where_keys_are_seen(attention: Subject, case: Any) -> None:
    """As :func:`assert_matches_oracle`, in the rows that see a key; the others are finite."""

    def check(call: Call) -> None:
        assert_close_where_keys_are_seen(run(attention, call), expected_output(call), call)

    in_every_lane(case, check, attention.device)


def visibility_call(call: Call) -> Call:
    """The same call with queries 0 and one-hot values: the output shows which keys are seen.

    Every visible key gets the same weight, so output element (query, j) is positive if key j is
    seen and exactly 0 if it is not, in any dtype. Queries, keys and values all get the width that
    this takes, a multiple of 8, because some kernels take only equal widths.
    """
    (q, k, v), _ = call.values()
    heads, keys = k.shape[1], k.shape[2]
    width = -(-max(keys, q.shape[3]) // 8) * 8
    return call.then(
        f"q = q.new_zeros(*q.shape[:3], {width})",
        # NaN in unused cache slots stays.
        f"k = torch.nn.functional.pad(k, (0, {width} - k.shape[3]))",
        f"v = torch.eye({keys}, {width}, dtype=v.dtype, device=v.device)"
        f".expand({v.shape[0]}, {heads}, -1, -1) + 0 * v[..., :1]",
    )


def assert_sees_exactly(attention: Subject, case: Any) -> None:
    """Every query sees exactly the keys that the reference says; no tolerance is involved."""

    def check(call: Call) -> None:
        probe = visibility_call(call)
        seen = run(attention, probe).cpu()[..., : case.kv_len]
        expected = oracle_output(probe)[..., : case.kv_len] > 0
        assert_same_keys(seen, expected, probe)

    in_every_lane(case, check, attention.device)


def assert_same_keys(seen: Tensor, expected: Tensor, call: Call) -> None:
    """``seen`` [batch, heads, q_len, kv_len] is positive exactly where ``expected`` is True.

    Rows that must see nothing are left out: what they give is a rule of its own.
    """
    if not bool(torch.isfinite(seen).all()):
        raise ConformanceFailure(
            "non-finite", "the output is not finite where every key weighs the same", call=call
        )
    wrong = ((seen > 0) != expected) & expected.any(dim=-1, keepdim=True)
    if not bool(wrong.any()):
        return
    batch, head, query, _ = wrong.nonzero()[0].tolist()
    keys_seen = (seen[batch, head, query] > 0).nonzero().flatten().tolist()
    keys_due = expected[batch, head, query].nonzero().flatten().tolist()
    raise ConformanceFailure(
        "wrong keys",
        f"query {query} of head {head} in batch row {batch} sees keys {keys_seen}; "
        f"it must see {keys_due}",
        details=(f"{int(wrong.sum())} of {expected.numel()} (query, key) pairs are wrong",),
        call=call,
    )


GRADIENT_NAMES = ("q", "k", "v", "sinks")


def gradients(
    method: Callable[..., Tensor],
    arguments: list[Tensor],
    options: dict[str, Any],
    upstream: Tensor,
) -> dict[str, Tensor | None]:
    """Gradients of ``(output * upstream).sum()`` with respect to q, k, v and the sinks if any."""
    leaves = {name: x.detach().requires_grad_() for name, x in zip(GRADIENT_NAMES, arguments)}
    if isinstance(options.get("sinks"), Tensor):
        leaves["sinks"] = options["sinks"].detach().requires_grad_()
        options = {**options, "sinks": leaves["sinks"]}
    output = method(*(leaves[name] for name in ("q", "k", "v")), **options)
    if not output.requires_grad:
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(output, list(leaves.values()), upstream, allow_unused=True)
    return dict(zip(leaves, grads))


def upstream_gradient(call: Call) -> Tensor:
    """A random gradient of the output, in the call's dtype."""
    q, _, v = call.values()[0]
    generator = torch.Generator().manual_seed(call.case.seed + 1)
    shape = (*q.shape[:3], v.shape[3])
    return torch.randn(shape, generator=generator).to(q.dtype).to(q.device)


@remembered
def expected_gradients(call: Call) -> dict[str, Expectation]:
    """What the oracle says of each gradient of ``call``."""
    arguments, options = in_float64(call.values())
    upstream = in_float64(upstream_gradient(call))
    values = gradients(Attention().attention, arguments, options, upstream)
    noise = _gradient_noise(arguments, options, upstream)
    low_arguments, low_options = call.values()
    low_arguments = [x.cpu() for x in low_arguments]
    low_options = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in low_options.items()}
    variants = [
        gradients(steps.attention, low_arguments, low_options, upstream_gradient(call).cpu())
        for steps in floor_variants(call.dtype)
    ]
    return {
        name: expect(value, [variant[name] for variant in variants], noise[name], call.dtype)
        for name, value in values.items()
    }


def _gradient_noise(
    arguments: list[Tensor], options: dict[str, Any], upstream: Tensor
) -> dict[str, Tensor]:
    """Element noise of each gradient: the rounding of the output's and the scores' gradients.

    With dP = dO Vᵀ and dS = P (dP - rowsum(dO O)), an error of one part in one in each factor adds up
    as the squares do: |dS| + P (1 + |S|) (|dO| |V|ᵀ) bounds the terms of dS before they cancel.
    """
    q, k, v = arguments
    recorded = _Recorded()
    with torch.no_grad():
        recorded.attention(q, k, v, **options)
        heads, groups = q.shape[1], k.shape[1]
        scale = recorded.score_scale(q, options.get("scale"))
        weights, values = recorded.kept_weights, recorded.kept_values
        spread = weights * (1 + recorded.kept_scores.abs())
        rough = spread * (upstream.square() @ values.square().transpose(-1, -2)).sqrt() * scale
        k_full = torch.nan_to_num(k).repeat_interleave(heads // groups, dim=1)
        q_noise = (rough.square() @ k_full.square()).sqrt()
        k_noise = (rough.square().transpose(-1, -2) @ q.square()).sqrt()
        v_noise = (spread.square().transpose(-1, -2) @ upstream.square()).sqrt()
        fold = lambda x: x.unflatten(1, (groups, -1)).square().sum(2).sqrt()
        noise = {"q": q_noise, "k": fold(k_noise), "v": fold(v_noise)}
        if "sinks" in options:
            out = recorded.combine(weights, values)
            terms = (out * upstream).square().sum(-1).sqrt()
            noise["sinks"] = terms.square().sum((0, 2)).sqrt()
        return noise


def assert_gradients_match(attention: Subject, case: Any) -> None:
    """Every gradient is within the floor of the oracle's, in every lane of ``case``."""

    def check(call: Call) -> None:
        actual = run_gradients(attention, call)
        for name, expectation in expected_gradients(call).items():
            assert_close_to(actual[name], expectation, call, name=f"gradient of {name}")

    in_every_lane(case, check, attention.device)


def run_gradients(attention: Subject, call: Call) -> dict[str, Tensor]:
    """Gradients from the implementation; a missing one is a failure."""
    arguments, options = call.values()
    upstream = upstream_gradient(call)
    found = gradients(attention, arguments, options, upstream)
    names = {name: name for name in found}
    keep(call, upstream, gradients=names, upstream_seed=call.case.seed + 1)
    for name, gradient in found.items():
        if gradient is None:
            raise ConformanceFailure(
                "no gradient", f"no gradient reaches {name}", call=call, lane=dtype_name(call.dtype)
            )
    return found


def assert_lse_matches(attention: Subject, case: Any) -> None:
    """The log-sum-exp is within the floor of the oracle's, in every lane of ``case``."""

    def check(call: Call) -> None:
        _, lse = run_with_lse(attention, call)
        assert_close_to(lse, expected_lse(call), call.then(return_lse="True"), name="lse")

    in_every_lane(case, check, attention.device)


def merged_halves(attention: Subject, call: Call, first_keys: int) -> Tensor:
    """Attention over the first keys and over the rest, merged by their log-sum-exps."""
    (q, k, v), options = call.values()
    parts = []
    for keys in (slice(0, first_keys), slice(first_keys, None)):
        mask = options["mask"][..., keys]
        parts += attention(q, k[:, :, keys], v[:, :, keys], mask=mask, return_lse=True)
    return merge_attention(*parts)[0]
