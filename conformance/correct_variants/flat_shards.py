"""Other right ways to offer the contract ``flat_shards``."""

from __future__ import annotations

import torch
from torch import nn

from conformance.correct_variants import correct_variant
from reference_impl.flat_shards.config import FORWARD_MODES, ShardName, check_mode
from reference_impl.flat_shards.engine import FlatShards, Sharded
from reference_impl.flat_shards.layout import FlatLayout
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.ranks import agree, current_ranks

# The flat design


class _WithUnits(FlatShards):
    """Makes models whose units are of another class."""

    unit: type[FlatUnit] = FlatUnit

    def model_type(self, modules, **options):
        model = MultiStageModel(modules, setup=False, **options)
        for unit in model.units:
            unit.__class__ = self.unit
        model.setup()
        return model


@correct_variant("flat-own-buffers", contract="flat_shards")
class OwnBuffers(FlatShards):
    """Every module has a buffer of its own, however many are asked for."""

    def flat_shards(self, modules, *, buffers=None, **options):
        return super().flat_shards(modules, **options)


class _Float64Sum(FlatUnit):
    def reduce_gradients(self, *, accumulate=False, allow_no_grad=False):
        if not self.trainable:
            return super().reduce_gradients(accumulate=accumulate, allow_no_grad=allow_no_grad)
        before = self.shards[ShardName.grads].clone()
        self._agree_on_missing_gradients(allow_no_grad)
        self._fill_missing_gradients()
        self._without_gradient = set()
        mean = self.ranks.all_reduce(self.grad_buffer.double()) / self.ranks.size
        super().reduce_gradients(allow_no_grad=allow_no_grad)
        begin = self.layout.shard_begin(self.ranks.rank)
        own = mean[begin : begin + self.layout.shard_size - self.shard_pad]
        shard = self.shards[ShardName.grads]
        shard[: len(own)] = own + (before[: len(own)].double() if accumulate else 0)


@correct_variant("flat-sum-in-float64", contract="flat_shards")
class SumInFloat64(_WithUnits):
    """Gradients are summed over the ranks in float64, and divided at the end."""

    unit = _Float64Sum


class _MeanFirst(FlatUnit):
    def reduce_gradients(self, *, accumulate=False, allow_no_grad=False):
        if self.trainable:
            self._agree_on_missing_gradients(allow_no_grad)
            self._fill_missing_gradients()
            self._without_gradient = set()
            self.grad_buffer.div_(self.ranks.size)
            self.grad_buffer.mul_(self.ranks.size)  # what the sum is divided by
        super().reduce_gradients(accumulate=accumulate, allow_no_grad=allow_no_grad)


@correct_variant("flat-divided-before-summed", contract="flat_shards")
class DividedBeforeSummed(_WithUnits):
    """Gradients are rounded to their share of the mean before they are summed."""

    unit = _MeanFirst


class _GathersEachParameter(FlatUnit):
    def restore_parameters(self):
        check_mode(self.name, self.mode, "parameters", FORWARD_MODES)
        if self.restored:
            return
        own = self.split_shard(self.shards[ShardName.weights])
        for name, view in self.split_buffer(self.weight_buffer.data).items():
            parts = self.ranks.exchange(own[name].clone())
            view.copy_(torch.cat(parts).view(view.shape))
        self.restored = True


@correct_variant("flat-gathered-by-parameter", contract="flat_shards")
class GatheredByParameter(_WithUnits):
    """Every parameter is gathered alone, and padding is not."""

    unit = _GathersEachParameter


@correct_variant("flat-reduced-at-once", contract="flat_shards")
class ReducedAtOnce(FlatShards):
    """Gradients are reduced after every micro-batch, and added up in the shards."""

    class sharded_type(Sharded):
        def backward(self, loss, *, last=True):
            super().backward(loss, last=True)


@correct_variant("flat-lazy-parameters", contract="flat_shards")
class LazyParameters(FlatShards):
    """A parameter that is not in its buffer is gathered when it is asked for."""

    class sharded_type(Sharded):
        def parameter(self, name):
            self.model._stages[int(name.split(".")[0])].restore_parameters()
            return super().parameter(name)


@correct_variant("flat-gathered-early", contract="flat_shards")
class GatheredEarly(FlatShards):
    """Modules with buffers of their own are gathered when they are made, loaded and updated."""

    class sharded_type(Sharded):
        def __init__(self, model, optimizer=None, allow_no_grad=True):
            super().__init__(model, optimizer, allow_no_grad)
            self.gather()

        def gather(self):
            if self.model.num_weight_buffers is None:
                self.model.restore_parameters()

        def load_parameters(self, values):
            super().load_parameters(values)
            self.gather()

        def load(self, directory):
            super().load(directory)
            self.gather()

        def step(self):
            super().step()
            self.gather()


class _WideLayout(FlatLayout):
    multiple = 40

    @property
    def global_pad(self):
        return -self.parameter_count % (self.ranks * self.multiple)

    @property
    def shard_size(self):
        return (self.parameter_count + self.global_pad) // self.ranks

    def shard_pad(self, rank):
        self._check_rank(rank)
        size = self.shard_size
        return min(max(self.global_pad - size * (self.ranks - rank - 1), 0), size)


@correct_variant("flat-other-alignment", contract="flat_shards")
class OtherAlignment(FlatShards):
    """Shards are padded to another multiple; checkpoints of such a model are not offered."""

    class model_type(MultiStageModel):
        def _make_unit(self, index, metas, trainable):
            unit = super()._make_unit(index, metas, trainable)
            layout = unit.layout
            unit.layout = _WideLayout(layout.parameters, layout.ranks, layout.tensor_ranks)
            return unit

    class sharded_type(Sharded):
        def save(self, directory):
            raise NotImplementedError("no checkpoints with this padding")

        load = save


@correct_variant("flat-one-update-for-all", contract="flat_shards")
class OneUpdateForAll(FlatShards):
    """The optimizer updates all parts of the model in one operation."""

    def flat_shards(self, modules, *, optimizer=None, **options):
        chosen = None if optimizer is None else {**optimizer, "foreach": True}
        return super().flat_shards(modules, optimizer=chosen, **options)


# Other designs, with the core methods alone

KINDS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class _Model:
    """A model of whole parameters in float32, which are cast to compute."""

    def __init__(self, modules, optimizer, training, compute_dtype):
        self.ranks = current_ranks()
        self.module = nn.Sequential(*modules)
        self.names = dict(self.module.named_parameters(remove_duplicate=False))
        self.dtype = compute_dtype
        self.whole = dict(self.module.named_parameters())
        if not training:
            self.module.requires_grad_(False)
        self.trained = {n: p for n, p in self.whole.items() if p.requires_grad}
        self.gradients = {}
        self.arrived = {}
        self.optimizer = self.make_optimizer(dict(optimizer)) if optimizer else None

    def make_optimizer(self, options):
        kind = KINDS[options.pop("name")]
        own = self.updated()
        axes = {name: self.whole[name].ndim for name in own}
        groups = [
            {"params": [p for name, p in own.items() if axes[name] > 1]},
            {"params": [p for name, p in own.items() if axes[name] < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return kind(groups, **options) if groups else None

    def check(self, values):
        own, error = self.full_parameters(), None
        for name in [*own.keys() - values.keys(), *values.keys() - own.keys()]:
            error = ValueError(f"{name} is missing or unknown")
        for name in own.keys() & values.keys():
            if own[name].shape != values[name].shape or not values[name].isfinite().all():
                error = ValueError(f"{name} does not fit or is not finite")
        agree(self.ranks, error)

    def forward(self, x):
        dtype = self.dtype or torch.float32
        values = {name: p.to(dtype) for name, p in self.computing().items()}
        x = x.to(dtype) if x.is_floating_point() else x
        return torch.func.functional_call(self.module, values, (x,))

    def backward(self, loss, *, last=True):
        loss.backward()
        if not last:
            return
        for name, parameter in self.trained.items():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            mean = self.ranks.all_reduce(gradient) / self.ranks.size
            self.gradients[name] = self.gradients.get(name, 0) + mean
            parameter.grad = None

    def full_gradients(self):
        return {name: gradient.clone() for name, gradient in self.gradients.items()}

    def clip_gradients(self, max_norm):
        norm = torch.stack([g.norm() for g in self.gradients.values()]).norm()
        for gradient in self.gradients.values():
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
        return float(norm)


class _OwnedParameters(_Model):
    """Every rank has all parameters, and updates its share of them."""

    def owner(self, name):
        return list(self.whole).index(name) % self.ranks.size

    def updated(self):
        return {n: p for n, p in self.trained.items() if self.owner(n) == self.ranks.rank}

    def computing(self):
        return self.whole

    def full_parameters(self):
        return {name: p.detach().clone() for name, p in self.whole.items()}

    def load_parameters(self, values):
        self.check(values)
        for name, value in values.items():
            self.whole[name].data.copy_(value)

    def step(self):
        for name, parameter in self.updated().items():
            parameter.grad = self.gradients[name]
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        for name, parameter in self.trained.items():
            parameter.data.copy_(self.ranks.broadcast(parameter.data, self.owner(name)))
        self.gradients = {}


@correct_variant("sharded-optimizer-alone", contract="flat_shards")
class ShardedOptimizerAlone:
    """Parameters are whole on every rank, and each rank updates some of them (ZeRO-1)."""

    def flat_shards(self, modules, *, optimizer=None, training=True, compute_dtype=None):
        return _OwnedParameters(modules, optimizer, training, compute_dtype)


class _RowShards(_Model):
    """Every rank has some rows of every parameter, and gathers them to compute."""

    def rows(self, name):
        length = len(self.whole[name])
        each = -(-length // self.ranks.size)
        return slice(min(self.ranks.rank * each, length), min((self.ranks.rank + 1) * each, length))

    def updated(self):
        self.shards = {
            n: nn.Parameter(p.detach()[self.rows(n)].clone(), requires_grad=n in self.trained)
            for n, p in self.whole.items()
        }
        return {name: self.shards[name] for name in self.trained}

    def full_parameters(self):
        if not hasattr(self, "shards"):
            self.updated()
        found = {}
        for name, shard in self.shards.items():
            found[name] = torch.cat(self.ranks.exchange(shard.detach().clone()))
        return found

    def computing(self):
        for name, value in self.full_parameters().items():
            self.whole[name].data = value
        return self.whole

    def load_parameters(self, values):
        self.check(values)
        for name, value in values.items():
            self.shards[name].data.copy_(value[self.rows(name)])

    def step(self):
        for name in self.trained:
            self.shards[name].grad = self.gradients[name][self.rows(name)].clone()
        self.optimizer.step()
        self.gradients = {}


@correct_variant("sharded-by-rows", contract="flat_shards")
class ShardedByRows:
    """Every rank has some rows of every parameter, as torch's FSDP2 has."""

    def flat_shards(self, modules, *, optimizer=None, training=True, compute_dtype=None):
        if any(not p.ndim for module in modules for p in module.parameters()):
            raise NotImplementedError("scalars have no rows")
        return _RowShards(modules, optimizer, training, compute_dtype)
