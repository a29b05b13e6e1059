"""What shows a failure that its last call alone does not show: earlier calls, parts, gradients, inputs.

While a case is checked in a dtype, the calls that are made are kept. Where a failure is about more than
the last of them, its lines make the others too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conformance.harness.calls import Call, Course
from conformance.harness.failures import ConformanceFailure

PLAIN = "print(out)"
"""What shows a failure of which nobody has said what shows it."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
"""What the results of earlier calls are called."""


@dataclass
class Kept:
    """What was called since a check began."""

    calls: list[Call] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    """Of the results of these."""
    gradients: Mapping[str, str] = field(default_factory=dict)
    """Of what the latest call was asked: what the check calls it, and what the lines call it."""
    upstream_seed: int = 0
    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    """What the method itself was given, in every call of it."""


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


def keep(
    call: Call,
    result: Tensor,
    *,
    gradients: Mapping[str, str] | None = None,
    upstream_seed: int = 0,
) -> None:
    """Note that a call was made, and of what ``gradients`` were asked for then.

    They are of the sum of the result times random numbers of a seed.
    """
    kept = _kept.get()
    if kept is not None:
        kept.calls.append(call)
        kept.shapes.append(result.shape)
        kept.gradients, kept.upstream_seed = gradients or {}, upstream_seed


def keep_arguments(arguments: tuple[Any, ...]) -> None:
    """Note what the method was given."""
    kept = _kept.get()
    if kept is not None:
        kept.arguments.append(arguments)


@contextmanager
def whole_course_shown() -> Iterator[None]:
    """A failure in here is shown by all calls that it takes, where that is not only the last."""
    token = _kept.set(Kept())
    try:
        yield
    except ConformanceFailure as failure:
        show(failure, _kept.get())
        raise
    finally:
        _kept.reset(token)


@contextmanager
def earlier_calls_shown(*in_doubt: Call) -> Iterator[None]:
    """A failure in here is one of what was called before: its lines make those calls too.

    ``in_doubt`` are made where nothing was called before in this case: what an implementation
    remembers may be of an earlier one.
    """
    try:
        yield
    except ConformanceFailure as failure:
        kept = _kept.get() or Kept()
        if len(kept.calls) == 1:
            kept = Kept([*in_doubt, *kept.calls])
        make_earlier_calls(failure, kept)
        raise


@contextmanager
def preceded_by(*calls: Call) -> Iterator[None]:
    """A failure in here may be of these calls, which were made before: its lines make them too."""
    try:
        yield
    except ConformanceFailure as failure:
        if failure.call is not None:
            make_earlier_calls(failure, Kept([*calls, failure.call]))
        raise


def show(failure: ConformanceFailure, kept: Kept) -> None:
    """Give a failure the lines that it takes."""
    if failure.summary.startswith("chunked output"):
        make_parts(failure, kept.arguments)
    elif kept.gradients and failure.call in kept.calls:
        make_gradients(failure, kept.gradients, kept.upstream_seed)
    elif failure.shown_by == PLAIN and failure.kind in ("not identical", "no effect"):
        compare_calls(failure, kept)


# Earlier calls


def make_earlier_calls(failure: ConformanceFailure, kept: Kept) -> list[str]:
    """Put the calls before the last one into the lines; the names of their results."""
    calls = kept.calls[-len(ORDINALS) - 1 :]
    if len(calls) < 2 or failure.call is None or failure.call.lines != calls[-1].lines:
        return []
    lines: list[str] = []
    names = list(ORDINALS[: len(calls) - 1])
    for name, call, before in zip([*names, None], calls, [None, *calls]):
        known = before.lines if before is not None else ()
        further = call.lines[: len(known)] == known
        lines += call.lines[len(known) :] if further else call.lines
        if name is not None:
            lines.append(f"{name} = {call.source()}")
    failure.call = replace(failure.call, lines=tuple(lines))
    return names


def compare_calls(failure: ConformanceFailure, kept: Kept) -> None:
    """The last result beside that of the first call."""
    names = make_earlier_calls(failure, kept)
    if not names or kept.shapes[-1] != kept.shapes[-1 - len(names)]:
        return
    if failure.kind == "no effect":
        failure.shown_by = f"print('equal:', torch.equal(out, {names[0]}), '- expected False')"
    else:
        failure.shown_by = differing("out", names[0])


# Parts


def make_parts(failure: ConformanceFailure, arguments: Sequence[tuple[Any, ...]]) -> None:
    """Lines that call the method with parts of the tensors, and put the results together."""
    call = failure.call
    options = [f"{name}={source}" for name, source in call.options]
    given = [[part_of(call.named(n), x, n) for n, x in zip(call.arguments, a)] for a in arguments]
    calls = [f"{call.contract}({', '.join((*each, *options))})" for each in given]
    failure.shown_by = "\n".join(
        (
            "parts = [",
            *(f"    {each}," for each in calls),
            "]",
            "out = torch.cat(parts, dim=2)",
            element("out", failure.shown_by),
        )
    )


def part_of(whole: Tensor, part: Tensor, name: str) -> str:
    """A part of a tensor as source text: what begins and ends where on each axis."""
    offset = part.storage_offset() - whole.storage_offset()
    axes = sorted(range(whole.ndim), key=whole.stride, reverse=True)
    begin = dict.fromkeys(axes, 0)
    for axis in axes:
        if whole.shape[axis] > 1 and whole.stride(axis):
            begin[axis], offset = divmod(offset, whole.stride(axis))
    slices = [
        f"{begin[axis]}:{begin[axis] + size}" if size < whole.shape[axis] else ":"
        for axis, size in enumerate(part.shape)
    ]
    while slices and slices[-1] == ":":
        slices.pop()
    return f"{name}[{', '.join(slices)}]" if slices else name


# Gradients


def make_gradients(
    failure: ConformanceFailure, names: Mapping[str, str], upstream_seed: int
) -> None:
    """Lines that differentiate the sum of output times random numbers, as the check has done."""
    call = failure.call
    found = re.search(rf"gradient of ({'|'.join(map(re.escape, names))})\b", failure.summary)
    name = names[found[1]] if found else next(iter(names.values()))
    if failure.kind == "no gradient":
        return
    failure.call = call.then(f"for each in [{', '.join(names.values())}]: each.requires_grad_()")
    generator = f"torch.Generator().manual_seed({upstream_seed})"
    lines = [
        f"upstream = torch.randn(out.shape, generator={generator}).to(out)",
        "out.backward(upstream)",
        element(f"{name}.grad", failure.shown_by),
    ]
    failure.shown_by = "\n".join(lines)


def no_gradient(name: str) -> str:
    """Lines that print whether a gradient of the output reaches a tensor."""
    asked = f"torch.autograd.grad(out.sum(), {name}, allow_unused=True)[0]"
    return "\n".join(
        (
            f"there = out.requires_grad and {asked} is not None",
            f"print('a gradient of {name}:', there, '- expected True')",
        )
    )


# What else is done


@contextmanager
def made_by(call: Call, *, then: str | None = None) -> Iterator[None]:
    """A failure in here is shown by ``call``, and by ``then`` in place of what was to show it."""
    try:
        yield
    except ConformanceFailure as failure:
        failure.call = call
        failure.shown_by = failure.shown_by if then is None else then
        raise


@contextmanager
def after(*lines: str) -> Iterator[None]:
    """A failure in here is shown after these lines of Python; of several ranks, every one runs them."""
    try:
        yield
    except ConformanceFailure as failure:
        failure.shown_by = "\n".join((*lines, failure.shown_by))
        raise


# Several ranks


@contextmanager
def shown_on_rank(rank: int, ranks: int) -> Iterator[None]:
    """A failure in here is of one of several ranks, which all run the lines; that one prints."""
    try:
        yield
    except ConformanceFailure as failure:
        if ranks > 1:
            failure.shown_by = f"if rank == {rank}: {failure.shown_by}"
        raise


# Printing


def differing(one: str, other: str) -> str:
    """The line that prints where two tensors differ."""
    return f"print('they differ at', ({one} != {other}).nonzero()[:4].tolist())"


def element(source: str, shown_by: str) -> str:
    """The line that prints of ``source`` what another line prints of ``out``.

    Where that says which element is expected to be what, one element.
    """
    said = re.fullmatch(r"print\(out, '(expected .*?(\[[\d, ]*\]): .*)'\)", shown_by)
    if said is None:
        return re.sub(r"^print\(out\b", lambda _: f"print({source}", shown_by)
    return f"print({source}{said[2]}.item(), {said[1]!r})"


def shown_by_kind(failure: ConformanceFailure) -> tuple[tuple[str, ...], str]:
    """Lines before the call, and the line after it, of a failure that its kind says all about."""
    reached = re.fullmatch(r"no gradient reaches (\w+)", failure.summary)
    if reached and isinstance(failure.call.namespace().get(reached[1]), Tensor):
        return (f"{reached[1]}.requires_grad_()",), no_gradient(reached[1])
    of_rank = re.fullmatch(
        r"print\(out, '(expected ([\w.]+) of rank (\d+)(\[[\d, ]*\]): .*)'\)", failure.shown_by
    )
    if of_rank and isinstance(failure.call, Course):  # `out` has, by rank, what it has seen
        said, name, rank, at = of_rank.groups()
        return (), f"print(out[{rank}][-1][{name!r}]{at}.item(), {said!r})"
    if failure.shown_by != PLAIN:
        return (), failure.shown_by
    if failure.kind in ("changed input", "aliased output"):
        names = tensor_names(failure.call)
        if names and failure.kind == "aliased output":
            same = f"[x.data_ptr() == out.data_ptr() for x in [{names}]]"
            return (), f"print('shared memory:', {same}, '- expected none')"
        if names:
            differ = "int(((a != b) & ~(a.isnan() & b.isnan())).sum())"
            changed = f"[{differ} for a, b in zip([{names}], given)]"
            before = f"given = [x.detach().clone() for x in [{names}]]"
            return (before,), f"print('elements changed:', {changed}, '- expected none')"
    return (), failure.shown_by


def tensor_names(call: Call) -> str:
    """The arguments and options of a call that are tensors, by name, as source text."""
    sources = [*call.arguments, *(source for _, source in call.options)]
    if call.preamble:  # the lines are those of each of several ranks
        call = replace(call, lines=("rank = 0", *call.lines))
    found = call.namespace() if all(s.isidentifier() for s in call.arguments) else {}
    return ", ".join(s for s in sources if isinstance(found.get(s), Tensor))
