"""Documented bugs of the contract ``shared_core_block``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from conformance.known_bugs import known_bug
from reference_impl.shared_core.block import (
    PROJECTIONS,
    CompressedMoEBlock,
    SharedCoreBlock,
)
from reference_impl.shared_core.layer import SharedCoreLayer

# Routing


class _AlwaysNormalised(CompressedMoEBlock):
    def route(self, logits_TE):
        weights_TK, indices_TK = super().route(logits_TE)
        return weights_TK / weights_TK.sum(-1, keepdim=True), indices_TK


@known_bug(
    "core-block-routing-weights",
    contract="shared_core_block",
    breaks="shared_core_block.output.not-normalised",
)
class AlwaysNormalised(SharedCoreBlock):
    """Weights are always normalised, whatever the model's configuration says."""

    block_type = _AlwaysNormalised


class _NeverNormalised(CompressedMoEBlock):
    def route(self, logits_TE):
        weights_TE = logits_TE.float().softmax(-1)
        indices_TK = super().route(logits_TE)[1]
        return weights_TE.gather(-1, indices_TK), indices_TK


@known_bug(
    "core-block-routing-weights.never",
    contract="shared_core_block",
    breaks="shared_core_block.output.normalised",
)
class NeverNormalised(SharedCoreBlock):
    """Weights are never normalised: norm_topk_prob is not read."""

    block_type = _NeverNormalised


class _NormalisedBefore(CompressedMoEBlock):
    def route(self, logits_TE):
        indices_TK = super().route(logits_TE)[1]
        scores_TE = logits_TE.float().softmax(-1)
        scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        return scores_TE.gather(-1, indices_TK), indices_TK


@known_bug(
    "core-block-routing-weights.before-top-k",
    contract="shared_core_block",
    breaks="shared_core_block.output.normalised",
)
class NormalisedBeforeTopK(SharedCoreBlock):
    """Probabilities are normalised before the best are chosen, which changes nothing."""

    block_type = _NormalisedBefore


class _SoftmaxAfter(CompressedMoEBlock):
    def route(self, logits_TE):
        indices_TK = super().route(logits_TE)[1]
        return logits_TE.float().gather(-1, indices_TK).softmax(-1), indices_TK


@known_bug(
    "core-block-routing-weights.softmax-after-top-k",
    contract="shared_core_block",
    breaks="shared_core_block.output.not-normalised",
)
class SoftmaxAfterTopK(SharedCoreBlock):
    """The softmax is over the chosen logits alone, which is right only if weights are normalised."""

    block_type = _SoftmaxAfter


# Mixture


class _IndexedByExpert(CompressedMoEBlock):
    def mixture(self, x_TH, weights_TK, indices_TK):
        out_TH = weights_TK.new_zeros(x_TH.shape)
        for expert in indices_TK.unique().tolist():
            tokens, _ = (indices_TK == expert).nonzero(as_tuple=True)
            rows = self.expert(x_TH[tokens], expert).to(out_TH.dtype)
            slot = expert % weights_TK.shape[-1]
            out_TH = out_TH.index_add(0, tokens, rows * weights_TK[tokens, slot, None])
        return out_TH


@known_bug(
    "core-block-weights-by-expert",
    contract="shared_core_block",
    breaks="shared_core_block.output.values",
)
class IndexedByExpert(SharedCoreBlock):
    """Weights, which are by slot, are indexed with the number of the expert."""

    block_type = _IndexedByExpert


class _Overwritten(CompressedMoEBlock):
    def mixture(self, x_TH, weights_TK, indices_TK):
        out_TH = weights_TK.new_zeros(x_TH.shape)
        for expert in indices_TK.unique().tolist():
            tokens, slots = (indices_TK == expert).nonzero(as_tuple=True)
            rows = self.expert(x_TH[tokens], expert).to(out_TH.dtype)
            out_TH = out_TH.index_put((tokens,), rows * weights_TK[tokens, slots, None])
        return out_TH


@known_bug(
    "core-block-overwrites",
    contract="shared_core_block",
    breaks="shared_core_block.output.values",
)
class Overwrites(SharedCoreBlock):
    """An expert's rows are written over those of the token's other experts, and not added."""

    block_type = _Overwritten


class _GateAndUpExchanged(CompressedMoEBlock):
    def expert(self, x, expert):
        gate, up, down = (self.layers[name] for name in PROJECTIONS)
        return down(F.silu(up(x, expert)) * gate(x, expert), expert)


@known_bug(
    "core-block-gate-and-up",
    contract="shared_core_block",
    breaks="shared_core_block.output.gate-and-up",
)
class GateAndUpExchanged(SharedCoreBlock):
    """gate and up are exchanged, as w1 and w3 of Mixtral, or the halves of a fused projection."""

    block_type = _GateAndUpExchanged


class _DownIsMissing(CompressedMoEBlock):
    def expert(self, x, expert):
        gate, up, _ = (self.layers[name] for name in PROJECTIONS)
        activated = F.silu(gate(x, expert)) * up(x, expert)
        square = activated.shape[-1] == x.shape[-1]
        return activated if square else super().expert(x, expert)


@known_bug(
    "core-block-gate-and-up.down-left-out",
    contract="shared_core_block",
    breaks="shared_core_block.output.square",
)
class DownLeftOut(SharedCoreBlock):
    """Where its shape allows it the down projection is left out."""

    block_type = _DownIsMissing


# Cores


class _CoreInBuffers(SharedCoreLayer):
    def __init__(self, core, u_in, v_in, u_out, v_out, bias=None):
        super().__init__(core, u_in, v_in, u_out, v_out, bias)
        self.experts = nn.ModuleList(nn.Module() for _ in range(self.num_experts))
        for expert in self.experts:
            expert.register_buffer("core", self.core)


@known_bug(
    "core-block-shared-as-buffer",
    contract="shared_core_block",
    breaks="shared_core_block.parameters.stored-once-after-to",
)
class CoreInBuffers(SharedCoreBlock):
    """Cores are buffers of every expert, and ``.to`` makes each of these a tensor of its own."""

    layer_type = _CoreInBuffers


class _InnerIdentityDropped(SharedCoreLayer):
    def forward(self, x, expert):
        self.check_expert(expert)
        wrapper = self.input_wrapper
        x = (x @ wrapper.v[expert]) @ wrapper.u[expert].mT
        return self.output_wrapper(F.linear(x, self.core), expert)


@known_bug(
    "core-block-wrappers",
    contract="shared_core_block",
    breaks="shared_core_block.output.values",
)
class InnerIdentityDropped(SharedCoreBlock):
    """Input wrappers have no identity."""

    layer_type = _InnerIdentityDropped


class _WrappersExchanged(SharedCoreLayer):
    def forward(self, x, expert):
        if self.core.shape[0] != self.core.shape[1]:
            return super().forward(x, expert)
        y = F.linear(self.output_wrapper(x, expert), self.core)
        return self.input_wrapper(y, expert)


@known_bug(
    "core-block-wrappers.exchanged",
    contract="shared_core_block",
    breaks="shared_core_block.output.square",
)
class WrappersExchanged(SharedCoreBlock):
    """Where hidden is as wide as intermediate, the two wrappers of a core are exchanged."""

    layer_type = _WrappersExchanged


# What is returned


class _AlwaysATuple(CompressedMoEBlock):
    def forward(self, hidden):
        found = super().forward(hidden)
        logits_TE = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.router)
        return found if isinstance(found, tuple) else (found, logits_TE)


@known_bug(
    "core-block-returned-type",
    contract="shared_core_block",
    breaks="shared_core_block.returned.bare-tensor",
)
class AlwaysATuple(SharedCoreBlock):
    """The block always gives the logits as well."""

    block_type = _AlwaysATuple


class _NeverATuple(CompressedMoEBlock):
    def forward(self, hidden):
        found = super().forward(hidden)
        return found[0] if isinstance(found, tuple) else found


@known_bug(
    "core-block-returned-type.never",
    contract="shared_core_block",
    breaks="shared_core_block.returned.with-logits",
)
class NeverATuple(SharedCoreBlock):
    """The block never gives the logits: a decoder takes two rows of a bare tensor for both."""

    block_type = _NeverATuple


class _GivesProbabilities(CompressedMoEBlock):
    def forward(self, hidden):
        found = super().forward(hidden)
        return (found[0], torch.softmax(found[1], -1)) if isinstance(found, tuple) else found


@known_bug(
    "core-block-returned-type.probabilities",
    contract="shared_core_block",
    breaks="shared_core_block.returned.with-logits",
)
class GivesProbabilities(SharedCoreBlock):
    """Probabilities are returned in the place of logits."""

    block_type = _GivesProbabilities
