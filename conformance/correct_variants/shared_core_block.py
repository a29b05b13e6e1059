"""Other right ways to offer the contract ``shared_core_block``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.block import (
    PROJECTIONS,
    CompressedMoEBlock,
    FoldedMoEBlock,
    SharedCoreBlock,
)


@correct_variant("core-block-folded", contract="shared_core_block")
class Folded(SharedCoreBlock):
    """Each core is applied once a token, and wrappers as low-rank parts beside it."""

    block_type = FoldedMoEBlock


class _TokenByToken(CompressedMoEBlock):
    def mixture(self, x_TH, weights_TK, indices_TK):
        rows = []
        for x, weights, indices in zip(x_TH, weights_TK, indices_TK.tolist()):
            parts = [w * self.expert(x, e).to(w.dtype) for w, e in zip(weights, indices)]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows) if rows else weights_TK.new_zeros(x_TH.shape)


@correct_variant("core-block-token-by-token", contract="shared_core_block")
class TokenByToken(SharedCoreBlock):
    """One token after the other, one of its experts after the other."""

    block_type = _TokenByToken


class _EveryExpert(CompressedMoEBlock):
    """Every expert for every token, weighted with zeros where it is not chosen."""

    def mixture(self, x_TH, weights_TK, indices_TK):
        number = len(self.router)
        weights_TE = weights_TK.new_zeros(len(x_TH), number).scatter(1, indices_TK, weights_TK)
        rows = torch.stack([self.expert(x_TH, e) for e in range(number)], 1).to(weights_TE)
        return torch.einsum("te,teh->th", weights_TE, rows)


@correct_variant("core-block-every-expert", contract="shared_core_block")
class EveryExpert(SharedCoreBlock):
    """Every expert is computed for every token, and most weights are zero."""

    block_type = _EveryExpert


class _WeightsInDtype(CompressedMoEBlock):
    """Weights are cast to the dtype of the block, as in transformers, and sums are in it."""

    def route(self, logits_TE):
        probabilities_TE = F.softmax(logits_TE, dim=1, dtype=torch.float)
        weights_TK, indices_TK = torch.topk(probabilities_TE, self.top_k, dim=-1)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(logits_TE.dtype), indices_TK

    def mixture(self, x_TH, weights_TK, indices_TK):
        return super().mixture(x_TH, weights_TK.to(x_TH.dtype), indices_TK)


@correct_variant("core-block-weights-in-dtype", contract="shared_core_block")
class WeightsInDtype(SharedCoreBlock):
    """Weights, and the sums over experts, are in the dtype of the block, as in transformers."""

    block_type = _WeightsInDtype


class _SoftmaxOfChosen(CompressedMoEBlock):
    def route(self, logits_TE):
        wide = logits_TE.float()
        best = wide.topk(self.top_k, sorted=False)
        if self.normalize:
            return best.values.softmax(-1), best.indices
        return (best.values - wide.logsumexp(-1, keepdim=True)).exp(), best.indices


@correct_variant("core-block-softmax-of-chosen", contract="shared_core_block")
class SoftmaxOfChosen(SharedCoreBlock):
    """Normalised weights are a softmax over the chosen logits; experts come in any order."""

    block_type = _SoftmaxOfChosen


class _DenseWeights(CompressedMoEBlock):
    def expert(self, x, expert):
        gate, up, down = (self.layers[name].reconstruct(expert) for name in PROJECTIONS)
        fused = F.linear(x, torch.cat([gate, up]))
        gate_TI, up_TI = fused.chunk(2, -1)
        return F.linear(gate_TI * torch.sigmoid(gate_TI) * up_TI, down)


@correct_variant("core-block-dense-weights", contract="shared_core_block")
class DenseWeights(SharedCoreBlock):
    """Dense weights are made at each call, gate and up are one product."""

    block_type = _DenseWeights


class _SortedByExpert(CompressedMoEBlock):
    """Pairs are sorted by expert, computed in blocks, and put back by a scatter."""

    def mixture(self, x_TH, weights_TK, indices_TK):
        order = indices_TK.flatten().argsort(stable=True)
        tokens = order // max(1, self.top_k)
        counts = indices_TK.flatten().bincount(minlength=len(self.router)).tolist()
        blocks = x_TH[tokens].split(counts)
        rows = torch.cat([self.expert(x, e) for e, x in enumerate(blocks)])
        rows = rows.to(weights_TK.dtype) * weights_TK.flatten()[order, None]
        out_TH = weights_TK.new_zeros(x_TH.shape)
        return out_TH.scatter_add(0, tokens[:, None].expand_as(rows), rows)


@correct_variant("core-block-sorted", contract="shared_core_block")
class SortedByExpert(SharedCoreBlock):
    """Pairs of token and expert are sorted by expert, as for grouped matrix products."""

    block_type = _SortedByExpert


class _Wrapped(nn.Module):
    """The block inside another module, under names of its own."""

    def __init__(self, block):
        super().__init__()
        self.mlp = block

    def forward(self, hidden_states):
        found = self.mlp(hidden_states.contiguous())
        if isinstance(found, tuple):
            return found[0], found[1].float()
        return found


@correct_variant("core-block-wrapped", contract="shared_core_block")
class Wrapped(SharedCoreBlock):
    """The block is inside another module; logits are in float32."""

    def shared_core_block(self, router, gate_proj, up_proj, down_proj, **options):
        return _Wrapped(super().shared_core_block(router, gate_proj, up_proj, down_proj, **options))
