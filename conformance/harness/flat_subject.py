"""Driving a sharded model on one rank of several: every method named where it fails or is missing."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.subject import Subject, errors_named

NEEDED = ("forward", "full_parameters", "load_parameters", "backward", "full_gradients", "step")
"""Methods that every model has."""


def this_rank() -> int:
    """The number of this rank in the current group."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def make(subject: Subject, modules: Sequence[nn.Module], options: Mapping[str, Any]) -> Driver:
    """The model of copies of the modules, which are the case's own."""
    return Driver(subject(copy.deepcopy(list(modules)), **options))


class Driver:
    """A sharded model whose methods raise failures, or decline what it does not have."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ended_by: Exception | None = None
        """What says that the case cannot be run, even if a program caught it."""

    def __getattr__(self, name: str) -> Any:
        """A method of the model; errors in it are failures that name it."""
        method = getattr(self.model, name, None)
        if method is None:
            self.ended_by = Declined(f"the model has no method {name}")
            if name in NEEDED:
                found = type(self.model).__name__
                self.ended_by = ConformanceFailure("wrong type", f"{found} has no method {name}")
            raise self.ended_by

        def called(*arguments: Any, **options: Any) -> Any:
            try:
                with errors_named(f"{name}()"):
                    return method(*arguments, **options)
            except Declined as reason:
                self.ended_by = reason
                raise

        return called

    def parameters(self) -> dict[str, Tensor]:
        """Copies of :meth:`full_parameters`."""
        return as_tensors(self.full_parameters(), "full_parameters()")

    def gradients(self) -> dict[str, Tensor]:
        """Copies of :meth:`full_gradients`."""
        return as_tensors(self.full_gradients(), "full_gradients()")

    def micro_batch(self, x: Tensor, upstream: Tensor, *, last: bool) -> Tensor:
        """Forward and backward pass of one batch; the output."""
        with torch.enable_grad():
            out = self.forward(x)
            if not isinstance(out, Tensor):
                found = type(out).__name__
                raise ConformanceFailure("wrong type", f"forward() gives {found}, not a tensor")
            loss = (out.to(torch.promote_types(out.dtype, torch.float32)) * upstream).sum()
            self.backward(loss, last=last)
        return out.detach().clone()

    def batches(self, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
        """Several micro-batches, the gradients of which are complete after the last; the outputs."""
        last = len(inputs) - 1
        return [
            self.micro_batch(x, u, last=number == last)
            for number, (x, u) in enumerate(zip(inputs, upstream))
        ]

    def train(
        self,
        inputs: Sequence[Tensor],
        upstream: Sequence[Tensor],
        steps: int,
        *,
        max_norm: float | None = None,
    ) -> list[float]:
        """Steps of as many micro-batches each; the norms of gradients where they are clipped."""
        each, norms = len(inputs) // steps, []
        for step in range(steps):
            part = slice(step * each, (step + 1) * each)
            self.batches(inputs[part], upstream[part])
            if max_norm is not None:
                norms.append(float(self.clip_gradients(max_norm)))
            self.step()
        return norms


def as_tensors(found: Any, what: str) -> dict[str, Tensor]:
    """Copies of a mapping of tensors."""
    if not isinstance(found, Mapping):
        raise ConformanceFailure(
            "wrong type", f"{what} gives {type(found).__name__}, not a mapping"
        )
    for name, value in found.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ConformanceFailure("wrong type", f"{what} gives {kind} for {name}, not a tensor")
    return {name: value.detach().clone() for name, value in found.items()}
