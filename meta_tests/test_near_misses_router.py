"""Subtle mistakes in routing that no catalogue lists, for every requirement of ``moe_router``."""

import pytest
import torch
from mutants import Broken, OtherGradient

from reference_impl.moe.routing import MoERouter

NEAR_ROUTER: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"moe_router.{breaks}"
        NEAR_ROUTER[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_ROUTER)
def test_near_miss_is_caught(name):
    NEAR_ROUTER[name].assert_caught()


class After(MoERouter):
    """Weights and indices go through ``after``."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        weights_TK, indices_TK = self.after(weights_TK, indices_TK, logits)
        return (weights_TK, indices_TK, *loss)


class OtherLogits(MoERouter):
    """Logits go through ``before``."""

    def moe_router(self, logits, **options):
        return super().moe_router(self.before(logits), **options)


# Scores and weights


@near("softmax.not-normalised")
class SoftmaxWithASink(MoERouter):
    """The softmax has one logit of 0 more, which takes some of the probability."""

    def expert_scores(self, logits, score):
        if score == "sigmoid":
            return super().expert_scores(logits, score)
        return torch.cat([logits, torch.zeros_like(logits[:, :1])], -1).float().softmax(-1)[:, :-1]


@near("softmax.normalised")
class NormalisedByTheSecondNorm(MoERouter):
    """Weights are divided by the root of the sum of their squares."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK / weights_TK.norm(dim=-1, keepdim=True) if normalize else weights_TK


@near("sigmoid.not-normalised")
class SigmoidOfSoftmax(MoERouter):
    """The sigmoid is taken of probabilities: same order, other weights."""

    def expert_scores(self, logits, score):
        scores_TE = super().expert_scores(logits, "softmax")
        return scores_TE if score == "softmax" else scores_TE.sigmoid()


@near("sigmoid.normalised")
class SigmoidNormalisedOverAll(MoERouter):
    """Sigmoid scores are divided by the sum over all experts."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        if normalize and bool(((scores_TE.sum(-1) - 1).abs() > 1e-3).any()):
            return scores_TE.gather(-1, indices_TK) / scores_TE.sum(-1, keepdim=True)
        return super().expert_weights(scores_TE, indices_TK, normalize)


@near("normalised.sum-is-one")
class LargeEpsilon(MoERouter):
    """1e-4 is added to the sum that weights are divided by."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-4) if normalize else weights_TK


@near("weights.of-their-experts")
class WeightsReversed(After):
    """Weights are from the worst expert to the best, experts from the best to the worst."""

    def after(self, weights_TK, indices_TK, logits):
        return weights_TK.flip(-1), indices_TK


@near("weights.close-logits")
class ScoresRounded(MoERouter):
    """Scores are rounded to float16 before experts are chosen."""

    def expert_scores(self, logits, score):
        return super().expert_scores(logits, score).half().float()


@near("weights.large-logits")
class WithoutTheMaximum(MoERouter):
    """The softmax divides exponentials of the logits themselves, which overflow."""

    def expert_scores(self, logits, score):
        if score == "sigmoid":
            return super().expert_scores(logits, score)
        powers = logits.float().exp()
        return powers / powers.sum(-1, keepdim=True)


@near("weights.shifted-logits")
class LogitsClamped(OtherLogits):
    """Logits are kept between -60 and 60."""

    def before(self, logits):
        return logits.clamp(-60, 60)


@near("weights.equal-logits")
class EqualScoresAreMaskedTogether(MoERouter):
    """The best expert is taken ``top_k`` times, all that are as good being masked each time."""

    def best(self, ranked_TE, allowed_TE, top_k):
        ranked_TE = ranked_TE.masked_fill(~allowed_TE, -torch.inf)
        slots = []
        for _ in range(top_k):
            best, at = ranked_TE.max(-1, keepdim=True)
            slots.append(at)
            ranked_TE = ranked_TE.masked_fill(ranked_TE == best, -torch.inf)
        return torch.cat(slots, -1)


@near("weights.masked-experts")
class LogitsCentred(OtherLogits):
    """The mean is taken from a token's logits first, which is infinite if one of them is."""

    def before(self, logits):
        return logits - logits.mean(-1, keepdim=True)


@near("weights.masked-experts")
class InfinityIsTheLowestNumber(MoERouter):
    """A logit of -inf becomes -2, as in a router that clamps what it must not choose."""

    def moe_router(self, logits, **options):
        return super().moe_router(logits.masked_fill(logits == -torch.inf, -2.0), **options)


@near("weights.nan-is-seen")
class NaNIsZero(OtherLogits):
    """NaN becomes 0."""

    def before(self, logits):
        return logits.nan_to_num()


@near("weights.nan-is-seen")
class NaNSpreads(After):
    """NaN in a token reaches the weights of all, through a mean that is taken off again."""

    def after(self, weights_TK, indices_TK, logits):
        return weights_TK + 0 * logits.float().mean(), indices_TK


# Which experts


@near("choice.largest-scores")
class LargestMagnitude(MoERouter):
    """Experts are chosen by the magnitude of their logits."""

    def moe_router(self, logits, **options):
        self.logits = logits
        return super().moe_router(logits, **options)

    def selection_scores(self, scores_TE, bias):
        return self.logits.float().abs() if bias is None else scores_TE + bias


@near("choice.largest-scores")
class NextBest(MoERouter):
    """The last slot has the next expert but one."""

    def best(self, ranked_TE, allowed_TE, top_k):
        more = min(top_k + 1, ranked_TE.shape[-1])
        found = super().best(ranked_TE, allowed_TE, more)
        return torch.cat([found[..., : top_k - 1], found[..., -1:]], -1)


@near("choice.many-experts")
class SevenBits(After):
    """Experts are numbered in 7 bits."""

    def after(self, weights_TK, indices_TK, logits):
        return weights_TK, indices_TK % 128


@near("choice.ties")
class TiesAreTakenTwice(EqualScoresAreMaskedTogether):
    """Of equal scores one is taken, and then the first expert again."""


@near("choice.ties-lowest-index")
class HighestIndex(MoERouter):
    """Of experts with equal scores those with the highest index are chosen."""

    def best(self, ranked_TE, allowed_TE, top_k):
        found = super().best(ranked_TE.flip(-1), allowed_TE.flip(-1), top_k)
        return ranked_TE.shape[-1] - 1 - found


@near("choice.one-expert")
class OneExpertIsOne(MoERouter):
    """With one expert a token its weight is 1."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = super().expert_weights(scores_TE, indices_TK, normalize)
        return weights_TK / weights_TK.detach() if weights_TK.shape[-1] == 1 else weights_TK


@near("choice.one-expert-normalised")
class OneExpertIsNotNormalised(MoERouter):
    """With one expert a token weights are not normalised, as some libraries have it."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        return super().expert_weights(scores_TE, indices_TK, normalize and indices_TK.shape[-1] > 1)


@near("choice.all-experts")
class NeverTheLast(MoERouter):
    """With as many slots as experts the last slot repeats the one before."""

    def best(self, ranked_TE, allowed_TE, top_k):
        found = super().best(ranked_TE, allowed_TE, top_k)
        if found.shape[-1] < ranked_TE.shape[-1] or top_k < 2:
            return found
        return torch.cat([found[..., :-1], found[..., -2:-1]], -1)


# A selection bias


@near("bias.chooses")
class BiasTakenOff(MoERouter):
    """The bias is taken off the scores."""

    def selection_scores(self, scores_TE, bias):
        return scores_TE if bias is None else scores_TE - bias


@near("bias.not-in-weights")
class BiasInTheSum(MoERouter):
    """The bias is in the sum that weights are divided by."""

    def selection_scores(self, scores_TE, bias):
        self.bias = bias
        return super().selection_scores(scores_TE, bias)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        if not normalize:
            return weights_TK
        biased_TE = super().selection_scores(scores_TE, self.bias)
        return weights_TK / biased_TE.gather(-1, indices_TK).sum(-1, keepdim=True)


@near("bias.constant")
class BiasMultiplies(MoERouter):
    """Scores are multiplied by one plus the bias."""

    def selection_scores(self, scores_TE, bias):
        return scores_TE if bias is None else scores_TE * (1 + bias)


@near("bias.in-float32")
class BiasInFloat16(MoERouter):
    """The bias is rounded to float16."""

    def selection_scores(self, scores_TE, bias):
        return super().selection_scores(scores_TE, None if bias is None else bias.half())


# Groups


@near("groups.best-expert")
class AlwaysTheBestTwo(MoERouter):
    """A group is as good as the sum of its best two without a bias as well."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        return super().allowed_experts(ranked_TE, groups, biased=True)


@near("groups.best-expert")
class GroupsOfNumbers(MoERouter):
    """Groups are of experts with the same remainder, not of neighbours."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        if groups is None:
            return super().allowed_experts(ranked_TE, groups, biased=biased)
        size = ranked_TE.shape[-1] // groups[0]
        dealt = ranked_TE.unflatten(-1, (size, -1)).mT.flatten(-2)
        allowed = super().allowed_experts(dealt, groups, biased=biased)
        return allowed.unflatten(-1, (-1, size)).mT.flatten(-2)


@near("groups.best-two")
class SumOfTheGroup(MoERouter):
    """A group is as good as the sum of all its experts."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        if groups is None or not biased:
            return super().allowed_experts(ranked_TE, groups, biased=biased)
        sums_TG = ranked_TE.unflatten(-1, (groups[0], -1)).sum(-1)
        kept = torch.zeros_like(sums_TG, dtype=torch.bool)
        kept = kept.scatter(-1, sums_TG.topk(groups[1], dim=-1).indices, True)
        return kept.repeat_interleave(ranked_TE.shape[-1] // groups[0], dim=-1)


@near("groups.negative-scores")
class OtherGroupsAreMinusOne(MoERouter):
    """Scores of groups that are not kept become -1, for no score was thought to be lower."""

    def best(self, ranked_TE, allowed_TE, top_k):
        everywhere = torch.ones_like(allowed_TE)
        return super().best(ranked_TE.masked_fill(~allowed_TE, -1), everywhere, top_k)


# The factor


@near("scaling.weights")
class FactorOnlyIfNormalised(MoERouter):
    """The factor is used in the branch that normalises."""

    def moe_router(self, logits, *, normalize=False, scaling_factor=1.0, **options):
        factor = scaling_factor if normalize else 1.0
        return super().moe_router(logits, normalize=normalize, scaling_factor=factor, **options)


@near("scaling.after-normalising")
class FactorTwice(MoERouter):
    """Normalised weights are multiplied by the factor twice."""

    def moe_router(self, logits, *, normalize=False, scaling_factor=1.0, **options):
        factor = scaling_factor**2 if normalize else scaling_factor
        return super().moe_router(logits, normalize=normalize, scaling_factor=factor, **options)


@near("options.any-combination")
class NoGroupsWithoutNormalising(MoERouter):
    """With softmax, a bias and no normalisation, groups are forgotten."""

    def moe_router(self, logits, *, groups=None, selection_bias=None, score="softmax", **options):
        if selection_bias is not None and score == "softmax" and not options.get("normalize"):
            groups = None
        return super().moe_router(
            logits, groups=groups, selection_bias=selection_bias, score=score, **options
        )


# Gradients


@near("gradient.logits")
class SumWithoutGradient(MoERouter):
    """The sum that weights are divided by is taken for a constant."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK / weights_TK.detach().sum(-1, keepdim=True) if normalize else weights_TK


@near("gradient.logits")
class WeightsDetached(After):
    """No gradient reaches the logits."""

    def after(self, weights_TK, indices_TK, logits):
        return weights_TK.detach(), indices_TK


@near("gradient.one-expert")
class StraightThrough(MoERouter):
    """With one expert a token the gradient of the score is taken for 1."""

    def expert_scores(self, logits, score):
        scores_TE = super().expert_scores(logits, score)
        return scores_TE.detach() + logits.float() - logits.float().detach()


@near("gradient.options")
class FactorNotInGradients(MoERouter):
    """The factor is on the weights and not in their gradients."""

    def moe_router(self, logits, *, scaling_factor=1.0, **options):
        weights_TK, *rest = super().moe_router(logits, scaling_factor=scaling_factor, **options)
        return (OtherGradient.apply(weights_TK, lambda g: g / scaling_factor), *rest)


# The balancing loss


@near("loss.value")
class LossWithNormalisedWeights(MoERouter):
    """P is the mean of the chosen experts' normalised weights."""

    def balancing_loss(self, logits, indices_TK):
        tokens, experts = logits.shape
        scores_TE = self.expert_scores(logits, "softmax")
        weights_TK = self.expert_weights(scores_TE, indices_TK, True)
        mean_E = torch.zeros_like(scores_TE).scatter(-1, indices_TK, weights_TK).mean(0)
        return experts * (indices_TK.flatten().bincount(minlength=experts) / tokens * mean_E).sum()


@near("loss.balanced")
class LossAboveItsMinimum(MoERouter):
    """What the loss of balanced routing is is taken off."""

    def balancing_loss(self, logits, indices_TK):
        return super().balancing_loss(logits, indices_TK) - indices_TK.shape[-1]


@near("loss.collapsed")
class ShareAtMostEven(MoERouter):
    """An expert counts no more slots than twice its even share."""

    def balancing_loss(self, logits, indices_TK):
        tokens, experts = logits.shape
        share_E = indices_TK.flatten().bincount(minlength=experts) / max(tokens, 1)
        share_E = share_E.clamp(max=2 * indices_TK.shape[-1] / experts)
        return experts * (share_E * self.expert_scores(logits, "softmax").mean(0)).sum()


@near("loss.gradient")
class LossDetached(MoERouter):
    """The loss has no gradient."""

    def balancing_loss(self, logits, indices_TK):
        return super().balancing_loss(logits.detach(), indices_TK)


@near("loss.gradient")
class GradientOfTheShareToo(MoERouter):
    """The share of slots has the gradient of the scores."""

    def balancing_loss(self, logits, indices_TK):
        scores_TE = self.expert_scores(logits, "softmax")
        more = scores_TE.mean(0) - scores_TE.mean(0).detach()
        share_E = indices_TK.flatten().bincount(minlength=logits.shape[-1]) / max(len(logits), 1)
        return logits.shape[-1] * ((share_E + more) * scores_TE.mean(0)).sum()


@near("loss.of-what-is-chosen")
class LossOfScores(MoERouter):
    """P is the mean of the scores that experts are chosen by."""

    def moe_router(self, logits, *, score="softmax", **options):
        self.score = score
        return super().moe_router(logits, score=score, **options)

    def balancing_loss(self, logits, indices_TK):
        share_E = indices_TK.flatten().bincount(minlength=logits.shape[-1]) / max(len(logits), 1)
        return logits.shape[-1] * (share_E * self.expert_scores(logits, self.score).mean(0)).sum()


@near("loss.of-what-is-chosen")
class LossOfTheUnbiased(MoERouter):
    """The loss counts the best experts without the bias."""

    def balancing_loss(self, logits, indices_TK):
        best_TK = logits.topk(indices_TK.shape[-1], dim=-1).indices
        return super().balancing_loss(logits, best_TK)


@near("loss.changes-no-weights")
class NormalisedForTheLoss(MoERouter):
    """Asked for the loss, weights are normalised."""

    def moe_router(self, logits, *, normalize=False, return_balancing_loss=False, **options):
        return super().moe_router(
            logits,
            normalize=normalize or return_balancing_loss,
            return_balancing_loss=return_balancing_loss,
            **options,
        )


# Tokens


@near("tokens.permuted")
class LaterTokensWeighLess(After):
    """Weights fall a little with the place of the token."""

    def after(self, weights_TK, indices_TK, logits):
        fall = 1 - 0.001 * torch.arange(len(logits))[:, None]
        return (weights_TK * fall).to(weights_TK.dtype), indices_TK


@near("tokens.alone")
class CentredOverTokens(OtherLogits):
    """The mean over tokens is taken off every expert's logits, to balance them."""

    def before(self, logits):
        return logits - logits.mean(0) if len(logits) else logits


@near("tokens.all-to-the-same")
class Capacity(After):
    """Beyond twelve tokens an expert gives the others the weight 0."""

    def after(self, weights_TK, indices_TK, logits):
        kept = torch.ones_like(indices_TK, dtype=torch.bool)
        for expert in range(logits.shape[-1]):
            late = (indices_TK == expert).nonzero()[12:]
            kept[late[:, 0], late[:, 1]] = False
        return torch.where(kept, weights_TK, 0), indices_TK


@near("tokens.none")
class NoTokensAreOne(MoERouter):
    """Without tokens there is a row of zeros."""

    def moe_router(self, logits, **options):
        if not len(logits):
            logits = logits.new_zeros(1, logits.shape[-1])
        return super().moe_router(logits, **options)


# The output


@near("output.shape-dtype-device")
class IndicesInInt32(After):
    """Experts are int32, as some kernels have them."""

    def after(self, weights_TK, indices_TK, logits):
        return weights_TK, indices_TK.int()


@near("output.shape-dtype-device")
class IndicesFirst(MoERouter):
    """Experts come first, and then their weights."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        return (indices_TK, weights_TK, *loss)


@near("output.inputs-unchanged")
class LogitsShiftedInPlace(OtherLogits):
    """The largest logit is taken off in place."""

    def before(self, logits):
        return logits.detach().sub_(logits.amax(-1, keepdim=True)) if len(logits) else logits


@near("output.inputs-unchanged")
class BiasUpdated(MoERouter):
    """The bias is moved towards balance at each call, as in training."""

    def moe_router(self, logits, *, selection_bias=None, **options):
        found = super().moe_router(logits, selection_bias=selection_bias, **options)
        if selection_bias is not None:
            selection_bias += 0.001
        return found


@near("output.deterministic")
class Jitter(After):
    """A random number decides the last bits, as jitter that is left on does."""

    def after(self, weights_TK, indices_TK, logits):
        noise = torch.finfo(weights_TK.dtype).eps * (torch.rand_like(weights_TK) < 0.5)
        return weights_TK * (1 + noise), indices_TK


@near("output.deterministic")
class AnswersKept(MoERouter):
    """Answers are kept by the shape of the logits."""

    def moe_router(self, logits, **options):
        kept = self.__dict__.setdefault("kept", {})
        key = (logits.shape, logits.dtype, repr(options))
        weights, *rest = super().moe_router(logits, **options)
        before = kept.setdefault(key, weights.detach())
        kept[key] = weights.detach()
        return (weights + (before - weights).detach() * 1e-3, *rest)


@near("inputs.any-strides")
class OrderOfMemory(OtherLogits):
    """Logits are read as they lie in memory."""

    def before(self, logits):
        return logits.as_strided(logits.shape, (logits.shape[1], 1))


# What is refused


@near("refuses.top-k")
class TopKClamped(MoERouter):
    """A ``top_k`` that cannot be becomes the nearest that can."""

    def moe_router(self, logits, *, top_k, **options):
        return super().moe_router(logits, top_k=min(max(top_k, 1), logits.shape[-1]), **options)


@near("refuses.too-few-in-groups")
class FilledUpFromOtherGroups(MoERouter):
    """Where the kept groups have too few experts, all groups are kept."""

    def moe_router(self, logits, *, top_k, groups=None, **options):
        if groups and top_k > groups[1] * logits.shape[-1] // groups[0]:
            groups = None
        return super().moe_router(logits, top_k=top_k, groups=groups, **options)


@near("refuses.groups")
class UnevenGroupsIgnored(MoERouter):
    """Groups that do not divide the experts are left out."""

    def moe_router(self, logits, *, groups=None, **options):
        if groups and logits.shape[-1] % groups[0]:
            groups = None
        return super().moe_router(logits, groups=groups, **options)


@near("refuses.bias-of-another-length")
class BiasBroadcast(MoERouter):
    """A bias of length 1 is broadcast."""

    def moe_router(self, logits, *, selection_bias=None, **options):
        if selection_bias is not None and len(selection_bias) == 1:
            selection_bias = selection_bias.expand(logits.shape[-1])
        return super().moe_router(logits, selection_bias=selection_bias, **options)


@near("refuses.bias-of-another-length")
class BiasCut(MoERouter):
    """A bias that is too long is cut, as one for padded experts."""

    def moe_router(self, logits, *, selection_bias=None, **options):
        if selection_bias is not None:
            selection_bias = selection_bias[: logits.shape[-1]]
        return super().moe_router(logits, selection_bias=selection_bias, **options)


@near("refuses.unknown-score")
class AnythingElseIsSigmoid(MoERouter):
    """Whatever is not softmax is sigmoid."""

    def moe_router(self, logits, *, score="softmax", **options):
        score = score if score == "softmax" else "sigmoid"
        return super().moe_router(logits, score=score, **options)
