"""What is measured: a call of a contract with random inputs, what it costs at least, what is right.

A workload knows nothing of time or of implementations. Which there are for a device:
:func:`workloads`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from conformance.harness.failures import Declined
from conformance.harness.resolve import close
from conformance.harness.subject import accepted_options

Inputs = dict[str, Tensor]
"""The tensors of a call by name."""

ROUNDING = {torch.float32: 2.0**-13, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
"""How large the error of a row may be, relative to the oracle's: eight roundings of 16-bit dtypes.

Kernels round several times on the way (weights of the softmax, activations between two products), so
one rounding would refuse right kernels. In bfloat16, at the shapes for a GPU, torch's attention was
seen to be off by 0.003 in its worst row, its gradients by 0.015, and grouped experts by 0.005; a row
that is missing, or another's, is off by about 1.
"""


class WrongOutput(Exception):
    """A timed call does not compute what it must; one line that says which and how wrong."""


class NoSuchWorkload(ValueError):
    """No workload has such a name; one line."""


class NotOffered(Exception):
    """An implementation does not have the contract of a workload; one line."""


@dataclass(frozen=True)
class Work:
    """What a call has to do at least, from the shape alone."""

    flops: int
    """Floating-point operations; a multiplication and an addition are two."""
    bytes: int
    """Compulsory traffic: every input read once, every output written once."""


class Workload(ABC):
    """One call of one contract on inputs of one shape and dtype; a frozen dataclass below this."""

    contract: ClassVar[str]
    """The method of an adapter that is called."""
    refilled: ClassVar[tuple[str, ...]]
    """The inputs, where there are any, that change from call to call: all but what is bound once."""
    dtype: str
    """Of the floating inputs, by torch's name for it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A stable id: letters, digits, dots and hyphens."""

    @abstractmethod
    def inputs(self, device: str, seed: int) -> Inputs:
        """Random inputs; the same for the same seed and kind of device."""

    @abstractmethod
    def bind(self, method: Callable, inputs: Inputs) -> Callable[[], Any]:
        """One call of ``method`` on these tensors, backward included where the workload says so.

        What can be done once and for all (building a module) is done here. Raises Declined where the
        method lacks an option that the workload needs. The tensors may be refilled between calls.
        """

    @abstractmethod
    def work(self) -> Work:
        """Operations and bytes of one call."""

    @abstractmethod
    def check(self, output: Any, inputs: Inputs) -> None:
        """Raise :class:`WrongOutput` unless ``output`` is right for ``inputs``, by a float64 oracle."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    def refill(self, inputs: Inputs, seed: int) -> None:
        """Put other random numbers into the same tensors."""
        device = next(iter(inputs.values())).device.type
        other = self.inputs(device, seed)
        with torch.no_grad():
            for name in self.refilled:
                if name in inputs:
                    inputs[name].copy_(other[name])

    def wrong(self, what: str) -> WrongOutput:
        """The exception for an output of this workload."""
        return WrongOutput(f"{self.name}: {what}")

    def check_rows(
        self,
        what: str,
        found: Any,
        expected: Tensor,
        *,
        terms: Tensor | None = None,
        factor: float = 1.0,
    ) -> None:
        """Raise :class:`WrongOutput` where a row (the last axis) is farther off than rounding puts it.

        ``expected`` is float64. A row's error is relative to its norm, or to ``terms`` (of its shape
        without the last axis) where they are larger: what it is a sum of. ``factor`` widens the limit.
        """
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise self.wrong(f"{what} is {shape}, expected {list(expected.shape)}")
        if not expected.numel():
            return
        scale = expected.norm(dim=-1)
        scale = scale if terms is None else torch.maximum(scale, terms)
        limit = factor * ROUNDING[self.torch_dtype]
        worst = self.worst_row(found.to(torch.float64) - expected, scale)
        if not worst <= limit:
            raise self.wrong(
                f"a row of {what} is off by {worst:.3g} of its norm, allowed is {limit:.3g}"
            )

    def worst_row(self, error: Tensor, scale: Tensor) -> float:
        """The largest error of a row relative to its scale; NaN is infinite, 0 of 0 is 0."""
        ratio = error.norm(dim=-1) / scale.clamp(min=torch.finfo(torch.float64).tiny)
        return float(ratio.nan_to_num(nan=torch.inf).max())


def method_of(adapter: object, workload: Workload) -> Callable:
    """The method that a workload calls; :class:`NotOffered` if the adapter has none."""
    method = getattr(adapter, workload.contract, None)
    if not callable(method):
        raise NotOffered(f"does not offer {workload.contract}")
    return method


def need_options(method: Callable, options: dict[str, Any]) -> None:
    """Raise Declined unless the method can be given these options."""
    accepted, anything = accepted_options(method)
    for name in options:
        if name not in accepted and not anything:
            raise Declined(f"does not take {name!r}")


def bytes_of(tensors: Any) -> int:
    """Bytes of the tensors in a nest of mappings, tuples and lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, dict):
        return sum(map(bytes_of, tensors.values()))
    return sum(map(bytes_of, tensors)) if isinstance(tensors, (tuple, list)) else 0


def workloads(device: str, *, only: Sequence[str] = ()) -> list[Workload]:
    """The workloads for a device: small shapes on ``cpu``, those of real models on ``cuda``.

    ``only`` are globs on the name, of which any may match; :class:`NoSuchWorkload` for one that
    matches nothing, and for another device.
    """
    from conformance.benchmarks.attention_workloads import attention_workloads
    from conformance.benchmarks.experts_workloads import experts_workloads

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise NoSuchWorkload(f"there are no workloads for {device!r}, only for cpu and cuda")
    every = [*attention_workloads(kind), *experts_workloads(kind)]
    for glob in only:
        if not any(fnmatchcase(each.name, glob) for each in every):
            hint = close(glob, [each.name for each in every])
            raise NoSuchWorkload(f"no workload for {kind} is called {glob!r}{hint}")
    return [w for w in every if not only or any(fnmatchcase(w.name, glob) for glob in only)]
