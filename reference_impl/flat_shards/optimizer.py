"""torch's optimizers on flat shards, their state in shards of its own; clipping by the global norm.

An optimizer sees shards, not parameters: every rank updates its own part of the model, and reads
nothing of the others'. Parameters without weight decay lie first in a unit, so that each unit is two
ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.unit import FlatUnit

STATE_NAMES: dict[str, dict[str, str]] = {
    "sgd": {"momentum_buffer": "momentum_buffers"},
    "adamw": {"exp_avg": "exp_avgs", "exp_avg_sq": "exp_avgs_sq"},
}
"""State of each optimizer: torch's name for a parameter's, and the name of the shard."""


class ShardedOptimizer:
    """``"sgd"`` or ``"adamw"`` of ``torch.optim`` on the shards of a model, with its options.

    The model has been made with ``optimizer_state_names=tuple(STATE_NAMES[name].values())``.
    """

    def __init__(self, model: MultiStageModel, name: str, **options: Any) -> None:
        self.model = model
        self.name = name
        self.parts = list(trained_parts(model))
        groups = [
            {"params": [part["weights"] for part in self.parts if part["decays"] is decays]}
            for decays in (True, False)
        ]
        groups[1]["weight_decay"] = 0.0
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
        self.optimizer = kind(groups, **options)
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """Say how many steps were made; the state in the shards is taken as it is."""
        self.steps = steps
        for part in self.parts:
            state = {theirs: part[ours] for theirs, ours in STATE_NAMES[self.name].items()}
            if self.name == "adamw":
                state["step"] = torch.tensor(float(steps))
            self.optimizer.state[part["weights"]] = state

    def clip_gradients(self, max_norm: float) -> float:
        """See :func:`clip_gradients`."""
        return clip_gradients(self.model, max_norm)

    def step(self) -> None:
        """Update the shards by the gradient shards; buffers are stale then, and invalidated."""
        for part in self.parts:
            part["weights"].grad = part["grads"]
        self.optimizer.step()
        self.steps += 1
        self.model.invalidate_buffers()

    def save(self, directory: str | Path) -> None:
        """Write weights, optimizer state and the number of steps. Collective."""
        self.model.save(directory, steps=self.steps)

    def load(self, directory: str | Path) -> None:
        """Read what :meth:`save` wrote, on any number of ranks. Collective."""
        self.set_steps(int(self.model.load(directory).get("steps", 0)))


def trained_parts(model: MultiStageModel) -> Iterator[dict[str, Any]]:
    """The ranges of the shards that decay, or do not: each shard's view of them, by shard name."""
    for unit in model.units:
        if not unit.trainable:
            continue
        middle = first_decaying(unit)
        for decays, begin, end in ((False, 0, middle), (True, middle, unit.layout.shard_size)):
            if begin < end:
                views = {name: shard[begin:end] for name, shard in unit.shards.items()}
                yield {"decays": decays} | views


def first_decaying(unit: FlatUnit) -> int:
    """Where the parameters with weight decay begin in this rank's shard."""
    decaying = [name for name in unit.layout.names if unit.layout.meta(name).weight_decay]
    if not decaying:
        return unit.layout.shard_size
    return unit.range_in_shard(decaying[0])[0]


def clip_gradients(model: MultiStageModel, max_norm: float) -> float:
    """Scale gradients so that their norm is at most ``max_norm``; the norm before. Collective."""
    norm = gradient_norm(model)
    factor = min(1.0, max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
    if factor < 1:
        model.get_shard(ShardName.grads).mul_(factor)
    return norm


def gradient_norm(model: MultiStageModel) -> float:
    """The norm of the gradient of all parameters, each element once. Collective.

    Parameters that tensor-parallel ranks all hold are counted on the first of them.
    """
    squares = torch.zeros((), dtype=torch.float64, device=model.device)
    for unit in model.units:
        if not unit.trainable:
            continue
        for name, part in unit.split_shard(unit.shards[ShardName.grads]).items():
            whole = unit.layout.meta(name).tensor_parallel_dim is None
            if not (whole and model.tensor.rank):
                squares += square_sum(part)
    total = model.tensor.all_reduce(model.ranks.all_reduce(squares))
    return float(total.sqrt())


def square_sum(x: Tensor) -> Tensor:
    """The sum of the squares of the elements, in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
