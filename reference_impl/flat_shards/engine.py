"""Flat shards as one object: layouts by arithmetic, and models on the ranks of the current group."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.flat_shards import resharding
from reference_impl.flat_shards.config import Precision, ShardName, StageMode
from reference_impl.flat_shards.layout import FlatLayout, ParameterMeta, buffer_order
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.optimizer import STATE_NAMES, ShardedOptimizer, clip_gradients
from reference_impl.ranks import current_ranks


class Layout(FlatLayout):
    """A layout with what can be done with the shards of all ranks in one process."""

    def cut(self, values: Mapping[str, Tensor], rank: int, tensor_rank: int = 0) -> Tensor:
        """See :func:`reference_impl.flat_shards.resharding.cut`."""
        return resharding.cut(self, values, rank, tensor_rank)

    def join(self, shards: Mapping[tuple[int, int], Tensor]) -> dict[str, Tensor]:
        """See :func:`reference_impl.flat_shards.resharding.join`."""
        return resharding.join(self, shards)

    def reshard(
        self, shards: Mapping[tuple[int, int], Tensor], to: FlatLayout
    ) -> dict[tuple[int, int], Tensor]:
        """See :func:`reference_impl.flat_shards.resharding.reshard`."""
        return resharding.reshard(self, shards, to)


class Sharded:
    """A model with its optimizer; see :class:`conformance.contracts.ShardedModel`."""

    def __init__(
        self,
        model: MultiStageModel,
        optimizer: Mapping[str, Any] | None = None,
        allow_no_grad: bool = True,
    ) -> None:
        self.model = model
        self.allow_no_grad = allow_no_grad
        self.complete = False
        """Whether the gradient shards hold gradients of this step."""
        self.optimizer: ShardedOptimizer | None = None
        if optimizer is not None:
            options = dict(optimizer)
            self.optimizer = ShardedOptimizer(model, options.pop("name"), **options)

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`MultiStageModel.forward`."""
        return self.model.forward(x)

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, whole, from the shards."""
        return dict(self.model.export_state())

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """See :meth:`MultiStageModel.import_state`."""
        self.model.import_state(values)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients, and reduce them with ``last``."""
        loss.backward()
        if last:
            self.model.reduce_gradients(accumulate=self.complete, allow_no_grad=self.allow_no_grad)
            self.complete = True

    def full_gradients(self) -> dict[str, Tensor]:
        """The reduced gradients, whole."""
        return dict(self.model.export_state(ShardName.grads))

    def step(self) -> None:
        """One step of the optimizer."""
        if self.optimizer is None:
            raise RuntimeError("the model has no optimizer")
        self.optimizer.step()
        self.complete = False

    def clip_gradients(self, max_norm: float) -> float:
        """See :func:`reference_impl.flat_shards.optimizer.clip_gradients`."""
        return clip_gradients(self.model, max_norm)

    def save(self, directory: str) -> None:
        """See :meth:`ShardedOptimizer.save`."""
        (self.optimizer or self.model).save(directory)

    def load(self, directory: str) -> None:
        """See :meth:`ShardedOptimizer.load`."""
        (self.optimizer or self.model).load(directory)
        self.complete = False

    def restore(self) -> None:
        """See :meth:`MultiStageModel.restore_parameters`."""
        self.model.restore_parameters()

    def invalidate(self) -> None:
        """See :meth:`MultiStageModel.invalidate_buffers`."""
        self.model.invalidate_buffers()

    def parameter(self, name: str) -> nn.Parameter:
        """See :meth:`MultiStageModel.parameter`."""
        return self.model.parameter(name)

    def buffers(self) -> list[Tensor]:
        """The weight buffers of all units."""
        return [unit.weight_buffer for unit in self.model.units if unit.weight_buffer is not None]

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """See :meth:`Stage.forward`."""
        return self.model._stages[index].forward(x)

    def restore_stage(self, index: int) -> None:
        """See :meth:`Stage.restore_parameters`."""
        self.model._stages[index].restore_parameters()

    def get_shard(self, name: str) -> Tensor:
        """See :meth:`MultiStageModel.get_shard`."""
        return self.model.get_shard(name)

    def split_shard(self, name: str) -> dict[str, Tensor]:
        """What this rank's shards hold of every parameter, in order: views."""
        self.model.get_shard(name)  # raises for a shard that there is not
        return {
            parameter: part
            for unit in self.model.units
            if unit.shard_length(name)
            for parameter, part in unit.split_shard(unit.shards[name]).items()
        }


class FlatShards:
    """See :class:`conformance.contracts.FlatLayout` and :class:`conformance.contracts.FlatShards`."""

    layout_type = Layout
    model_type = MultiStageModel
    sharded_type = Sharded

    def flat_layout(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        *,
        ranks: int = 1,
        tensor_ranks: int = 1,
        tensor_dims: Mapping[str, int] | None = None,
        weight_decay: Mapping[str, bool] | None = None,
        sequence_parallel: Sequence[str] = (),
    ) -> Layout:
        """The layout of parameters over ranks; sorted if ``weight_decay`` is given.

        Raises ValueError for what :class:`FlatLayout` refuses, for ``tensor_dims`` or
        ``sequence_parallel`` of a parameter that there is not, and for a ``weight_decay`` that is
        not of each parameter and of no other.
        """
        dims = tensor_dims or {}
        check_known("tensor_dims", dims, parameters)
        check_known("sequence_parallel", sequence_parallel, parameters)
        if weight_decay is not None:
            check_known("weight_decay", weight_decay, parameters)
            missing = [name for name in parameters if name not in weight_decay]
            if missing:
                raise ValueError(f"weight_decay lacks {', '.join(missing)}")
        metas = [
            ParameterMeta(
                name,
                tuple(shape),
                dims.get(name),
                weight_decay=True if weight_decay is None else weight_decay[name],
                sequence_parallel=name in sequence_parallel,
            )
            for name, shape in parameters.items()
        ]
        ordered = metas if weight_decay is None else buffer_order(metas)
        return self.layout_type(tuple(ordered), ranks, tensor_ranks)

    def flat_shards(
        self,
        modules: Sequence[nn.Module],
        *,
        optimizer: Mapping[str, Any] | None = None,
        training: bool = True,
        compute_dtype: torch.dtype | None = None,
        buffers: int | None = None,
        allow_no_grad: bool = True,
    ) -> Sharded:
        """A model on the ranks of the current group."""
        names = STATE_NAMES[optimizer["name"]].values() if optimizer and training else ()
        model = self.model_type(
            modules,
            mode=StageMode.training if training else StageMode.inference,
            precision=Precision(compute_dtype=compute_dtype or torch.float32),
            ranks=current_ranks(),
            optimizer_state_names=tuple(names),
            num_weight_buffers=buffers,
        )
        return self.sharded_type(model, optimizer, allow_no_grad)


def check_known(what: str, names: Iterable[str], parameters: Container[str]) -> None:
    """Raise ValueError that names what is none of the parameters."""
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise ValueError(f"{what} has unknown names: {', '.join(unknown)}")
