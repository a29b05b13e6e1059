"""Whether two implementations did the same on one case.

Outputs are compared element by element, within what two correct implementations may differ by.
Failures that compare no output are compared by what they say: the words must be equal, and printed
numbers up to rounding.
"""

from __future__ import annotations

import re
import tempfile

import torch

from conformance.diagnosis.observation import FAILED, SILENT, Observation
from conformance.harness.compared import Compared
from conformance.harness.failures import ConformanceFailure
from conformance.harness.lanes import PRECISION
from conformance.harness.tolerance import measure

BOTH_MAY_ERR = 2
"""Each of the two may be off by the limit, to different sides."""

PRINTED, PRINTED_FROM_16_BITS = 1e-3, 2e-2
"""Relative differences of printed numbers that rounding explains, in float32 and in 16 bits.

What is compared by its text alone prints six digits or more; where fewer are printed and the last
differs, the two do not agree: a bug is rather not named than named wrongly. In bfloat16 a number is off
by up to 2⁻⁸, and a sum of some by a few times as much.
"""

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
_FOLDERS = "|".join(map(re.escape, (tempfile.gettempdir(), "/dev/shm")))
_TEMPORARY = re.compile(rf"""(?:{_FOLDERS})/[^\s/'":]+""")
_FRAME = re.compile(r"\s|File |Traceback|rank \d+: *File ")


def agree(mine: Observation, theirs: Observation) -> bool | None:
    """Whether they did the same; None where one of them says nothing."""
    if SILENT in (mine.ended, theirs.ended):
        return None
    if mine.ended != theirs.ended:
        return False
    if mine.ended != FAILED:
        return True
    return fail_alike(mine.failure, theirs.failure)


def fail_alike(mine: ConformanceFailure, theirs: ConformanceFailure) -> bool:
    """Whether two failures of one case are the same fault."""
    if (mine.kind, mine.lane) != (theirs.kind, theirs.lane):
        return False
    if mine.compared is not None and theirs.compared is not None:
        return outputs_agree(mine.compared, theirs.compared)
    relative = PRINTED_FROM_16_BITS if mine.lane == PRECISION else PRINTED
    return texts_agree(told(mine), told(theirs), relative)


def outputs_agree(mine: Compared, theirs: Compared) -> bool:
    """Whether two wrong outputs are equal within the limits of the case.

    A fault that makes an output larger makes its rounding errors larger, too.
    """
    if mine.name != theirs.name or mine.found.shape != theirs.found.shape:
        return False
    finite = torch.isfinite(mine.found)
    if not torch.equal(finite, torch.isfinite(theirs.found)):
        return False
    infinite = torch.isinf(mine.found)
    if not torch.equal(mine.found[infinite], theirs.found[infinite]):
        return False
    mine_found, their_found = (torch.where(finite, each.found, 0) for each in (mine, theirs))
    expected = mine.expectation.value
    right = torch.where(torch.isfinite(expected) & finite, expected, 0)
    scale = max(1.0, _size(their_found) / (_size(right) or 1.0))
    limits = mine.expectation.widened(BOTH_MAY_ERR * scale).limits
    return not measure(mine_found, their_found).exceeds(limits)


def _size(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def told(failure: ConformanceFailure) -> list[str]:
    """What a failure says, without the frames of code and the names of temporary folders."""
    lines = [failure.summary, *(d for d in failure.details if not _FRAME.match(d))]
    return [_TEMPORARY.sub("(temporary)", line) for line in lines]


def texts_agree(mine: list[str], theirs: list[str], relative: float) -> bool:
    """Whether two texts differ in nothing but the rounding of numbers that are not whole."""
    if len(mine) != len(theirs):
        return False
    return all(_lines_agree(a, b, relative) for a, b in zip(mine, theirs))


def _lines_agree(mine: str, theirs: str, relative: float) -> bool:
    if _NUMBER.sub("#", mine) != _NUMBER.sub("#", theirs):
        return False
    numbers = zip(_NUMBER.findall(mine), _NUMBER.findall(theirs))
    return all(a == b or _round_alike(a, b, relative) for a, b in numbers)


def _round_alike(a: str, b: str, relative: float) -> bool:
    if not ("." in a + b or "e" in a + b):
        return False
    x, y = float(a), float(b)
    return abs(x - y) <= relative * max(abs(x), abs(y))
