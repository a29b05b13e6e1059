"""Documented bugs of the contract ``moe_router``."""

from __future__ import annotations

import torch

from conformance.known_bugs import known_bug
from reference_impl.moe.routing import MoERouter

# Softmax, top-k, normalisation


@known_bug(
    "moe-softmax-topk-renorm-semantics",
    contract="moe_router",
    breaks="moe_router.softmax.not-normalised",
)
class SoftmaxAfterTopK(MoERouter):
    """The softmax is over the chosen logits alone, for models that do not normalise as well."""

    def moe_router(self, logits, *, score="softmax", **options):
        self.logits, self.score = logits, score
        return super().moe_router(logits, score=score, **options)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        if self.score == "softmax":
            return self.logits.gather(-1, indices_TK).float().softmax(-1)
        return super().expert_weights(scores_TE, indices_TK, normalize)


@known_bug(
    "moe-softmax-topk-renorm-semantics.raw-logits",
    contract="moe_router",
    breaks="moe_router.softmax.not-normalised",
)
class RawLogits(MoERouter):
    """The softmax is in the branch that normalises: without it weights are logits."""

    def moe_router(self, logits, *, normalize=False, **options):
        self.logits = logits
        return super().moe_router(logits, normalize=normalize, **options)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        if normalize:
            return super().expert_weights(scores_TE, indices_TK, normalize)
        return self.logits.gather(-1, indices_TK).float()


@known_bug(
    "moe-softmax-topk-renorm-semantics.always",
    contract="moe_router",
    breaks="moe_router.softmax.not-normalised",
)
class AlwaysNormalised(MoERouter):
    """Weights are divided by their sum whether the model does that or not."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, True)


@known_bug(
    "moe-softmax-topk-renorm-semantics.never",
    contract="moe_router",
    breaks="moe_router.softmax.normalised",
)
class NeverNormalised(MoERouter):
    """``norm_topk_prob`` is read, and not used."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, False)


@known_bug(
    "moe-softmax-topk-renorm-semantics.softmax-of-scores",
    contract="moe_router",
    breaks="moe_router.sigmoid.normalised",
)
class SoftmaxOfScores(MoERouter):
    """Normalising is a softmax over the chosen scores, which are scores already."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK.softmax(-1) if normalize else weights_TK


@known_bug(
    "moe-softmax-topk-renorm-semantics.scaled-first",
    contract="moe_router",
    breaks="moe_router.scaling.after-normalising",
)
class ScaledBeforeNormalising(MoERouter):
    """Weights are scaled and then normalised, which takes the factor out again."""

    def moe_router(self, logits, *, normalize=False, scaling_factor=1.0, **options):
        factor = 1.0 if normalize else scaling_factor
        return super().moe_router(logits, normalize=normalize, scaling_factor=factor, **options)


@known_bug(
    "moe-top1-softmax-after-topk-zero-grad",
    contract="moe_router",
    breaks="moe_router.gradient.one-expert",
)
class SoftmaxOfOne(MoERouter):
    """With one expert a token its weight is the softmax of one number: 1, without a gradient."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return weights_TK.softmax(-1) if weights_TK.shape[-1] == 1 else weights_TK


# Precision


@known_bug(
    "mix-low-precision-softmax",
    contract="moe_router",
    breaks="moe_router.weights.close-logits",
)
class ScoresInTheDtypeOfLogits(MoERouter):
    """The softmax of 16-bit logits is rounded to 16 bits before the experts are chosen."""

    def expert_scores(self, logits, score):
        return super().expert_scores(logits, score).to(logits.dtype)


@known_bug(
    "mix-low-precision-softmax.autocast",
    contract="moe_router",
    breaks="moe_router.choice.many-experts",
)
class ScoresInBfloat16(MoERouter):
    """Logits are rounded to bfloat16 whatever their dtype, as under autocast."""

    def expert_scores(self, logits, score):
        return super().expert_scores(logits.bfloat16(), score)


# The selection bias


@known_bug(
    "moe-selection-bias-leaks-into-weights",
    contract="moe_router",
    breaks="moe_router.bias.not-in-weights",
)
class BiasInWeights(MoERouter):
    """Weights are the scores with the bias that they were chosen by."""

    def selection_scores(self, scores_TE, bias):
        self.bias = bias
        return super().selection_scores(scores_TE, bias)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        biased_TE = super().selection_scores(scores_TE, self.bias)
        return super().expert_weights(biased_TE, indices_TK, normalize)


@known_bug(
    "moe-selection-bias-leaks-into-weights.on-logits",
    contract="moe_router",
    breaks="moe_router.bias.chooses",
)
class BiasOnLogits(MoERouter):
    """The bias is added to the logits to choose, where it has another scale than on scores."""

    def moe_router(self, logits, *, score="softmax", selection_bias=None, **options):
        self.logits, self.score = logits, score
        return super().moe_router(logits, score=score, selection_bias=selection_bias, **options)

    def selection_scores(self, scores_TE, bias):
        return scores_TE if bias is None else self.expert_scores(self.logits + bias, self.score)


@known_bug(
    "moe-selection-bias-leaks-into-weights.low-precision",
    contract="moe_router",
    breaks="moe_router.bias.in-float32",
)
class BiasInBfloat16(MoERouter):
    """The bias is loaded in the dtype of the model, bfloat16."""

    def selection_scores(self, scores_TE, bias):
        return super().selection_scores(scores_TE, None if bias is None else bias.bfloat16())


@known_bug(
    "moe-selection-bias-leaks-into-weights.ignored",
    contract="moe_router",
    breaks="moe_router.bias.chooses",
)
class BiasIgnored(MoERouter):
    """The bias is loaded and chooses nothing."""

    def selection_scores(self, scores_TE, bias):
        return scores_TE


# Groups


@known_bug(
    "mix-group-mask-zero",
    contract="moe_router",
    breaks="moe_router.groups.negative-scores",
)
class OtherGroupsAreZero(MoERouter):
    """Scores of groups that are not kept become 0, which is more than a negative score."""

    def best(self, ranked_TE, allowed_TE, top_k):
        everywhere = torch.ones_like(allowed_TE)
        return super().best(ranked_TE.masked_fill(~allowed_TE, 0), everywhere, top_k)


@known_bug(
    "mix-group-mask-zero.max-with-bias",
    contract="moe_router",
    breaks="moe_router.groups.best-two",
)
class BestExpertWithBias(MoERouter):
    """A group is as good as its best expert, with a bias too."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        return super().allowed_experts(ranked_TE, groups, biased=False)


# Slots


@known_bug(
    "mix-weights-of-other-slots",
    contract="moe_router",
    breaks="moe_router.weights.of-their-experts",
)
class IndicesSortedAlone(MoERouter):
    """The experts of a token are sorted for the dispatch, and their weights are not."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        return (weights_TK, indices_TK.sort(dim=-1).values, *loss)


# The balancing loss


@known_bug(
    "moe-aux-loss-constant-or-mis-scaled",
    contract="moe_router",
    breaks="moe_router.loss.gradient",
)
class AveragedOverExperts(MoERouter):
    """Probabilities are averaged over the experts: 1 / experts for every token, a constant."""

    def balancing_loss(self, logits, indices_TK):
        tokens, experts = logits.shape
        mean = self.expert_scores(logits, "softmax").mean(-1).mean()
        return experts * mean * (indices_TK.numel() / max(tokens, 1))


@known_bug(
    "moe-aux-loss-constant-or-mis-scaled.without-experts",
    contract="moe_router",
    breaks="moe_router.loss.balanced",
)
class WithoutTheNumberOfExperts(MoERouter):
    """The factor of the number of experts is forgotten."""

    def balancing_loss(self, logits, indices_TK):
        return super().balancing_loss(logits, indices_TK) / logits.shape[-1]


@known_bug(
    "moe-aux-loss-constant-or-mis-scaled.over-slots",
    contract="moe_router",
    breaks="moe_router.loss.value",
)
class AveragedOverSlots(MoERouter):
    """Slots are averaged over tokens times ``top_k``."""

    def balancing_loss(self, logits, indices_TK):
        return super().balancing_loss(logits, indices_TK) / indices_TK.shape[-1]


@known_bug(
    "moe-aux-loss-constant-or-mis-scaled.first-slot",
    contract="moe_router",
    breaks="moe_router.loss.value",
)
class OnlyTheFirstSlot(MoERouter):
    """Only the best expert of a token is counted, and ``top_k`` is multiplied on."""

    def balancing_loss(self, logits, indices_TK):
        slots = indices_TK.shape[-1]
        return super().balancing_loss(logits, indices_TK[:, :1]) * slots


@known_bug(
    "moe-aux-loss-constant-or-mis-scaled.chosen-probabilities",
    contract="moe_router",
    breaks="moe_router.loss.gradient",
)
class ProbabilitiesOfTheChosen(MoERouter):
    """P counts a token's probability only for the experts that it goes to."""

    def balancing_loss(self, logits, indices_TK):
        tokens, experts = logits.shape
        chosen_TE = torch.zeros_like(logits).scatter(-1, indices_TK, 1.0)
        share_E = chosen_TE.sum(0) / max(tokens, 1)
        kept_TE = self.expert_scores(logits, "softmax") * chosen_TE
        return experts * (share_E * kept_TE.sum(0) / max(tokens, 1)).sum()
