"""Documented bugs of the contract ``moe_block``."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.moe.block import MoEBlock

# The shared expert


@known_bug(
    "moe-shared-expert-gate-ignored",
    contract="moe_block",
    breaks="moe_block.shared.gated",
)
class SharedGateIgnored(MoEBlock):
    """The gate of the shared expert is loaded, and not used."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        return super().shared_expert(x_TH, gate_up_proj, down_proj, None)


@known_bug(
    "moe-shared-expert-gate-ignored.dropped",
    contract="moe_block",
    breaks="moe_block.shared.added",
)
class SharedExpertDropped(MoEBlock):
    """The shared expert is loaded, and not added."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        return torch.zeros_like(x_TH)


@known_bug(
    "moe-shared-expert-gate-ignored.detached",
    contract="moe_block",
    breaks="moe_block.gradient.shared",
)
class SharedGateDetached(MoEBlock):
    """The gate of the shared expert is computed without a gradient."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        shared_gate = None if shared_gate is None else shared_gate.detach()
        return super().shared_expert(x_TH, gate_up_proj, down_proj, shared_gate)


@known_bug("mix-shared-gate-up-exchanged", contract="moe_block", breaks="moe_block.shared.added")
class SharedGateAndUpExchanged(MoEBlock):
    """The halves of the shared expert's fused projection are taken the other way round."""

    def shared_expert(self, x_TH, gate_up_proj, down_proj, shared_gate):
        exchanged = torch.cat(gate_up_proj.chunk(2)[::-1])
        return super().shared_expert(x_TH, exchanged, down_proj, shared_gate)


# Routing


@known_bug(
    "moe-softmax-topk-renorm-semantics.block",
    contract="moe_block",
    breaks="moe_block.output.probabilities",
)
class BlockAlwaysNormalises(MoEBlock):
    """The block divides weights by their sum whatever the configuration says."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, True)


@known_bug(
    "mix-norm-topk-prob-ignored",
    contract="moe_block",
    breaks="moe_block.output.normalised",
)
class NormTopKProbIgnored(MoEBlock):
    """``norm_topk_prob`` is in the configuration, and the block never normalises."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, False)


@known_bug(
    "moe-top1-softmax-after-topk-zero-grad.block",
    contract="moe_block",
    breaks="moe_block.gradient.one-expert",
)
class RouterLearnsNothing(MoEBlock):
    """With one expert a token its weight is the softmax of one number: the router has no gradient."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return weights_TK.softmax(-1) if weights_TK.shape[-1] == 1 else weights_TK


@known_bug(
    "moe-selection-bias-leaks-into-weights.block",
    contract="moe_block",
    breaks="moe_block.output.bias",
)
class BiasInTheOutput(MoEBlock):
    """The block's weights are scores with the bias."""

    def selection_scores(self, scores_TE, bias):
        self.bias = bias
        return super().selection_scores(scores_TE, bias)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        biased_TE = super().selection_scores(scores_TE, self.bias)
        return super().expert_weights(biased_TE, indices_TK, normalize)


@known_bug(
    "mix-group-mask-zero.block",
    contract="moe_block",
    breaks="moe_block.output.groups",
)
class BlockTakesOtherGroups(MoEBlock):
    """Scores of groups that are not kept become 0, which is more than a negative score."""

    def best(self, ranked_TE, allowed_TE, top_k):
        everywhere = torch.ones_like(allowed_TE)
        return super().best(ranked_TE.masked_fill(~allowed_TE, 0), everywhere, top_k)


# Slots and tokens


@known_bug(
    "mix-weights-by-expert-id",
    contract="moe_block",
    breaks="moe_block.output.probabilities",
)
class WeightsByExpertNumber(MoEBlock):
    """The loop over experts takes ``weights[:, expert]``, though that axis has slots."""

    def experts(self, hidden, indices, weights, *projections, **options):
        slots = indices % weights.shape[-1]
        return super().experts(hidden, indices, weights.gather(-1, slots), *projections, **options)


@known_bug(
    "mix-second-slot-overwrites",
    contract="moe_block",
    breaks="moe_block.output.normalised",
)
class SecondSlotOverwrites(MoEBlock):
    """What an expert gives is assigned to its tokens, over what another expert gave them."""

    def experts(self, hidden, indices, weights, *projections, **options):
        last = indices == indices.amax(-1, keepdim=True)
        kept = torch.where(last, weights, 0)
        return super().experts(hidden, indices, kept, *projections, **options)


@known_bug(
    "mix-capacity-drops-tokens",
    contract="moe_block",
    breaks="moe_block.tokens.all-to-the-same",
)
class TokensBeyondCapacity(MoEBlock):
    """An expert takes twice its even share of tokens, and those behind get nothing from it."""

    def experts(self, hidden, indices, weights, gate_up_proj, down_proj, **options):
        capacity = -(-2 * indices.numel() // len(down_proj))
        kept = torch.zeros_like(indices, dtype=torch.bool)
        for expert in range(len(down_proj)):
            places = (indices == expert).nonzero()[:capacity]
            kept[places[:, 0], places[:, 1]] = True
        weights = torch.where(kept, weights, 0)
        return super().experts(hidden, indices, weights, gate_up_proj, down_proj, **options)


# What is returned


@known_bug(
    "mix-tuple-or-tensor",
    contract="moe_block",
    breaks="moe_block.output.shape-dtype-device",
)
class AlwaysATuple(MoEBlock):
    """The block always returns (output, logits), where its layer adds one tensor."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        return super().moe_block(hidden, *weights, return_logits=True, **options)


@known_bug(
    "mix-tuple-or-tensor.bare",
    contract="moe_block",
    breaks="moe_block.logits.returned",
)
class NeverATuple(MoEBlock):
    """The block always returns a tensor, of which a layer unpacks two batch rows."""

    def moe_block(self, hidden, *weights, return_logits=False, **options):
        return super().moe_block(hidden, *weights, **options)
