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
                    result = method(*arguments, **options)
            except Declined as reason:
                self.ended_by = reason
                raise
            if name in RESULTS:
                RESULTS[name](result, f"{name}()")
            return result

        return called

    def parameters(self) -> ByName:
        """Copies of :meth:`full_parameters`."""
        return as_tensors(self.full_parameters(), "full_parameters()")

    def micro_batch(self, x: Tensor, upstream: Tensor, *, last: bool) -> Tensor:
        """Forward and backward pass of one batch; the output."""
        with torch.enable_grad():
            out = self.forward(x)
            loss = (out.to(torch.promote_types(out.dtype, torch.float32)) * upstream).sum()
            self.backward(loss, last=last)
        return out.detach().clone()


class ByName(dict):
    """Tensors by name; to look up one that is not there is a failure, not an error of the suite."""

    def __missing__(self, name: str) -> Tensor:
        """Raises :class:`ConformanceFailure` that says what there is."""
        have = ", ".join(self) or "nothing"
        raise ConformanceFailure("missing weight", f"there is no {name} among {have}")


def as_tensors(found: Mapping[str, Tensor], what: str) -> ByName:
    """Copies of a mapping of tensors."""
    check_tensors(found, what)
    return ByName((name, value.detach().clone()) for name, value in found.items())


def check_tensors(found: Any, what: str) -> None:
    """Fail unless this is a mapping of tensors."""
    if not isinstance(found, Mapping):
        raise ConformanceFailure(
            "wrong type", f"{what} gives {type(found).__name__}, not a mapping"
        )
    for name, value in found.items():
        check_tensor(value, f"{what}[{name!r}]")


def check_tensor(found: Any, what: str) -> None:
    """Fail unless this is a tensor."""
    if not isinstance(found, Tensor):
        raise ConformanceFailure("wrong type", f"{what} gives {type(found).__name__}, not a tensor")


def check_list(found: Any, what: str) -> None:
    """Fail unless this is a list of tensors."""
    if not isinstance(found, (list, tuple)):
        raise ConformanceFailure("wrong type", f"{what} gives {type(found).__name__}, not a list")
    for number, value in enumerate(found):
        check_tensor(value, f"{what}[{number}]")


def check_number(found: Any, what: str) -> None:
    """Fail unless this is a number."""
    if not isinstance(found, (int, float)):
        raise ConformanceFailure("wrong type", f"{what} gives {type(found).__name__}, not a number")


RESULTS = {
    "forward": check_tensor,
    "forward_stage": check_tensor,
    "parameter": check_tensor,
    "get_shard": check_tensor,
    "full_parameters": check_tensors,
    "full_gradients": check_tensors,
    "split_shard": check_tensors,
    "buffers": check_list,
    "clip_gradients": check_number,
}
"""What the methods give."""
