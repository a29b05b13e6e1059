"""Other right ways to offer the contract ``moe_router``."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from conformance.correct_variants import correct_variant
from reference_impl.moe.routing import MoERouter, check_routing


@correct_variant("router-softmax-after-top-k", contract="moe_router")
class SoftmaxAfterTopK(MoERouter):
    """Experts are chosen by their logits; normalised weights are the softmax of those chosen."""

    def moe_router(self, logits, *, score="softmax", **options):
        self.logits = logits.float() if score == "softmax" else None
        return super().moe_router(logits, score=score, **options)

    def selection_scores(self, scores_TE, bias):
        if bias is None and self.logits is not None:
            return self.logits
        return super().selection_scores(scores_TE, bias)

    def expert_weights(self, scores_TE, indices_TK, normalize):
        if not normalize or self.logits is None:
            return super().expert_weights(scores_TE, indices_TK, normalize)
        return self.logits.gather(-1, indices_TK).softmax(-1)


@correct_variant("router-torch-topk", contract="moe_router")
class TorchTopK(MoERouter):
    """Experts come from an unsorted torch.topk where no scores are equal; 1e-20 is added to sums."""

    def best(self, ranked_TE, allowed_TE, top_k):
        masked_TE = ranked_TE.masked_fill(~allowed_TE, -torch.inf)
        if bool((masked_TE.sort(-1).values.diff(dim=-1) == 0).any()):
            return super().best(ranked_TE, allowed_TE, top_k)
        return masked_TE.topk(top_k, dim=-1, sorted=False).indices

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20) if normalize else weights_TK


@correct_variant("router-weights-in-dtype-of-logits", contract="moe_router")
class WeightsInTheDtypeOfLogits(MoERouter):
    """Weights are rounded to the dtype of the logits, as in Qwen3-MoE; the rest is in float32."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        return (weights_TK.to(logits.dtype), indices_TK, *loss)


@correct_variant("router-scaled-in-dtype-of-logits", contract="moe_router")
class ScaledInTheDtypeOfLogits(MoERouter):
    """Weights are rounded to the dtype of the logits first, and scaled in it."""

    def moe_router(self, logits, *, scaling_factor=1.0, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        return (weights_TK.to(logits.dtype) * scaling_factor, indices_TK, *loss)


@correct_variant("router-dense", contract="moe_router")
class Dense(MoERouter):
    """Weights are made over all experts, zero for those not chosen, and taken out at the end."""

    def expert_weights(self, scores_TE, indices_TK, normalize):
        chosen_TE = F.one_hot(indices_TK, scores_TE.shape[-1]).sum(-2)
        dense_TE = scores_TE * chosen_TE
        if normalize:
            dense_TE = F.normalize(dense_TE, p=1.0, dim=-1, eps=0.0)
        return dense_TE.gather(-1, indices_TK)


@correct_variant("router-slots-reversed", contract="moe_router")
class SlotsReversed(MoERouter):
    """The last slot has the best expert; weights and indices are views with other strides."""

    def best(self, ranked_TE, allowed_TE, top_k):
        return super().best(ranked_TE, allowed_TE, top_k).flip(-1)

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits, **options)
        return (weights_TK.T.contiguous().T, indices_TK.T.contiguous().T, *loss)


@correct_variant("router-exponentials", contract="moe_router")
class Exponentials(MoERouter):
    """Softmax through its logarithm and sigmoid through tanh; the division is a product."""

    def expert_scores(self, logits, score):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if score == "softmax":
            return (logits - logits.logsumexp(-1, keepdim=True)).exp()
        return torch.exp(F.logsigmoid(logits))

    def expert_weights(self, scores_TE, indices_TK, normalize):
        weights_TK = torch.take_along_dim(scores_TE, indices_TK, -1)
        if not normalize:
            return weights_TK
        return weights_TK * weights_TK.sum(-1, keepdim=True).reciprocal()


@correct_variant("router-float64", contract="moe_router")
class InFloat64(MoERouter):
    """Everything is computed in float64, and weights are rounded to float32 at the end."""

    def moe_router(self, logits, **options):
        weights_TK, indices_TK, *loss = super().moe_router(logits.double(), **options)
        return (weights_TK.float(), indices_TK, *(each.float() for each in loss))


@correct_variant("router-groups-as-matrices", contract="moe_router")
class GroupsAsMatrices(MoERouter):
    """Groups that are not kept lose their experts before top-k: these are chosen among the rest."""

    def allowed_experts(self, ranked_TE, groups, *, biased):
        if groups is None:
            return super().allowed_experts(ranked_TE, groups, biased=biased)
        number, kept = groups
        parts = ranked_TE.view(len(ranked_TE), number, ranked_TE.shape[-1] // number)
        sorted_parts = parts.sort(-1).values
        worth_TG = sorted_parts[..., -1] + sorted_parts[..., -2] if biased else parts.amax(-1)
        least = worth_TG.kthvalue(number - kept + 1, dim=-1, keepdim=True).values
        return (worth_TG >= least).repeat_interleave(parts.shape[-1], dim=-1)


@correct_variant("router-token-by-token", contract="moe_router")
class TokenByToken(MoERouter):
    """A token at a time, experts by numpy; a tuple is given as a list."""

    def moe_router(self, logits, *, return_balancing_loss=False, **options):
        route = super().moe_router
        rows = [route(row[None], **options) for row in logits] or [route(logits, **options)]
        weights_TK, indices_TK = (torch.cat(parts) for parts in zip(*rows))
        if not return_balancing_loss:
            return [weights_TK, indices_TK]
        return [weights_TK, indices_TK, self.balancing_loss(logits, indices_TK)]

    def best(self, ranked_TE, allowed_TE, top_k):
        ranked = ranked_TE.masked_fill(~allowed_TE, -torch.inf).detach().cpu().numpy()
        order = np.argsort(np.where(np.isnan(ranked), -np.inf, -ranked), axis=-1, kind="stable")
        return torch.from_numpy(np.ascontiguousarray(order[..., :top_k])).to(ranked_TE.device)


@correct_variant("router-loss-by-one-hot", contract="moe_router")
class LossByOneHot(MoERouter):
    """The loss is a mean over one-hot slots, in the dtype of the logits for the probabilities."""

    def balancing_loss(self, logits, indices_TK):
        experts = logits.shape[-1]
        probabilities_TE = logits.softmax(-1)
        share_KE = F.one_hot(indices_TK, experts).float().mean(0)
        return (share_KE * probabilities_TE.float().mean(0)[None]).sum() * experts


@correct_variant("router-raises-on-nan", contract="moe_router")
class RaisesOnNaN(MoERouter):
    """NaN raises, and logits are checked before anything is computed."""

    def moe_router(
        self, logits, *, top_k, score="softmax", selection_bias=None, groups=None, **rest
    ):
        check_routing(logits.shape[-1], top_k, score, selection_bias, groups)
        if bool(logits.isnan().any()):
            raise ValueError("NaN among the logits")
        options = {"score": score, "selection_bias": selection_bias, "groups": groups}
        return super().moe_router(logits, top_k=top_k, **options, **rest)
