"""A call of a contract's method, written as the Python lines that build its arguments.

The lines that a failure prints to reproduce itself are the very lines that were executed: they use
torch and a seeded generator, and nothing of this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.memo import remembered


@dataclass(frozen=True)
class Call:
    """``contract(*arguments, **options)`` over names that ``lines`` define."""

    contract: str
    lines: tuple[str, ...]
    arguments: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()
    dtype: torch.dtype = torch.float32
    case: object = None

    @property
    def preamble(self) -> tuple[str, ...]:
        """What a reproduction begins with: nothing, or joining the group of several ranks."""
        ranks = getattr(self.case, "ranks", 1)
        if ranks == 1:
            return ()
        return (
            f"import torch.distributed as dist  # torchrun --nproc-per-node={ranks}",
            "dist.init_process_group('gloo')",
            "rank = dist.get_rank()",
        )

    @property
    def closing(self) -> tuple[str, ...]:
        """What a reproduction ends with: nothing, or leaving that group when all are done."""
        return ("dist.barrier()", "dist.destroy_process_group()") if self.preamble else ()

    @property
    def printed(self) -> tuple[str, ...]:
        """The lines as a reproduction has them, which needs nothing of this package."""
        return self.lines

    def then(self, *lines: str, **options: str) -> Call:
        """The same call after further lines, with options (as source text) added or replaced."""
        merged = {**dict(self.options), **options}
        return replace(self, lines=self.lines + lines, options=tuple(merged.items()))

    def without(self, *names: str) -> Call:
        """The same call without some of its options."""
        return replace(self, options=tuple(pair for pair in self.options if pair[0] not in names))

    def named(self, name: str) -> Any:
        """A value that the lines define."""
        return self.namespace()[name]

    def namespace(self) -> dict[str, Any]:
        """What the lines define, by name."""
        return _execute(self.lines)

    def values(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional arguments and options. The tensors are shared: nobody may change them."""
        namespace = self.namespace()
        return (
            [eval(source, namespace) for source in self.arguments],
            {name: eval(source, namespace) for name, source in self.options},
        )

    def source(self) -> str:
        """The call itself as source text."""
        options = [f"{name}={source}" for name, source in self.options]
        return f"{self.contract}({', '.join((*self.arguments, *options))})"


@dataclass(frozen=True)
class Course(Call):
    """A call that is one of several things that are done; what gives the result is ``text``.

    It is printed where a failure is about more than one call, and never executed by the suite.
    """

    text: str = ""

    def source(self) -> str:
        """That text."""
        return self.text


def course(call: Call, *lines: str, result: str) -> Course:
    """The lines of a call, further ones, and what leaves the result in ``out``."""
    kept = {field.name: getattr(call, field.name) for field in fields(Call)}
    return Course(**(kept | {"lines": (*call.lines, *lines)}), text=result)


@remembered
def _execute(lines: tuple[str, ...]) -> dict[str, Any]:
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile("\n".join(lines), "<reproduction>", "exec"), namespace)
    return namespace


def shown_case(case: Any, *, always: int = 4) -> str:
    """A case (a dataclass) by its first fields, and whatever else is not at its default."""
    parts = [
        f"{field.name}={getattr(case, field.name)!r}"
        for index, field in enumerate(fields(case))
        if index < always or getattr(case, field.name) != field.default
    ]
    return f"{type(case).__name__}({', '.join(parts)})"


def in_float64(values: Any) -> Any:
    """The same arguments with every floating tensor in float64 on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return values.to(torch.float64) if values.is_floating_point() else values
    if isinstance(values, (list, tuple)):
        return type(values)(in_float64(value) for value in values)
    if isinstance(values, Mapping):
        return {name: in_float64(value) for name, value in values.items()}
    return values


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
