"""Subtle mistakes in sharded models that no catalogue lists, one or more a requirement."""

import pytest
import torch
from mutants import Broken

from reference_impl.flat_shards import optimizer
from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.engine import FlatShards, Sharded
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.unit import FlatUnit

NEAR_FLAT: dict[str, Broken] = {}
WEIGHTS, GRADS = ShardName.weights, ShardName.grads


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"flat_shards.{breaks}"
        NEAR_FLAT[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


def near_model(breaks: str):
    """Register a model, which takes the place of the reference's."""

    def decorate(model: type[Sharded]) -> type:
        members = {"sharded_type": model, "__doc__": model.__doc__}
        near(breaks)(type(model.__name__, (FlatShards,), members))
        return model

    return decorate


def made_of(modules, unit: type[FlatUnit], **options) -> MultiStageModel:
    """A model whose units are of another class."""
    model = MultiStageModel(modules, setup=False, **options)
    for each in model.units:
        each.__class__ = unit
    model.setup()
    return model


def near_unit(breaks: str):
    """Register a unit, which takes the place of the reference's."""

    def decorate(unit: type[FlatUnit]) -> type:
        def model_type(self, modules, **options):
            return made_of(modules, unit=unit, **options)

        members = {"model_type": model_type, "__doc__": unit.__doc__}
        near(breaks)(type(unit.__name__, (FlatShards,), members))
        return unit

    return decorate


def in_buffers(model: MultiStageModel) -> dict[str, torch.Tensor]:
    """Copies of what the buffers hold of every parameter."""
    pairs = (pair for unit in model.units for pair in unit.parameters.items())
    return {name: parameter.detach().float().clone() for name, parameter in pairs}


def own_slice(unit: FlatUnit) -> torch.Tensor:
    """This rank's place in a buffer."""
    begin = unit.layout.shard_begin(unit.ranks.rank)
    return unit.weight_buffer.data[begin : begin + unit.layout.shard_size]


@pytest.mark.parametrize("name", NEAR_FLAT)
def test_near_miss_is_caught(name):
    NEAR_FLAT[name].assert_caught()


# What is read


@near_model("parameters.of-few-elements")
class EmptyShardsReadBuffers(Sharded):
    """A rank whose shard is all padding reads parameters from its buffer."""

    def full_parameters(self):
        found = super().full_parameters()
        empty = all(u.shard_pad == u.layout.shard_size for u in self.model.units)
        return in_buffers(self.model) if empty else found


@near_model("parameters.on-one-rank")
class OneRankReadsByName(Sharded):
    """The shard of one rank is cut in the order of names, not in that of the layout."""

    def full_parameters(self):
        found = super().full_parameters()
        if self.model.ranks.size > 1:
            return found
        for unit in self.model.units:
            place, shard = 0, unit.shards[WEIGHTS]
            for name in sorted(unit.layout.names):
                end = place + found[name].numel()
                found[name] = shard[place:end].view(found[name].shape).clone()
                place = end
        return found


@near_model("parameters.frozen")
class FrozenAreNotGathered(Sharded):
    """Elements of frozen parameters that other ranks hold are read as zeros."""

    def full_parameters(self):
        found, parts = super().full_parameters(), self.split_shard(WEIGHTS)
        for unit in self.model.units:
            for name in () if unit.trainable else unit.layout.names:
                first, last = unit.layout.range_of_parameter(name, self.model.ranks.rank)
                own = torch.zeros_like(found[name]).view(-1)
                own[first:last] = parts[name]
                found[name] = own.view(found[name].shape)
        return found


@near_model("parameters.scalars")
class ScalarsHaveAnAxis(Sharded):
    """A scalar is read with an axis of length 1."""

    def full_parameters(self):
        return {name: x if x.ndim else x[None] for name, x in super().full_parameters().items()}


@near_model("parameters.copies")
class ReadOnce(Sharded):
    """What was read is kept, and given again."""

    kept = None

    def full_parameters(self):
        self.kept = self.kept or super().full_parameters()
        return self.kept


@near_model("parameters.after-forward")
class DecaysInBackward(Sharded):
    """The backward pass decays the weights a little."""

    def backward(self, loss, *, last=True):
        super().backward(loss, last=last)
        self.model.get_shard(WEIGHTS).mul_(1 - 1e-6)


# Loading


@near_model("load.read-back")
class LastElementNotLoaded(Sharded):
    """The last element of every shard stays as it was."""

    def load_parameters(self, values):
        parts = [part for part in self.split_shard(WEIGHTS).values() if part.numel()]
        last = parts[-1][-1].clone() if parts else None
        super().load_parameters(values)
        if parts:
            parts[-1][-1] = last


@near_model("load.any-order")
class LoadedByShape(Sharded):
    """Values of one shape are handed out in the order in which they come."""

    def load_parameters(self, values):
        shapes = {name: value.shape for name, value in self.full_parameters().items()}
        queues = {}
        for name in values:
            queues.setdefault(values[name].shape, []).append(values[name])
        super().load_parameters({name: queues[shape].pop(0) for name, shape in shapes.items()})


@near_model("load.own-copy")
class KeepsWhatWasLoaded(Sharded):
    """What was loaded is kept as it was given, and read again."""

    given = None

    def load_parameters(self, values):
        super().load_parameters(values)
        self.given = dict(values)

    def full_parameters(self):
        return self.given or super().full_parameters()


@near_model("load.unknown")
class UnknownIsIgnored(Sharded):
    """Names that the model does not have are ignored."""

    def load_parameters(self, values):
        known = set(self.model.parameter_names) | set(self.model.tied)
        super().load_parameters({name: x for name, x in values.items() if name in known})


@near_model("load.other-shape")
class OneRowIsSpread(Sharded):
    """A value with an axis of length 1 is spread."""

    def load_parameters(self, values):
        own = self.full_parameters()
        spread = {
            name: x.expand_as(own[name]) if name in own and len(x) == 1 else x
            for name, x in values.items()
        }
        super().load_parameters(spread)


@near_model("load.other-shape")
class MoreRowsAreCut(Sharded):
    """Rows behind the last are left out."""

    def load_parameters(self, values):
        own = self.full_parameters()
        cut = {name: x[: len(own[name])] if name in own else x for name, x in values.items()}
        super().load_parameters(cut)


@near_model("load.not-finite")
class InfinityIsLoaded(Sharded):
    """NaN is refused and infinity is not."""

    def load_parameters(self, values):
        finite = {name: x.clamp(-1e30, 1e30) for name, x in values.items()}
        super().load_parameters(finite)


@near_model("load.missing")
class RefusedAfterTheRest(Sharded):
    """A load that is refused has changed the parameters before the one that is missing."""

    def load_parameters(self, values):
        own = self.full_parameters()
        super().load_parameters({name: values.get(name, own[name]) for name in own})
        super().load_parameters(values)


# Forward


@near_unit("forward.on-one-rank")
class NothingToGatherAlone(FlatUnit):
    """One rank has nothing to gather, and leaves its buffer as it is."""

    def restore_parameters(self):
        self.restored = self.restored or self.ranks.size == 1
        super().restore_parameters()


@near_model("forward.twice")
class NoiseInForward(Sharded):
    """The last bits of the output are drawn at random."""

    def forward(self, x):
        out = super().forward(x)
        return out * (1 + torch.finfo(out.dtype).eps * (torch.rand_like(out) < 0.5))


@near_unit("forward.without-training")
class FrozenNotRestoredInInference(FlatUnit):
    """For inference frozen parameters are left in the buffer as they are."""

    def restore_parameters(self):
        if not self.trainable and not self.mode.support_backward:
            self.restored = True
        super().restore_parameters()


# Gradients


@near_model("gradient.micro-batches")
class MeanOverMicroBatches(Sharded):
    """Gradients are means over the micro-batches, too."""

    count = 0

    def backward(self, loss, *, last=True):
        self.count += 1
        super().backward(loss, last=last)
        if last:
            self.model.get_shard(GRADS).div_(self.count)


@near_model("gradient.on-one-rank")
class OneRankForgetsMicroBatches(Sharded):
    """One rank has the gradients of its last micro-batch."""

    def backward(self, loss, *, last=True):
        if self.model.ranks.size == 1:
            self.model.reset_gradients()
        super().backward(loss, last=last)


@near_model("gradient.forgotten")
class GradientsOutliveTheStep(Sharded):
    """Gradients of the step before are added to."""

    def step(self):
        complete = self.complete
        super().step()
        self.complete = complete


@near_model("gradient.tied")
class TiedGradientIsAMean(Sharded):
    """A tied parameter has the mean of the gradients of its uses."""

    def backward(self, loss, *, last=True):
        super().backward(loss, last=last)
        if last:
            for name in set(self.model.tied.values()):
                self.split_shard(GRADS)[name].div_(2)


@near_model("gradient.frozen")
class ZerosForFrozen(Sharded):
    """Frozen parameters have gradients of zeros."""

    def full_gradients(self):
        zeros = {name: torch.zeros_like(x) for name, x in self.full_parameters().items()}
        return zeros | super().full_gradients()


@near_model("gradient.none-is-zero")
class ZeroGradientsLeftOut(Sharded):
    """Gradients that are zero are left out."""

    def full_gradients(self):
        return {name: x for name, x in super().full_gradients().items() if bool(x.any())}


@near_model("gradient.missing-is-named")
class MissingGradientNotNamed(Sharded):
    """The error for a gradient that is missing does not say which."""

    def backward(self, loss, *, last=True):
        try:
            super().backward(loss, last=last)
        except RuntimeError as error:
            raise RuntimeError("some parameters have no gradient") from error


@near("gradient.missing-is-named")
class MissingGradientAllowed(FlatShards):
    """A parameter may end without a gradient, asked or not."""

    def flat_shards(self, modules, *, allow_no_grad=True, **options):
        return super().flat_shards(modules, allow_no_grad=True, **options)


@near_model("gradient.missing-on-some-ranks")
class OnlyTheRankItselfSaysSo(Sharded):
    """Where another rank lacks a gradient, a rank goes on as if nothing were."""

    def backward(self, loss, *, last=True):
        try:
            super().backward(loss, last=last)
        except RuntimeError as error:
            if "has no gradient" in str(error) and not str(error).startswith("rank "):
                raise


@near_model("gradient.bfloat16")
class GradientsInComputeDtype(Sharded):
    """Gradients are read in the compute dtype."""

    def full_gradients(self):
        dtype = self.model.precision.compute_dtype
        return {name: x.to(dtype) for name, x in super().full_gradients().items()}


@near_model("gradient.shared-buffers")
class BackwardOfOtherParameters(Sharded):
    """The backward pass takes the parameters that happen to be in the buffer."""

    def backward(self, loss, *, last=True):
        for unit in self.model.units:
            unit.restored = True
        super().backward(loss, last=last)
        self.model.invalidate_buffers()


# Clipping


@near_model("clip.global-norm")
class NormOfTheOwnShard(Sharded):
    """The norm is that of the rank's own shard."""

    def clip_gradients(self, max_norm):
        norm = float(optimizer.square_sum(self.model.get_shard(GRADS)).sqrt())
        self.model.get_shard(GRADS).mul_(min(1.0, max_norm / (norm + 1e-6)))
        return norm


@near_model("clip.scaled")
class ClippedModuleByModule(Sharded):
    """Every module's gradients are scaled by their own norm; the norm that is given is right."""

    def clip_gradients(self, max_norm):
        norm = optimizer.gradient_norm(self.model)
        for unit in self.model.units:
            if unit.trainable:
                square = optimizer.square_sum(unit.shards[GRADS])
                own = float(unit.ranks.all_reduce(square).sqrt())
                unit.shards[GRADS].mul_(min(1.0, max_norm / (own + 1e-6)))
        return norm


@near_model("clip.below-the-limit")
class ScaledUpToTheLimit(Sharded):
    """Gradients below the limit are scaled up to it."""

    def clip_gradients(self, max_norm):
        norm = super().clip_gradients(max_norm)
        if norm < max_norm:
            self.model.get_shard(GRADS).mul_(max_norm / norm)
        return norm


# Steps


@near_model("step.sgd")
class MomentumOfOneRankForgotten(Sharded):
    """The last rank takes every step without momentum."""

    def step(self):
        if self.model.ranks.rank == self.model.ranks.size - 1:
            for name in self.model.optimizer_state_names:
                self.model.get_shard(name).zero_()
        super().step()


@near_model("step.adamw")
class NormsDecayToo(Sharded):
    """AdamW decays parameters of one axis as well."""

    def step(self):
        if self.optimizer.name == "adamw":
            wide, narrow = self.optimizer.optimizer.param_groups
            narrow["weight_decay"] = wide["weight_decay"]
        super().step()


@near_model("step.adamw")
class StepsNotCounted(Sharded):
    """AdamW takes every step for the first, and corrects its means as if it were."""

    def step(self):
        for state in self.optimizer.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        super().step()


@near_model("step.on-one-rank")
class OneRankForgetsItsState(Sharded):
    """One rank begins every step without the state of the one before."""

    def step(self):
        if self.model.ranks.size == 1:
            for name in self.model.optimizer_state_names:
                self.model.get_shard(name).zero_()
        super().step()


@near_model("step.few-elements")
class MostlyPaddingIsSkipped(Sharded):
    """Shards that are mostly padding are not updated."""

    def step(self):
        units = [u for u in self.model.units if 2 * u.shard_pad > u.layout.shard_size]
        before = [unit.shards[WEIGHTS].clone() for unit in units]
        super().step()
        for unit, weights in zip(units, before):
            unit.shards[WEIGHTS].copy_(weights)


@near_model("step.frozen")
class FrozenDecay(Sharded):
    """Frozen parameters decay."""

    def step(self):
        super().step()
        for unit in self.model.units:
            if not unit.trainable:
                unit.shards[WEIGHTS].mul_(1 - 1e-4)


@near_model("step.ranks-agree")
class OneRankRounds(Sharded):
    """One rank reads parameters with other last bits."""

    def full_parameters(self):
        rank = self.model.ranks.rank
        return {name: x * (1 + 2e-7 * rank) for name, x in super().full_parameters().items()}


@near_model("step.in-full-precision")
class WeightsInComputeDtype(Sharded):
    """Updated weights are rounded to the compute dtype."""

    def step(self):
        super().step()
        weights = self.model.get_shard(WEIGHTS)
        weights.copy_(weights.to(self.model.precision.compute_dtype))


@near_model("step.shared-buffers")
class OnlyRestoredModulesTrain(Sharded):
    """A step updates the modules that are in their buffers."""

    def step(self):
        units = [unit for unit in self.model.units if not unit.restored]
        before = [unit.shards[WEIGHTS].clone() for unit in units]
        super().step()
        for unit, weights in zip(units, before):
            unit.shards[WEIGHTS].copy_(weights)


# Buffers


class ReadsRestoredBuffers(Sharded):
    """Reads parameters where they are, if they have been gathered."""

    def full_parameters(self):
        restored = all(unit.restored for unit in self.model.units)
        return in_buffers(self.model) if restored else super().full_parameters()


@near_model("buffers.of-a-new-model")
class GatheredWhenMade(ReadsRestoredBuffers):
    """A new model is gathered at once, and read from its buffers."""

    def __init__(self, model, *arguments):
        super().__init__(model, *arguments)
        if not model.num_weight_buffers:
            model.restore_parameters()


@near_model("buffers.after-load")
class GatheredWhenLoaded(ReadsRestoredBuffers):
    """What was loaded is gathered at once, and read from the buffers."""

    def load_parameters(self, values):
        super().load_parameters(values)
        self.restore()


@near_model("buffers.forward")
class InvalidateIgnored(Sharded):
    """Invalidate does nothing, for only steps and loads change anything."""

    def invalidate(self):
        pass


class OwnSliceKept(FlatUnit):
    """Takes its own slice of the buffer to be up to date after the first restore."""

    def restore_parameters(self):
        if self.restored:
            return
        own = own_slice(self)
        if not hasattr(self, "filled"):
            own.copy_(self.shards[WEIGHTS])
        self.filled = True
        self.ranks.gather_into(self.weight_buffer.data, own)
        self.restored = True


@near("buffers.training")
class StepsInTheBuffer(FlatShards):
    """Every rank updates its slice of the buffer as well, and gathers the others' alone."""

    def model_type(self, modules, **options):
        return made_of(modules, unit=OwnSliceKept, **options)

    class sharded_type(Sharded):
        def step(self):
            super().step()
            for unit in self.model.units:
                own_slice(unit).copy_(unit.shards[WEIGHTS])


@near_unit("buffers.edit-is-lost")
class EditsWrittenBack(FlatUnit):
    """Invalidate writes this rank's slice of the buffer back to its shard."""

    def invalidate_buffer(self):
        if self.restored and self.weight_buffer is not None:
            self.shards[WEIGHTS].copy_(own_slice(self))
        super().invalidate_buffer()


# Parameters of modules


class ParameterOnceRestored(Sharded):
    """Gives parameters of modules that were restored once."""

    def parameter(self, name):
        index, path = name.split(".", 1)
        stage = self.model._stages[int(index)]
        if any(bool(unit.weight_buffer.any()) for unit in stage.units):
            return stage.module.get_parameter(path)
        return super().parameter(name)


@near_model("parameter.after-load")
class ParameterBeforeTheLoad(ParameterOnceRestored):
    """A parameter that was gathered before a load is given after it."""


@near_model("parameter.after-step")
class ParameterBeforeTheStep(ParameterOnceRestored):
    """A parameter that was gathered before a step is given after it."""


@near_model("parameter.invalidated")
class ParameterAfterInvalidate(ParameterOnceRestored):
    """A parameter is given after invalidate."""


@near_unit("parameter.restored")
class CastByTruncation(FlatUnit):
    """The cast to bfloat16 cuts bits off instead of rounding."""

    def restore_parameters(self):
        fresh = not self.restored
        super().restore_parameters()
        if fresh and self.weight_buffer.dtype == torch.bfloat16:
            own = own_slice(self)
            bits = self.shards[WEIGHTS].view(torch.int32) & -65536
            own.copy_(bits.view(torch.float32))
            self.ranks.gather_into(self.weight_buffer.data, own)


# Restoring


@near_unit("restore.keeps-shards")
class ShardsRounded(FlatUnit):
    """A restore leaves the shard as the buffer has it, in the compute dtype."""

    def restore_parameters(self):
        fresh = not self.restored
        super().restore_parameters()
        if fresh:
            self.shards[WEIGHTS].copy_(own_slice(self))


@near_model("stage.in-turn")
class StagesInBfloat16(Sharded):
    """A module alone gives its output in fewer bits than the model does."""

    def forward_stage(self, index, x):
        out = super().forward_stage(index, x)
        return out.bfloat16().to(out.dtype)


# Shards


@near_model("shard.split")
class PartsAreCopies(Sharded):
    """Parts of a shard are copies."""

    def split_shard(self, name):
        return {parameter: x.clone() for parameter, x in super().split_shard(name).items()}


@near_model("shard.split")
class PartsByName(Sharded):
    """Parts of a shard are given in the order of names."""

    def split_shard(self, name):
        return dict(sorted(super().split_shard(name).items()))


@near_model("shard.order")
class FrozenFirst(Sharded):
    """What is frozen is given before what trains."""

    def split_shard(self, name):
        parts = super().split_shard(name)
        trained = {n for u in self.model.units if u.trainable for n in u.layout.names}
        return dict(sorted(parts.items(), key=lambda pair: pair[0] in trained))


@near_model("shard.frozen")
class GradientsOfFrozen(Sharded):
    """The shard of gradients has parts of frozen parameters."""

    def split_shard(self, name):
        parts = super().split_shard(name)
        everything = super().split_shard(WEIGHTS) if name == GRADS else {}
        return {n: torch.zeros_like(x) for n, x in everything.items()} | parts


@near_model("shard.unknown")
class UnknownIsWeights(Sharded):
    """An unknown shard is that of weights."""

    def get_shard(self, name):
        known = name in self.model.shard_names or name == GRADS
        return super().get_shard(name if known else WEIGHTS)


@near_model("shard.without-training")
class EmptyGradientsInInference(Sharded):
    """Without training the shard of gradients is empty."""

    def get_shard(self, name):
        if name == GRADS and GRADS not in self.model.shard_names:
            return torch.empty(0)
        return super().get_shard(name)
