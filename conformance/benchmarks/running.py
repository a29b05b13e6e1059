"""A workload on an implementation, ready to be timed, with outputs held against an oracle."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conformance.benchmarks.workload import Workload, bytes_of

RING_OVER_CACHE = 4
"""Bytes of the ring's inputs over those of the L2 cache: what is read was evicted since."""

LARGEST_RING = 64
"""Inputs in a ring, at most."""

STRIDE = 1009
"""Seeds that belong to one seed of a user: those of the ring and of fresh inputs."""


class Running:
    """A workload bound to a method on a device: a ring of inputs, and launches that go around it.

    ``seed`` decides every input. ``ring`` is the number of inputs; by default as many as fill four
    times the L2 cache, two at least, so that no answer can be that of the call before.
    """

    def __init__(
        self,
        workload: Workload,
        method: Callable,
        device: str,
        *,
        seed: int,
        ring: int | None = None,
    ) -> None:
        self.workload, self.method, self.device = workload, method, device
        forget_compiled()
        self._next_seed = seed * STRIDE
        first = workload.inputs(device, self._seed())
        number = ring or ring_size(bytes_of(first), cache_bytes(device))
        self.ring = [first, *(workload.inputs(device, self._seed()) for _ in range(number - 1))]
        self.calls = [workload.bind(method, inputs) for inputs in self.ring]
        self.last: tuple[int, Any] | None = None
        """Place in the ring and output of the last launch."""

    def _seed(self) -> int:
        self._next_seed += 1
        return self._next_seed

    def launch(self, turn: int) -> Any:
        """Enqueue one call on the ring's inputs ``turn``; its output."""
        place = turn % len(self.calls)
        output = self.calls[place]()
        self.last = (place, output)
        return output

    def check(self) -> None:
        """Raise WrongOutput unless the last launch, fresh inputs and refilled inputs come out right.

        Refilled inputs are other numbers in the same tensors: an answer that was kept, by whatever
        it is kept, is that of other inputs.
        """
        if self.last is not None:
            place, output = self.last
            self.workload.check(output, self.ring[place])
            self.last = None
        inputs = self.workload.inputs(self.device, self._seed())
        call = self.workload.bind(self.method, inputs)
        output = call()
        self.workload.check(output, inputs)
        before = copied(output)
        self.workload.refill(inputs, self._seed())
        output = call()
        if same(before, output):
            raise self.workload.wrong("other inputs in the same tensors gave the same output")
        self.workload.check(output, inputs)

    def close(self) -> None:
        """Let go of inputs, outputs, and what was compiled."""
        self.ring, self.calls, self.last = [], [], None
        forget_compiled()
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def forget_compiled() -> None:
    """Forget what torch compiled: it does so for a few shapes of a function, and then no more."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def copied(output: Any) -> Any:
    """The tensors of an output, with memory of their own."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    return tuple(map(copied, output)) if isinstance(output, tuple) else output


def same(before: Any, after: Any) -> bool:
    """Whether every tensor of two outputs is the same, bit for bit."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before is after


def ring_size(bytes_of_inputs: int, cache: int) -> int:
    """How many inputs make a ring: 2 at least, and LARGEST_RING at most."""
    return min(LARGEST_RING, max(2, -(-RING_OVER_CACHE * cache // max(1, bytes_of_inputs))))


def cache_bytes(device: str) -> int:
    """Bytes of the L2 cache of a device; of the CPU, those of one core's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    return cpu_cache_bytes()


def cpu_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of a core's L2 cache as Linux tells it; 2 MiB where it does not."""
    for index in sorted(folder.glob("index*")):
        try:
            if (index / "level").read_text().strip() == "2":
                return int((index / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return 2 << 20
