"""Parallel layers made from full weights: what a rank keeps, and the layer that uses it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference_impl.qwen2 import layers, sharding
from reference_impl.ranks import Ranks, current_ranks


class ParallelLinear:
    """Makes each kind of layer for the rank that calls it; every step can be replaced."""

    def parallel_linear(
        self,
        kind: str,
        weights: Mapping[str, Tensor],
        *,
        group_size: int | None = None,
        gather_output: bool = False,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        heads: tuple[int, int] | None = None,
        layout: sharding.QKVLayout = "separate",
        vocab_size: int | None = None,
        eps: float = 1e-6,
        label_smoothing: float = 0.0,
    ) -> layers.ShardedLayer:
        """The rank's part of a layer, as :class:`conformance.contracts.ParallelLinear` has it.

        Raises ValueError that names the sizes for weights that cannot be split over the ranks.
        """
        ranks = self.group(group_size)
        if kind == "column":
            return self.column(weights, ranks, gather_output)
        if kind == "row":
            return self.row(weights, ranks, input_is_parallel, reduce_results)
        if kind == "qkv":
            return self.qkv(weights, ranks, heads, layout)
        if kind == "gate_up":
            return self.gate_up(weights, ranks, layout)
        if kind == "mlp":
            return self.mlp(weights, ranks)
        if kind == "embedding":
            return self.embedding(weights["weight"], ranks)
        if kind == "head":
            return self.head(weights["weight"], ranks)
        if kind == "norm":
            return self.norm(weights["weight"], ranks, eps)
        if kind == "cross_entropy":
            return self.cross_entropy(vocab_size, ranks, label_smoothing)
        raise ValueError(f"{kind!r} is not a kind of layer")

    def group(self, size: int | None) -> Ranks:
        """The ranks of this rank's tensor-parallel group."""
        ranks = current_ranks()
        return ranks if size is None else ranks.split(size)

    def column(
        self, weights: Mapping[str, Tensor], ranks: Ranks, gather_output: bool
    ) -> layers.ShardedLayer:
        """A column-parallel layer."""
        check_bias(weights, "weight", "bias")
        shard = sharding.column_shard(len(weights["weight"]), ranks.rank, ranks.size)
        parts = {name: sharding.take(w, shard) for name, w in weights.items()}
        return layers.ColumnParallelLinear(**parts, ranks=ranks, gather_output=gather_output)

    def row(
        self,
        weights: Mapping[str, Tensor],
        ranks: Ranks,
        input_is_parallel: bool,
        reduce_results: bool,
    ) -> layers.ShardedLayer:
        """A row-parallel layer; its bias is held in full."""
        check_bias(weights, "weight", "bias")
        weight, bias = weights["weight"], weights.get("bias")
        shard = sharding.row_shard(weight.shape[1], ranks.rank, ranks.size)
        return layers.RowParallelLinear(
            sharding.take(weight, shard),
            None if bias is None else bias.clone(),
            ranks=ranks,
            input_is_parallel=input_is_parallel,
            reduce_results=reduce_results,
        )

    def qkv(
        self,
        weights: Mapping[str, Tensor],
        ranks: Ranks,
        heads: tuple[int, int],
        layout: sharding.QKVLayout,
    ) -> layers.ShardedLayer:
        """Queries, keys and values of the rank's heads."""
        parts = {}
        shards = self.qkv_shards(weights, ranks, heads, layout)
        for name, shard in zip("qkv", shards):
            for what in ("weight", "bias"):
                source = weights.get(what if layout != "separate" else f"{name}.{what}")
                if source is not None:
                    parts[f"{name}.{what}"] = sharding.take(source, shard)
        replicas = ranks.split(sharding.kv_replicas(heads[1], ranks.size))
        return layers.QKVParallelLinear(parts, ranks=ranks, replicas=replicas)

    def qkv_shards(
        self,
        weights: Mapping[str, Tensor],
        ranks: Ranks,
        heads: tuple[int, int],
        layout: sharding.QKVLayout,
    ) -> tuple[sharding.Shard, sharding.Shard, sharding.Shard]:
        """The rows of queries, keys and values that the rank holds."""
        rank, size = ranks.rank, ranks.size
        query_heads, kv_heads = heads
        sharding.check_heads(query_heads, kv_heads, size)
        if layout == "separate":
            for name in "qkv":
                check_bias(weights, f"{name}.weight", f"{name}.bias")
            width = head_width(weights["q.weight"], query_heads, "q.weight")
            for name in "kv":
                expect_rows(weights[f"{name}.weight"], kv_heads * width, f"{name}.weight")
            kv = sharding.key_value_shard(query_heads, kv_heads, width, rank, size)
            return sharding.query_shard(query_heads, width, rank, size), kv, kv
        check_bias(weights, "weight", "bias")
        width = head_width(weights["weight"], query_heads + 2 * kv_heads, "weight")
        return sharding.fused_qkv_shard(query_heads, kv_heads, width, layout, rank, size)

    def gate_up(
        self, weights: Mapping[str, Tensor], ranks: Ranks, layout: sharding.QKVLayout
    ) -> layers.ShardedLayer:
        """Gate and up of the rank."""
        rank, size = ranks.rank, ranks.size
        if layout == "separate":
            expect_rows(weights["up.weight"], len(weights["gate.weight"]), "up.weight")
            shard = sharding.column_shard(len(weights["gate.weight"]), rank, size)
            parts = {name: sharding.take(w, shard) for name, w in weights.items()}
        else:
            width = head_width(weights["weight"], 2, "weight")
            shards = sharding.fused_gate_up_shard(width, layout, rank, size)
            parts = {
                f"{name}.{what}": sharding.take(w, shard)
                for what, w in weights.items()
                for name, shard in zip(("gate", "up"), shards)
            }
        return layers.GateUpParallelLinear(parts, ranks=ranks)

    def mlp(self, weights: Mapping[str, Tensor], ranks: Ranks) -> layers.ShardedLayer:
        """A gated MLP."""
        inner = len(weights["gate.weight"])
        expect_rows(weights["up.weight"], inner, "up.weight")
        if weights["down.weight"].shape[1] != inner:
            found = list(weights["down.weight"].shape)
            raise ValueError(f"down.weight has shape {found}, expected {inner} columns")
        column = sharding.column_shard(inner, ranks.rank, ranks.size)
        row = sharding.row_shard(inner, ranks.rank, ranks.size)
        shards = {"gate.weight": column, "up.weight": column, "down.weight": row}
        parts = {name: sharding.take(weights[name], shard) for name, shard in shards.items()}
        return layers.ParallelMLP(parts, ranks=ranks)

    def embedding(self, weight: Tensor, ranks: Ranks) -> layers.ShardedLayer:
        """A vocabulary-parallel embedding."""
        shard = sharding.vocabulary_shard(len(weight), ranks.rank, ranks.size)
        part = sharding.take(weight, shard)
        return layers.VocabParallelEmbedding(part, vocab_size=len(weight), ranks=ranks)

    def head(self, weight: Tensor, ranks: Ranks) -> layers.ShardedLayer:
        """A vocabulary-parallel head."""
        shard = sharding.vocabulary_shard(len(weight), ranks.rank, ranks.size)
        part = sharding.take(weight, shard)
        return layers.VocabParallelHead(part, vocab_size=len(weight), ranks=ranks)

    def norm(self, weight: Tensor, ranks: Ranks, eps: float) -> layers.ShardedLayer:
        """RMS norm over a split axis."""
        shard = sharding.column_shard(len(weight), ranks.rank, ranks.size)
        return layers.ParallelRMSNorm(sharding.take(weight, shard), eps=eps, ranks=ranks)

    def cross_entropy(
        self, vocab_size: int, ranks: Ranks, label_smoothing: float
    ) -> layers.ShardedLayer:
        """Cross entropy over a split vocabulary."""
        return layers.VocabParallelCrossEntropy(
            vocab_size=vocab_size, label_smoothing=label_smoothing, ranks=ranks
        )


def head_width(weight: Tensor, heads: int, name: str) -> int:
    """The rows of each of ``heads`` equal parts; ValueError where there are none."""
    if len(weight) % heads:
        raise ValueError(f"{name} has {len(weight)} rows, which {heads} parts do not divide")
    return len(weight) // heads


def expect_rows(weight: Tensor, rows: int, name: str) -> None:
    """Raise ValueError unless the weight has so many rows."""
    if len(weight) != rows:
        raise ValueError(f"{name} has shape {list(weight.shape)}, expected {rows} rows")


def check_bias(weights: Mapping[str, Tensor], weight: str, bias: str) -> None:
    """Raise ValueError unless a bias, if there is one, has an element for each row of the weight."""
    given = weights.get(bias)
    if given is not None and tuple(given.shape) != (len(weights[weight]),):
        expected = [len(weights[weight])]
        raise ValueError(f"{bias} has shape {list(given.shape)}, expected {expected}")
