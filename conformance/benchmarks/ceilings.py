"""What a machine can do at most, measured: a matrix product and a device copy, and a launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from conformance.benchmarks.clock import Clock

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices of the product."""

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes that are copied: many times the caches."""

LAUNCHES = {"cuda": 9, "cpu": 7}
"""Timed, after as many for warming up; the median counts."""

SMALL_LAUNCHES = 500
"""Additions to one number, of which the host's time is taken."""


@dataclass(frozen=True)
class Ceilings:
    """Of one machine at one time."""

    product: dict[str, float]
    """Operations in a second of a product of square matrices, by dtype."""
    copy: float
    """Bytes in a second of a copy, those read and those written."""
    launch: float
    """Seconds of the host for one small launch."""

    def as_json(self) -> dict:
        """The fields by name."""
        return asdict(self)


def measure_ceilings(device: str, clock: Clock, dtypes: Sequence[str]) -> Ceilings:
    """Products of random matrices in these dtypes, a copy, and small launches."""
    kind = device.partition(":")[0]
    product = {dtype: product_speed(device, clock, dtype, PRODUCT_SIZE[kind]) for dtype in dtypes}
    copy = copy_speed(device, clock, COPIED_BYTES[kind])
    return Ceilings(product, copy, launch_time(device))


def product_speed(device: str, clock: Clock, dtype: str, size: int) -> float:
    """Operations in a second, 2·size³ of them a product."""
    left, right = (_random((size, size), device, seed, dtype) for seed in (0, 1))
    out = torch.empty_like(left)
    seconds = _median(clock, lambda: torch.mm(left, right, out=out), device)
    return 2 * size**3 / seconds


def copy_speed(device: str, clock: Clock, size: int) -> float:
    """Bytes in a second, ``size`` read and as many written."""
    source = _random((size // 4,), device, 2, "float32")
    target = torch.empty_like(source)
    return 2 * size / _median(clock, lambda: target.copy_(source), device)


def launch_time(device: str) -> float:
    """Seconds of the host for an addition to one number, the device keeping up."""
    number = torch.zeros((), device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(3):
        wait()
        begin = time.perf_counter()
        for _ in range(SMALL_LAUNCHES):
            number.add_(1)
        wait()
        times.append((time.perf_counter() - begin) / SMALL_LAUNCHES)
    return min(times)


def _random(shape: tuple[int, ...], device: str, seed: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=getattr(torch, dtype))


def _median(clock: Clock, launch, device: str) -> float:
    number = LAUNCHES[device.partition(":")[0]]
    clock.seconds([launch] * number)
    return statistics.median(clock.seconds([launch] * number))
