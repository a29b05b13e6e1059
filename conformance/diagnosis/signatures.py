"""What can be seen of a wrong output, said without a cause."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conformance.harness.compared import Compared
from conformance.harness.failures import ConformanceFailure

NEGLIGIBLE = 10
"""An error over so many limits is a fault; below it may be the echo of one."""

MOST_PERMUTED = 64
"""The longest axis that is searched for a permutation."""

RISES = 0.9
"""Rank correlation from which an error is said to grow along an axis."""


def signatures(failure: ConformanceFailure) -> tuple[str, ...]:
    """Observations on a failure, the most telling first; none where no output was compared."""
    if failure.compared is None:
        return ()
    return tuple(
        line
        for look in (zeros, not_numbers, factor, permuted, transposed, where, rising)
        if (line := look(failure.compared))
    )


def zeros(compared: Compared) -> str | None:
    """The output is zero where it must not be."""
    zero = (compared.found == 0) & (compared.expectation.value != 0)
    if bool(zero.all()):
        return f"every element of {compared.name} is 0"
    return _places(zero, compared, "0") if bool(zero.any()) else None


def not_numbers(compared: Compared) -> str | None:
    """NaN or infinity where a finite number must be."""
    bad = ~torch.isfinite(compared.found) & torch.isfinite(compared.expectation.value)
    if bool(bad.all()):
        return f"no element of {compared.name} is finite"
    return _places(bad, compared, "not finite") if bool(bad.any()) else None


def factor(compared: Compared) -> str | None:
    """The output is the right one times a number."""
    found, right = _finite(compared)
    energy = float(right.square().sum())
    if not energy:
        return None
    times = float((found * right).sum()) / energy
    if times == 0 or not _small(compared, found - times * right, abs(times)):
        return None
    return f"{compared.name} is {times:.6g} times what it must be"


def permuted(compared: Compared) -> str | None:
    """Blocks of the right output are in other places."""
    found, right = _finite(compared)
    for axis, name in enumerate(compared.axes):
        size = found.shape[axis]
        if not 1 < size <= MOST_PERMUTED or found.numel() == size:
            continue
        sources = [_source(compared, found, right, axis, index) for index in range(size)]
        if None not in sources and sources != list(range(size)):
            return f"the {name} of {compared.name} are those of {sources}, in this order"
    return None


def _source(compared: Compared, found: Tensor, right: Tensor, axis: int, index: int) -> int | None:
    """The index of the block that the block at ``index`` equals; itself before all others."""
    block = found.select(axis, index)
    order = [index, *(other for other in range(found.shape[axis]) if other != index)]
    return next((o for o in order if _small(compared, block - right.select(axis, o))), None)


def transposed(compared: Compared) -> str | None:
    """The last two axes are exchanged."""
    found, right = _finite(compared)
    if found.ndim < 2 or found.shape[-1] != found.shape[-2] or found.shape[-1] == 1:
        return None
    same = _small(compared, found - right.mT) and not _small(compared, found - right)
    return f"{compared.name} is transposed in its last two axes" if same else None


def where(compared: Compared) -> str | None:
    """The error is in some indices of an axis and not in the others."""
    wrong = compared.error > NEGLIGIBLE * compared.expectation.limits.largest
    return _places(wrong, compared, "wrong") if bool(wrong.any()) else None


def rising(compared: Compared) -> str | None:
    """The error grows along an axis of positions."""
    for axis, name in enumerate(compared.axes):
        errors = torch.tensor(compared.profile(axis), dtype=torch.float64)
        if name != "tokens" or len(errors) < 4 or not bool(torch.isfinite(errors).all()):
            continue
        if float(errors.std()) > 0 and _rank_correlation(errors) >= RISES:
            first, last = float(errors[0]), float(errors[-1])
            return f"the error grows with the position, from {first:.2g} to {last:.2g}"
    return None


def _rank_correlation(values: Tensor) -> float:
    ranks = values.argsort().argsort().to(torch.float64)
    positions = torch.arange(len(values), dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([ranks, positions]))[0, 1])


def _places(wrong: Tensor, compared: Compared, what: str) -> str | None:
    """Which indices of the axis that tells the most have it; None where all of every axis have."""
    lines = []
    for axis, name in enumerate(compared.axes):
        others = tuple(a for a in range(wrong.ndim) if a != axis)
        any_there = wrong.any(dim=others) if others else wrong
        at = any_there.nonzero().flatten().tolist()
        if 0 < len(at) < wrong.shape[axis]:
            lines.append(
                (len(at) / wrong.shape[axis], f"{_span(at)} of {wrong.shape[axis]} {name}")
            )
    if not lines:
        return None
    return f"{compared.name} is {what} only in {' and in '.join(line for _, line in sorted(lines)[:2])}"


def _span(indices: Sequence[int]) -> str:
    """Indices in few characters."""
    first, last = indices[0], indices[-1]
    if len(indices) == 1:
        return f"[{first}]"
    if len(indices) == last - first + 1:
        return f"[{first} .. {last}]"
    step = indices[1] - first
    if len(indices) > 3 and list(indices) == list(range(first, last + 1, step)):
        return f"[{first}, {indices[1]} .. {last}]"
    shown = ", ".join(map(str, indices[:8]))
    return f"[{shown}{', …' if len(indices) > 8 else ''}]"


def _finite(compared: Compared) -> tuple[Tensor, Tensor]:
    expected = compared.expectation.value
    finite = torch.isfinite(expected)
    return torch.where(finite, compared.found, 0), torch.where(finite, expected, 0)


def _small(compared: Compared, error: Tensor, scale: float = 1.0) -> bool:
    """Whether a difference is within the limit of an element. NaN is not."""
    return bool((error.abs() <= compared.expectation.limits.largest * max(scale, 1.0)).all())
