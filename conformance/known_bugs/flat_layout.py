"""Documented bugs of arithmetic of flat shards."""

from __future__ import annotations

import math

import torch

from conformance.known_bugs import known_bug
from reference_impl.flat_shards.engine import FlatShards, Layout
from reference_impl.flat_shards.layout import SHARD_PAD_TO_MULTIPLE, clamp
from reference_impl.flat_shards.resharding import as_mapping

# Padding


class _PadOnTheLastRank(Layout):
    def shard_pad(self, rank):
        self._check_rank(rank)
        return self.global_pad if rank == self.ranks - 1 else 0


@known_bug(
    "fsdp-shard-pad-spans-ranks",
    contract="flat_layout",
    breaks="flat_layout.shard.padding-spans-ranks",
)
class PadOnTheLastRank(FlatShards):
    """All padding is the last rank's, also where it is more than a shard."""

    layout_type = _PadOnTheLastRank


class _PaddingIsNotZeroed(Layout):
    def cut(self, values, rank, tensor_rank=0):
        shard = super().cut(values, rank, tensor_rank)
        shard[len(shard) - self.shard_pad(rank) :] = 1  # what empty memory may hold
        return shard


@known_bug(
    "fsdp-shard-pad-spans-ranks.not-zeroed",
    contract="flat_layout",
    breaks="flat_layout.cut.padding-zero",
)
class PaddingIsNotZeroed(FlatShards):
    """Padding of a shard is what the memory held before."""

    layout_type = _PaddingIsNotZeroed


class _PaddingTravels(Layout):
    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        last = shards[self.ranks - 1, 0]
        for (rank, _), shard in made.items():
            if to.shard_pad(rank) and self.shard_pad(self.ranks - 1):
                shard[len(shard) - to.shard_pad(rank) :] = last[-1]
        return made


@known_bug(
    "fsdp-shard-pad-spans-ranks.resharded",
    contract="flat_layout",
    breaks="flat_layout.reshard.padding-zero",
)
class PaddingTravels(FlatShards):
    """Padding of new shards is filled with what stood in the padding of the old ones."""

    layout_type = _PaddingTravels


class _PadPerParameter(Layout):
    def _size(self, name):
        return math.prod(self.shape(name))

    def table(self):
        found, behind = {}, 0
        for name in self.names:
            found[name] = (behind, behind + self._size(name))
            behind += self._size(name) + -self._size(name) % SHARD_PAD_TO_MULTIPLE
        return found

    def begin(self, name):
        return self.table()[name][0]

    def end(self, name):
        return self.table()[name][1]

    @property
    def parameter_count(self):
        sizes = (self._size(name) for name in self.names)
        return sum(size + -size % SHARD_PAD_TO_MULTIPLE for size in sizes)


@known_bug(
    "flat-pad-per-parameter",
    contract="flat_layout",
    breaks="flat_layout.buffer.contiguous",
)
class PadPerParameter(FlatShards):
    """Every parameter begins at a multiple of 32."""

    layout_type = _PadPerParameter


class _PadOfTheTotal(Layout):
    @property
    def shard_size(self):
        count = self.parameter_count + -self.parameter_count % SHARD_PAD_TO_MULTIPLE
        return -(-count // self.ranks)

    def shard_pad(self, rank):
        self._check_rank(rank)
        return clamp((rank + 1) * self.shard_size - self.parameter_count, 0, self.shard_size)


@known_bug("flat-pad-of-total", contract="flat_layout", breaks="flat_layout.shard.size")
class PadOfTheTotal(FlatShards):
    """The buffer is padded to a multiple of 32, and not each rank's part of it."""

    layout_type = _PadOfTheTotal


class _PadOfTheRankThatAsks(Layout):
    def buffer_to_shard(self, index, rank):
        used = self.shard_size - self.shard_pad(self.ranks - 1)
        return clamp(index - self.shard_begin(rank), 0, used)


@known_bug(
    "flat-pad-of-other-rank",
    contract="flat_layout",
    breaks="flat_layout.ranges.of-every-rank",
)
class PadOfTheRankThatAsks(FlatShards):
    """Asked by the last rank, ranges in any shard end where the last rank's padding begins."""

    layout_type = _PadOfTheRankThatAsks


# Shards of shards


class _InOneBuffer(Layout):
    """Copies between shards by positions in the buffer, without tensor-parallel ranks."""

    def reshard(self, shards, to):
        if self.tensor_ranks > 1 or to.tensor_ranks > 1:
            return super().reshard(shards, to)
        by_rank, made = as_mapping(self, shards), {}
        for rank in range(to.ranks):
            shard = torch.zeros(to.shard_size, dtype=by_rank[0, 0].dtype)
            for (source, _), old in by_rank.items():
                begin, low, high = self.common(to, source, rank)
                if low < high:
                    from_begin = source * self.shard_size
                    shard[low - begin : high - begin] = old[low - from_begin : high - from_begin]
            made[rank, 0] = shard
        return made

    def common(self, to, source, rank):
        """Where the new shard begins in the buffer, and the interval that both shards hold."""
        begin = rank * to.shard_size
        low = max(source * self.shard_size, begin)
        high = min((source + 1) * self.shard_size, begin + to.shard_size, self.parameter_count)
        return begin, low, high


class _PadOfTheOldShard(_InOneBuffer):
    def common(self, to, source, rank):
        begin, low, high = super().common(to, source, rank)
        return begin, low, min(high, begin + to.shard_size - self.shard_pad(source))


@known_bug(
    "flat-reshard-other-pad",
    contract="flat_layout",
    breaks="flat_layout.reshard.any-to-any",
)
class PadOfTheOldShard(FlatShards):
    """A new shard is filled up to where the padding of the old one would be in it."""

    layout_type = _PadOfTheOldShard


class _WithoutPadding(Layout):
    def reshard(self, shards, to):
        if self.tensor_ranks > 1 or to.tensor_ranks > 1:
            return super().reshard(shards, to)
        by_rank = as_mapping(self, shards)
        buffer = torch.cat([by_rank[rank, 0] for rank in range(self.ranks)])
        size = to.shard_size
        return {
            (rank, 0): torch.cat([buffer, buffer.new_zeros(to.buffer_size)])[
                rank * (size - to.shard_pad(rank)) :
            ][:size].clone()
            for rank in range(to.ranks)
        }


@known_bug(
    "flat-reshard-other-pad.begin",
    contract="flat_layout",
    breaks="flat_layout.reshard.any-to-any",
)
class BeginsWithoutPadding(FlatShards):
    """A shard is thought to begin behind those before it as if they had as much padding as it."""

    layout_type = _WithoutPadding


# Order


@known_bug(
    "flat-module-order",
    contract="flat_layout",
    breaks="flat_layout.order.weight-decay-first",
)
class ModuleOrder(FlatShards):
    """Parameters lie in the order of the modules, whether they decay or not."""

    def flat_layout(self, parameters, *, weight_decay=None, **options):
        return super().flat_layout(parameters, **options)


@known_bug(
    "flat-module-order.decay-only",
    contract="flat_layout",
    breaks="flat_layout.order.split-parameters",
)
class SortedByDecayOnly(FlatShards):
    """Parameters are sorted by weight decay and by nothing else."""

    def flat_layout(self, parameters, *, weight_decay=None, **options):
        names = list(parameters)
        if weight_decay is not None:
            names.sort(key=lambda name: weight_decay[name])
        return super().flat_layout({name: parameters[name] for name in names}, **options)


# Values and shards that do not belong


class _CountsElements(Layout):
    def cut(self, values, rank, tensor_rank=0):
        taken = {
            name: value.reshape(self.meta(name).shape)
            if name in self.names and value.numel() == math.prod(self.meta(name).shape)
            else value
            for name, value in values.items()
        }
        return super().cut(taken, rank, tensor_rank)


@known_bug(
    "flat-equal-count-shape-swap",
    contract="flat_layout",
    breaks="flat_layout.refuses.equal-count-shapes",
)
class CountsElements(FlatShards):
    """A value is taken for a parameter if it has as many elements."""

    layout_type = _CountsElements


class _CountsValues(Layout):
    def cut(self, values, rank, tensor_rank=0):
        if len(values) == len(self.names) and set(values) != set(self.names):
            unknown = [name for name in values if name not in self.names]
            missing = [name for name in self.names if name not in values]
            other = dict(zip(unknown, missing))
            values = {other.get(name, name): value for name, value in values.items()}
        return super().cut(values, rank, tensor_rank)


@known_bug(
    "flat-count-for-names",
    contract="flat_layout",
    breaks="flat_layout.refuses.values-under-another-name",
)
class CountsValues(FlatShards):
    """Values are complete if there are as many of them as parameters."""

    layout_type = _CountsValues


class _CountsShards(Layout):
    def complete(self, shards):
        """As many shards as there are ranks, in the order of the ranks that they are given for."""
        if len(shards) != self.ranks * self.tensor_ranks:
            return shards
        ranks = [(rank, t) for rank in range(self.ranks) for t in range(self.tensor_ranks)]
        return dict(zip(ranks, (shards[key] for key in sorted(shards))))

    def join(self, shards):
        return super().join(self.complete(shards))

    def reshard(self, shards, to):
        return super().reshard(self.complete(shards), to)


@known_bug(
    "flat-count-for-names.shards",
    contract="flat_layout",
    breaks="flat_layout.refuses.missing-shard",
)
class CountsShards(FlatShards):
    """Shards are complete if there are as many of them as ranks."""

    layout_type = _CountsShards
