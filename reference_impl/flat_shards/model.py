"""A model of stages over the ranks of a group: shards, buffers, gradients, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.flat_shards.config import FLOAT32, Precision, ShardName, StageMode
from reference_impl.flat_shards.layout import FlatLayout, buffer_order, check_same_parameters
from reference_impl.flat_shards.stage import Stage, StageCall, parameter_metas
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.ranks import OneRank, Ranks
from reference_impl.stored import all_finite

CPU = torch.device("cpu")


class MultiStageModel:
    """Modules that follow one another, whose parameters are flat shards.

    ``modules`` are this object's from now on: their parameters are replaced. What they hold is the
    initial value, the same on every rank; ``requires_grad`` says what trains, and a parameter that
    is there several times is tied. Names are those of ``nn.Sequential(*modules)``.

    ``ranks`` shard the model; ``tensor`` are the ranks that hold the other slices of parameters
    with an attribute ``tensor_parallel_dim``. ``optimizer_state_names`` are shards of their own.
    ``num_weight_buffers``: how many buffers the stages share in turn; default: each has its own.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        mode: StageMode = StageMode.training,
        precision: Precision = FLOAT32,
        ranks: Ranks | None = None,
        tensor: Ranks | None = None,
        optimizer_state_names: Sequence[str] = (),
        num_weight_buffers: int | None = None,
        setup: bool = True,
    ) -> None:
        self.mode = StageMode(mode)
        self.precision = precision
        self.ranks = ranks or OneRank()
        self.tensor = tensor or OneRank()
        self.optimizer_state_names = tuple(optimizer_state_names)
        self.num_weight_buffers = num_weight_buffers
        self.usable = False
        """Whether the shards hold weights: not before they are set up, nor after a load failed."""
        self.tied: dict[str, str] = {}
        """Names of tied parameters, and the name under which each is stored."""
        self.base_model = nn.Sequential(*modules)
        """The modules; while a stage is not restored, its parameters are not in them."""
        self._flat_shard: Tensor | None = None
        self._initial: dict[str, Tensor] = {}
        self._stages: list[Stage] = self._make_stages(modules)
        if setup:
            self.setup()

    @classmethod
    def from_pretrained(
        cls, modules: Sequence[nn.Module], directory: str | Path, **options: Any
    ) -> MultiStageModel:
        """The model of a checkpoint, which may be of other numbers of ranks. Collective.

        ``options`` as for the class. Shards hold the weights then, and parameters nothing.
        """
        model = cls(modules, **options)
        model.load(directory)
        return model

    # Stages

    @property
    def stages(self) -> list[Stage]:
        """The stages, in their order."""
        return self._stages

    def _make_stages(self, modules: Sequence[nn.Module]) -> list[Stage]:
        owners: dict[nn.Parameter, tuple[Stage, str]] = {}
        stages = []
        for index, module in enumerate(modules):
            metas = parameter_metas(index, module, self.tensor.size)
            borrowed = {name: owners[p] for name, (_, p) in metas.items() if p in owners}
            own = {name: pair for name, pair in metas.items() if name not in borrowed}
            units = []
            for trainable in (True, False):
                chosen = [meta for meta, _ in own.values() if meta.requires_grad is trainable]
                if chosen:
                    units.append(self._make_unit(index, chosen, trainable))
            stage = Stage(index, module, units, borrowed)
            for name, (_, parameter) in own.items():
                owners[parameter] = stage, name
                self._initial[name] = parameter.detach().clone()
            self.tied |= {name: stored for name, (_, stored) in borrowed.items()}
            self.tied |= names_within(index, module, owners)
            stages.append(stage)
        return stages

    def _make_unit(self, index: int, metas: list, trainable: bool) -> FlatUnit:
        layout = FlatLayout(tuple(buffer_order(metas)), self.ranks.size, self.tensor.size)
        return FlatUnit(
            f"stage_{index}" if trainable else f"stage_{index}_frozen",
            layout,
            trainable=trainable,
            precision=self.precision,
            ranks=self.ranks,
            tensor=self.tensor,
        )

    @property
    def units(self) -> list[FlatUnit]:
        """The units of all stages, in the order of the shards."""
        return [unit for stage in self._stages for unit in stage.units]

    @property
    def parameter_names(self) -> list[str]:
        """Names of all parameters that are stored, in the order of the shards."""
        return [name for unit in self.units for name in unit.layout.names]

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters, tied ones once; of this tensor-parallel rank's slices."""
        return sum(unit.layout.parameter_count for unit in self.units)

    # Setting up

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The shards that the mode has, in their order: weights, optimizer state, gradients."""
        names: tuple[str, ...] = (ShardName.weights,) if self.mode.on_device else ()
        names += self.optimizer_state_names if self.mode.support_training else ()
        return names + ((ShardName.grads,) if self.mode.support_backward else ())

    @property
    def state_shard_names(self) -> tuple[str, ...]:
        """The shards that a checkpoint has."""
        return tuple(name for name in self.shard_names if name != ShardName.grads)

    @property
    def device(self) -> torch.device:
        """Where the shards are: where the modules' parameters were; the CPU without any."""
        found = self._flat_shard if self._flat_shard is not None else None
        return next((x.device for x in (found, *self._initial.values()) if x is not None), CPU)

    def shard_length(self, shard_name: str) -> int:
        """Elements of a shard on each rank; before it is set up, too."""
        known = (ShardName.weights, *self.optimizer_state_names, ShardName.grads)
        if shard_name not in known:
            raise KeyError(f"Unknown shard name {shard_name}, expected one of {', '.join(known)}")
        return sum(unit.shard_length(shard_name) for unit in self.units)

    def setup(self) -> None:
        """Make shards and buffers, and put the initial values into the shards; once only."""
        if self._flat_shard is not None:
            raise RuntimeError("the model is set up already")
        dtypes = {unit.shard_dtype for unit in self.units}
        if len(dtypes) > 1:
            found = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"the shards of one model have one dtype, found {found}")
        total = sum(self.shard_length(name) for name in self.shard_names)
        dtype = dtypes.pop() if dtypes else self.precision.optimization_dtype
        self._flat_shard = torch.zeros(total, dtype=dtype, device=self.device)
        per_unit: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in self.units}
        place = 0
        for shard_name in self.shard_names:
            for unit in self.units:
                length = unit.shard_length(shard_name)
                per_unit[unit.name][shard_name] = self._flat_shard[place : place + length]
                place += length
        buffers = self._weight_buffers()
        for stage in self._stages:
            for unit in stage.units:
                unit.setup(self.mode, per_unit[unit.name], buffers.get(unit.name))
            stage.mode = self.mode
        if self.mode.support_forward:
            for stage in self._stages:
                stage.bind()
        if self.mode.on_device:
            self.initialize_weights(self._initial)
        self._initial = {}

    def _weight_buffers(self) -> dict[str, Tensor]:
        """Shared buffers by the unit that uses them; stages that own tied weights have their own."""
        number = self.num_weight_buffers
        if number is None or not self.mode.support_forward:
            return {}
        lenders = {owner for stage in self._stages for owner in stage.owners}
        sharing = [stage for stage in self._stages if stage not in lenders]
        buffers: dict[str, Tensor] = {}
        for first in range(min(number, len(sharing))):
            group = sharing[first::number]
            for stage in group:
                stage.sharing = [other for other in group if other is not stage]
            for trainable in (True, False):
                units = [u for stage in group for u in stage.units if u.trainable is trainable]
                size = max((unit.layout.buffer_size for unit in units), default=0)
                dtype = self.precision.compute_dtype
                buffer = torch.zeros(size, dtype=dtype, device=self.device)
                buffers |= {unit.name: buffer for unit in units}
        return buffers

    def initialize_weights(self, values: Mapping[str, Tensor]) -> None:
        """Put values into the weight shards: this rank's slices of parameters, by name."""
        for unit in self.units:
            shard = unit.shards[ShardName.weights]
            for name in unit.layout.names:
                first, last = unit.layout.range_of_parameter(name, self.ranks.rank)
                begin, end = unit.range_in_shard(name)
                shard[begin:end] = values[name].reshape(-1)[first:last]
            unit.reset_shard_pad(shard, ShardName.weights)
        self.usable = True
        self.invalidate_buffers()

    # Shards

    def get_shard(self, shard_name: str) -> Tensor:
        """This rank's flat shard of the whole model, padding included: a view, not a copy.

        Units follow one another; within each, parameters lie as its layout says. Raises RuntimeError
        before the model is set up, KeyError for a shard that the mode does not have.
        """
        if self._flat_shard is None:
            raise RuntimeError("the model is not set up")
        if shard_name not in self.shard_names:
            known = ", ".join(self.shard_names) or "none"
            raise KeyError(f"Unknown shard name {shard_name}, expected one of {known}")
        names = self.shard_names[: self.shard_names.index(shard_name)]
        begin = sum(self.shard_length(name) for name in names)
        return self._flat_shard[begin : begin + self.shard_length(shard_name)]

    def import_state(
        self, values: Mapping[str, Tensor], shard_name: str = ShardName.weights
    ) -> None:
        """Set every parameter, or its state, from whole tensors; tied ones under one of their names.

        Raises ValueError for names that are missing or unknown and shapes that do not fit, before
        anything is written.
        """
        units = [unit for unit in self.units if unit.shard_length(shard_name)]
        stored = self._under_stored_names(values)
        check_same_parameters(list(stored), [name for u in units for name in u.layout.names])
        for name, value in stored.items():
            if not all_finite(value):
                raise ValueError(f"{name} has values that are not finite")
        parts = [
            (unit, name, unit.parameter_global_to_shard(stored[name], name))
            for unit in units
            for name in unit.layout.names
        ]
        for unit, name, part in parts:
            begin, end = unit.range_in_shard(name)
            unit.shards[shard_name][begin:end] = part
        self.usable = True
        self.invalidate_buffers()

    def _under_stored_names(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for name, value in values.items():
            owner = self.tied.get(name, name)
            if owner in stored and not torch.equal(stored[owner], value):
                raise ValueError(f"{name} differs from {owner}, to which it is tied")
            stored.setdefault(owner, value)
        return stored

    def export_state(self, shard_name: str = ShardName.weights) -> Iterator[tuple[str, Tensor]]:
        """Every parameter that is stored, or its state, whole, from the shards. Collective."""
        self._need_weights()
        for unit in self.units:
            if unit.shard_length(shard_name):
                yield from unit.export_shard(unit.shards[shard_name])

    # Buffers

    def restore_parameters(self) -> None:
        """Restore every stage; raises RuntimeError where stages share buffers and cannot all be."""
        self._need_weights()
        for stage in self._stages:
            stage.restore_parameters()
        lost = [stage.index for stage in self._stages if not stage.restored]
        if lost:
            raise RuntimeError(
                f"stages {lost} share buffers with later ones: restore them one at a time"
            )

    def invalidate_buffers(self) -> None:
        """Restore anew next time: the shards have changed."""
        for stage in self._stages:
            stage.invalidate_buffer()

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter of a module; raises RuntimeError while it does not hold what the shards do."""
        index = int(name.split(".")[0])
        stage = self._stages[index]
        if not stage.restored:
            raise RuntimeError(f"{name} is not in the buffer: stage {index} is not restored")
        return stage.module.get_parameter(name.removeprefix(f"{index}."))

    def fill_invalid_buffers(self, value: float | None) -> None:
        """Fill buffers with ``value`` now and whenever they are invalidated: a reader then shows.

        Restored stages are invalidated. None: leave them alone from now on.
        """
        for stage in self._stages:
            stage.poison = value
            stage.invalidate_buffer()

    # Forward and backward

    def __call__(self, x: Tensor) -> Tensor:
        """See :meth:`forward`."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last stage. Restores each stage when its turn comes. Collective."""
        self._need_weights()
        recorded = torch.empty(0, requires_grad=True)
        for stage in self._stages:
            stage.restore_parameters()
            if torch.is_grad_enabled() and self.mode.support_backward:
                x = StageCall.apply(x, stage, {}, recorded)
            else:
                x = stage.forward(x)
        return x

    def reset_gradients(self) -> None:
        """See :meth:`FlatUnit.reset_gradients`."""
        for stage in self._stages:
            stage.reset_gradients()

    def reduce_gradients(self, *, accumulate: bool = False, allow_no_grad: bool = False) -> None:
        """See :meth:`FlatUnit.reduce_gradients`. Stages that are not restored are, first."""
        for stage in self._stages:
            stage.restore_parameters()
            stage.reduce_gradients(accumulate=accumulate, allow_no_grad=allow_no_grad)

    def _need_weights(self) -> None:
        if self._flat_shard is None:
            raise RuntimeError("the model is not set up")
        if not self.usable:
            raise RuntimeError("the model has no weights: loading them failed")

    # Checkpoints

    def save(self, directory: str | Path, **metadata: object) -> None:
        """Write a checkpoint; see :func:`reference_impl.flat_shards.checkpoint.save`."""
        from reference_impl.flat_shards.checkpoint import save

        save(self, directory, metadata)

    def load(self, directory: str | Path) -> dict[str, object]:
        """Read a checkpoint; see :func:`reference_impl.flat_shards.checkpoint.load`."""
        from reference_impl.flat_shards.checkpoint import load

        return load(self, directory)


def names_within(
    index: int, module: nn.Module, owners: Mapping[nn.Parameter, tuple[Stage, str]]
) -> dict[str, str]:
    """Further names that a module has for its parameters, and where each is stored."""
    tied = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored = owners[parameter][1]
        if f"{index}.{name}" != stored:
            tied[f"{index}.{name}"] = stored
    return tied
