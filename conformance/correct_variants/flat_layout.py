"""Other right ways to offer the contract ``flat_layout``."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch

from conformance.correct_variants import correct_variant
from reference_impl.flat_shards.engine import FlatShards, Layout
from reference_impl.flat_shards.layout import SHARD_PAD_TO_MULTIPLE, check_same_parameters
from reference_impl.flat_shards.resharding import as_mapping


class _NumpyPositions(Layout):
    def sizes(self):
        """Elements of each parameter on a tensor-parallel rank."""
        return np.array([np.prod(self.shape(n), dtype=np.int64) for n in self.names], np.int64)

    def edges(self):
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes())])

    def number(self, name):
        return self.names.index(name)

    def table(self):
        begins, ends = self.edges()[:-1], self.edges()[1:]
        return {name: [b, e] for name, b, e in zip(self.names, begins, ends)}

    @property
    def shard_size(self):
        unit = np.int64(SHARD_PAD_TO_MULTIPLE * self.ranks)
        return np.ceil(self.edges()[-1] / unit).astype(np.int64) * SHARD_PAD_TO_MULTIPLE

    def shard_pad(self, rank):
        self._check_rank(rank)
        behind = (np.arange(self.ranks) + 1) * self.shard_size - self.edges()[-1]
        return np.clip(behind, 0, self.shard_size)[rank]

    def range_in_shard(self, name, rank):
        low = self.shard_begin(rank)
        place = self.number(name)
        inside = np.clip(self.edges()[place : place + 2], low, low + self.shard_size) - low
        return inside.tolist()

    def range_of_parameter(self, name, rank):
        low, place = self.shard_begin(rank), self.number(name)
        begin, size = self.edges()[place], self.sizes()[place]
        return np.clip(np.array([low, low + self.shard_size]) - begin, 0, size)


@correct_variant("flat-numpy-positions", contract="flat_layout")
class NumpyPositions(FlatShards):
    """Positions are numpy's numbers and arrays, from cumulative sums; nothing ends at the padding."""

    layout_type = _NumpyPositions


class _Intervals(Layout):
    def table(self):
        return MappingProxyType(super().table())

    def range_in_shard(self, name, rank):
        low = self.shard_begin(rank)
        begin, end = max(self.begin(name), low), min(self.end(name), low + self.shard_size)
        return (begin - low, end - low) if begin < end else (0, 0)

    def range_of_parameter(self, name, rank):
        begin, end = self.range_in_shard(name, rank)
        first = self.shard_begin(rank) + begin - self.begin(name)
        return (first, first + end - begin) if begin < end else (0, 0)


@correct_variant("flat-intervals", contract="flat_layout")
class IntersectsIntervals(FlatShards):
    """Ranges are intersections, (0, 0) where there is none; the table is read-only."""

    layout_type = _Intervals


class _CutByTorch(Layout):
    def parts(self, values, tensor_rank):
        for parameter in self.parameters:
            value, dim = values[parameter.name], parameter.tensor_parallel_dim
            if dim is not None:
                size = value.shape[dim] // self.tensor_ranks
                value = value.narrow(dim, tensor_rank * size, size)
            yield value.flatten()

    def cut(self, values, rank, tensor_rank=0):
        super().cut(values, rank, tensor_rank)  # refuses what does not belong
        flat = list(self.parts(values, tensor_rank))
        if not flat or not self.shard_size:
            return torch.zeros(0, dtype=flat[0].dtype if flat else torch.float32)
        buffer = torch.nn.functional.pad(torch.cat(flat), (0, self.global_pad))
        return buffer.split(self.shard_size)[rank].clone()


@correct_variant("flat-cut-of-whole-buffer", contract="flat_layout")
class CutsTheWholeBuffer(FlatShards):
    """The whole buffer is made, padded, and split."""

    layout_type = _CutByTorch


class _ThroughWhole(Layout):
    def reshard(self, shards, to):
        whole = self.join(shards)
        return {
            (rank, t): to.cut(whole, rank, t)
            for t in range(to.tensor_ranks)
            for rank in range(to.ranks)
        }


@correct_variant("flat-reshard-through-whole", contract="flat_layout")
class ReshardsThroughWholeValues(FlatShards):
    """Shards are joined to whole values, which are cut again; those of a tensor rank together."""

    layout_type = _ThroughWhole


class _ThroughIndex(Layout):
    def numbers(self):
        """The number of every element of every parameter, from 1 on."""
        behind, found = 1, {}
        for parameter in self.parameters:
            size = int(np.prod(parameter.shape, dtype=np.int64))
            found[parameter.name] = torch.arange(behind, behind + size).view(parameter.shape)
            behind += size
        return found, behind

    def reshard(self, shards, to):
        check_same_parameters(to.names, self.names)
        shards, (numbers, count) = as_mapping(self, shards), self.numbers()
        flat = torch.zeros(count, dtype=shards[0, 0].dtype)
        for (rank, t), shard in shards.items():
            flat[self.cut(numbers, rank, t).long()] = shard
        flat[0] = 0  # where all padding was put
        return {
            (rank, t): flat[to.cut(numbers, rank, t).long()]
            for rank in range(to.ranks)
            for t in range(to.tensor_ranks)
        }


@correct_variant("flat-reshard-through-index", contract="flat_layout")
class ReshardsThroughAnIndex(FlatShards):
    """Elements are numbered, and the numbers are cut to tell where each goes."""

    layout_type = _ThroughIndex


class _Required:
    """What every layout has, and nothing that may be missing."""

    def __init__(self, layout):
        self.shard_size = layout.shard_size
        self.table = layout.table
        self.shard_pad = layout.shard_pad
        self.range_in_shard = layout.range_in_shard


@correct_variant("flat-positions-only", contract="flat_layout")
class PositionsOnly(FlatShards):
    """Only positions are offered; there are no shards of values."""

    def flat_layout(self, parameters, **options):
        return _Required(super().flat_layout(parameters, **options))


class _KeyErrors(Layout):
    def complete(self, shards):
        """The shards of all ranks; KeyError for the one that is missing."""
        return {(rank, 0): shards[rank, 0] for rank in range(self.ranks)}

    def join(self, shards):
        return super().join(self.complete(shards))

    def reshard(self, shards, to):
        return super().reshard(self.complete(shards), to)


@correct_variant("flat-data-parallel-only", contract="flat_layout")
class DataParallelOnly(FlatShards):
    """No tensor-parallel ranks, no sorting, and more shards than needed are left alone."""

    layout_type = _KeyErrors

    def flat_layout(self, parameters, ranks=1):
        return super().flat_layout(parameters, ranks=ranks)


class _FillsShards(Layout):
    def cut(self, values, rank, tensor_rank=0):
        whole = super().cut(values, rank, tensor_rank)
        shard = whole.new_full(whole.shape, torch.nan if whole.is_floating_point() else -1)
        for name in reversed(self.names):
            begin, end = self.range_in_shard(name, rank)
            shard[begin:end] = whole[begin:end]
        used = self.shard_size - self.shard_pad(rank)
        return shard.index_fill_(0, torch.arange(used, self.shard_size), 0)

    def join(self, shards):
        by_rank, found = as_mapping(self, shards), {}
        for parameter in reversed(self.parameters):
            name, dim = parameter.name, parameter.tensor_parallel_dim
            parts = []
            for t in range(1 if dim is None else self.tensor_ranks):
                part = by_rank[0, 0].new_empty(self.shape(name)).flatten()
                for rank in range(self.ranks):
                    low, high = self.range_of_parameter(name, rank)
                    begin, end = self.range_in_shard(name, rank)
                    part[low:high] = by_rank[rank, t][begin:end]
                parts.append(part.view(self.shape(name)))
            found[name] = parts[0] if dim is None else torch.cat(parts, dim)
        return found


@correct_variant("flat-backwards", contract="flat_layout")
class Backwards(FlatShards):
    """Parameters are copied and given from the last to the first."""

    layout_type = _FillsShards
