"""Other right ways to offer the contract ``distillation_loss``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.distillation_loss import (
    IGNORED,
    DistillationLoss,
    as_logits,
)


@correct_variant("distillation-every-position", contract="distillation_loss")
class EveryPosition(DistillationLoss):
    """Positions without a target stay in the batch: their logits are zeros, and weigh nothing."""

    def valid_targets(self, labels_BT):
        self.valid_BT = super().valid_targets(labels_BT)
        return torch.ones_like(self.valid_BT)

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        logits_BTV = logits_BTV[:, :-1, :vocabulary]
        wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return torch.where(self.valid_BT[..., None], wide_BTV, 0.0).flatten(0, 1)

    def token_divergence(self, *arguments):
        return torch.where(self.valid_BT.flatten(), super().token_divergence(*arguments), 0.0)

    def token_cross_entropy(self, logits_NV, targets_N):
        each_N = super().token_cross_entropy(logits_NV, targets_N.clamp(min=0))
        return torch.where(self.valid_BT.flatten(), each_N, 0.0)

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return super().number_of_targets(self.valid_BT, num_items_in_batch)


@correct_variant("distillation-float64", contract="distillation_loss")
class InFloat64(DistillationLoss):
    """Everything is computed in float64, and the loss is."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        return super().kept_logits(logits_BTV, valid_BT, vocabulary).double()


@correct_variant("distillation-kl-div", contract="distillation_loss")
class TorchFunctions(DistillationLoss):
    """torch's ``kl_div`` of log probabilities and ``cross_entropy`` with an ignored index."""

    def kl(self, log_p_NO, log_r_NO):
        impossible = torch.isneginf(log_p_NO)
        log_p_NO = torch.where(impossible, -1e4, log_p_NO)
        log_r_NO = torch.where(impossible, -1e4, log_r_NO)
        return F.kl_div(log_r_NO, log_p_NO, reduction="none", log_target=True).sum(-1)

    def token_cross_entropy(self, logits_NV, targets_N):
        return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="none")


@correct_variant("distillation-chunks", contract="distillation_loss")
class ChunkByChunk(DistillationLoss):
    """A few targets at a time, so that no tensor of all log probabilities is made."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        chunks = zip(log_q_NO.split(4), log_s_NO.split(4))
        found = [super(ChunkByChunk, self).token_divergence(*c, divergence, beta) for c in chunks]
        return torch.stack([each.sum() for each in found])

    def token_cross_entropy(self, logits_NV, targets_N):
        chunks = zip(logits_NV.split(3), targets_N.split(3))
        return torch.stack([F.cross_entropy(*each, reduction="sum") for each in chunks])


@correct_variant("distillation-entropies", contract="distillation_loss")
class DifferenceOfEntropies(DistillationLoss):
    """The KL is the cross entropy of the two less the entropy of the first."""

    def kl(self, log_p_NO, log_r_NO):
        p_NO, possible = log_p_NO.exp(), log_p_NO > -torch.inf
        log_p_NO = torch.where(possible, log_p_NO, 0.0)
        log_r_NO = torch.where(possible, log_r_NO, 0.0)
        return (p_NO * log_p_NO).sum(-1) - (p_NO * log_r_NO).sum(-1)


@correct_variant("distillation-probabilities", contract="distillation_loss")
class MixtureOfProbabilities(DistillationLoss):
    """The mixture is one of probabilities, and its logarithm is taken afterwards."""

    def mixture(self, log_q_NO, log_s_NO, beta):
        mixture_NO = beta * log_q_NO.exp() + (1 - beta) * log_s_NO.exp()
        return mixture_NO.clamp(min=torch.finfo(mixture_NO.dtype).tiny).log()


@correct_variant("distillation-constant-mixture", contract="distillation_loss")
class ConstantMixture(DistillationLoss):
    """The mixture has no gradient: Σ (β q + (1 − β) s) d log m = Σ dm, and that is 0."""

    def mixture(self, log_q_NO, log_s_NO, beta):
        return super().mixture(log_q_NO, log_s_NO, beta).detach()


@correct_variant("distillation-logsumexp", contract="distillation_loss")
class ByTheNormaliser(DistillationLoss):
    """Log probabilities are logits less their logsumexp; T² is applied to the logits' gradient."""

    def tempered(self, logits_NV, temperature):
        scores_NV = logits_NV * (1 / temperature)
        return scores_NV - torch.logsumexp(scores_NV, dim=-1, keepdim=True)

    def scale_of_divergence(self, temperature):
        return math.pow(temperature, 2)


class _ClosedForm(torch.autograd.Function):
    """Σ KL(Q ‖ S) with its gradient (S − Q) / T made in the forward pass."""

    @staticmethod
    def forward(ctx, student_NV, log_q_NV, temperature):
        log_s_NV = torch.log_softmax(student_NV / temperature, -1)
        ctx.save_for_backward((log_s_NV.exp() - log_q_NV.exp()) / temperature)
        ratio_NV = torch.where(log_q_NV > -torch.inf, log_q_NV - log_s_NV, 0.0)
        return (log_q_NV.exp() * ratio_NV).sum(-1)

    @staticmethod
    def backward(ctx, upstream_N):
        (gradient_NV,) = ctx.saved_tensors
        return upstream_N[:, None] * gradient_NV, None, None


@correct_variant("distillation-closed-form", contract="distillation_loss")
class ClosedForm(DistillationLoss):
    """The gradient of the forward KL is written out, and made with the loss."""

    def both_log_probabilities(self, student_NV, teacher, valid_BT, temperature, *top_k):
        self.given = (student_NV, temperature) if top_k[0] is None else None
        return super().both_log_probabilities(student_NV, teacher, valid_BT, temperature, *top_k)

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence != "forward_kl" or self.given is None:
            return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        student_NV, temperature = self.given
        return _ClosedForm.apply(student_NV, log_q_NO, temperature)


@correct_variant("distillation-tail-of-probabilities", contract="distillation_loss")
class TailOfProbabilities(DistillationLoss):
    """The mass of the other columns is summed over them, the teacher's is what is missing to one."""

    def teacher_over_outcomes(self, logits_NK, logsumexp_N, temperature):
        log_q_NK = logits_NK / temperature - logsumexp_N[:, None]
        lost_N1 = 1 - log_q_NK.exp().sum(-1, keepdim=True)
        return torch.cat([log_q_NK, lost_N1.clamp(min=1e-7).log()], dim=-1)

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        other_NV = torch.ones_like(log_s_NV).scatter(-1, indices_NK, 0.0)
        tail_N1 = (log_s_NV.exp() * other_NV).sum(-1, keepdim=True).log()
        return log_q_NO, torch.cat([log_s_NV.gather(-1, indices_NK), tail_N1], dim=-1)


@correct_variant("distillation-teacher-first", contract="distillation_loss")
class TeacherFirst(DistillationLoss):
    """The teacher is run before the student, and copied out of what they share."""

    def logits_of_modules(self, student, teacher, ids, alpha):
        teacher_logits = self.logits_of_teacher(teacher, ids)
        return as_logits(student(ids)), teacher_logits.clone()


@correct_variant("distillation-token-sums", contract="distillation_loss")
class SumOfWeightedTokens(DistillationLoss):
    """Both terms are one number a token, divided before they are summed."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return 1

    def distillation_loss(self, student, teacher, labels, **options):
        self.items = options.get("num_items_in_batch") or max(
            1, int((labels[:, 1:] != IGNORED).sum())
        )
        return super().distillation_loss(student, teacher, labels, **options)

    def token_divergence(self, *arguments):
        return super().token_divergence(*arguments) / self.items

    def token_cross_entropy(self, logits_NV, targets_N):
        return super().token_cross_entropy(logits_NV, targets_N) / self.items
