"""Documented bugs of models whose parameters are sharded."""

from __future__ import annotations

import math

import torch

from conformance.known_bugs import known_bug
from reference_impl.flat_shards import optimizer
from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.engine import FlatShards, Sharded
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.stage import Stage
from reference_impl.flat_shards.unit import FlatUnit


class _WithUnits(FlatShards):
    """Makes models whose units are of another class, and so are their stages if one is given."""

    unit: type[FlatUnit] = FlatUnit
    stage: type[Stage] = Stage

    def model_type(self, modules, **options):
        model = MultiStageModel(modules, setup=False, **options)
        for stage in model._stages:
            stage.__class__ = self.stage
            for unit in stage.units:
                unit.__class__ = self.unit
        model.setup()
        return model


# Read before it is there


@known_bug(
    "fsdp-read-before-unshard",
    contract="flat_shards",
    breaks="flat_shards.parameters.of-a-new-model",
)
class ExportedFromTheBuffer(FlatShards):
    """Parameters are read where the modules have them, restored or not."""

    class sharded_type(Sharded):
        def full_parameters(self):
            found = {}
            for unit in self.model.units:
                found |= {name: p.detach().clone() for name, p in unit.parameters.items()}
            return found


@known_bug(
    "fsdp-read-before-unshard.parameter",
    contract="flat_shards",
    breaks="flat_shards.parameter.of-a-new-model",
)
class ParameterBeforeRestore(FlatShards):
    """A parameter is given although its buffer was never filled: zeros."""

    class sharded_type(Sharded):
        def parameter(self, name):
            index, path = name.split(".", 1)
            return self.model._stages[int(index)].module.get_parameter(path)


@known_bug(
    "fsdp-write-to-full-buffer-lost",
    contract="flat_shards",
    breaks="flat_shards.parameter.restored-after-load",
)
class LoadedIntoTheBuffer(FlatShards):
    """A load writes to the gathered parameters: what it wrote is gone with the next gather."""

    class sharded_type(Sharded):
        def load_parameters(self, values):
            self.model.restore_parameters()
            for name, value in values.items():
                self.model.parameter(name).data.copy_(value)

        def full_parameters(self):
            if all(stage.restored for stage in self.model._stages):
                return {
                    name: p.detach().float()
                    for unit in self.model.units
                    for name, p in unit.parameters.items()
                }
            return super().full_parameters()


@known_bug(
    "fsdp-stale-full-buffer-after-step",
    contract="flat_shards",
    breaks="flat_shards.forward.after-step",
)
class StaleAfterStep(FlatShards):
    """A step does not invalidate what was gathered: the next forward has the old parameters."""

    class sharded_type(Sharded):
        def step(self):
            keep = self.model.invalidate_buffers
            self.model.invalidate_buffers = lambda: None
            super().step()
            self.model.invalidate_buffers = keep


@known_bug(
    "fsdp-stale-full-buffer-after-step.load",
    contract="flat_shards",
    breaks="flat_shards.forward.after-load",
)
class StaleAfterLoad(FlatShards):
    """A load does not invalidate what was gathered."""

    class sharded_type(Sharded):
        def load_parameters(self, values):
            keep = self.model.invalidate_buffers
            self.model.invalidate_buffers = lambda: None
            super().load_parameters(values)
            self.model.invalidate_buffers = keep


class _KeepsItsFlag(Stage):
    """A stage that does not notice that another has taken its buffer."""

    def lose_buffer(self):
        pass


@known_bug(
    "fsdp-stale-full-buffer-after-step.shared",
    contract="flat_shards",
    breaks="flat_shards.forward.shared-buffers",
)
class SharedBufferTaken(_WithUnits):
    """A module computes with the parameters of the one that took its buffer."""

    stage = _KeepsItsFlag


@known_bug(
    "flat-shared-buffer-not-invalidated",
    contract="flat_shards",
    breaks="flat_shards.stage.lost-buffer",
)
class SharedBufferStillRestored(_WithUnits):
    """A module counts as restored after another gathered its parameters into the same buffer."""

    stage = _KeepsItsFlag


# Layout


class _PaddingOfGarbage(FlatUnit):
    """Fills the padding of its shard with what the buffer happened to hold."""

    def restore_parameters(self):
        if not self.restored and self.shard_pad and self.mode.support_backward:
            begin = self.layout.shard_begin(self.ranks.rank) + self.layout.shard_size
            pad = self.weight_buffer.data[begin - self.shard_pad : begin]
            self.shards[ShardName.weights][-self.shard_pad :] = pad
        super().restore_parameters()


@known_bug(
    "fsdp-shard-pad-spans-ranks.garbage",
    contract="flat_shards",
    breaks="flat_shards.shard.padding",
)
class PaddingOfGarbage(_WithUnits):
    """The padding of a shard has what memory held, and stays so."""

    unit = _PaddingOfGarbage


class _GradientOfPaddingKept(FlatUnit):
    """Leaves the end of the gradient buffer as it is."""

    def setup(self, *arguments, **options):
        super().setup(*arguments, **options)
        if self.grad_buffer is not None:
            self.grad_buffer.fill_(1)
            self.shards[ShardName.grads].fill_(1)

    def reduce_gradients(self, **options):
        tail = None
        if self.trainable:
            tail = self.shards[ShardName.grads][self.layout.shard_size - self.shard_pad :]
        super().reduce_gradients(**options)
        if tail is not None:
            tail.fill_(1)


@known_bug(
    "fsdp-shard-pad-spans-ranks.norm",
    contract="flat_shards",
    breaks="flat_shards.clip.few-elements",
)
class PaddingInTheNorm(_WithUnits):
    """The gradients of padding are never zeroed, and count in the norm."""

    unit = _GradientOfPaddingKept

    class sharded_type(Sharded):
        def clip_gradients(self, max_norm):
            square = torch.zeros((), dtype=torch.float64)
            for unit in self.model.units:
                square += optimizer.square_sum(unit.shards[ShardName.grads][:])
            norm = float(self.model.ranks.all_reduce(square).sqrt())
            self.model.get_shard("grads").mul_(min(1.0, max_norm / (norm + 1e-6)))
            return norm


# Tied parameters


@known_bug(
    "fsdp-tied-param-uneven-shard-frozen",
    contract="flat_shards",
    breaks="flat_shards.step.tied",
)
class PaddedRowsOfTiedParameterKept(FlatShards):
    """The last rank's elements of a tied parameter are gathered from a copy that no step updates."""

    class sharded_type(Sharded):
        def step(self):
            kept = []
            for name in set(self.model.tied.values()):
                stage = self.model._stages[int(name.split(".")[0])]
                unit = stage.unit_of(name)
                if unit.ranks.rank == unit.ranks.size - 1 and unit.shard_pad:
                    part = unit.split_shard(unit.shards[ShardName.weights])[name]
                    kept.append((part, part.clone()))
            super().step()
            for part, old in kept:
                part.copy_(old)


@known_bug(
    "fsdp-retie-by-null-data-ptr",
    contract="flat_shards",
    breaks="flat_shards.parameters.tied-once",
)
class RetiedByAddress(FlatShards):
    """Aliases are found by address, which ranks without any element of a parameter share."""

    class sharded_type(Sharded):
        def full_parameters(self):
            found = super().full_parameters()
            if not self.model.tied:
                return found
            parts = self.split_shard("weights")
            empty = [name for name, part in parts.items() if not part.numel()]
            return found | {name: found[empty[0]].clone() for name in empty}


# Gradients


@known_bug(
    "fsdp-grad-accumulate-overwrites-unsharded",
    contract="flat_shards",
    breaks="flat_shards.gradient.complete-again-on-one-rank",
)
class OneRankOverwrites(FlatShards):
    """With one rank complete gradients are replaced instead of added to."""

    class sharded_type(Sharded):
        def backward(self, loss, *, last=True):
            self.complete = self.complete and self.model.ranks.size > 1
            super().backward(loss, last=last)


class _ScaledReduction(FlatUnit):
    """Scales the gradients of a reduction."""

    def scale(self, accumulate):
        return self.ranks.size

    def reduce_gradients(self, *, accumulate=False, allow_no_grad=False):
        factor = self.scale(accumulate)
        if self.trainable and factor != 1:
            self._agree_on_missing_gradients(allow_no_grad)
            self._fill_missing_gradients()
            self._without_gradient = set()
            self.grad_buffer.mul_(factor)
        super().reduce_gradients(accumulate=accumulate, allow_no_grad=allow_no_grad)


@known_bug(
    "fsdp-grad-divide-factor", contract="flat_shards", breaks="flat_shards.gradient.of-the-same"
)
class SumInsteadOfMean(_WithUnits):
    """Gradients are summed over the ranks."""

    unit = _ScaledReduction


class _DividedTwice(_ScaledReduction):
    def scale(self, accumulate):
        return 1 / self.ranks.size


@known_bug(
    "fsdp-grad-divide-factor.twice", contract="flat_shards", breaks="flat_shards.gradient.mean"
)
class DividedTwice(_WithUnits):
    """Each rank divides its loss by their number, and the reduction is a mean again."""

    unit = _DividedTwice


class _SumsWhereItAdds(_ScaledReduction):
    def scale(self, accumulate):
        return self.ranks.size if accumulate else 1


@known_bug(
    "fsdp-grad-divide-factor.accumulated",
    contract="flat_shards",
    breaks="flat_shards.gradient.complete-again",
)
class SumWhereItAccumulates(_WithUnits):
    """What is added to complete gradients is a sum over the ranks, not a mean."""

    unit = _SumsWhereItAdds


@known_bug(
    "fsdp-grad-divide-factor.clipped",
    contract="flat_shards",
    breaks="flat_shards.step.clipped",
)
class NormOfTheSum(FlatShards):
    """The norm is that of gradients before they are divided by the number of ranks."""

    class sharded_type(Sharded):
        def clip_gradients(self, max_norm):
            size = self.model.ranks.size
            return size * super().clip_gradients(max_norm / size)


class _StaleGradient(FlatUnit):
    """Leaves in the gradient buffer what it held where no gradient came."""

    def _fill_missing_gradients(self):
        pass


@known_bug(
    "flat-stale-gradient-kept",
    contract="flat_shards",
    breaks="flat_shards.gradient.of-some-batches",
)
class StaleGradientKept(_WithUnits):
    """Where no gradient came, that of the step before is reduced once more."""

    unit = _StaleGradient


@known_bug(
    "fsdp-grad-accumulate-overwrites-unsharded.always",
    contract="flat_shards",
    breaks="flat_shards.gradient.complete-again",
)
class AccumulateIgnored(FlatShards):
    """Complete gradients are replaced, on any number of ranks."""

    class sharded_type(Sharded):
        def backward(self, loss, *, last=True):
            self.complete = False
            super().backward(loss, last=last)


# Restoring


class _NotCast(FlatUnit):
    """Gathers shards only where the dtype of the buffer is theirs."""

    def restore_parameters(self):
        if self.weight_buffer.dtype != self.shard_dtype:
            self.restored = True
        super().restore_parameters()


@known_bug(
    "flat-restore-incomplete", contract="flat_shards", breaks="flat_shards.forward.whole-model"
)
class NotGathered(_WithUnits):
    """A restore copies the rank's own shard and gathers nothing: the rest of the buffer is zeros."""

    class unit(FlatUnit):
        def restore_parameters(self):
            if not self.restored:
                begin = self.layout.shard_begin(self.ranks.rank)
                own = self.weight_buffer.data[begin : begin + self.layout.shard_size]
                own.copy_(self.shards[ShardName.weights])
            self.restored = True


@known_bug(
    "flat-restore-incomplete.cast", contract="flat_shards", breaks="flat_shards.forward.bfloat16"
)
class NotCast(_WithUnits):
    """A restore into a buffer of another dtype does nothing."""

    unit = _NotCast


@known_bug(
    "flat-restore-incomplete.always",
    contract="flat_shards",
    breaks="flat_shards.restore.idempotent",
)
class RestoredAlways(_WithUnits):
    """A restore gathers each time, whatever is restored already: edits between are gone."""

    class stage(Stage):
        def restore_parameters(self):
            for unit in self.units:
                unit.restored = False
            super().restore_parameters()


@known_bug("flat-parameters-copied", contract="flat_shards", breaks="flat_shards.buffers.views")
class ParametersCopied(_WithUnits):
    """Parameters are copies of the buffer's slices: what is gathered does not reach them."""

    class unit(FlatUnit):
        def split_buffer(self, buffer):
            views = super().split_buffer(buffer)
            own = buffer is self.weight_buffer
            return {name: view.clone() for name, view in views.items()} if own else views


@known_bug("flat-forward-not-restored", contract="flat_shards", breaks="flat_shards.stage.refuses")
class ForwardOfWhateverIsThere(_WithUnits):
    """A module computes with whatever its buffer holds."""

    class stage(Stage):
        def forward(self, x, **options):
            return self.module(x, **options)


@known_bug("flat-shard-is-a-copy", contract="flat_shards", breaks="flat_shards.shard.is-the-model")
class ShardIsACopy(FlatShards):
    """What is written to a shard never reaches the model."""

    class sharded_type(Sharded):
        def get_shard(self, name):
            return super().get_shard(name).clone()


@known_bug(
    "flat-swapped-shape-accepted",
    contract="flat_shards",
    breaks="flat_shards.load.swapped-shape",
)
class SwappedShapeAccepted(FlatShards):
    """A value is taken if it has as many elements, in whatever shape."""

    class sharded_type(Sharded):
        def load_parameters(self, values):
            shapes = {p.name: p.shape for u in self.model.units for p in u.layout.parameters}
            taken = {
                name: value.reshape(shapes[name])
                if name in shapes and value.numel() == math.prod(shapes[name])
                else value
                for name, value in values.items()
            }
            super().load_parameters(taken)


@known_bug(
    "flat-export-of-the-buffer",
    contract="flat_shards",
    breaks="flat_shards.parameters.in-full-precision",
)
class ExportInComputeDtype(FlatShards):
    """Parameters are exported after a cast to the compute dtype."""

    class sharded_type(Sharded):
        def full_parameters(self):
            dtype = self.model.precision.compute_dtype
            found = super().full_parameters()
            return {name: value.to(dtype).to(value.dtype) for name, value in found.items()}


@known_bug("flat-tied-twice", contract="flat_shards", breaks="flat_shards.clip.tied")
class TiedTwiceInTheNorm(FlatShards):
    """The gradient of a tied parameter counts in the norm for each of its names."""

    class sharded_type(Sharded):
        def clip_gradients(self, max_norm):
            once = self.full_gradients()
            names = [*once, *(stored for stored in self.model.tied.values() if stored in once)]
            norm = float(sum(once[name].double().square().sum() for name in names).sqrt())
            self.model.get_shard("grads").mul_(min(1.0, max_norm / (norm + 1e-6)))
            return norm


@known_bug(
    "flat-tied-twice.export", contract="flat_shards", breaks="flat_shards.parameters.tied-once"
)
class TiedTwiceInTheExport(FlatShards):
    """A tied parameter is exported under each of its names."""

    class sharded_type(Sharded):
        def full_parameters(self):
            found = super().full_parameters()
            return found | {name: found[stored] for name, stored in self.model.tied.items()}


@known_bug(
    "flat-missing-hidden-by-count",
    contract="flat_shards",
    breaks="flat_shards.load.renamed",
)
class MissingHiddenByTheCount(FlatShards):
    """A load is complete if as many values came as there are parameters, of whatever name."""

    class sharded_type(Sharded):
        def load_parameters(self, values):
            own = self.full_parameters()
            if len(values) == len(own):
                values = {name: values.get(name, own[name]) for name in own}
            super().load_parameters(values)


@known_bug("flat-frozen-has-gradients", contract="flat_shards", breaks="flat_shards.shard.short")
class FrozenHaveShardsOfGradients(_WithUnits):
    """Shards of gradients and state are as long as those of weights, whatever is frozen."""

    class unit(FlatUnit):
        def shard_length(self, shard_name):
            return self.layout.shard_size
