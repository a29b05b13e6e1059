"""Documented bugs of distillation losses."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.known_bugs import known_bug
from reference_impl.shared_core.distillation_loss import (
    IGNORED,
    DistillationLoss,
    as_logits,
)


class _TermByTerm(DistillationLoss):
    """The two terms one after the other, each with labels of its own."""

    def labels_of_divergence(self, labels):
        return labels

    def labels_of_cross_entropy(self, labels):
        return labels

    def divergence_term(self, student, teacher, labels, **options):
        labels = self.labels_of_divergence(labels)
        return super().distillation_loss(student, teacher, labels, alpha=1.0, **options)

    def cross_entropy_term(self, student, teacher, labels, **options):
        labels = self.labels_of_cross_entropy(labels)
        return super().distillation_loss(student, teacher, labels, alpha=0.0, **options)

    def distillation_loss(self, student, teacher, labels, *, alpha=0.5, **options):
        total = 0.0
        if alpha > 0:
            total = total + alpha * self.divergence_term(student, teacher, labels, **options)
        if alpha < 1:
            cross_entropy = self.cross_entropy_term(student, teacher, labels, **options)
            total = total + (1 - alpha) * cross_entropy
        return total


# The generalised Jensen-Shannon divergence


class _OtherJSD(DistillationLoss):
    """Replaces the Jensen-Shannon divergence and leaves the others."""

    def jsd(self, log_q_NO, log_s_NO, beta):
        raise NotImplementedError

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence == "jsd":
            return self.jsd(log_q_NO, log_s_NO, beta)
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)


@known_bug(
    "dist-jsd-mixture-weights",
    contract="distillation_loss",
    breaks="distillation_loss.jsd.values",
)
class WeightsOfTheOther(DistillationLoss):
    """The mixture is β Q + (1 − β) S, but the KL of the student is weighted by β, as if it were Q."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence != "jsd" or beta in (0, 1):
            return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        log_m_NO = self.mixture(log_q_NO, log_s_NO, beta)
        return (1 - beta) * self.kl(log_q_NO, log_m_NO) + beta * self.kl(log_s_NO, log_m_NO)


@known_bug(
    "dist-jsd-mixture-weights.mixture",
    contract="distillation_loss",
    breaks="distillation_loss.jsd.values",
)
class OtherMixture(DistillationLoss):
    """The mixture is (1 − β) Q + β S, and the KLs are weighted as if it were β Q + (1 − β) S."""

    def mixture(self, log_q_NO, log_s_NO, beta):
        return super().mixture(log_q_NO, log_s_NO, 1 - beta)


@known_bug(
    "dist-jsd-mixture-weights.clamped",
    contract="distillation_loss",
    breaks="distillation_loss.jsd.ends",
)
class ClampedBeta(_OtherJSD):
    """β is clamped to [1e-6, 1 − 1e-6]: at both ends the loss all but vanishes."""

    def jsd(self, log_q_NO, log_s_NO, beta):
        beta = min(max(beta, 1e-6), 1 - 1e-6)
        return super(_OtherJSD, self).token_divergence(log_q_NO, log_s_NO, "jsd", beta)


@known_bug(
    "dist-jsd-mixture-weights.ends-exchanged",
    contract="distillation_loss",
    breaks="distillation_loss.jsd.ends",
)
class EndsExchanged(_OtherJSD):
    """At β = 0 it is the reverse KL, and at β = 1 the forward one."""

    def jsd(self, log_q_NO, log_s_NO, beta):
        beta = 1 - beta if beta in (0, 1) else beta
        return super(_OtherJSD, self).token_divergence(log_q_NO, log_s_NO, "jsd", beta)


@known_bug(
    "dist-jsd-mixture-weights.interpolated",
    contract="distillation_loss",
    breaks="distillation_loss.jsd.disjoint",
)
class Interpolated(_OtherJSD):
    """Between its ends it is (1 − β) KL(Q ‖ S) + β KL(S ‖ Q), without a mixture."""

    def jsd(self, log_q_NO, log_s_NO, beta):
        return (1 - beta) * self.kl(log_q_NO, log_s_NO) + beta * self.kl(log_s_NO, log_q_NO)


# The denominator


@known_bug(
    "dist-reduction-denominator",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.more-rows",
)
class BatchMeanOfThreeAxes(_TermByTerm):
    """``batchmean`` of [batch, tokens, vocabulary] divides the KL by the batch alone."""

    def divergence_term(self, student, teacher, labels, **options):
        if options.get("num_items_in_batch") is None:
            options["num_items_in_batch"] = len(labels)
        return super().divergence_term(student, teacher, labels, **options)


@known_bug(
    "dist-reduction-denominator.vocabulary",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.vocabulary",
)
class MeanOfElements(DistillationLoss):
    """``reduction="mean"`` divides the KL by the vocabulary besides."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta) / log_s_NO.shape[-1]


@known_bug(
    "dist-reduction-denominator.padded",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.more-columns",
)
class MeanOfAllPositions(DistillationLoss):
    """Sums over valid targets are divided by all positions, padding included."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return num_items_in_batch or max(1, valid_BT.numel())


@known_bug(
    "dist-reduction-denominator.sum",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.batch-twice",
)
class SumOfTokens(_TermByTerm):
    """``reduction="sum"``: the KL is not divided at all."""

    def divergence_term(self, student, teacher, labels, **options):
        if options.get("num_items_in_batch") is None:
            options["num_items_in_batch"] = 1
        return super().divergence_term(student, teacher, labels, **options)


# The temperature


@known_bug(
    "dist-temperature-squared",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.values",
)
class WithoutTemperatureSquared(DistillationLoss):
    """T² is missing."""

    def scale_of_divergence(self, temperature):
        return 1.0


@known_bug(
    "dist-temperature-squared.twice",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.large-limit",
)
class TemperatureSquaredTwice(DistillationLoss):
    """T² is applied to the sum over the vocabulary, and to the loss again."""

    def scale_of_divergence(self, temperature):
        return temperature**4


@known_bug(
    "dist-temperature-squared.not-squared",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.values",
)
class TemperatureNotSquared(DistillationLoss):
    """The divergence is multiplied by T."""

    def scale_of_divergence(self, temperature):
        return temperature


@known_bug(
    "dist-temperature-squared.blend",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.blend",
)
class TemperatureSquaredOfTheBlend(_TermByTerm):
    """T² multiplies the blended loss, cross entropy included."""

    def cross_entropy_term(self, student, teacher, labels, **options):
        loss = super().cross_entropy_term(student, teacher, labels, **options)
        return loss * options.get("temperature", 1.0) ** 2


@known_bug(
    "dist-temperature-squared.cross-entropy",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.cross-entropy",
)
class TemperedCrossEntropy(_TermByTerm):
    """The student's logits are divided by T once, for both terms."""

    def cross_entropy_term(self, student, teacher, labels, **options):
        if isinstance(student, Tensor):
            student = student / options.get("temperature", 1.0)
        return super().cross_entropy_term(student, teacher, labels, **options)


@known_bug(
    "dist-temperature-squared.teacher-only",
    contract="distillation_loss",
    breaks="distillation_loss.temperature.values",
)
class TeacherTemperedAlone(DistillationLoss):
    """The temperature is that of the teacher's distribution alone."""

    def both_log_probabilities(self, student_NV, teacher, valid_BT, temperature, *top_k):
        found = super().both_log_probabilities(
            student_NV * temperature, teacher, valid_BT, temperature, *top_k
        )
        return found


# The mask


@known_bug(
    "dist-padding-and-prompt-not-masked",
    contract="distillation_loss",
    breaks="distillation_loss.mask.content",
)
class DivergenceOfEverything(_TermByTerm):
    """The KL runs over prompt and padding too."""

    def labels_of_divergence(self, labels):
        return labels.clamp(min=0)


@known_bug(
    "dist-padding-and-prompt-not-masked.input-position",
    contract="distillation_loss",
    breaks="distillation_loss.mask.content",
)
class MaskOfTheInputToken(_TermByTerm):
    """The KL has the mask of the token that is read, the cross entropy that of the one to come."""

    def labels_of_divergence(self, labels):
        # What is looked up behind a position is what stands at it.
        return labels.roll(1, dims=1)


@known_bug(
    "dist-padding-and-prompt-not-masked.prompt",
    contract="distillation_loss",
    breaks="distillation_loss.mask.content",
)
class DivergenceOfThePrompt(_TermByTerm):
    """The KL has the attention mask: padding is left out, the prompt is not."""

    def labels_of_divergence(self, labels):
        later = (labels >= 0).flip(1).cumsum(1).flip(1) > 0
        return torch.where(later, labels.clamp(min=0), labels)


@known_bug(
    "dist-padding-and-prompt-not-masked.mean",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.more-columns",
)
class MaskedButCounted(_TermByTerm):
    """The KL of padding is zero, but its positions are among those that the sum is divided by."""

    def divergence_term(self, student, teacher, labels, **options):
        if options.get("num_items_in_batch") is None:
            options["num_items_in_batch"] = max(1, labels[:, 1:].numel())
        return super().divergence_term(student, teacher, labels, **options)


# The shift


class _TeacherElsewhere(DistillationLoss):
    """The teacher's logits are those of another position."""

    def both_log_probabilities(self, student_NV, teacher, valid_BT, temperature, *top_k):
        shifted = (None if x is None else x.roll(-1, dims=1) for x in (teacher, *top_k))
        teacher, *top_k = shifted
        return super().both_log_probabilities(student_NV, teacher, valid_BT, temperature, *top_k)


@known_bug(
    "dist-shift-by-one",
    contract="distillation_loss",
    breaks="distillation_loss.zero.same-distributions",
)
class TeacherOnePositionLater(_TeacherElsewhere):
    """The student's logits at a position are compared with the teacher's at the next."""


@known_bug(
    "dist-shift-by-one.twice",
    contract="distillation_loss",
    breaks="distillation_loss.cross-entropy.values",
)
class ShiftedTwice(DistillationLoss):
    """Labels that the model has shifted are shifted by the loss again."""

    def next_tokens(self, labels_BT):
        twice = labels_BT[:, 1:].roll(-1, dims=1)
        twice[:, -1] = IGNORED
        return twice


@known_bug(
    "dist-shift-by-one.mask",
    contract="distillation_loss",
    breaks="distillation_loss.shift.fixture",
)
class MaskNotShifted(DistillationLoss):
    """Logits and labels are shifted, the mask is not."""

    def valid_targets(self, labels_BT):
        return labels_BT[:, :-1] != IGNORED

    def next_tokens(self, labels_BT):
        return super().next_tokens(labels_BT).clamp(min=0)


@known_bug(
    "dist-shift-by-one.last-position",
    contract="distillation_loss",
    breaks="distillation_loss.shift.last-logits",
)
class LastPositionCounts(DistillationLoss):
    """Nothing is shifted: the last logits have a part."""

    def next_tokens(self, labels_BT):
        return labels_BT

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        more = torch.cat([logits_BTV, logits_BTV[:, -1:]], dim=1)
        return super().kept_logits(more, valid_BT, vocabulary)

    def both_log_probabilities(self, student_NV, teacher, valid_BT, temperature, *top_k):
        more = (None if x is None else torch.cat([x, x[:, -1:]], dim=1) for x in top_k)
        return super().both_log_probabilities(student_NV, teacher, valid_BT, temperature, *more)


# Modes of modules


@known_bug(
    "dist-teacher-mode",
    contract="distillation_loss",
    breaks="distillation_loss.modules.teacher-evaluates",
)
class TeacherInItsOwnMode(DistillationLoss):
    """The teacher is run as it is: in training mode, with dropout, if it is part of the student."""

    def logits_of_teacher(self, teacher, ids):
        with torch.no_grad():
            return as_logits(teacher(ids))


@known_bug(
    "dist-teacher-mode.dropout",
    contract="distillation_loss",
    breaks="distillation_loss.modules.teacher-twice",
)
class TeacherTrains(DistillationLoss):
    """``student.train()`` before each step reaches the teacher, which is run with dropout."""

    def logits_of_teacher(self, teacher, ids):
        modes = [(module, module.training) for module in teacher.modules()]
        teacher.train()
        with torch.no_grad():
            found = as_logits(teacher(ids))
        for module, mode in modes:
            module.training = mode
        return found


@known_bug(
    "dist-teacher-mode.student-evaluates",
    contract="distillation_loss",
    breaks="distillation_loss.modules.shared",
)
class TeacherFirst(DistillationLoss):
    """The teacher is set to evaluation mode, and shared modules are so in the student's pass."""

    def logits_of_modules(self, student, teacher, ids, alpha):
        modes = [(module, module.training) for module in teacher.modules()]
        teacher.eval()
        found = super().logits_of_modules(student, teacher, ids, alpha)
        for module, mode in modes:
            module.training = mode
        return found


@known_bug(
    "dist-teacher-mode.left",
    contract="distillation_loss",
    breaks="distillation_loss.modules.modes-kept",
)
class LeftInEvaluationMode(DistillationLoss):
    """The teacher stays in evaluation mode, with what the student shares with it."""

    def logits_of_teacher(self, teacher, ids):
        teacher.eval()
        with torch.no_grad():
            return as_logits(teacher(ids))


@known_bug(
    "dist-teacher-mode.all-alike",
    contract="distillation_loss",
    breaks="distillation_loss.modules.modes-kept",
)
class AllModesAlike(DistillationLoss):
    """Afterwards the teacher has its own mode again, and every part of it the same."""

    def logits_of_teacher(self, teacher, ids):
        mode = teacher.training
        teacher.eval()
        with torch.no_grad():
            found = as_logits(teacher(ids))
        teacher.train(mode)
        return found


@known_bug(
    "dist-teacher-mode.gradient",
    contract="distillation_loss",
    breaks="distillation_loss.modules.teacher-no-gradient",
)
class GradientOfTheTeacher(DistillationLoss):
    """The teacher is run with gradients, and they reach its parameters."""

    def without_gradient(self, teacher):
        return teacher

    def logits_of_teacher(self, teacher, ids):
        modes = [(module, module.training) for module in teacher.modules()]
        teacher.eval()
        found = as_logits(teacher(ids))
        for module, mode in modes:
            module.training = mode
        return found


@known_bug(
    "dist-teacher-mode.logits",
    contract="distillation_loss",
    breaks="distillation_loss.teacher.no-gradient",
)
class GradientOfTheLogits(DistillationLoss):
    """The teacher's logits are not detached."""

    def without_gradient(self, teacher):
        return teacher


# Micro-batches


@known_bug(
    "dist-microbatch-normalisation",
    contract="distillation_loss",
    breaks="distillation_loss.micro-batches.add-up",
)
class MeanOfTheMicroBatch(DistillationLoss):
    """``num_items_in_batch`` is accepted and not used: each micro-batch is its own mean."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return super().number_of_targets(valid_BT, None)


@known_bug(
    "dist-microbatch-normalisation.cross-entropy-alone",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.num-items",
)
class DivergenceOfTheMicroBatch(_TermByTerm):
    """The cross entropy is divided by the number of items, the divergence by its own valid targets."""

    def divergence_term(self, student, teacher, labels, **options):
        options["num_items_in_batch"] = None
        return super().divergence_term(student, teacher, labels, **options)


@known_bug(
    "dist-microbatch-normalisation.rows",
    contract="distillation_loss",
    breaks="distillation_loss.denominator.more-rows",
)
class MeanOfMeansOfRows(DistillationLoss):
    """Every row is divided by its own valid targets, and the mean is taken over rows."""

    def distillation_loss(self, student, teacher, labels, **options):
        if options.get("num_items_in_batch") or not isinstance(student, Tensor):
            return super().distillation_loss(student, teacher, labels, **options)
        losses = []
        for row in range(len(labels)):
            at = slice(row, row + 1)
            top_k = {
                name: options[name][at]
                for name in ("teacher_indices", "teacher_logsumexp")
                if options.get(name) is not None
            }
            given = options | top_k
            losses.append(super().distillation_loss(student[at], teacher[at], labels[at], **given))
        return torch.stack(losses).mean()


# The direction, and the shift of the source


@known_bug(
    "distill-direction-reversed",
    contract="distillation_loss",
    breaks="distillation_loss.forward-kl.values",
)
class DirectionReversed(DistillationLoss):
    """The forward KL is that of the student from the teacher, and the reverse one the other way."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        other = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl"}
        divergence = other.get(divergence, divergence)
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)


@known_bug(
    "distill-direction-reversed.always-forward",
    contract="distillation_loss",
    breaks="distillation_loss.reverse-kl.values",
)
class AlwaysForward(DistillationLoss):
    """The reverse KL is the forward one."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        divergence = divergence.replace("reverse_kl", "forward_kl")
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)


@known_bug(
    "distill-cross-entropy-unshifted",
    contract="distillation_loss",
    breaks="distillation_loss.cross-entropy.values",
)
class CrossEntropyUnshifted(_TermByTerm):
    """The cross entropy of the logits at t is that of the label at t."""

    def labels_of_cross_entropy(self, labels):
        return labels.roll(1, dims=1)


# Nothing to learn


@known_bug(
    "distill-nothing-to-learn-nan",
    contract="distillation_loss",
    breaks="distillation_loss.mask.nothing-to-learn",
)
class ZeroByZero(DistillationLoss):
    """Without a valid target the loss is 0 / 0."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return num_items_in_batch or valid_BT.sum()


@known_bug(
    "distill-nothing-to-learn-nan.constant",
    contract="distillation_loss",
    breaks="distillation_loss.mask.nothing-to-learn",
)
class ZeroWithoutGraph(DistillationLoss):
    """Without a valid target the loss is a constant, whose backward pass raises."""

    def distillation_loss(self, student, teacher, labels, **options):
        loss = super().distillation_loss(student, teacher, labels, **options)
        return loss if bool(self.valid_targets(labels).any()) else loss.detach()


# Precision


@known_bug(
    "distill-low-precision",
    contract="distillation_loss",
    breaks="distillation_loss.dtype.divergence",
)
class SixteenBitSoftmax(DistillationLoss):
    """The softmax is taken in the dtype of the logits."""

    dtype = torch.float32

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        self.dtype = logits_BTV.dtype
        return super().kept_logits(logits_BTV, valid_BT, vocabulary)

    def tempered(self, logits_NV, temperature):
        found = super().tempered(logits_NV.to(self.dtype), temperature)
        return found.to(logits_NV.dtype)


@known_bug(
    "distill-low-precision.cross-entropy",
    contract="distillation_loss",
    breaks="distillation_loss.dtype.cross-entropy",
)
class SixteenBitCrossEntropy(SixteenBitSoftmax):
    """The cross entropy is computed in the dtype of the logits, and the divergence in float32."""

    def tempered(self, logits_NV, temperature):
        return DistillationLoss.tempered(self, logits_NV, temperature)

    def token_cross_entropy(self, logits_NV, targets_N):
        return super().token_cross_entropy(logits_NV.to(self.dtype), targets_N).to(logits_NV.dtype)


@known_bug(
    "distill-probabilities-clamped",
    contract="distillation_loss",
    breaks="distillation_loss.logits.large",
)
class ClampedProbabilities(DistillationLoss):
    """Logarithms are taken of probabilities, which are raised to 1e-8 first."""

    def tempered(self, logits_NV, temperature):
        return (logits_NV / temperature).softmax(-1).clamp(min=1e-8).log()


# The vocabulary


@known_bug(
    "distill-vocabulary-padding",
    contract="distillation_loss",
    breaks="distillation_loss.vocabulary.padding",
)
class PaddingHasProbability(DistillationLoss):
    """Columns of padding take part in both softmaxes."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        return super().kept_logits(logits_BTV, valid_BT, logits_BTV.shape[-1])


@known_bug(
    "distill-vocabulary-padding.teacher",
    contract="distillation_loss",
    breaks="distillation_loss.vocabulary.padding",
)
class TeacherKeepsItsPadding(DistillationLoss):
    """The teacher's softmax is over its padding too, and is cut to the vocabulary afterwards."""

    def both_log_probabilities(self, student_NV, teacher, valid_BT, temperature, *top_k):
        if top_k[0] is not None:
            return super().both_log_probabilities(
                student_NV, teacher, valid_BT, temperature, *top_k
            )
        teacher_NV = self.kept_logits(teacher, valid_BT, teacher.shape[-1])
        log_q_NV = self.tempered(teacher_NV, temperature)[:, : student_NV.shape[-1]]
        return log_q_NV, self.tempered(student_NV, temperature)


@known_bug(
    "distill-minus-infinity",
    contract="distillation_loss",
    breaks="distillation_loss.vocabulary.minus-infinity",
)
class ZeroTimesInfinity(DistillationLoss):
    """What has no probability is 0 · (−∞ − (−∞)), which is NaN."""

    def kl(self, log_p_NO, log_r_NO):
        return (log_p_NO.exp() * (log_p_NO - log_r_NO)).sum(-1)


# A teacher's likeliest columns


class _Columns(DistillationLoss):
    """Another treatment of the columns that a teacher does not give."""

    def outcomes(self, log_q_NK, log_s_NV, indices_NK):
        raise NotImplementedError

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        return self.outcomes(log_q_NO[:, :-1], log_s_NV, indices_NK)


@known_bug(
    "distill-top-k-filled",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.values",
)
class FilledWithLowLogits(_Columns):
    """Columns that the teacher does not give are −10000: it is certain that they do not come."""

    def outcomes(self, log_q_NK, log_s_NV, indices_NK):
        filled_NV = torch.full_like(log_s_NV, -1e4).scatter(-1, indices_NK, log_q_NK)
        return filled_NV.log_softmax(-1), log_s_NV


@known_bug(
    "distill-top-k-filled.renormalised",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.lost-mass",
)
class Renormalised(_Columns):
    """Both distributions are renormalised over the columns that the teacher gives."""

    def outcomes(self, log_q_NK, log_s_NV, indices_NK):
        return log_q_NK.log_softmax(-1), log_s_NV.gather(-1, indices_NK).log_softmax(-1)


@known_bug(
    "distill-top-k-filled.lost",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.values",
)
class LostMassIgnored(_Columns):
    """The sum is over the teacher's columns alone, and what the others have is not in it."""

    def outcomes(self, log_q_NK, log_s_NV, indices_NK):
        return log_q_NK, log_s_NV.gather(-1, indices_NK)


@known_bug(
    "distill-top-k-filled.tail-constant",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.tail-gradient",
)
class TailWithoutGradient(DistillationLoss):
    """The student's mass in the other columns is a constant."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        log_q_NO, log_s_NO = super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        given = indices_NK.shape[-1]
        return log_q_NO, torch.cat([log_s_NO[:, :given], log_s_NO[:, given:].detach()], dim=-1)


@known_bug(
    "distill-top-k-filled.uniform",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.values",
)
class TailSpreadEvenly(DistillationLoss):
    """The lost mass is spread evenly over the other columns, which tells more than is known."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        others = log_s_NV.shape[-1] - indices_NK.shape[-1]
        if not others:
            return super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        each_N1 = log_q_NO[:, -1:] - torch.tensor(float(others)).log()
        spread_NV = each_N1.expand_as(log_s_NV)
        return spread_NV.scatter(-1, indices_NK, log_q_NO[:, :-1]), log_s_NV


@known_bug(
    "distill-top-k-temperature",
    contract="distillation_loss",
    breaks="distillation_loss.top-k.values",
)
class NormaliserDividedByTemperature(DistillationLoss):
    """The teacher's log normaliser is divided by the temperature with its logits."""

    def teacher_over_outcomes(self, logits_NK, logsumexp_N, temperature):
        divided_N = logsumexp_N / temperature
        return super().teacher_over_outcomes(logits_NK, divided_N, temperature)
