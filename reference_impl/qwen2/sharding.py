"""Which part of each weight a rank holds: plain functions of (rank, ranks).

Weights have the layout of ``F.linear``: [out_features, in_features]. A column-parallel layer splits
its output, so its ranks hold rows of the weight; a row-parallel layer splits its input, so its ranks
hold columns. Attention is split by whole heads. Where there are more ranks than key/value heads,
each of these is held by several consecutive ranks, those whose query heads read it.

Sources: Megatron-LM (arXiv 1909.08053, section 3); vLLM's ``QKVParallelLinear`` for replicas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

QKVLayout = Literal["separate", "concatenated", "interleaved"]


@dataclass(frozen=True)
class Shard:
    """The indices of one axis that a rank holds, one range after the other."""

    dim: int
    ranges: tuple[range, ...]
    padding: int = 0
    """Rows of zeros behind them, for a vocabulary that the ranks do not divide."""

    @property
    def size(self) -> int:
        """How many indices that are, padding included."""
        return sum(map(len, self.ranges)) + self.padding


def even_range(size: int, rank: int, ranks: int, what: str) -> range:
    """The part of ``size`` equal things that a rank holds; ValueError unless ``ranks`` divides it."""
    check_ranks(rank, ranks)
    if size % ranks:
        raise ValueError(f"{what} {size} cannot be divided among {ranks} ranks")
    share = size // ranks
    return range(rank * share, (rank + 1) * share)


def check_ranks(rank: int, ranks: int) -> None:
    """Raise ValueError unless ``rank`` is one of ``ranks``."""
    if ranks < 1 or not 0 <= rank < ranks:
        raise ValueError(f"there is no rank {rank} among {ranks} ranks")


def check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    """Raise ValueError unless every rank can hold whole heads and the heads that these read."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    if ranks < 1 or heads % ranks:
        raise ValueError(f"{heads} query heads cannot be divided among {ranks} ranks")
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"{kv_heads} key/value heads can be neither divided among nor repeated on {ranks} ranks"
        )


def kv_head_range(heads: int, kv_heads: int, rank: int, ranks: int) -> range:
    """The key/value heads that a rank holds: its part, or the one that its query heads read."""
    check_heads(heads, kv_heads, ranks)
    check_ranks(rank, ranks)
    if ranks <= kv_heads:
        return even_range(kv_heads, rank, ranks, "key/value heads")
    head = rank // (ranks // kv_heads)
    return range(head, head + 1)


def kv_replicas(kv_heads: int, ranks: int) -> int:
    """How many ranks hold each key/value head."""
    return max(1, ranks // kv_heads)


def column_shard(out_features: int, rank: int, ranks: int) -> Shard:
    """Rows of a column-parallel weight, or elements of its bias."""
    return Shard(0, (even_range(out_features, rank, ranks, "output width"),))


def row_shard(in_features: int, rank: int, ranks: int) -> Shard:
    """Columns of a row-parallel weight; its bias is held in full."""
    return Shard(1, (even_range(in_features, rank, ranks, "input width"),))


def query_shard(heads: int, head_dim: int, rank: int, ranks: int) -> Shard:
    """Rows of the query projection."""
    return Shard(0, (_rows(even_range(heads, rank, ranks, "query heads"), head_dim),))


def key_value_shard(heads: int, kv_heads: int, head_dim: int, rank: int, ranks: int) -> Shard:
    """Rows of the key projection, and of the value projection."""
    return Shard(0, (_rows(kv_head_range(heads, kv_heads, rank, ranks), head_dim),))


def fused_qkv_shard(
    heads: int, kv_heads: int, head_dim: int, layout: QKVLayout, rank: int, ranks: int
) -> tuple[Shard, Shard, Shard]:
    """Rows of a fused projection that are this rank's queries, keys and values.

    ``concatenated``: all queries, all keys, all values. ``interleaved``: for each key/value head its
    query heads, then its key, then its value (Megatron-LM).
    """
    q_heads = even_range(heads, rank, ranks, "query heads")
    own_kv = kv_head_range(heads, kv_heads, rank, ranks)
    if layout == "concatenated":
        places = (
            list(q_heads),
            [heads + head for head in own_kv],
            [heads + kv_heads + head for head in own_kv],
        )
    else:
        of_group = heads // kv_heads
        places = (
            [head // of_group * (of_group + 2) + head % of_group for head in q_heads],
            [head * (of_group + 2) + of_group for head in own_kv],
            [head * (of_group + 2) + of_group + 1 for head in own_kv],
        )
    return tuple(
        Shard(0, tuple(_rows(range(head, head + 1), head_dim) for head in part)) for part in places
    )


def fused_gate_up_shard(
    intermediate: int, layout: QKVLayout, rank: int, ranks: int
) -> tuple[Shard, Shard]:
    """Rows of a fused projection that are this rank's gate and up.

    ``concatenated``: all of gate, all of up. ``interleaved``: g0, u0, g1, u1 … (gpt-oss).
    """
    own = even_range(intermediate, rank, ranks, "intermediate width")
    if layout == "concatenated":
        up = range(intermediate + own.start, intermediate + own.stop)
        return Shard(0, (own,)), Shard(0, (up,))
    starts = (2 * own.start, 2 * own.start + 1)
    return tuple(Shard(0, (range(start, 2 * own.stop, 2),)) for start in starts)


def vocabulary_shard(vocab_size: int, rank: int, ranks: int) -> Shard:
    """Rows of an embedding or a head: equal shares, the last filled up with zeros."""
    check_ranks(rank, ranks)
    share = math.ceil(vocab_size / ranks)
    start, stop = min(rank * share, vocab_size), min((rank + 1) * share, vocab_size)
    return Shard(0, (range(start, stop),), padding=share - (stop - start))


def take(weight: Tensor, shard: Shard | None) -> Tensor:
    """The part of a full weight that a rank holds, a new tensor; all of it where shard is None."""
    if shard is None:
        return weight.clone()
    indices = torch.tensor([i for part in shard.ranges for i in part], device=weight.device)
    return pad(weight.index_select(shard.dim, indices.long()), shard)


def pad(part: Tensor, shard: Shard) -> Tensor:
    """``part`` with the shard's rows of zeros behind it."""
    if not shard.padding:
        return part
    zeros = part.new_zeros(shard.padding, *part.shape[1:])
    return torch.cat([part, zeros])


def unshard(parts: Sequence[Tensor], shards: Sequence[Shard | None], size: int) -> Tensor:
    """The full weight, of ``size`` along the split axis, from the parts of all ranks.

    Raises ValueError when ranks that hold the same differ, or an index is held by none.
    """
    if shards[0] is None:
        shards = [Shard(0, (range(len(parts[0])),))] * len(parts)
        size = len(parts[0])
    dim = shards[0].dim
    shape = list(parts[0].shape)
    shape[dim] = size
    full, held = parts[0].new_zeros(shape), torch.zeros(size, dtype=torch.bool)
    for rank, (part, shard) in enumerate(zip(parts, shards)):
        indices = torch.tensor([i for each in shard.ranges for i in each]).long()
        own = part.narrow(dim, 0, len(indices))
        known = held[indices].nonzero()[:, 0]
        before = full.index_select(dim, indices).index_select(dim, known)
        # NaN is the same as NaN: weights that diverged are replicas all the same.
        if not torch.allclose(own.index_select(dim, known), before, 0, 0, equal_nan=True):
            raise ValueError(f"rank {rank} holds another copy of what an earlier rank holds")
        full.index_copy_(dim, indices, own)
        held[indices] = True
    if not bool(held.all()):
        raise ValueError(f"no rank holds index {int((~held).nonzero()[0])} of {size}")
    return full


def _rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
