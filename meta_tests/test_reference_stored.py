"""What loaders share: whether all that was read is finite, in every dtype that a file can hold."""

from __future__ import annotations

import pytest
import torch

from reference_impl.stored import all_finite

FLOATING = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
NOT_FINITE = [
    (dtype, value)
    for dtype in FLOATING
    for value in (float("nan"), float("inf"), -float("inf"))
    if value != value or dtype != torch.float8_e4m3fn  # which has no infinity
]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_finite_values_are_finite(dtype):
    assert all_finite(torch.linspace(-50, 50, 24).reshape(4, 6).to(dtype))


@pytest.mark.parametrize(("dtype", "value"), NOT_FINITE, ids=str)
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (3, 5)], ids=str)
def test_one_value_is_enough(dtype, value, place):
    values = torch.linspace(-50, 50, 24).reshape(4, 6)
    values[place] = value
    assert not all_finite(values.to(dtype))


def test_nothing_and_integers_are_finite():
    assert all_finite(torch.empty(0, 3))
    assert all_finite(torch.tensor([2**62, -1]))
    assert all_finite(torch.tensor([True, False]))
