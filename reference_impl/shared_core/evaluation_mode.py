"""Running a model in evaluation mode, and giving each of its modules its own mode back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and each in its own mode again afterwards.

    ``module.train()`` would set all of them alike: a part that was frozen on purpose would wake up.
    """
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
