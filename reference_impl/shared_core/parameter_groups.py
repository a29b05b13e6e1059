"""Groups of parameters by regular expressions: a share of the learning rate for each, or none."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def check_multipliers(multipliers: Iterable[tuple[str, float]]) -> None:
    """Raise ValueError for a pattern that is none, or a multiplier that is negative or not finite."""
    for pattern, multiplier in multipliers:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        if not (multiplier >= 0 and math.isfinite(multiplier)):
            raise ValueError(f"the multiplier of {pattern!r} is {multiplier}, expected 0 or more")


def parameter_groups(
    parameters: Mapping[str, Tensor], multipliers: Iterable[tuple[str, float]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with its ``multiplier``, and the ``names`` of its parameters.

    A parameter has the multiplier of the first pattern that is found in its name (``re.search``), 1
    without one; with 0 it is frozen: it is in no group and its ``requires_grad`` is False. Vectors are
    not decayed. Raises ValueError for a pattern that matches no parameter, and if all are frozen.
    """
    multipliers = list(multipliers)
    check_multipliers(multipliers)
    for pattern, _ in multipliers:
        if not any(re.search(pattern, name) for name in parameters):
            raise ValueError(f"{pattern!r} matches no parameter of the student")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        found = (m for pattern, m in multipliers if re.search(pattern, name))
        multiplier = next(found, 1.0)
        parameter.requires_grad_(multiplier > 0)
        if not multiplier:
            continue
        decay = weight_decay if parameter.ndim > 1 else 0.0
        settings = {"multiplier": multiplier, "weight_decay": decay}
        group = groups.setdefault((multiplier, decay), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("every parameter of the student is frozen")
    return list(groups.values())
