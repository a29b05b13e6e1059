"""Subtle mistakes in the arithmetic of flat shards that no catalogue lists, for every requirement."""

import math

import pytest
import torch
from mutants import Broken

from reference_impl.flat_shards import resharding
from reference_impl.flat_shards.engine import FlatShards, Layout
from reference_impl.flat_shards.layout import ParameterMeta, clamp

NEAR_LAYOUT: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"flat_layout.{breaks}"
        NEAR_LAYOUT[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


def near_layout(breaks: str):
    """Register a layout, which takes the place of the reference's."""

    def decorate(layout: type) -> type:
        class Adapter(FlatShards):
            layout_type = layout

        Adapter.__name__, Adapter.__doc__ = layout.__name__, layout.__doc__
        near(breaks)(Adapter)
        return layout

    return decorate


@pytest.mark.parametrize("name", NEAR_LAYOUT)
def test_near_miss_is_caught(name):
    NEAR_LAYOUT[name].assert_caught()


# The buffer


@near("buffer.order-given")
class SortedByName(FlatShards):
    """Parameters lie in the order of their names."""

    def flat_layout(self, parameters, **options):
        return super().flat_layout(dict(sorted(parameters.items())), **options)


@near("buffer.order-given")
class LargestFirst(FlatShards):
    """Parameters lie in the order of their sizes."""

    def flat_layout(self, parameters, **options):
        ordered = sorted(parameters.items(), key=lambda item: -math.prod(item[1]))
        return super().flat_layout(dict(ordered), **options)


@near_layout("buffer.positions")
class EndsAreTheLastElement(Layout):
    """The end of a parameter is its last element."""

    def table(self):
        return {name: (begin, end - 1) for name, (begin, end) in super().table().items()}


@near_layout("buffer.contiguous")
class BeginsAtOne(Layout):
    """The first parameter begins at 1."""

    def table(self):
        return {name: (begin + 1, end + 1) for name, (begin, end) in super().table().items()}


class OtherSizes(Layout):
    """Counts the elements of parameters in another way."""

    @property
    def _bounds(self):
        ends = [0]
        for parameter in self.parameters:
            ends.append(ends[-1] + self.size(parameter.local_shape(self.tensor_ranks)))
        return ends


@near_layout("buffer.scalars-and-empty")
class ScalarsAreNothing(OtherSizes):
    """A parameter without axes has no element."""

    def size(self, shape):
        return math.prod(shape) if shape else 0


@near_layout("buffer.scalars-and-empty")
class EmptyIsOne(OtherSizes):
    """A parameter without elements has one."""

    def size(self, shape):
        return max(math.prod(shape), 1)


# Shards


@near_layout("shard.whole-multiple")
class OneBlockMore(Layout):
    """There is always padding: where none is needed, 32 elements a rank."""

    @property
    def shard_size(self):
        return self.parameter_count // (32 * self.ranks) * 32 + 32

    def shard_pad(self, rank):
        self._check_rank(rank)
        return clamp((rank + 1) * self.shard_size - self.parameter_count, 0, self.shard_size)


@near_layout("shard.padding-at-the-end")
class PaddingInFront(Layout):
    """The padding is that of the first ranks."""

    def shard_pad(self, rank):
        return super().shard_pad(self.ranks - 1 - rank)


@near_layout("shard.padding-total")
class LessThanABlock(Layout):
    """No rank has more padding than 31 elements."""

    def shard_pad(self, rank):
        return min(super().shard_pad(rank), 31)


@near_layout("shard.padding-spans-ranks")
class TwoRanksAtMost(Layout):
    """Padding fills the last two shards and what is left of it the one before."""

    def shard_pad(self, rank):
        return super().shard_pad(rank) if rank >= self.ranks - 2 else 0


@near_layout("shard.no-elements")
class NothingIsABlock(Layout):
    """Shards of nothing have 32 elements."""

    @property
    def shard_size(self):
        return super().shard_size or 32

    def shard_pad(self, rank):
        self._check_rank(rank)
        return super().shard_pad(rank) if self.parameter_count else 32


@near_layout("shard.one-rank")
class OneRankIsNotPadded(Layout):
    """One rank has no padding."""

    @property
    def shard_size(self):
        return self.parameter_count if self.ranks == 1 else super().shard_size

    def shard_pad(self, rank):
        return super().shard_pad(rank) if self.ranks > 1 else 0


@near_layout("shard.many-ranks")
class TwoDigitsAreSorted(Layout):
    """Ranks stand in the order of their names: 0, 1, 10, 11, 2."""

    def shard_begin(self, rank):
        self._check_rank(rank)
        return sorted(map(str, range(self.ranks))).index(str(rank)) * self.shard_size


# Ranges


@near_layout("ranges.in-shard")
class LastElementBelongsToTheNext(Layout):
    """A shard begins one element before its place."""

    def range_in_shard(self, name, rank):
        begin, end = super().range_in_shard(name, rank)
        return (begin + 1, end + 1) if rank and begin != end else (begin, end)


@near_layout("ranges.adjacent")
class OverlapByOne(Layout):
    """A parameter begins with the last element of the one before it."""

    def range_in_shard(self, name, rank):
        begin, end = super().range_in_shard(name, rank)
        return (begin - 1, end) if 0 < begin < end else (begin, end)


@near_layout("ranges.sum-to-parameter")
class WholeShardIsForgotten(Layout):
    """A parameter that fills a shard is not in it."""

    def range_in_shard(self, name, rank):
        begin, end = super().range_in_shard(name, rank)
        return (begin, begin) if end - begin == self.shard_size else (begin, end)


@near_layout("ranges.absent")
class AbsentIsMinusOne(Layout):
    """What is not there is at -1."""

    def range_in_shard(self, name, rank):
        begin, end = super().range_in_shard(name, rank)
        return (-1, -1) if begin == end else (begin, end)


@near_layout("ranges.absent")
class AbsentIsOne(Layout):
    """What is behind a shard has its last element."""

    def range_in_shard(self, name, rank):
        begin, end = super().range_in_shard(name, rank)
        return (begin - 1, end) if begin == end == self.shard_size else (begin, end)


@near_layout("ranges.of-parameter")
class PlaceInTheBuffer(Layout):
    """Elements of a parameter are counted from the begin of the buffer."""

    def range_of_parameter(self, name, rank):
        begin, end = super().range_of_parameter(name, rank)
        return self.begin(name) + begin, self.begin(name) + end


@near_layout("ranges.of-parameter")
class OtherRanksInFront(Layout):
    """Elements in the shards of later ranks are counted as if they came first."""

    def range_of_parameter(self, name, rank):
        begin, end = super().range_of_parameter(name, rank)
        size = self.end(name) - self.begin(name)
        return size - end, size - begin


@near_layout("ranges.billions")
class NumbersOf32Bits(Layout):
    """Positions wrap around at 2³¹."""

    def table(self):
        def wrapped(number):
            return (number + 2**31) % 2**32 - 2**31

        return {name: tuple(map(wrapped, place)) for name, place in super().table().items()}


@near_layout("ranges.billions")
class NumbersAreFloats(Layout):
    """The place in a shard is computed in float32."""

    def buffer_to_shard(self, index, rank):
        return int(torch.tensor(float(super().buffer_to_shard(index, rank))).float())


# Shards of values


@near_layout("cut.elements")
class DealtInTurn(Layout):
    """Elements are dealt out to the ranks in turn."""

    def cut(self, values, rank, tensor_rank=0):
        shards = [super(DealtInTurn, self).cut(values, r, tensor_rank) for r in range(self.ranks)]
        self._check_rank(rank)
        return torch.cat(shards)[rank :: self.ranks].clone()


@near_layout("cut.elements")
class LastElementIsZero(Layout):
    """The last element of a shard is lost."""

    def cut(self, values, rank, tensor_rank=0):
        shard = super().cut(values, rank, tensor_rank)
        shard[-1:] = 0
        return shard


@near_layout("cut.dtype")
class CutInFloat32(Layout):
    """Shards are in float32."""

    def cut(self, values, rank, tensor_rank=0):
        return super().cut(values, rank, tensor_rank).float()


@near_layout("cut.any-strides")
class OrderOfMemory(Layout):
    """Values are flattened as they lie in memory."""

    def cut(self, values, rank, tensor_rank=0):
        flat = {
            name: torch.as_strided(value, (value.numel(),), (1,)).view(value.shape)
            for name, value in values.items()
        }
        return super().cut(flat, rank, tensor_rank)


@near_layout("cut.order-of-values")
class ValuesInTheirOrder(Layout):
    """Values are put one behind the other in the order in which they are given."""

    def cut(self, values, rank, tensor_rank=0):
        super().cut(values, rank, tensor_rank)
        flat = torch.cat([value.flatten() for value in values.values()])
        padded = torch.cat([flat, flat.new_zeros(self.global_pad)])
        return padded[rank * self.shard_size :][: self.shard_size].clone()


@near_layout("join.inverse")
class JoinedInReverse(Layout):
    """The elements of matrices are joined in the order of their columns."""

    def join(self, shards):
        return {
            name: value.t().reshape(value.shape) if value.ndim == 2 else value
            for name, value in super().join(shards).items()
        }


@near_layout("join.inverse")
class JoinedFlat(Layout):
    """Values are joined without their shapes."""

    def join(self, shards):
        return {name: value.flatten() for name, value in super().join(shards).items()}


@near_layout("join.padding-ignored")
class PaddingIsAdded(Layout):
    """Padding is multiplied by zero and added, which NaN survives."""

    def join(self, shards):
        nothing = sum(
            shards[key][self.shard_size - self.shard_pad(key[0]) :].sum() * 0 for key in shards
        )
        return {name: value + nothing for name, value in super().join(shards).items()}


@near_layout("join.own-memory")
class JoinGivesViews(Layout):
    """One rank's values are views of its shard."""

    def join(self, shards):
        found = super().join(shards)
        if self.ranks * self.tensor_ranks > 1:
            return found
        return resharding.split_buffer(self, shards[0, 0])


@near_layout("join.own-memory")
class CutGivesViews(Layout):
    """A shard that one parameter fills is a view of it."""

    def cut(self, values, rank, tensor_rank=0):
        shard = super().cut(values, rank, tensor_rank)
        for name in self.names:
            if self.size_in_shard(name, rank) == len(shard) and self.tensor_ranks == 1:
                first, last = self.range_of_parameter(name, rank)
                return values[name].view(-1)[first:last]
        return shard


# Tensor-parallel ranks


@near_layout("tensor-parallel.positions")
class WholeSizes(Layout):
    """Positions are those of whole parameters."""

    @property
    def _bounds(self):
        ends = [0]
        for parameter in self.parameters:
            parameter.local_shape(self.tensor_ranks)
            ends.append(ends[-1] + math.prod(parameter.shape))
        return ends


@near_layout("tensor-parallel.parts")
class FlatParts(Layout):
    """Split parameters are flattened first, and then split."""

    def cut(self, values, rank, tensor_rank=0):
        super().cut(values, rank, tensor_rank)
        parts = {}
        for parameter in self.parameters:
            name, shape = parameter.name, self.shape(parameter.name)
            flat = values[name].flatten()
            if parameter.tensor_parallel_dim is not None:
                flat = flat.chunk(self.tensor_ranks)[tensor_rank]
            parts[name] = flat.view(shape)
        metas = tuple(ParameterMeta(name, tuple(part.shape)) for name, part in parts.items())
        return Layout(metas, self.ranks).cut(parts, rank)


@near_layout("tensor-parallel.parts")
class FirstPartForAll(Layout):
    """Every tensor-parallel rank has the first part."""

    def cut(self, values, rank, tensor_rank=0):
        return super().cut(values, rank, tensor_rank and 0)


@near_layout("tensor-parallel.join")
class WholeParametersAreSummed(Layout):
    """What every tensor-parallel rank holds is added up."""

    def join(self, shards):
        return {
            name: value
            if self.meta(name).tensor_parallel_dim is not None
            else value * self.tensor_ranks
            for name, value in super().join(shards).items()
        }


@near_layout("tensor-parallel.join")
class JoinedAlongTheFirstAxis(Layout):
    """Parts are put together along their first axis, and the result is given the right shape."""

    def join(self, shards):
        found = super().join(shards)
        for parameter in self.parameters:
            name, dim = parameter.name, parameter.tensor_parallel_dim
            if dim is not None:
                parts = found[name].chunk(self.tensor_ranks, dim)
                found[name] = torch.cat(parts, 0).reshape(parameter.shape)
        return found


# Shards of shards


@near_layout("reshard.any-to-any")
class ParametersAreCutAnew(Layout):
    """Every parameter is dealt out to the ranks in even parts."""

    def reshard(self, shards, to):
        made, whole = super().reshard(shards, to), self.join(shards)
        if to.tensor_ranks > 1:
            return made
        for rank in range(to.ranks):
            parts = [value.flatten().tensor_split(to.ranks)[rank] for value in whole.values()]
            flat = torch.cat([*parts, made[rank, 0].new_zeros(to.shard_size)])
            made[rank, 0] = flat[: to.shard_size].clone()
        return made


@near_layout("reshard.many-ranks")
class PaddedShardsAreEmpty(Layout):
    """New shards that are only padding have no elements."""

    def reshard(self, shards, to):
        return {
            key: shard if to.shard_pad(key[0]) < to.shard_size else shard[:0]
            for key, shard in super().reshard(shards, to).items()
        }


@near_layout("reshard.padding-zero")
class PaddingIsWhatFollows(Layout):
    """New padding is taken from what stands behind the last parameter in the old shards."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        for (rank, t), shard in made.items():
            old = shards[self.ranks - 1, 0 if t >= self.tensor_ranks else t]
            pad = min(to.shard_pad(rank), self.shard_pad(self.ranks - 1))
            if pad:
                shard[-pad:] = old[-pad:]
        return made


@near_layout("reshard.back-again")
class FewerRanksLoseTheLastElement(Layout):
    """From more ranks to fewer the last element is lost."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        if to.ranks < self.ranks and self.parameter_count:
            rank, place = divmod(self.parameter_count - 1, to.shard_size)
            made[rank, 0][place] = 0
        return made


@near_layout("reshard.bits")
class NaNIsMissing(Layout):
    """NaN is taken for an element that is not there, and is zero in the new shards."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        return {key: torch.where(shard.isnan(), 0, shard) for key, shard in made.items()}


@near_layout("reshard.bits")
class AddedToZeros(Layout):
    """Elements are added to zeros, which negative zero does not survive."""

    def reshard(self, shards, to):
        return {key: shard + 0.0 for key, shard in super().reshard(shards, to).items()}


@near_layout("reshard.bits")
class ThroughFloat32(Layout):
    """New shards are in float32."""

    def reshard(self, shards, to):
        return {key: shard.float() for key, shard in super().reshard(shards, to).items()}


@near_layout("reshard.keeps-source")
class SameRanksSameShards(Layout):
    """For the same ranks the shards are given back."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        return shards if (self.ranks, self.tensor_ranks) == (to.ranks, to.tensor_ranks) else made


@near_layout("reshard.keeps-source")
class OldPaddingIsZeroed(Layout):
    """Shards that are read have their first element zeroed."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        for shard in shards.values():
            shard[:1].zero_()
        return made


@near_layout("reshard.tensor-parallel")
class FirstPartsAreRepeated(Layout):
    """More tensor-parallel ranks each have the parts of the first ones."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        if to.tensor_ranks > self.tensor_ranks:
            return {(r, t): made[r, t % self.tensor_ranks].clone() for r, t in made}
        return made


@near_layout("reshard.tensor-parallel")
class WholeParametersOfTheFirst(Layout):
    """Only the first tensor-parallel rank is given what all of them hold."""

    def reshard(self, shards, to):
        made = super().reshard(shards, to)
        for (rank, t), shard in made.items():
            for parameter in self.parameters if t else ():
                if parameter.tensor_parallel_dim is None:
                    begin, end = to.range_in_shard(parameter.name, rank)
                    shard[begin:end] = 0
        return made


# Order


def sorted_anew(change):
    """An adapter's method that gives the layout other parameters to sort."""

    def flat_layout(self, parameters, *, weight_decay=None, **options):
        if weight_decay is None:
            return FlatShards.flat_layout(self, parameters, **options)
        changed = change(self, parameters, dict(weight_decay), options)
        return FlatShards.flat_layout(self, changed[0], weight_decay=changed[1], **options)

    return flat_layout


@near("order.weight-decay-first")
class DecayFirst(FlatShards):
    """Parameters that decay come first."""

    flat_layout = sorted_anew(
        lambda self, parameters, decay, options: (parameters, {n: not d for n, d in decay.items()})
    )


@near("order.weight-decay-first")
class LastGivenFirst(FlatShards):
    """Parameters that are alike lie in reverse order."""

    flat_layout = sorted_anew(
        lambda self, parameters, decay, options: (dict(reversed(parameters.items())), decay)
    )


@near("order.split-parameters")
class SplitLastThroughout(FlatShards):
    """Split parameters come last among those that do not decay, too."""

    def flat_layout(self, parameters, *, weight_decay=None, tensor_dims=None, **options):
        dims = dict(tensor_dims or {})
        if weight_decay is not None:
            sequence = options.get("sequence_parallel", ())
            ordered = sorted(
                parameters,
                key=lambda n: (
                    weight_decay[n],
                    n in dims,
                    weight_decay[n] != (n in sequence and n not in dims),
                ),
            )
            parameters = {name: parameters[name] for name in ordered}
        return super().flat_layout(parameters, tensor_dims=dims, **options)


@near("order.split-parameters")
class SplitIsSequenceParallel(FlatShards):
    """Split parameters that are named as sequence parallel are sorted as such."""

    def flat_layout(self, parameters, *, weight_decay=None, tensor_dims=None, **options):
        dims = dict(tensor_dims or {})
        if weight_decay is not None:
            sequence = options.get("sequence_parallel", ())
            ordered = sorted(
                parameters,
                key=lambda n: (
                    weight_decay[n],
                    weight_decay[n] == (n in dims),
                    weight_decay[n] != (n in sequence),
                ),
            )
            parameters = {name: parameters[name] for name in ordered}
        return super().flat_layout(parameters, tensor_dims=dims, **options)


@near("order.positions")
class OnlyTheTableIsSorted(FlatShards):
    """Parameters are listed sorted, and lie in the order given."""

    def flat_layout(self, parameters, *, weight_decay=None, **options):
        unsorted = super().flat_layout(parameters, **options)
        if weight_decay is not None:
            sorted_ = super().flat_layout(parameters, weight_decay=weight_decay, **options)
            table = Layout.table(unsorted)
            object.__setattr__(unsorted, "table", lambda: {n: table[n] for n in sorted_.names})
        return unsorted


# Bad input


@near("refuses.ranks-below-one")
class AtLeastOneRank(FlatShards):
    """Fewer than one rank is taken for one."""

    def flat_layout(self, parameters, *, ranks=1, **options):
        return super().flat_layout(parameters, ranks=max(ranks, 1), **options)


@near("refuses.ranks-below-one")
class NameInNoMessage(FlatShards):
    """Fewer than one rank is refused without a word."""

    def flat_layout(self, parameters, *, ranks=1, **options):
        if ranks < 1:
            raise ValueError("too few ranks")
        return super().flat_layout(parameters, ranks=ranks, **options)


@near("refuses.tensor-ranks-below-one")
class AtLeastOneTensorRank(FlatShards):
    """Fewer than one tensor-parallel rank is taken for one."""

    def flat_layout(self, parameters, *, tensor_ranks=1, **options):
        return super().flat_layout(parameters, tensor_ranks=max(tensor_ranks, 1), **options)


@near_layout("refuses.rank-beyond-last")
class LaterRanksHavePadding(Layout):
    """Ranks beyond the last have nothing but padding."""

    def _check_rank(self, rank):
        assert rank >= 0


@near_layout("refuses.tensor-rank-beyond-last")
class TensorRanksGoRound(Layout):
    """Tensor-parallel ranks beyond the last begin anew."""

    def cut(self, values, rank, tensor_rank=0):
        return super().cut(values, rank, tensor_rank % self.tensor_ranks)


@near("refuses.indivisible-axis")
class RestIsDropped(FlatShards):
    """What the tensor-parallel ranks do not divide is cut off."""

    def flat_layout(self, parameters, *, tensor_ranks=1, tensor_dims=None, **options):
        cut = {}
        for name, shape in parameters.items():
            dim = (tensor_dims or {}).get(name)
            size = shape if dim is None else list(shape)
            if dim is not None:
                size[dim] -= size[dim] % max(tensor_ranks, 1)
            cut[name] = tuple(size)
        options |= {"tensor_ranks": tensor_ranks, "tensor_dims": tensor_dims}
        return super().flat_layout(cut, **options)


class Completed(Layout):
    """Makes values fit before they are cut."""

    def cut(self, values, rank, tensor_rank=0):
        return super().cut(self.completed(dict(values)), rank, tensor_rank)


@near_layout("refuses.missing-values")
class MissingIsZero(Completed):
    """Values that are missing are zero."""

    def completed(self, values):
        zeros = {p.name: torch.zeros(p.shape) for p in self.parameters}
        return {**zeros, **values}


@near_layout("refuses.unknown-values")
class UnknownIsIgnored(Completed):
    """Values that are unknown are left out."""

    def completed(self, values):
        return {name: value for name, value in values.items() if name in self.names}


@near_layout("refuses.other-shapes")
class FirstElementsAreTaken(Completed):
    """Of a value with too many elements the first are taken, and zeros for those that are missing."""

    def completed(self, values):
        for parameter in self.parameters:
            value = values.get(parameter.name)
            size = math.prod(parameter.shape)
            if value is not None and value.numel() != size:
                flat = torch.cat([value.flatten(), value.new_zeros(size)])
                values[parameter.name] = flat[:size].view(parameter.shape)
        return values


@near_layout("refuses.equal-count-shapes")
class AxesOfOneAreIgnored(Completed):
    """A value with axes of one element more is taken."""

    def completed(self, values):
        for parameter in self.parameters:
            value = values.get(parameter.name)
            if value is not None and value.squeeze().shape == torch.Size(
                [size for size in parameter.shape if size != 1]
            ):
                values[parameter.name] = value.view(parameter.shape)
        return values


class Filled(Layout):
    """Makes shards fit before they are read."""

    def join(self, shards):
        return super().join(self.filled(dict(shards)))

    def reshard(self, shards, to):
        return super().reshard(self.filled(dict(shards)), to)


@near_layout("refuses.missing-shard")
class MissingShardIsZero(Filled):
    """Shards that are missing are zero, and others are left out."""

    def filled(self, shards):
        dtype = next(iter(shards.values())).dtype
        return {
            (rank, t): shards.get((rank, t), torch.zeros(self.shard_size, dtype=dtype))
            for rank in range(self.ranks)
            for t in range(self.tensor_ranks)
        }


@near_layout("refuses.shard-length")
class ShardsAreFitted(Filled):
    """Shards that are too long are cut off, and those that are too short filled with zeros."""

    def filled(self, shards):
        size = self.shard_size
        return {
            key: torch.cat([shard, shard.new_zeros(size)])[:size] for key, shard in shards.items()
        }
