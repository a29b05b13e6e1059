"""Programs of a sharded model: lines of Python that every rank runs, and that a failure prints.

A call makes the model, which its program knows as ``out``, beside ``rank`` and whatever the lines of
the call define. Whether the program does what the whole model does is for the checks to say.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.flat_cases import FlatCase
from conformance.harness.flat_subject import ByName, Driver, this_rank
from conformance.harness.rank_pool import on_ranks
from conformance.harness.subject import Subject, errors_named

# Lines

VALUES = "values = {name: 0.5 * r(*p.shape) for name, p in parameters.items()}"
"""Other values for every parameter; a line of the call."""
LOAD = "out.load_parameters(values)"
READ = "read = out.full_parameters()"
POISON = "for buffer in out.buffers(): buffer.data.fill_(float('nan'))"
STALE = "out.invalidate()"
STEP = "out.step()"
GRADIENTS = "read = out.full_gradients()"
RESTORE = "out.restore()"
HELD = "held = {name: out.parameter(name).detach().clone() for name in parameters}"
"""What the modules compute with."""


def evaluate(case: FlatCase, step: int = 0) -> str:
    """The line that leaves in ``outputs`` those of a step's batches."""
    first = step * case.micro_batches
    batches = f"inputs[rank][{first}:{first + case.micro_batches}]"
    return f"with torch.no_grad(): outputs = [out.forward(x) for x in {batches}]"


def backward(case: FlatCase, step: int = 0, *, complete: str = "last") -> str:
    """The line that runs the micro-batches of a step, forward and backward.

    Gradients are complete after the last of them, or after ``each``.
    """
    first = step * case.micro_batches
    end = first + case.micro_batches
    last = f"u is upstream[rank][{end - 1}]" if complete == "last" else "True"
    batches = f"list(zip(inputs[rank], upstream[rank]))[{first}:{end}]"
    loss = "(out.forward(x).float() * u).sum()"
    return f"for x, u in {batches}: out.backward({loss}, last={last})"


def training(case: FlatCase, *between: str, steps: int | None = None) -> tuple[str, ...]:
    """The lines of all steps, with lines before each update."""
    numbers = range(case.steps if steps is None else steps)
    return tuple(line for n in numbers for line in (backward(case, n), *between, STEP))


def attempt(statement: str, refused: str = "refused") -> str:
    """Lines that leave the text of the exception that a statement ends with; None without one."""
    return "\n".join(
        (
            f"{refused} = None",
            "try:",
            f"    {statement}",
            "except Exception as error:",
            f"    {refused} = str(error.__cause__ or error)",
        )
    )


# Running


@dataclass(frozen=True)
class Program:
    """A call that makes a model, and the lines that every rank runs with it."""

    call: Call
    lines: tuple[str, ...]

    @property
    def case(self) -> FlatCase:
        """The case of the call."""
        return self.call.case

    def run(self, flat_shards: Subject, *want: str) -> list[dict[str, Any]]:
        """The variables that are asked for, by name, of every rank."""
        load_optimizers()
        shown = self.on_device(flat_shards.device)
        with shown.failing():
            return on_ranks(
                flat_shards,
                self.case.ranks,
                run_program,
                shown.call.lines,
                shown.call.options,
                shown.lines,
                want,
            )

    def on_device(self, device: str) -> Program:
        """The same program of a model and batches on a device."""
        if device == "cpu":
            return self
        to = f".to('{device}')"
        moved = (
            f"for m in modules: m{to}",
            f"inputs, upstream = ([[x{to} for x in each] for each in of] for of in (inputs, upstream))",
            f"r = lambda *shape, made=r: made(*shape){to}",
        )
        return replace(self, call=self.call.then(*moved))

    @contextmanager
    def failing(self) -> Iterator[None]:
        """A failure in here is one of the call, and its reproduction ends with the program."""
        try:
            with failing_at(self.call):
                yield
        except ConformanceFailure as failure:
            shown = printing(self.result, failure.shown_by)
            failure.shown_by = "\n".join((*self.lines, shown))
            raise

    @property
    def result(self) -> str:
        """The variable that the lines set last."""
        tree = ast.parse("\n".join(self.lines))
        set_to = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        last = max(set_to, key=lambda node: (node.lineno, node.col_offset)).targets[-1]
        return ast.unparse(last)


@contextmanager
def showing(expression: str) -> Iterator[None]:
    """A failure in here is shown by printing an expression of the program's variables."""
    try:
        yield
    except ConformanceFailure as failure:
        failure.shown_by = printing(expression, failure.shown_by)
        raise


def printing(expression: str, shown_by: str) -> str:
    """The line that shows a failure, with an expression in the place of the model."""
    return re.sub(r"^print\(out\b", lambda _: f"print({expression}", shown_by)


@functools.cache
def load_optimizers() -> None:
    """Load what torch loads when the first optimizer is made, before ranks are forked.

    It takes longer than all steps of a requirement, and would be loaded on every rank.
    """
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]).step()


def run_program(
    subject: Subject,
    made_by: tuple[str, ...],
    options: tuple[tuple[str, str], ...],
    lines: tuple[str, ...],
    want: tuple[str, ...],
) -> dict[str, Any]:
    """Run a program on this rank."""
    namespace: dict[str, Any] = {"torch": torch, "rank": this_rank()}
    execute(made_by, namespace)
    given = {name: eval(source, namespace) for name, source in options}
    driver = namespace["out"] = Driver(subject(namespace["modules"], **given))
    with errors_named("the program"), torch.enable_grad():
        execute(lines, namespace)
    if driver.ended_by is not None:
        raise driver.ended_by
    return {name: portable(namespace[name]) for name in want}


def execute(lines: tuple[str, ...], namespace: dict[str, Any]) -> None:
    """Execute lines of Python."""
    exec(compile("\n".join(lines), "<reproduction>", "exec"), namespace)


def portable(found: Any) -> Any:
    """A copy that another process can have: tensors without a graph, of other objects the type."""
    if isinstance(found, Tensor):
        return found.detach().clone()
    if isinstance(found, Mapping):
        return ByName((name, portable(value)) for name, value in found.items())
    if isinstance(found, (list, tuple)):
        return [portable(value) for value in found]
    if isinstance(found, (int, float, str, bool, type(None))):
        return found
    return type(found).__name__
