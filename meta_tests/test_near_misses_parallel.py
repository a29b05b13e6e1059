"""Subtle mistakes in tensor-parallel layers that no catalogue lists, one or more a requirement."""

import pytest
import torch
import torch.nn.functional as F
from mutants import Broken

from reference_impl.qwen2 import layers, sharding
from reference_impl.qwen2.parallel_linear import ParallelLinear
from reference_impl.ranks import (
    copy_to_ranks,
    current_ranks,
    gather_from_ranks,
    reduce_from_ranks,
)

NEAR_PARALLEL: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"parallel_linear.{breaks}"
        NEAR_PARALLEL[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


def near_layer(kind: str, breaks: str):
    """Register a layer, which takes the place of the reference's of this kind."""

    def decorate(layer: type) -> type:
        class Adapter(ParallelLinear):
            def parallel_linear(self, asked, weights, **options):
                made = super().parallel_linear(asked, weights, **options)
                if asked == kind:
                    made.__class__ = layer
                return made

        Adapter.__name__, Adapter.__doc__ = layer.__name__, layer.__doc__
        near(breaks)(Adapter)
        return layer

    return decorate


@pytest.mark.parametrize("name", NEAR_PARALLEL)
def test_near_miss_is_caught(name):
    NEAR_PARALLEL[name].assert_caught()


# One rank, column, row


@near_layer("row", "one-rank.any-kind")
class BiasOfLaterRanks(layers.RowParallelLinear):
    """The bias is left to the other ranks, and alone there is none."""

    def add_bias(self, y):
        return y if self.ranks.size == 1 else super().add_bias(y)


@near_layer("column", "column.own-part")
class BiasOfFirstPart(layers.ColumnParallelLinear):
    """Every rank adds the first rank's part of the bias."""

    def forward(self, x):
        bias = self.ranks.broadcast(self.bias)
        return F.linear(x, self.weight, bias)


@near_layer("column", "column.gathered")
class GatheredInReverse(layers.ColumnParallelLinear):
    """Gathered parts stand in reverse order."""

    def forward(self, x):
        y = F.linear(self.copy(x), self.weight, self.bias)
        if not self.gather_output:
            return y
        parts = gather_from_ranks(y, self.ranks).chunk(self.ranks.size, -1)
        return torch.cat(parts[::-1], -1)


@near_layer("column", "column.gathered")
class GatheredByInterleaving(layers.ColumnParallelLinear):
    """Gathered parts are interleaved, channel by channel."""

    def forward(self, x):
        y = F.linear(self.copy(x), self.weight, self.bias)
        if not self.gather_output:
            return y
        parts = gather_from_ranks(y, self.ranks).chunk(self.ranks.size, -1)
        return torch.stack(parts, -1).flatten(-2)


@near_layer("row", "row.whole-input")
class FirstPartOfTheInput(layers.RowParallelLinear):
    """Given the whole input, every rank multiplies its first part."""

    def forward(self, x):
        if self.input_is_parallel:
            return super().forward(x)
        y = reduce_from_ranks(F.linear(x[..., : self.weight.shape[1]], self.weight), self.ranks)
        return self.add_bias(y)


@near_layer("row", "row.ranks-identical")
class OwnPartAddedLast(layers.RowParallelLinear):
    """Each rank adds its own part last, so that the ranks' sums differ in the last bits."""

    def reduce(self, partial):
        own = partial.detach()
        others = [p for rank, p in enumerate(self.ranks.gather(own)) if rank != self.ranks.rank]
        total = torch.zeros_like(own)
        for each in others:
            total = total * (1 + 1e-7) + each
        return total + partial


@near_layer("mlp", "row.ranks-identical")
class RoundedOnOneRank(layers.ParallelMLP):
    """One rank has the sum with its last bits cut off."""

    def reduce(self, partial):
        total = super().reduce(partial)
        return total if self.ranks.rank else total * (1 + 2e-7)


# Queries, keys and values


class WithShards(ParallelLinear):
    """Changes the rows of separate projections."""

    def qkv_shards(self, weights, ranks, heads, layout):
        right = super().qkv_shards(weights, ranks, heads, layout)
        return right if layout != "separate" else self.changed(right, ranks, heads)


@near("qkv.one-each")
class KeysOfTheNextRank(WithShards):
    """With as many ranks as key/value heads, each has the keys of the next rank."""

    def changed(self, right, ranks, heads):
        if ranks.size != heads[1]:
            return right
        width = right[1].size
        head = (ranks.rank + 1) % ranks.size
        return right[0], sharding.Shard(0, (range(head * width, (head + 1) * width),)), right[2]


@near("qkv.whole-heads")
class QueryHeadsDealtInTurn(WithShards):
    """Query heads are dealt out in turn, instead of in consecutive parts."""

    def changed(self, right, ranks, heads):
        width = right[0].size // (heads[0] // ranks.size)
        own = range(ranks.rank, heads[0], ranks.size)
        rows = tuple(range(head * width, (head + 1) * width) for head in own)
        return sharding.Shard(0, rows), right[1], right[2]


@near_layer("qkv", "qkv.without-bias")
class ValueBiasIsWeight(layers.QKVParallelLinear):
    """Without a bias the values get one of a thousandth."""

    def forward(self, x):
        q, k, v = super().forward(x)
        return q, k, v + (0.001 if self.v_bias is None else 0)


@near_layer("qkv", "qkv.whole-heads")
class ValuesHaveTheBiasOfKeys(layers.QKVParallelLinear):
    """The bias of keys is added to values, which has the same shape."""

    def forward(self, x):
        q, k, v = super().forward(x)
        return q, k, v if self.v_bias is None else v - self.v_bias + self.k_bias


@near("qkv.concatenated")
class ValuesBeforeKeys(ParallelLinear):
    """A fused weight is read as [Q; V; K]."""

    def qkv_shards(self, weights, ranks, heads, layout):
        q, k, v = super().qkv_shards(weights, ranks, heads, layout)
        return (q, v, k) if layout == "concatenated" else (q, k, v)


# Gated MLP


@near("gate-up.separate")
class GateAndUpExchanged(ParallelLinear):
    """Gate and up stand in each other's place."""

    def gate_up(self, weights, ranks, layout):
        made = super().gate_up(weights, ranks, layout)
        if layout == "separate":
            made.gate_weight, made.up_weight = made.up_weight, made.gate_weight
        return made


@near_layer("mlp", "mlp.swiglu")
class GeluInPlaceOfSilu(layers.ParallelMLP):
    """GELU in place of silu."""

    def activate(self, gate, up):
        return F.gelu(gate) * up


# Vocabulary


@near_layer("embedding", "embedding.rows")
class FirstRowForOthers(layers.VocabParallelEmbedding):
    """Ids of other ranks give the first row instead of zeros."""

    def forward(self, ids):
        local = ids - self.ranks.rank * len(self.weight)
        held = (local >= 0) & (local < len(self.weight))
        return reduce_from_ranks(F.embedding(torch.where(held, local, 0), self.weight), self.ranks)


@near_layer("embedding", "embedding.rows")
class LastRowIsForgotten(layers.VocabParallelEmbedding):
    """The last token of each rank's share has no row."""

    def forward(self, ids):
        local = ids - self.ranks.rank * len(self.weight)
        held = (local >= 0) & (local < len(self.weight) - 1)
        rows = F.embedding(torch.where(held, local, 0), self.weight)
        return reduce_from_ranks(torch.where(held[..., None], rows, 0), self.ranks)


@near_layer("head", "head.order")
class LogitsByRankFirst(layers.VocabParallelHead):
    """Gathered logits are those of token 0 of each rank, then token 1 of each."""

    def unpadded(self, logits):
        parts = logits.unflatten(-1, (self.ranks.size, -1)).transpose(-1, -2).flatten(-2)
        return parts[..., : self.vocab_size]


# Statistics


@near_layer("norm", "norm.all-ranks")
class SumForMean(layers.ParallelRMSNorm):
    """The mean of the ranks' roots is taken for the root of their mean."""

    def forward(self, x):
        root = (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        mean = reduce_from_ranks(root, self.ranks) / self.ranks.size
        return x / mean * self.weight


@near_layer("norm", "norm.epsilon")
class EpsilonBesideTheRoot(layers.ParallelRMSNorm):
    """Epsilon is added to the root."""

    def forward(self, x):
        total = self.sum_over_ranks(x.square().sum(-1, keepdim=True))
        return x / ((total / (x.shape[-1] * self.ranks.size)).sqrt() + self.eps) * self.weight


@near_layer("norm", "norm.epsilon")
class EpsilonOfEachRank(layers.ParallelRMSNorm):
    """Epsilon is added once a rank."""

    def forward(self, x):
        total = self.sum_over_ranks(x.square().mean(-1, keepdim=True) + self.eps)
        return x * torch.rsqrt(total / self.ranks.size + self.eps) * self.weight


@near_layer("cross_entropy", "cross-entropy.large-logits")
class LocalMaximum(layers.VocabParallelCrossEntropy):
    """The first rank's maximum is taken for that of all."""

    def forward(self, logits_NV, targets_N):
        largest = self.ranks.broadcast(logits_NV.detach().amax(-1))
        shifted = layers.VocabParallelCrossEntropy.forward
        exps = torch.exp(logits_NV - largest[:, None]).sum(-1)
        overflow = torch.isinf(reduce_from_ranks(exps, self.ranks))
        loss = shifted(self, logits_NV, targets_N)
        return torch.where(overflow, torch.inf, loss)


@near_layer("cross_entropy", "cross-entropy.value")
class IgnoredHasALoss(layers.VocabParallelCrossEntropy):
    """A target that is ignored has the loss of token 0."""

    def forward(self, logits_NV, targets_N):
        ignored = targets_N == self.ignore_index
        return super().forward(logits_NV, torch.where(ignored, 0, targets_N))


@near_layer("cross_entropy", "cross-entropy.label-smoothing")
class SmoothedAwayFromTheTarget(layers.VocabParallelCrossEntropy):
    """The smoothed part is spread over the other tokens only."""

    def width(self, rows):
        return self.vocab_size - 1


# Gradients


@near_layer("column", "column.gradients")
class InputGradientOfOneRank(layers.ColumnParallelLinear):
    """The gradient of the input is that of the rank's own part."""

    def copy(self, x):
        return x


@near_layer("row", "row.gradients")
class GradientIsReducedAgain(layers.RowParallelLinear):
    """The gradient of the sum is summed over the ranks once more."""

    def reduce(self, partial):
        return copy_to_ranks(super().reduce(partial), self.ranks)


@near_layer("qkv", "qkv.replica-gradients")
class ReplicasKeepTheirOwn(layers.QKVParallelLinear):
    """Replicas of a key/value head each keep the gradient of their own query heads."""

    def shared(self, weight):
        return weight


@near_layer("qkv", "qkv.gradients")
class KeysHaveNoInputGradient(layers.QKVParallelLinear):
    """The input has no gradient through the keys."""

    def forward(self, x):
        q, _, v = super().forward(x)
        return q, F.linear(x.detach(), self.shared(self.k_weight), self.shared(self.k_bias)), v


@near_layer("mlp", "mlp.gradients")
class GateIsAConstant(layers.ParallelMLP):
    """The gate has no gradient."""

    def activate(self, gate, up):
        return super().activate(gate.detach() + 0 * gate, up)


@near_layer("embedding", "embedding.gradients")
class GradientOfOtherRows(layers.VocabParallelEmbedding):
    """Ids of other ranks add to the gradient of the first row."""

    def forward(self, ids):
        local = ids - self.ranks.rank * len(self.weight)
        held = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(torch.where(held, local, 0), self.weight)
        kept = torch.where(held[..., None], rows, rows - rows.detach())
        return reduce_from_ranks(kept, self.ranks)


@near_layer("head", "head.gradients")
class HeadWithoutInputGradient(layers.VocabParallelHead):
    """The input's gradient is that of the rank's own logits."""

    def forward(self, x):
        logits = F.linear(x, self.weight)
        return self.unpadded(gather_from_ranks(logits, self.ranks))


@near_layer("norm", "norm.gradients")
class StatisticsOfOneRank(layers.ParallelRMSNorm):
    """The gradient through the mean square is that of the rank's own output."""

    def sum_over_ranks(self, x):
        return reduce_from_ranks(x, self.ranks)


@near_layer("cross_entropy", "cross-entropy.gradients")
class PaddingHasAGradient(layers.VocabParallelCrossEntropy):
    """The gradient of the sum of exponentials is scaled by the ranks."""

    def total(self, x):
        return copy_to_ranks(reduce_from_ranks(x, self.ranks), self.ranks)


# What is held


def tells(kind: str, breaks: str):
    """Register what a right layer of this kind wrongly says that it holds."""

    def decorate(change: type) -> type:
        class Adapter(ParallelLinear):
            def parallel_linear(self, asked, weights, **options):
                made = super().parallel_linear(asked, weights, **options)
                if asked == kind:
                    told = made.shards()
                    made.shards = lambda: change.of(dict(told), made)
                return made

        Adapter.__name__, Adapter.__doc__ = change.__name__, change.__doc__
        near(breaks)(Adapter)
        return change

    return decorate


@tells("column", "shards.rows")
class RowsOfTheFirstRank:
    """Every rank tells the first rank's bias."""

    @staticmethod
    def of(told, made):
        return told | {"bias": made.ranks.broadcast(told["bias"])}


@tells("row", "shards.columns")
class BiasInParts:
    """A row-parallel bias is held in parts."""

    @staticmethod
    def of(told, made):
        if "bias" not in told or made.ranks.size == 1:
            return told
        return told | {"bias": told["bias"][: len(told["bias"]) // 2]}


@tells("mlp", "shards.columns")
class TransposedDown:
    """The down projection is told transposed."""

    @staticmethod
    def of(told, made):
        return told | {"down.weight": told["down.weight"].t().reshape(told["down.weight"].shape)}


@tells("qkv", "shards.heads")
class HeadsReversed:
    """The rows of keys are told in reverse."""

    @staticmethod
    def of(told, made):
        return told | {"k.weight": told["k.weight"].flip(0)}


@tells("gate_up", "shards.fused")
class GateForUp:
    """Gate is told for up."""

    @staticmethod
    def of(told, made):
        return told | {"up.weight": told["gate.weight"]}


@tells("embedding", "shards.vocabulary")
class PaddingIsNotZero:
    """The rows behind the last token are not zero."""

    @staticmethod
    def of(told, made):
        weight = told["weight"].clone()
        held = made.vocab_size - made.ranks.rank * len(weight)
        weight[max(held, 0) :] = 1
        return {"weight": weight}


@near("shards.own")
class ViewsOfTheCaller(ParallelLinear):
    """A column-parallel layer on one group keeps views of the caller's weights."""

    def column(self, weights, ranks, gather_output):
        made = super().column(weights, ranks, gather_output)
        size = len(made.weight)
        rows = slice(ranks.rank * size, (ranks.rank + 1) * size)
        made.weight = torch.nn.Parameter(weights["weight"][rows], requires_grad=False)
        return made


@near_layer("row", "init.own-numbers")
class BiasOfItsOwnOnEachRank(layers.RowParallelLinear):
    """Each rank draws a bias of its own, which all hold."""

    def place(self, name):
        return self.ranks.rank, self.ranks.size


# Communication, groups


@near_layer("row", "communication.one-reduction")
class ReducedInHalves(layers.RowParallelLinear):
    """The sum is made in two reductions, of half the tokens each."""

    def reduce(self, partial):
        one, two = partial.chunk(2) if len(partial) > 1 else (partial[:0], partial)
        return torch.cat([super(ReducedInHalves, self).reduce(part) for part in (one, two)])


@near_layer("column", "communication.none")
class SynchronisedForNothing(layers.ColumnParallelLinear):
    """The input, which is the same on all ranks, is sent by the first one."""

    def copy(self, x):
        return super().copy(self.ranks.broadcast(x) + 0 * x)


@near("groups.independent")
class WorldInPlaceOfGroup(ParallelLinear):
    """The size of groups is heeded for the parts, and sums are over the world."""

    def group(self, size):
        ranks = super().group(size)
        if size is not None and ranks.size > 1:
            world = current_ranks()
            ranks.all_reduce = world.all_reduce
        return ranks


@near("groups.of-one")
class GroupOfOneIsTheWorld(ParallelLinear):
    """A group of one rank is taken for no group, and so for all ranks."""

    def group(self, size):
        return super().group(None if size == 1 else size)


@near("groups.of-one")
class OneIsNone(ParallelLinear):
    """A group of one is taken for none given: everything is split over the world."""

    def group(self, size):
        return super().group(None if size == 1 else size)


# Dtypes, shapes, calls


class Rounding(ParallelLinear):
    """Sums are rounded to another dtype on the way."""

    def group(self, size):
        ranks = super().group(size)
        exact = ranks.all_reduce
        ranks.all_reduce = lambda x: exact(self.rounded(x)).to(x.dtype)
        return ranks


@near("dtype.float64")
class SumsInFloat32(Rounding):
    """Sums over the ranks are made in float32 whatever the dtype."""

    def rounded(self, x):
        return x.to(torch.float32)


@near("dtype.bfloat16")
class EightBitSums(Rounding):
    """Sums of bfloat16 are made in eight bits."""

    def rounded(self, x):
        return x.to(torch.float8_e4m3fn).to(x.dtype) if x.dtype == torch.bfloat16 else x


@near("dtype.float16")
class BFloat16Sums(Rounding):
    """Sums of float16 are made in bfloat16."""

    def rounded(self, x):
        return x.to(torch.bfloat16).to(x.dtype) if x.dtype == torch.float16 else x


@near("input.any-axes")
class BatchOfOne(ParallelLinear):
    """The output of a single token has a batch axis."""

    def parallel_linear(self, kind, weights, **options):
        made = super().parallel_linear(kind, weights, **options)
        forward = made.forward
        made.forward = lambda x, *more: forward(x[None] if x.ndim == 1 else x, *more)
        return made


@near_layer("head", "calls.repeated")
class GrowingTemperature(layers.VocabParallelHead):
    """Each call scales the weight a little."""

    def forward(self, x):
        logits = super().forward(x)
        with torch.no_grad():
            self.weight *= 1.0001
        return logits


# Bad input


class Unchecked(ParallelLinear):
    """Rounds sizes down where the ranks do not divide them."""

    def cut(self, weights, ranks, dims):
        return {
            name: weight.narrow(
                dims.get(name, 0), 0, weight.shape[dims.get(name, 0)] // ranks.size * ranks.size
            )
            for name, weight in weights.items()
        }


@near("refuses.column-width")
class ColumnRoundedDown(Unchecked):
    """Output channels that are left over are dropped."""

    def column(self, weights, ranks, gather_output):
        return super().column(self.cut(weights, ranks, {}), ranks, gather_output)


@near("refuses.row-width")
class RowRoundedDown(Unchecked):
    """Input channels that are left over are dropped."""

    def row(self, weights, ranks, input_is_parallel, reduce_results):
        cut = self.cut({"weight": weights["weight"]}, ranks, {"weight": 1})
        return super().row(dict(weights) | cut, ranks, input_is_parallel, reduce_results)


@near("refuses.mlp-width")
class MLPRoundedDown(Unchecked):
    """Hidden channels of the MLP that are left over are dropped."""

    def mlp(self, weights, ranks):
        return super().mlp(self.cut(weights, ranks, {"down.weight": 1}), ranks)

    def gate_up(self, weights, ranks, layout):
        return super().gate_up(self.cut(weights, ranks, {}), ranks, layout)


@near("refuses.heads")
class HeadsRoundedDown(ParallelLinear):
    """Query heads that are left over are dropped."""

    def qkv_shards(self, weights, ranks, heads, layout):
        if heads[0] % ranks.size == 0:
            return super().qkv_shards(weights, ranks, heads, layout)
        width = len(weights["q.weight"]) // heads[0]
        rows = sharding.Shard(0, (range(width),))
        return rows, rows, rows


@near("refuses.heads")
class ErrorWithoutSizes(ParallelLinear):
    """The error does not say which sizes."""

    def qkv_shards(self, weights, ranks, heads, layout):
        try:
            return super().qkv_shards(weights, ranks, heads, layout)
        except ValueError:
            raise ValueError("the sizes do not fit") from None


@near("refuses.kv-heads")
class KeyValueHeadsRoundedDown(ParallelLinear):
    """Key/value heads that do not fit are dealt out as far as they go."""

    def qkv_shards(self, weights, ranks, heads, layout):
        if heads[0] % ranks.size or heads[1] % ranks.size == 0 or ranks.size % heads[1] == 0:
            return super().qkv_shards(weights, ranks, heads, layout)
        width = len(weights["q.weight"]) // heads[0]
        head = ranks.rank % heads[1]
        kv = sharding.Shard(0, (range(head * width, (head + 1) * width),))
        return sharding.query_shard(heads[0], width, ranks.rank, ranks.size), kv, kv


@near("refuses.weights-of-other-shapes")
class MoreRowsThanHeads(ParallelLinear):
    """Rows of the keys beyond those of the heads are not looked at."""

    def qkv_shards(self, weights, ranks, heads, layout):
        if layout != "separate":
            return super().qkv_shards(weights, ranks, heads, layout)
        rows = heads[1] * (len(weights["q.weight"]) // heads[0])
        fitting = {
            name: weight[:rows] if name[0] in "kv" else weight for name, weight in weights.items()
        }
        return super().qkv_shards(fitting, ranks, heads, layout)
