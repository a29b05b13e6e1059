"""Shards of a layout from whole tensors and back, and from the shards of another; in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reference_impl.flat_shards.layout import FlatLayout, check_same_parameters, overlaps

Shards = Mapping[tuple[int, int], Tensor] | Sequence[Tensor]
"""Shards by (rank, tensor-parallel rank); or of one tensor-parallel rank, in rank order."""


def cut(
    layout: FlatLayout, values: Mapping[str, Tensor], rank: int, tensor_rank: int = 0
) -> Tensor:
    """The shard of a rank, [shard_size], of whole tensors by name; padding is zero.

    Raises ValueError for ranks that there are not, names that are missing or unknown, other shapes,
    and values of several dtypes.
    """
    if not 0 <= tensor_rank < layout.tensor_ranks:
        ranks = f"{layout.tensor_ranks} tensor-parallel ranks"
        raise ValueError(f"tensor-parallel rank {tensor_rank} is not one of {ranks}")
    check_same_parameters(list(values), layout.names)
    device = next((value.device for value in values.values()), None)
    shard = torch.zeros(layout.shard_size, dtype=common_dtype(values), device=device)
    for name in layout.names:
        begin, end = layout.range_in_shard(name, rank)
        shard[begin:end] = part_in_shard(layout, name, values[name], rank, tensor_rank)
    return shard


def part_in_shard(
    layout: FlatLayout, name: str, value: Tensor, rank: int, tensor_rank: int = 0
) -> Tensor:
    """What the shard of a rank holds of a whole parameter, flat: a range of its rank's slice.

    Raises ValueError for another shape.
    """
    meta = layout.meta(name)
    if tuple(value.shape) != meta.shape:
        found, expected = list(value.shape), list(meta.shape)
        raise ValueError(f"{name} has shape {found}, expected {expected}")
    if meta.tensor_parallel_dim is not None:
        value = value.chunk(layout.tensor_ranks, meta.tensor_parallel_dim)[tensor_rank]
    first, last = layout.range_of_parameter(name, rank)
    return value.reshape(-1)[first:last]


def common_dtype(values: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of all values, float32 if there are none; raises ValueError if they have several."""
    dtypes = {name: value.dtype for name, value in values.items()}
    first = next(iter(dtypes.values()), torch.float32)
    for name, dtype in dtypes.items():
        if dtype != first:
            raise ValueError(f"{name} has dtype {dtype}, expected {first} as the others")
    return first


def join(layout: FlatLayout, shards: Shards) -> dict[str, Tensor]:
    """Whole tensors by name, in buffer order, of the shards of all ranks.

    A parameter that every tensor-parallel rank holds is that of the first. Raises ValueError for a
    shard that is missing, or of another length.
    """
    by_rank = as_mapping(layout, shards)
    values: dict[str, Tensor] = {}
    locals_ = [
        split_buffer(layout, torch.cat([by_rank[rank, t] for rank in range(layout.ranks)]))
        for t in range(layout.tensor_ranks)
    ]
    for name in layout.names:
        dim = layout.meta(name).tensor_parallel_dim
        parts = [each[name] for each in locals_]
        values[name] = parts[0].clone() if dim is None else torch.cat(parts, dim)
    return values


def split_buffer(layout: FlatLayout, buffer: Tensor) -> dict[str, Tensor]:
    """Views of a whole buffer: each parameter in its shape on one tensor-parallel rank."""
    return {
        name: buffer[begin:end].view(layout.shape(name))
        for name, (begin, end) in layout.table().items()
    }


def as_mapping(layout: FlatLayout, shards: Shards) -> dict[tuple[int, int], Tensor]:
    """Shards by (rank, tensor-parallel rank), all of them there and of the right length."""
    if not isinstance(shards, Mapping):
        shards = {(rank, 0): shard for rank, shard in enumerate(shards)}
    wanted = {(rank, t) for rank in range(layout.ranks) for t in range(layout.tensor_ranks)}
    if wanted != set(shards):
        raise ValueError(f"shards of ranks {sorted(shards)}, expected {sorted(wanted)}")
    for rank, shard in shards.items():
        if tuple(shard.shape) != (layout.shard_size,):
            found = f"the shard of rank {rank} has shape {list(shard.shape)}"
            raise ValueError(f"{found}, expected [{layout.shard_size}]")
    return dict(shards)


def reshard(
    source: FlatLayout, shards: Shards, target: FlatLayout, *, out: Shards | None = None
) -> dict[tuple[int, int], Tensor]:
    """The shards of ``target`` from those of ``source``, by (rank, tensor-parallel rank).

    Each element is copied once, from one shard to the other, and no whole tensor is made. ``out``:
    shards of ``target`` to write to, which share no memory with ``shards``; default: new ones.
    Raises ValueError unless both layouts have the same parameters in the same shapes.
    """
    by_rank = as_mapping(source, shards)
    check_same_parameters(source.names, target.names)
    for name in target.names:
        found, expected = list(source.meta(name).shape), list(target.meta(name).shape)
        if found != expected:
            raise ValueError(f"{name} has shape {found}, expected {expected}")
    if out is None:
        some = next(iter(by_rank.values()))
        wanted = ((rank, t) for rank in range(target.ranks) for t in range(target.tensor_ranks))
        made = {key: some.new_empty(target.shard_size) for key in wanted}
    else:
        made = as_mapping(target, out)
    for (rank, tensor_rank), shard in made.items():
        shard[target.shard_size - target.shard_pad(rank) :].zero_()
        for (source_rank, source_tensor_rank), old in by_rank.items():
            for overlap in overlaps(
                source,
                source_rank,
                target,
                rank,
                source_tensor_rank=source_tensor_rank,
                target_tensor_rank=tensor_rank,
            ):
                place = slice(overlap.target, overlap.target + overlap.count)
                shard[place] = old[overlap.source : overlap.source + overlap.count]
    return made
