"""Other right ways to compute tensor-parallel layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from conformance.correct_variants import correct_variant
from reference_impl.qwen2 import layers
from reference_impl.qwen2.parallel_linear import ParallelLinear
from reference_impl.ranks import copy_to_ranks, gather_from_ranks, reduce_from_ranks


class _OtherLayers(ParallelLinear):
    """Makes layers of other classes where ``classes`` has one for the kind."""

    classes: dict[str, type] = {}  # noqa: RUF012

    def parallel_linear(self, kind, weights, **options):
        made = super().parallel_linear(kind, weights, **options)
        if kind in self.classes:
            made.__class__ = self.classes[kind]
        return made


class _BiasOfFirstRank(layers.RowParallelLinear):
    def forward(self, x):
        if not self.reduce_results or not self.input_is_parallel or self.bias is None:
            return super().forward(x)
        # The other ranks' gradients are zero; the sum gives every rank that of the first.
        bias = copy_to_ranks(self.bias, self.ranks) * (self.ranks.rank == 0)
        return self.reduce(F.linear(x, self.weight, bias))


@correct_variant("tp-bias-on-first-rank", contract="parallel_linear")
class BiasOnFirstRank(_OtherLayers):
    """The first rank adds the row-parallel bias, before the sum."""

    classes = {"row": _BiasOfFirstRank}  # noqa: RUF012


class _BiasInShares(layers.RowParallelLinear):
    def forward(self, x):
        if not self.reduce_results or not self.input_is_parallel or self.bias is None:
            return super().forward(x)
        share = self.bias + (self.bias / self.ranks.size - self.bias).detach()
        return self.reduce(F.linear(x, self.weight, share))


@correct_variant("tp-bias-in-shares", contract="parallel_linear")
class BiasInShares(_OtherLayers):
    """Every rank adds its share of the row-parallel bias, and has the whole gradient."""

    classes = {"row": _BiasInShares}  # noqa: RUF012


class _Float32Sum(layers.RowParallelLinear):
    def reduce(self, partial):
        wide = torch.promote_types(partial.dtype, torch.float32)
        return reduce_from_ranks(partial.to(wide), self.ranks).to(partial.dtype)


class _Float32SumMLP(layers.ParallelMLP):
    def reduce(self, partial):
        wide = torch.promote_types(partial.dtype, torch.float32)
        return reduce_from_ranks(partial.to(wide), self.ranks).to(partial.dtype)


@correct_variant("tp-sum-in-float32", contract="parallel_linear")
class SumInFloat32(_OtherLayers):
    """Partial sums are added in float32."""

    classes = {"row": _Float32Sum, "mlp": _Float32SumMLP}  # noqa: RUF012


class _FusedQKV(layers.QKVParallelLinear):
    def forward(self, x):
        parts = [self.q_weight, self.shared(self.k_weight), self.shared(self.v_weight)]
        biases = [self.q_bias, self.shared(self.k_bias), self.shared(self.v_bias)]
        bias = None if self.q_bias is None else torch.cat(biases)
        fused = F.linear(copy_to_ranks(x, self.ranks), torch.cat(parts), bias)
        return fused.split([len(part) for part in parts], dim=-1)


@correct_variant("tp-one-product-for-qkv", contract="parallel_linear")
class OneProductForQKV(_OtherLayers):
    """Queries, keys and values come of one product with the rank's fused weight."""

    classes = {"qkv": _FusedQKV}  # noqa: RUF012


class _TransposedColumn(layers.ColumnParallelLinear):
    def forward(self, x):
        y = self.copy(x) @ self.weight.t().contiguous()
        y = y if self.bias is None else y + self.bias
        return gather_from_ranks(y, self.ranks) if self.gather_output else y


@correct_variant("tp-transposed-weight", contract="parallel_linear")
class TransposedWeight(_OtherLayers):
    """The product is with a transposed copy of the weight, and the bias is added afterwards."""

    classes = {"column": _TransposedColumn}  # noqa: RUF012


class _OneHotEmbedding(layers.VocabParallelEmbedding):
    def forward(self, ids):
        layers.check_ids(ids, self.vocab_size)
        rows = torch.arange(len(self.weight)) + self.ranks.rank * len(self.weight)
        hits = (ids[..., None] == rows).to(self.weight.dtype)
        return reduce_from_ranks(hits @ self.weight, self.ranks)


@correct_variant("tp-one-hot-embedding", contract="parallel_linear")
class OneHotEmbedding(_OtherLayers):
    """The embedding is a product with one-hot vectors of the rank's own tokens."""

    classes = {"embedding": _OneHotEmbedding}  # noqa: RUF012


class _GatheredCrossEntropy(layers.VocabParallelCrossEntropy):
    def forward(self, logits_NV, targets_N):
        whole = gather_from_ranks(logits_NV, self.ranks)[:, : self.vocab_size]
        wide = whole.to(torch.promote_types(whole.dtype, torch.float32))
        kept = targets_N != self.ignore_index
        log_NV = wide.log_softmax(-1)
        hit_N = log_NV.gather(1, torch.where(kept, targets_N, 0)[:, None])[:, 0]
        smoothing = self.label_smoothing
        loss_N = -(1 - smoothing) * hit_N - smoothing * log_NV.mean(-1)
        return torch.where(kept, loss_N, 0)


@correct_variant("tp-gathered-loss", contract="parallel_linear")
class GatheredLoss(_OtherLayers):
    """Cross entropy of logits that are gathered first, by log-softmax."""

    classes = {"cross_entropy": _GatheredCrossEntropy}  # noqa: RUF012


class _SlicedMLP(layers.ParallelMLP):
    def forward(self, x):
        x = copy_to_ranks(x, self.ranks)
        fused = F.linear(x, torch.cat([self.gate_weight, self.up_weight]))
        gate, up = fused.chunk(2, dim=-1)
        return self.reduce(F.linear(nn.functional.silu(gate) * up, self.down_weight))


@correct_variant("tp-one-product-for-gate-up", contract="parallel_linear")
class OneProductForGateUp(_OtherLayers):
    """Gate and up come of one product with the rank's fused weight."""

    classes = {"mlp": _SlicedMLP}  # noqa: RUF012
