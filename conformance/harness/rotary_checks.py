"""The oracle of rotary embedding, its rounding floor, and the assertions of its requirements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, in_float64
from conformance.harness.compare import (
    assert_close_to,
    assert_different,
    assert_identical,
    assert_tensor,
)
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import EXACT, dtypes_of, in_every_lane
from conformance.harness.memo import remembered
from conformance.harness.requirement import current_tally
from conformance.harness.rotary_cases import RotaryCase
from conformance.harness.shown import earlier_calls_shown, keep
from conformance.harness.subject import Subject
from conformance.harness.tolerance import STEP_ERROR, Expectation, expect
from reference_impl.rotary import Rotary, default_frequencies, join_pairs, split_pairs

FLOAT32_ROUNDING = 2.0**-24


class _Recorded(Rotary):
    """The reference, keeping what the noise estimate needs."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        frequencies, factor = super().frequencies(rotary_dim, theta, layout, scaling, length)
        # A rule that mixes fast and slow frequencies rounds at the size of the fast one.
        size = frequencies
        if layout != "half-truncated":
            size = torch.maximum(frequencies, default_frequencies(rotary_dim, theta))
        # theta ** exponent in float32 is off by the rounding of its exponent, times ln theta; three
        # more roundings are the power itself, the reciprocal and the product with the position.
        roundings = 3 + size.clamp(min=1e-30).log().abs()
        self.frequency_error = FLOAT32_ROUNDING * size * roundings
        return frequencies, factor

    def tables(self, x, positions, frequencies_P, attention_factor):
        self.kept_tables = super().tables(x, positions, frequencies_P, attention_factor)
        self.angle_error = (positions[..., None] * self.frequency_error)[:, None]
        return self.kept_tables

    def rotate(self, x_BHTR, cos, sin, layout):
        self.kept_layout = layout
        self.kept_width = x_BHTR.shape[-1]
        return super().rotate(x_BHTR, cos, sin, layout)


@dataclass
class _Rounded(Rotary):
    """Rotation with tables rounded to ``dtype``, as transformers does, and every product too.

    The angles are in float32. With ``products`` False only the tables are rounded.
    """

    dtype: torch.dtype
    products: bool = True

    def tables(self, x, positions, frequencies_P, attention_factor):
        cos, sin = super().tables(x, positions, frequencies_P, attention_factor)
        return cos.to(self.dtype), sin.to(self.dtype)

    def angles(self, x, positions, frequencies_P):
        return (positions.float()[..., None] * frequencies_P.float()).double()

    def rotate(self, x_BHTR, cos, sin, layout):
        if self.products:
            return super().rotate(x_BHTR, cos, sin, layout)
        return super().rotate(x_BHTR, cos.float(), sin.float(), layout)


def floor_variants(dtype: torch.dtype) -> list[Rotary]:
    """Correct ways to rotate in ``dtype`` that differ in where they round."""
    if dtype == torch.float64:
        return []
    return (
        [_Rounded(dtype)] if dtype == torch.float32 else [_Rounded(dtype), _Rounded(dtype, False)]
    )


def rotation_noise(x: Tensor, positions: Tensor, options: Mapping[str, Any], dtype: torch.dtype):
    """The rotated float64 ``x`` and its noise, both [batch, heads, tokens, head_dim].

    The noise is that of :func:`~conformance.harness.tolerance.expect`: each product may be off by a
    step of ``dtype``, and the angle by what its computation in float32 makes of it, which moves a
    channel by the error times the other channel of its pair. Channels that pass through have none.
    """
    recorded = _Recorded()
    value = recorded.rotary(x, positions, **options)
    if options.get("layers") is not None and options["layers"][options["layer_type"]] is None:
        return value, torch.zeros_like(value)
    layout, width = recorded.kept_layout, recorded.kept_width
    first, second = (channel.abs() for channel in split_pairs(x[..., :width], layout))
    cos, sin = (table.abs() for table in recorded.kept_tables)
    turned = first * cos + second * sin, second * cos + first * sin
    products = join_pairs(*turned, layout)
    written = "half" if layout == "interleaved-to-half" else layout
    partner_first, partner_second = (c.abs() for c in split_pairs(value[..., :width], written))
    moved = join_pairs(
        recorded.angle_error * partner_second, recorded.angle_error * partner_first, layout
    )
    noise = torch.zeros_like(value)
    noise[..., :width] = products + moved / STEP_ERROR[dtype]
    return value, noise


@remembered
def expected_output(call: Call) -> Expectation:
    """What the oracle says of the output [batch, heads, tokens, head_dim] of ``call``."""
    (x, positions), options = in_float64(call.values())
    value, noise = rotation_noise(x, positions, options, call.dtype)
    variants = [_run_on_cpu(steps, call) for steps in floor_variants(call.dtype)]
    return expect(value, variants, noise, call.dtype)


def _run_on_cpu(steps: Rotary, call: Call) -> Tensor:
    (x, positions), options = call.values()
    return steps.rotary(x.cpu(), positions.cpu(), **options)


def run(rotary: Callable[..., Tensor], call: Call) -> Tensor:
    """The output of the implementation, with its type, shape, dtype and device checked."""
    (x, positions), options = call.values()
    with failing_at(call):
        output = rotary(x, positions, **options)
    assert_tensor(output, x.shape, x.dtype, x.device, call=call)
    keep(call, output)
    return output


def assert_matches_oracle(rotary: Subject, case: RotaryCase) -> None:
    """The output is within the floor of the oracle, in every lane of ``case``."""
    assert_calls_match(rotary, case, lambda call: call)


def assert_calls_match(rotary: Subject, case: RotaryCase, change: Callable[[Call], Call]) -> None:
    """As :func:`assert_matches_oracle`, for the call that ``change`` makes of the case's."""

    def check(call: Call) -> None:
        call = change(call)
        assert_close_to(run(rotary, call), expected_output(call), call)

    in_every_lane(case, check, rotary.device)


def width_rotated(case: RotaryCase) -> int:
    """How many channels are rotated."""
    return case.rotary_dim or case.head_dim


def partner_channels(case: RotaryCase) -> list[list[int]]:
    """For each channel, the channels that a one in it may reach."""
    width = width_rotated(case)
    first, second = split_pairs(torch.arange(width), case.layout)
    written = torch.arange(width)
    if case.layout == "interleaved-to-half":
        written_first, written_second = split_pairs(written, "half")
    else:
        written_first, written_second = first, second
    reached = [[channel] for channel in range(case.head_dim)]
    for a, b, *to in zip(*(t.tolist() for t in (first, second, written_first, written_second))):
        reached[a] = reached[b] = to
    return reached


def assert_pairs_exactly(rotary: Subject, case: RotaryCase) -> None:
    """A one in a channel reaches the two channels of its pair and no other; exact in any dtype."""
    reached = partner_channels(case)
    width = case.head_dim

    def check(call: Call) -> None:
        x = call.values()[0][0]
        probe = call.then(
            f"x = torch.eye({width}, dtype=x.dtype, device=x.device)"
            f"[torch.arange({x[..., 0].numel()}) % {width}].view({tuple(x.shape)})"
        )
        output = run(rotary, probe).detach().cpu()
        current_tally().comparisons[EXACT] += 1
        channels = (torch.arange(x[..., 0].numel()) % width).view(x.shape[:3])
        allowed = torch.zeros(width, width, dtype=torch.bool)
        for channel, to in enumerate(reached):
            allowed[channel, to] = True
        stray = (output != 0) & ~allowed[channels]
        if not bool(stray.any()):
            return
        batch, head, token, _ = stray.nonzero()[0].tolist()
        channel = int(channels[batch, head, token])
        found = (output[batch, head, token] != 0).nonzero().flatten().tolist()
        raise ConformanceFailure(
            "wrong pair",
            f"a one in channel {channel} of {width} reaches channels {found}; "
            f"it must reach {reached[channel]} only",
            call=probe,
            shown_by=f"print(out[{batch}, {head}, {token}])",
        )

    in_every_lane(case, check, rotary.device)


def assert_passes_through(rotary: Subject, case: RotaryCase) -> None:
    """The channels from ``rotary_dim`` on are bit-identical to the input."""

    def check(call: Call) -> None:
        output, x = run(rotary, call), call.values()[0][0]
        first = width_rotated(case)
        assert_identical(
            output[..., first:],
            x[..., first:],
            call,
            because=f"channels from {first} on are not rotated",
        )

    in_every_lane(case, check, rotary.device)


def assert_neighbours_differ(rotary: Subject, case: RotaryCase) -> None:
    """The same vector at neighbouring positions comes out different."""

    def check(call: Call) -> None:
        probe = call.then("x = x[:, :, :1].repeat(1, 1, x.shape[2], 1)")
        output, positions = run(rotary, probe), probe.values()[0][1]
        for token in range(output.shape[2] - 1):
            assert_different(
                output[:, :, token],
                output[:, :, token + 1],
                probe,
                because=f"positions {positions[:, token].tolist()} and the next are rotated alike",
            )
        assert_close_to(output, expected_output(probe), probe)

    in_every_lane(case, check, rotary.device)


def assert_same_output(
    rotary: Subject,
    case: RotaryCase,
    change: Callable[[Call], Call],
    *,
    because: str,
    part: Callable[[Tensor], Tensor] = lambda output: output,
) -> None:
    """What ``change`` does to the call does not matter: ``part`` of the output is bit-identical."""

    def check(call: Call) -> None:
        changed = change(call)
        assert_identical(
            part(run(rotary, changed)), part(run(rotary, call)), changed, because=because
        )

    in_every_lane(case, check, rotary.device)


def assert_other_output(
    rotary: Subject, case: RotaryCase, change: Callable[[Call], Call], *, because: str
) -> None:
    """What ``change`` does to the call matters: the output differs."""

    def check(call: Call) -> None:
        changed = change(call)
        assert_different(run(rotary, changed), run(rotary, call), changed, because=because)

    in_every_lane(case, check, rotary.device)


def assert_stateless(rotary: Subject, case: RotaryCase) -> None:
    """Calls of different lengths one after another do not change each other's result."""
    trained = dict(case.scaling)["original_max_position_embeddings"]

    def check(call: Call) -> None:
        short = call.then(f"positions = positions % {trained}")
        longest = call.then(f"positions = positions * 2 + {trained}")
        seen: dict[Call, Tensor] = {}
        for name, step in (
            ("a short", short),
            ("a long", longest),
            ("a short", short),
            ("a medium", call),
            ("a long", longest),
        ):
            output = run(rotary, step)
            with earlier_calls_shown(longest):
                assert_close_to(output, expected_output(step), step)
            if step in seen:
                because = f"{name} call is repeated after one of another length"
                assert_identical(output, seen[step], step, because=because)
            seen[step] = output

    in_every_lane(case, check, rotary.device)


def assert_norms_preserved(rotary: Subject, case: RotaryCase) -> None:
    """The length of each pair of channels [batch, heads, tokens, pairs] is what it was."""

    def check(call: Call) -> None:
        output = run(rotary, call)
        assert_close_to(pair_norms(case, output), expected_norms(call), call, name="pair norms")

    in_every_lane(case, check, rotary.device)


def pair_norms(case: RotaryCase, output: Tensor) -> Tensor:
    """Lengths of the rotated pairs of an output."""
    written = "half" if case.layout == "interleaved-to-half" else case.layout
    first, second = split_pairs(output[..., : width_rotated(case)].detach().double(), written)
    return torch.hypot(first, second)


@remembered
def expected_norms(call: Call) -> Expectation:
    """The lengths of the pairs of the input."""
    x, case = in_float64(call.values())[0][0], call.case
    first, second = split_pairs(x[..., : width_rotated(case)], case.layout)
    value = torch.hypot(first, second)
    variants = [pair_norms(case, _run_on_cpu(s, call)) for s in floor_variants(call.dtype)]
    return expect(value, variants, first.abs() + second.abs(), call.dtype)


def assert_scores_relative(rotary: Subject, case: RotaryCase, shift: int) -> None:
    """Scores of rotated queries and keys are the same when all positions are ``shift`` more."""

    def check(call: Call) -> None:
        outputs = []
        for moved in (query_call(call, shift), key_call(call, shift)):
            outputs.append(run(rotary, moved).detach().cpu())
        scores = scores_of(*outputs)
        assert_close_to(scores, expected_scores(call, shift), key_call(call, shift), name="scores")

    in_every_lane(case, check, rotary.device)


def query_call(call: Call, shift: int) -> Call:
    """The call that rotates queries: at the shifted positions."""
    return call.then(f"positions = positions + {shift}")


def key_call(call: Call, shift: int) -> Call:
    """The call that rotates keys: other numbers, at the shifted positions in reverse order."""
    return call.then("x = x.flip(1, 3) * 0.75", f"positions = positions.flip(1) + {shift}")


@remembered
def expected_scores(call: Call, shift: int) -> Expectation:
    """Scores [batch, heads, tokens, tokens] before the shift, and the noise after it."""
    unshifted = [
        rotation_noise(*arguments, options, call.dtype)[0]
        for arguments, options in (
            in_float64(call.values()),
            in_float64(key_call(call, 0).values()),
        )
    ]
    (q, q_noise), (k, k_noise) = (
        rotation_noise(*arguments, options, call.dtype)
        for arguments, options in (
            in_float64(query_call(call, shift).values()),
            in_float64(key_call(call, shift).values()),
        )
    )
    value = scores_of(*unshifted)
    over_keys = q_noise.square() @ k.square().transpose(-1, -2)
    over_queries = q.square() @ k_noise.square().transpose(-1, -2)
    # Rounded tables make errors that the channels of a pair and all heads share.
    variants = [
        scores_of(
            _run_on_cpu(steps, query_call(call, shift)), _run_on_cpu(steps, key_call(call, shift))
        )
        for steps in floor_variants(call.dtype)
    ]
    return expect(value, variants, (over_keys + over_queries).sqrt(), call.dtype)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """Dot products [batch, heads, queries, keys] in float64."""
    return q.double() @ k.double().transpose(-1, -2)


def assert_composes(rotary: Subject, case: RotaryCase) -> None:
    """Rotating by one position and then by another is rotating by their sum (in float32)."""
    call = case.call(torch.float32, rotary.device)
    at_both = call.then("positions = positions + positions.flip(1)")
    once = run(rotary, call)
    (_, positions), options = call.values()
    with failing_at(call):
        twice = rotary(once, positions.flip(1), **options)
    assert_tensor(twice, once.shape, once.dtype, once.device, call=call)
    (x, both), options = in_float64(at_both.values())
    value, noise = rotation_noise(x, both, options, call.dtype)
    assert_close_to(twice, expect(value, [], 2 * noise, call.dtype), at_both)


def upstream_gradient(call: Call) -> Tensor:
    """A random gradient of the output, in the call's dtype."""
    x = call.values()[0][0]
    generator = torch.Generator().manual_seed(call.case.seed + 1)
    return torch.randn(x.shape, generator=generator).to(x.dtype).to(x.device)


def gradient(
    rotary: Callable[..., Tensor],
    x: Tensor,
    positions: Tensor,
    options: Mapping[str, Any],
    upstream: Tensor,
) -> Tensor | None:
    """The gradient of ``(output * upstream).sum()`` with respect to ``x``; None if it has none."""
    leaf = x.detach().requires_grad_()
    output = rotary(leaf, positions, **options)
    if not output.requires_grad:
        return None
    return torch.autograd.grad(output, leaf, upstream, allow_unused=True)[0]


@remembered
def expected_gradient(call: Call) -> Expectation:
    """What the oracle says of the gradient [batch, heads, tokens, head_dim]."""
    (x, positions), options = in_float64(call.values())
    upstream = in_float64(upstream_gradient(call))
    value = gradient(Rotary().rotary, x, positions, options, upstream)
    # The adjoint rotates the other way; its noise is that of the gradient as an input, in pairs of
    # channels where the output has them.
    layout = options.get("layout", "half")
    recorded = _Recorded()
    recorded.rotary(x, positions, **options)
    width = recorded.kept_width
    written = "half" if layout == "interleaved-to-half" else layout
    first, second = (g.abs() for g in split_pairs(upstream[..., :width], written))
    cos, sin = (table.abs() for table in recorded.kept_tables)
    error = recorded.angle_error / STEP_ERROR[call.dtype]
    grad_first, grad_second = (g.abs() for g in split_pairs(value[..., :width], layout))
    pairs = (
        first * cos + second * sin + error * grad_second,
        second * cos + first * sin + error * grad_first,
    )
    read = "interleaved" if layout == "interleaved-to-half" else layout
    noise = torch.zeros_like(value)
    noise[..., :width] = join_pairs(*pairs, read)
    (x, positions), options = call.values()
    variants = [
        gradient(steps.rotary, x.cpu(), positions.cpu(), options, upstream_gradient(call).cpu())
        for steps in floor_variants(call.dtype)
    ]
    return expect(value, variants, noise, call.dtype)


def assert_gradient_matches(rotary: Subject, case: RotaryCase) -> None:
    """The gradient is within the floor of the oracle's, in every lane of ``case``."""

    def check(call: Call) -> None:
        (x, positions), options = call.values()
        with failing_at(call):
            upstream = upstream_gradient(call)
            found = gradient(rotary, x, positions, options, upstream)
            keep(call, upstream, gradients={"x": "x"}, upstream_seed=call.case.seed + 1)
        if found is None:
            raise ConformanceFailure("no gradient", "no gradient reaches x", call=call)
        assert_close_to(found, expected_gradient(call), call, name="gradient of x")

    in_every_lane(case, check, rotary.device)


def assert_not_rotated(rotary: Subject, case: RotaryCase) -> None:
    """A layer of the type ``none`` returns its input bit by bit; the very tensor will do."""
    rotary = rotary.may_return_input()
    for dtype in dtypes_of(case):
        call = case.call(dtype, rotary.device).then(layer_type="'none'")
        because = "a layer without rotation changes nothing"
        assert_identical(run(rotary, call), call.values()[0][0], call, because=because)


def assert_tables_belong_to_types(rotary: Subject, case: RotaryCase) -> None:
    """With two tables exchanged, a layer does what one of the other type did; they differ."""
    tables = dict(case.layers)
    swapped = {**tables, "local": tables["global"], "global": tables["local"]}
    exchanged = replace(case, layers=tuple(swapped.items()))
    other = {"local": "global", "global": "local"}[case.layer_type]

    def check(call: Call) -> None:
        options = exchanged.options()
        after = call.then(layers=options["layers"], layer_type=repr(other))
        because = f"{other!r} has the table that {case.layer_type!r} had"
        output = run(rotary, call)
        assert_identical(run(rotary, after), output, after, because=because)
        because = f"{other!r} layers turn as {case.layer_type!r} layers do"
        assert_different(
            run(rotary, call.then(layer_type=repr(other))), output, call, because=because
        )

    in_every_lane(case, check, rotary.device)


def assert_deterministic(rotary: Subject, case: RotaryCase, between: str) -> None:
    """The same call before and after another, which the line ``between`` makes, is identical."""

    def check(call: Call) -> None:
        first = run(rotary, call).clone()
        run(rotary, call.then(between))
        assert_identical(run(rotary, call), first, call, because="the same call is repeated")

    in_every_lane(case, check, rotary.device)


def assert_heads_commute(rotary: Subject, case: RotaryCase) -> None:
    """The output of heads in reverse order is the expected output in reverse order."""

    def check(call: Call) -> None:
        flipped = call.then("x = x.flip(1)")
        output = run(rotary, flipped).flip(1)
        assert_close_to(output, expected_output(call), flipped)

    in_every_lane(case, check, rotary.device)


def assert_identity_at_zero(rotary: Subject, case: RotaryCase) -> None:
    """At position 0 every channel is what it was, bit by bit."""

    def check(call: Call) -> None:
        zero = call.then("positions = positions * 0")
        x = zero.values()[0][0]
        assert_identical(run(rotary, zero), x, zero, because="position 0 does not turn")

    in_every_lane(case, check, rotary.device)
