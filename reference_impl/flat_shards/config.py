"""What a model is set up for, and in which precision. Source: Fast-LLM, ``multi_stage/config.py``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import torch


class ShardName:
    """Names of the shards that every model has; those of optimizer state are the optimizer's."""

    weights = "weights"
    grads = "grads"


class StageMode(StrEnum):
    """What a stage can do once it is set up."""

    training = "training"
    inference = "inference"
    weights = "weights"
    off_device = "off_device"

    @property
    def support_forward(self) -> bool:
        """Whether it has a buffer, and parameters in it."""
        return self in FORWARD_MODES

    @property
    def support_backward(self) -> bool:
        """Whether it has gradients."""
        return self in BACKWARD_MODES

    @property
    def support_training(self) -> bool:
        """Whether it has optimizer state."""
        return self is StageMode.training

    @property
    def on_device(self) -> bool:
        """Whether it has weights at all."""
        return self is not StageMode.off_device


FORWARD_MODES = (StageMode.training, StageMode.inference)
BACKWARD_MODES = (StageMode.training,)


def check_mode(owner: str, mode: StageMode | None, what: str, modes: Collection[StageMode]) -> None:
    """Raise RuntimeError unless ``owner`` is set up, in one of the modes that have ``what``."""
    if mode is None:
        raise RuntimeError(f"{owner} is not set up")
    if mode not in modes:
        raise RuntimeError(f"{owner} has no {what} in mode {mode}")


@dataclass(frozen=True)
class Precision:
    """The dtypes of the four flat tensors."""

    compute_dtype: torch.dtype = torch.float32
    """Of weight buffers, and so of parameters."""
    optimization_dtype: torch.dtype = torch.float32
    """Of shards, those of optimizer state included."""
    full_precision_gradients: bool = True
    """Whether gradients are accumulated and reduced in ``optimization_dtype``."""
    store_frozen_weights_in_optimization_precision: bool = True

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of gradient buffers."""
        return self.optimization_dtype if self.full_precision_gradients else self.compute_dtype

    def shard_dtype(self, trainable: bool) -> torch.dtype:
        """Of the shards of trainable or of frozen parameters."""
        if trainable or self.store_frozen_weights_in_optimization_precision:
            return self.optimization_dtype
        return self.compute_dtype


FLOAT32 = Precision()
"""Everything in float32."""
