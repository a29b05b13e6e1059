"""Documented bugs of tensor-parallel layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from conformance.known_bugs import known_bug
from reference_impl.qwen2 import layers, sharding
from reference_impl.qwen2.parallel_linear import ParallelLinear
from reference_impl.ranks import DistributedRanks, OneRank, current_ranks, reduce_from_ranks


@known_bug(
    "tp-identical-shard-init",
    contract="parallel_linear",
    breaks="parallel_linear.init.own-numbers",
)
class IdenticalShards(ParallelLinear):
    """Every rank draws its part from the same seed, so that the parts are copies of one block."""

    def parallel_linear(self, kind, weights, **options):
        made = super().parallel_linear(kind, weights, **options)
        made.place = lambda name: (0, 1)
        return made


class _Row(ParallelLinear):
    """Makes row-parallel layers of another class."""

    layer: type[layers.RowParallelLinear] = layers.RowParallelLinear

    def row(self, weights, ranks, input_is_parallel, reduce_results):
        made = super().row(weights, ranks, input_is_parallel, reduce_results)
        made.__class__ = self.layer
        return made


@known_bug("tp-row-bias-summed", contract="parallel_linear", breaks="parallel_linear.row.bias-once")
class RowBiasSummed(_Row):
    """The bias is added on every rank before the sum."""

    class layer(layers.RowParallelLinear):
        def forward(self, x):
            if not self.input_is_parallel or not self.reduce_results:
                return super().forward(x)
            return self.reduce(F.linear(x, self.weight, self.bias))


@known_bug(
    "tp-row-bias-grad-divided",
    contract="parallel_linear",
    breaks="parallel_linear.row.bias-gradient",
)
class RowBiasGradientDivided(_Row):
    """Each rank adds its share of the bias before the sum, and has that share of its gradient."""

    class layer(layers.RowParallelLinear):
        def forward(self, x):
            if self.bias is None or not self.reduce_results or not self.input_is_parallel:
                return super().forward(x)
            return self.reduce(F.linear(x, self.weight, self.bias / self.ranks.size))


@known_bug(
    "q2-row-bias-with-partial-results",
    contract="parallel_linear",
    breaks="parallel_linear.row.partial-results",
)
class RowBiasWithPartialResults(_Row):
    """Without the reduction every rank adds the bias."""

    class layer(layers.RowParallelLinear):
        def forward(self, x):
            if self.reduce_results or not self.input_is_parallel:
                return super().forward(x)
            return self.add_bias(F.linear(x, self.weight))


@known_bug(
    "q2-row-bias-with-partial-results.never",
    contract="parallel_linear",
    breaks="parallel_linear.row.partial-results",
)
class RowBiasNever(_Row):
    """Without the reduction no rank adds the bias."""

    class layer(layers.RowParallelLinear):
        def forward(self, x):
            if self.reduce_results or not self.input_is_parallel:
                return super().forward(x)
            return F.linear(x, self.weight)


@known_bug(
    "tp-missing-or-partial-reduce",
    contract="parallel_linear",
    breaks="parallel_linear.row.sum",
)
class NotReduced(_Row):
    """Partial sums are used as they are; nobody adds them up."""

    class layer(layers.RowParallelLinear):
        def reduce(self, partial):
            return partial


@known_bug(
    "tp-missing-or-partial-reduce.subgroup",
    contract="parallel_linear",
    breaks="parallel_linear.row.sum",
)
class ReducedOverSubgroup(_Row):
    """Of four ranks each adds up with its neighbour only."""

    def row(self, weights, ranks, input_is_parallel, reduce_results):
        made = super().row(weights, ranks, input_is_parallel, reduce_results)
        made.peers = ranks.split(2) if ranks.size == 4 else ranks
        return made

    class layer(layers.RowParallelLinear):
        def reduce(self, partial):
            return reduce_from_ranks(partial, self.peers)


@known_bug(
    "tp-shared-expert-double-reduce",
    contract="parallel_linear",
    breaks="parallel_linear.mlp.swiglu",
)
class ReducedTwice(ParallelLinear):
    """The down projection sums over the ranks, and the block that holds it does so again."""

    def mlp(self, weights, ranks):
        made = super().mlp(weights, ranks)
        made.__class__ = TwiceReducedMLP
        return made


class TwiceReducedMLP(layers.ParallelMLP):
    """An MLP whose output is summed twice."""

    def reduce(self, partial):
        return reduce_from_ranks(super().reduce(partial), self.ranks)


@known_bug("q2-silu-on-up", contract="parallel_linear", breaks="parallel_linear.mlp.swiglu")
class SiluOnUp(ParallelLinear):
    """The activation is on up instead of on gate."""

    def mlp(self, weights, ranks):
        made = super().mlp(weights, ranks)
        made.activate = lambda gate, up: gate * F.silu(up)
        return made


@known_bug(
    "tp-fused-qkv-contiguous-shard",
    contract="parallel_linear",
    breaks="parallel_linear.qkv.concatenated",
)
class FusedIsSplitContiguously(ParallelLinear):
    """A rank takes consecutive rows of [Q; K; V] and reads them as its queries, keys and values."""

    def qkv_shards(self, weights, ranks, heads, layout):
        right = super().qkv_shards(weights, ranks, heads, layout)
        if layout != "concatenated":
            return right
        sizes = [shard.size for shard in right]
        start = ranks.rank * (len(weights["weight"]) // ranks.size)
        start = min(start, len(weights["weight"]) - sum(sizes))
        shards = []
        for size in sizes:
            shards.append(sharding.Shard(0, (range(start, start + size),)))
            start += size
        return tuple(shards)


def _separate_kv(right, range_of):
    """The shards with other rows of keys and values; ``range_of`` gives them for the right rows."""
    query, key, value = right
    return query, *(sharding.Shard(0, (range_of(shard.ranges[0]),)) for shard in (key, value))


@known_bug(
    "tp-kv-heads-below-tp",
    contract="parallel_linear",
    breaks="parallel_linear.qkv.replicas",
)
class FractionsOfHeads(ParallelLinear):
    """With more ranks than key/value heads each rank has a fraction of a head, and tiles it."""

    def qkv(self, weights, ranks, heads, layout):
        made = super().qkv(weights, ranks, heads, layout)
        replicas = sharding.kv_replicas(heads[1], ranks.size)
        if replicas == 1:
            return made
        for name in ("k_weight", "v_weight", "k_bias", "v_bias"):
            part = getattr(made, name)
            if part is None or len(part) % replicas:
                continue
            own = part.detach().chunk(replicas)[ranks.rank % replicas]
            setattr(made, name, torch.nn.Parameter(torch.cat([own] * replicas)))
        return made


@known_bug(
    "tp-kv-replica-modulo",
    contract="parallel_linear",
    breaks="parallel_linear.qkv.replicas",
)
class ReplicaByModulo(ParallelLinear):
    """The repeated head is ``rank % kv_heads`` instead of ``rank // replicas``."""

    def qkv_shards(self, weights, ranks, heads, layout):
        right = super().qkv_shards(weights, ranks, heads, layout)
        if layout != "separate" or ranks.size <= heads[1]:
            return right
        head = ranks.rank % heads[1]
        return _separate_kv(right, lambda rows: range(head * len(rows), (head + 1) * len(rows)))


@known_bug(
    "q2-kv-split-as-replicated",
    contract="parallel_linear",
    breaks="parallel_linear.qkv.whole-heads",
)
class SplitAsReplicated(ParallelLinear):
    """The first head of a rank is its number although the ranks divide the key/value heads."""

    def qkv_shards(self, weights, ranks, heads, layout):
        right = super().qkv_shards(weights, ranks, heads, layout)
        if layout != "separate" or ranks.size >= heads[1]:
            return right
        width = len(right[1].ranges[0]) // (heads[1] // ranks.size)
        return _separate_kv(
            right, lambda rows: range(ranks.rank * width, ranks.rank * width + len(rows))
        )


@known_bug(
    "loader-interleaved-qkv-layout",
    contract="parallel_linear",
    breaks="parallel_linear.qkv.interleaved",
)
class InterleavedAsThirds(ParallelLinear):
    """A fused weight with the heads of each group side by side is read as [Q; K; V]."""

    def qkv_shards(self, weights, ranks, heads, layout):
        layout = "concatenated" if layout == "interleaved" else layout
        return super().qkv_shards(weights, ranks, heads, layout)


@known_bug(
    "loader-gate-up-interleaved",
    contract="parallel_linear",
    breaks="parallel_linear.gate-up.interleaved",
)
class InterleavedAsHalves(ParallelLinear):
    """g0, u0, g1, u1 … is cut in halves."""

    def gate_up(self, weights, ranks, layout):
        layout = "concatenated" if layout == "interleaved" else layout
        return super().gate_up(weights, ranks, layout)


@known_bug(
    "loader-gate-up-interleaved.twice",
    contract="parallel_linear",
    breaks="parallel_linear.gate-up.concatenated",
)
class HalvesAsInterleaved(ParallelLinear):
    """[gate; up] is converted from an interleaved layout that it does not have."""

    def gate_up(self, weights, ranks, layout):
        layout = "interleaved" if layout == "concatenated" else layout
        return super().gate_up(weights, ranks, layout)


@known_bug(
    "tp-qk-norm-local-statistics",
    contract="parallel_linear",
    breaks="parallel_linear.norm.all-ranks",
)
class LocalMeanSquare(ParallelLinear):
    """The mean square is that of the rank's own part."""

    def norm(self, weight, ranks, eps):
        made = super().norm(weight, ranks, eps)
        made.sum_over_ranks = lambda local: local * ranks.size
        return made


@known_bug(
    "tp-vocab-padding-logits",
    contract="parallel_linear",
    breaks="parallel_linear.head.no-padding",
)
class PaddingHasLogits(ParallelLinear):
    """Logits of the rows of zeros behind the vocabulary are given too."""

    def head(self, weight, ranks):
        made = super().head(weight, ranks)
        made.unpadded = lambda logits: logits
        return made


@known_bug(
    "tp-vocab-padding-logits.shifted",
    contract="parallel_linear",
    breaks="parallel_linear.head.no-padding",
)
class PaddingWithinTheVocabulary(ParallelLinear):
    """Padding stands behind each rank's rows, and the first logits are taken all the same."""

    def head(self, weight, ranks):
        size = len(weight)
        shares = [size // ranks.size + (rank < size % ranks.size) for rank in range(ranks.size)]
        start = sum(shares[: ranks.rank])
        rows = -(-size // ranks.size)
        part = weight[start : start + shares[ranks.rank]]
        part = torch.cat([part, part.new_zeros(rows - len(part), part.shape[1])])
        return layers.VocabParallelHead(part, vocab_size=size, ranks=ranks)


@known_bug(
    "tp-label-smoothing-local-vocab",
    contract="parallel_linear",
    breaks="parallel_linear.cross-entropy.label-smoothing",
)
class SmoothedOverLocalVocabulary(ParallelLinear):
    """Labels are smoothed over the tokens of a rank."""

    def cross_entropy(self, vocab_size, ranks, label_smoothing):
        made = super().cross_entropy(vocab_size, ranks, label_smoothing)
        made.width = lambda rows: rows
        return made


@known_bug(
    "tp-label-smoothing-local-vocab.sum",
    contract="parallel_linear",
    breaks="parallel_linear.cross-entropy.value",
)
class GatheredLogitsInParallelLoss(ParallelLinear):
    """The loss is log(ranks) too large: every rank counts all exponentials."""

    def cross_entropy(self, vocab_size, ranks, label_smoothing):
        made = super().cross_entropy(vocab_size, ranks, label_smoothing)
        made.__class__ = CountsExponentialsAgain
        return made


class CountsExponentialsAgain(layers.VocabParallelCrossEntropy):
    """Adds the logarithm of the number of ranks."""

    def forward(self, logits_NV, targets_N):
        loss = super().forward(logits_NV, targets_N)
        return torch.where(
            targets_N == self.ignore_index, loss, loss + torch.tensor(self.ranks.size).log()
        )


@known_bug(
    "tp-logprob-allreduce-no-autograd",
    contract="parallel_linear",
    breaks="parallel_linear.cross-entropy.gradients",
)
class ReductionWithoutGradient(ParallelLinear):
    """The target's logit goes through an all-reduce that autograd does not see."""

    def cross_entropy(self, vocab_size, ranks, label_smoothing):
        made = super().cross_entropy(vocab_size, ranks, label_smoothing)
        made.target_logits = lambda own: ranks.all_reduce(own.detach())
        return made


@known_bug(
    "q2-group-of-own-only",
    contract="parallel_linear",
    breaks="parallel_linear.groups.independent",
)
class GroupOfOwnOnly(ParallelLinear):
    """Each rank makes its own group only; torch.distributed wants every rank to make every group."""

    def group(self, size):
        ranks = current_ranks()
        if size is None or size == ranks.size:
            return ranks
        if size == 1:
            return OneRank()
        start = ranks.rank // size * size
        return DistributedRanks(torch.distributed.new_group(list(range(start, start + size))))
