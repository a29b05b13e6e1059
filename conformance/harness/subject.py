"""One method of an implementation, called so that nothing it does wrong goes unseen."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from conformance.contracts import CONTRACTS
from conformance.harness.failures import ConformanceFailure, Declined
from conformance.harness.gpu_lane import wait_for_device
from conformance.harness.shown import keep_arguments


class Subject:
    """A contract's method of the implementation under test.

    Passes only the options that the method takes, declines a case that needs another, and turns a
    changed input, an aliased output and any exception into a :class:`ConformanceFailure`.
    """

    def __init__(
        self,
        contract: str,
        method: Callable,
        *,
        device: str = "cpu",
        import_lines: tuple[str, ...] = (),
    ) -> None:
        self.contract = CONTRACTS[contract]
        self.method = method
        self.device = device
        self.import_lines = import_lines or (f"from my_adapter import {contract}",)
        self._accepted, self._takes_anything = accepted_options(method)
        self._may_alias = False
        self.calls = Counter()
        """How often the method was called, under the contract's name."""

    @classmethod
    def of(cls, contract: str, method: Callable | Subject) -> Subject:
        """``method`` itself when it is a Subject already."""
        return method if isinstance(method, Subject) else cls(contract, method)

    def may_return_input(self) -> Subject:
        """The same subject for calls that compute nothing, whose result may be the input itself."""
        lenient = copy.copy(self)
        lenient._may_alias = True
        return lenient

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the method; ``arguments`` and ``options`` as in the contract."""
        options = self.select_options(options)
        self.calls[self.contract.name] += 1
        keep_arguments(arguments)
        with changes_caught([*arguments, *options.values()]), errors_named(self.contract.name):
            result = self.method(*arguments, **options)
        for output in result if isinstance(result, tuple) else (result,):
            if isinstance(output, Tensor) and not self._may_alias:
                reject_alias(output, [*arguments, *options.values()])
        return result

    def select_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options to pass: those the method names, and those a case needs; or Declined."""
        defaults = self.contract.defaults
        selected = {
            name: options.get(name, defaults.get(name))
            for name in self._accepted
            if name in options
            or defaults.get(name, inspect.Parameter.empty) is not inspect.Parameter.empty
        }
        for name, value in options.items():
            if name in selected or (name in defaults and value is defaults[name]):
                continue
            if not self._takes_anything:
                raise Declined(f"does not take {name!r}")
            selected[name] = value
        return selected


def accepted_options(method: Callable) -> tuple[frozenset[str], bool]:
    """The names that a method can be given by keyword, and whether it takes any name."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return frozenset(), True
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(p.name for p in parameters if p.kind in by_name)
    contracts = [contract.defaults.keys() for contract in CONTRACTS.values()]
    known = frozenset().union(*contracts)
    return names & known, any(p.kind is p.VAR_KEYWORD for p in parameters)


@contextmanager
def errors_named(contract: str):
    """Any exception of the method becomes a failure; ``NotImplementedError`` declines the case.

    Kernels that it started on a GPU have ended: what they raise is the method's, too.
    """
    try:
        yield
        wait_for_device()
    except (ConformanceFailure, Declined):
        raise
    except NotImplementedError as error:
        raise Declined(first_line(error) or "NotImplementedError") from error
    except Exception as error:
        kind = f"raised {type(error).__name__}"
        raise ConformanceFailure(
            kind, f"{contract} {kind}: {first_line(error) or 'no message'}"
        ) from error
    except (
        SystemExit,
        GeneratorExit,
    ) as error:  # an adapter that calls exit() must not end the run
        kind = f"raised {type(error).__name__}"
        raise ConformanceFailure(kind, f"{contract} {kind}") from error


LONGEST_LINE = 300
"""Characters of an exception's message that are shown: some print whole tensors."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, of bounded length."""
    line = str(error).strip().split("\n")[0]
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} …"


@contextmanager
def changes_caught(values: list[Any]):
    """Fail if a tensor among ``values`` is changed; put it back, for it is shared."""
    snapshots = [(value, value.detach().clone()) for value in values if isinstance(value, Tensor)]
    yield
    for index, (tensor, snapshot) in enumerate(snapshots):
        if not bitwise_equal(tensor.detach(), snapshot):
            changed = int((tensor.detach() != snapshot).sum())
            with torch.no_grad():
                tensor.copy_(snapshot)
            raise ConformanceFailure(
                "changed input",
                f"an input tensor (number {index}, shape {list(tensor.shape)}) was changed in "
                f"{changed} of {tensor.numel()} places",
            )


def reject_alias(output: Tensor, inputs: list[Any]) -> None:
    """Fail if ``output`` shares memory with one of the inputs."""
    if not output.numel():
        return
    for value in inputs:
        if isinstance(value, Tensor) and value.numel() and _storage(value) == _storage(output):
            raise ConformanceFailure("aliased output", "the output shares memory with an input")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype and values, where NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
