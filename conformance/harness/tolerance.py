"""How far an output may be from the oracle, and four statistics of how far it is.

The limit of a case is measured on that case: several correct ways to compute it in the same dtype
(:mod:`conformance.harness.floors`) give a floor for every statistic, and so does the rounding noise
that the conditioning of the problem predicts. Pooling both keeps a lucky variant of a tiny case from
making an unfair limit. docs/tolerances.md records how the factors were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

# The relative error of one elementary step. For the 16-bit dtypes one rounding to nearest; for
# float32 sixteen roundings, because correct kernels use exponentials of up to 20 ulp (torch's flash
# kernel for the CPU has exp_u20) and sum in any order.
STEP_ERROR = {
    torch.float64: 2.0**-48,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


@dataclass(frozen=True)
class ErrorStatistics:
    """Four views of one error; any of them can exceed its limit."""

    largest: float
    """Largest absolute error of an element."""
    root_mean_square: float
    """Over all elements."""
    worst_row: float
    """Largest root mean square over a row (the last axis)."""
    gain: float
    """Largest systematic gain of a head (axis 1), |<out, expected> / <expected, expected> - 1|."""

    def exceeds(self, limits: ErrorStatistics) -> list[str]:
        """Names of the statistics that are over their limits; NaN is over every limit."""
        pairs = zip(_NAMES, astuple(self), astuple(limits))
        return [name for name, error, limit in pairs if not error <= limit]

    def ratio(self, limits: ErrorStatistics) -> float:
        """The largest statistic as a share of its limit; 0 where both are 0."""
        pairs = zip(astuple(self), astuple(limits))
        return max(
            error / limit if limit else float(error > 0) * torch.inf for error, limit in pairs
        )

    def worst(self, limits: ErrorStatistics) -> str:
        """The statistic that is the farthest over its limit, in words."""
        triples = zip(_NAMES, astuple(self), astuple(limits))
        name, error, limit = max(triples, key=lambda t: t[1] / t[2] if t[2] else torch.inf)
        return f"{name.replace('_', ' ')} error {error:.3g}, the limit is {limit:.3g}"

    def table(self, limits: ErrorStatistics) -> tuple[str, ...]:
        """Lines that hold the statistics against their limits."""
        over = self.exceeds(limits)
        rows = [f"{'statistic':<18}{'error':>12}{'limit':>12}"]
        for name, error, limit in zip(_NAMES, astuple(self), astuple(limits)):
            verdict = "  over" if name in over else ""
            rows.append(f"{name.replace('_', ' '):<18}{error:>12.3g}{limit:>12.3g}{verdict}")
        return tuple(rows)


_NAMES = tuple(ErrorStatistics.__dataclass_fields__)

# Limit = the larger of POOLED x (worst of the correct variants) and NOISE x (predicted noise).
POOLED = ErrorStatistics(largest=2, root_mean_square=2, worst_row=3, gain=4)
NOISE = ErrorStatistics(largest=4, root_mean_square=1.5, worst_row=3, gain=4)

ILL_CONDITIONED = 0.2
"""A case whose floor is over this share of its signal (root mean square) proves nothing."""


@dataclass(frozen=True)
class Expectation:
    """What the oracle says of one output, and how far a correct output may be from it."""

    value: Tensor
    """float64, on the CPU."""
    limits: ErrorStatistics
    ill_conditioned: bool
    floor: ErrorStatistics
    """The larger of the worst correct variant and the predicted noise: limits before the factors."""

    def widened(self, factor: float) -> Expectation:
        """The same value with limits for a computation of that many more rounding steps."""
        widen = lambda each: ErrorStatistics(*(factor * one for one in astuple(each)))
        return replace(self, limits=widen(self.limits), floor=widen(self.floor))

    def allowing(self, relative: float) -> Expectation:
        """The same value with limits raised by a share of its root mean square."""
        scale = float(torch.where(torch.isfinite(self.value), self.value, 0).square().mean().sqrt())
        share = (relative * scale, relative * scale, relative * scale, relative)
        raised = lambda each: ErrorStatistics(
            *(one + more for one, more in zip(astuple(each), share))
        )
        return replace(self, limits=raised(self.limits), floor=raised(self.floor))


def measure(actual: Tensor, expected: Tensor) -> ErrorStatistics:
    """Statistics of ``actual - expected``; positions where the oracle is infinite are left out."""
    finite = torch.isfinite(expected)
    expected = torch.where(finite, expected, 0)
    error = torch.where(finite, actual.detach().to("cpu", torch.float64) - expected, 0)
    return _statistics(error, expected, systematic=True)


def expect(
    value: Tensor, variants: Sequence[Tensor], noise: Tensor, dtype: torch.dtype
) -> Expectation:
    """The expectation from the oracle's value, correct variants in ``dtype``, and relative noise.

    ``noise`` has the shape of ``value``: the error of an element when every step of its computation
    is off by one part in one.
    """
    finite = torch.isfinite(value)
    clean = torch.where(finite, value, 0)
    predicted = _statistics(
        STEP_ERROR[dtype] * torch.where(finite, noise, 0), clean, systematic=False
    )
    floors = [measure(variant, value) for variant in variants]
    ones = ErrorStatistics(1, 1, 1, 1)
    floor = _pooled(predicted, floors, ones, ones)
    signal = float(clean.square().mean().sqrt()) if clean.numel() else 0.0
    return Expectation(
        value,
        limits=_pooled(predicted, floors, NOISE, POOLED),
        ill_conditioned=floor.root_mean_square > ILL_CONDITIONED * signal > 0,
        floor=floor,
    )


def _pooled(
    predicted: ErrorStatistics,
    floors: Sequence[ErrorStatistics],
    of_noise: ErrorStatistics,
    of_floor: ErrorStatistics,
) -> ErrorStatistics:
    """Statistic by statistic the largest of the predicted noise and the floors, times factors."""
    return ErrorStatistics(
        *(
            max(noise_factor * noise, *(pooled_factor * getattr(f, name) for f in floors), 0.0)
            for name, noise, noise_factor, pooled_factor in zip(
                _NAMES, astuple(predicted), astuple(of_noise), astuple(of_floor)
            )
        )
    )


def _statistics(error: Tensor, expected: Tensor, *, systematic: bool) -> ErrorStatistics:
    if not error.numel():
        return ErrorStatistics(0.0, 0.0, 0.0, 0.0)
    heads = (error.movedim(1, 0) if error.ndim > 2 else error[None]).flatten(1)
    signal = (expected.movedim(1, 0) if error.ndim > 2 else expected[None]).flatten(1)
    energy = signal.square().sum(-1)
    if systematic:
        projected = (heads * signal).sum(-1).abs()
    else:  # independent errors add up as their squares do
        projected = (heads * signal).square().sum(-1).sqrt()
    gain = torch.where(energy > 0, projected / torch.where(energy > 0, energy, 1), 0)
    return ErrorStatistics(
        largest=float(error.abs().max()),
        root_mean_square=float(error.square().mean().sqrt()),
        worst_row=float(error.square().mean(-1).sqrt().max()),
        gain=float(gain.max()),
    )
