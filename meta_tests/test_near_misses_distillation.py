"""Subtle mistakes in distillation losses that no catalogue lists, for every requirement."""

import math

import pytest
import torch
from mutants import Broken

from reference_impl.shared_core.distillation_loss import DIVERGENCES, IGNORED, DistillationLoss
from reference_impl.shared_core.evaluation_mode import evaluating

NEAR_DISTILLATION: dict[str, Broken] = {}


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"distillation_loss.{breaks}"
        NEAR_DISTILLATION[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_DISTILLATION)
def test_near_miss_is_caught(name):
    NEAR_DISTILLATION[name].assert_caught()


class Given(DistillationLoss):
    """Changes what it is given, and does the rest as it should."""

    def change(self, student, teacher, labels, options):
        raise NotImplementedError

    def distillation_loss(self, student, teacher, labels, **options):
        student, teacher, labels = self.change(student, teacher, labels, options)
        return super().distillation_loss(student, teacher, labels, **options)


# Divergences


@near("forward-kl.values")
class WithoutTheEntropy(DistillationLoss):
    """The forward KL is the cross entropy of soft targets: its gradient is right, its value is not."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence != "forward_kl":
            return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        return -(log_q_NO.exp() * log_s_NO).sum(-1)


@near("reverse-kl.values")
class WeightsAreConstants(DistillationLoss):
    """The student's probabilities are constants in the gradient of the reverse KL."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence != "reverse_kl":
            return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        return (log_s_NO.exp().detach() * (log_s_NO - log_q_NO)).sum(-1)


@near("jsd.values")
class NaturalWeights(DistillationLoss):
    """The Jensen-Shannon divergence is divided by β (1 − β)."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        found = super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        inside = divergence == "jsd" and 0 < beta < 1
        return found / (beta * (1 - beta)) if inside else found


@near("jsd.ends")
class EndsAreHalf(DistillationLoss):
    """β = 0 is taken for not given."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta or 0.5)


@near("jsd.disjoint")
class MixtureHasALowestProbability(DistillationLoss):
    """The mixture is raised by 1e-4, lest its logarithm be infinite."""

    def mixture(self, log_q_NO, log_s_NO, beta):
        return (super().mixture(log_q_NO, log_s_NO, beta).exp() + 1e-4).log()


@near("gradient.finite-differences")
class ClippedGradient(DistillationLoss):
    """The gradient of each logit is clipped to ±0.02."""

    def kept_logits(self, *arguments):
        found = super().kept_logits(*arguments)
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
        return found


@near("zero.same-distributions")
class SmoothedTeacher(DistillationLoss):
    """The teacher's distribution is mixed with a little of the uniform one."""

    def both_log_probabilities(self, *arguments):
        log_q, log_s = super().both_log_probabilities(*arguments)
        return (log_q.exp() * 0.999 + 0.001 / log_q.shape[-1]).log(), log_s


@near("zero.only-for-equal")
class SmallIsZero(DistillationLoss):
    """A token whose divergence is below 0.3 counts as learnt."""

    def token_divergence(self, *arguments):
        found = super().token_divergence(*arguments)
        return torch.where(found < 0.3, 0 * found, found)


@near("direction.kl-swapped")
class ReverseIsSymmetric(DistillationLoss):
    """The reverse KL is half of either direction."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        if divergence != "reverse_kl":
            return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        return (self.kl(log_q_NO, log_s_NO) + self.kl(log_s_NO, log_q_NO)) / 2


@near("direction.jsd-swapped")
class BetaIsHalf(DistillationLoss):
    """The Jensen-Shannon divergence is the symmetric one, whatever β is."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        beta = beta if beta in (0, 1) else 0.5
        return super().token_divergence(log_q_NO, log_s_NO, divergence, beta)


@near("logits.constant-shift")
class CappedLogits(DistillationLoss):
    """Logits are clamped to [-50, 50] before the softmax."""

    def kept_logits(self, *arguments):
        return super().kept_logits(*arguments).clamp(-50, 50)


@near("logits.large")
class AddedInsideTheLogarithm(DistillationLoss):
    """1e-10 is added to probabilities, lest their logarithm be infinite."""

    def tempered(self, logits_NV, temperature):
        return ((logits_NV / temperature).softmax(-1) + 1e-10).log()


# Weights of the two terms


@near("alpha.blend")
class AlphaOfTheLabels(DistillationLoss):
    """``alpha`` weighs the cross entropy, and 1 − ``alpha`` the divergence, between the ends."""

    def distillation_loss(self, student, teacher, labels, *, alpha=0.5, **options):
        alpha = 1 - alpha if 0 < alpha < 1 else alpha
        return super().distillation_loss(student, teacher, labels, alpha=alpha, **options)


@near("alpha.zero-has-no-teacher")
class ZeroTimesTheDivergence(DistillationLoss):
    """With ``alpha`` 0 the divergence is computed, and multiplied by 0."""

    def distillation_loss(self, student, teacher, labels, *, alpha=0.5, **options):
        loss = super().distillation_loss(student, teacher, labels, alpha=alpha, **options)
        if alpha > 0:
            return loss
        whole = super().distillation_loss(student, teacher, labels, alpha=1.0, **options)
        return loss + 0 * whole


@near("alpha.one-has-no-tokens")
class WhatIsKnownIsLeftOut(DistillationLoss):
    """Tokens that the teacher gets right have half the divergence."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        found = super().kept_logits(logits_BTV, valid_BT, vocabulary)
        self.best_N = found.argmax(-1)
        return found

    def distillation_loss(self, student, teacher, labels, **options):
        self.labels = labels
        return super().distillation_loss(student, teacher, labels, **options)

    def token_divergence(self, *arguments):
        targets_N = self.next_tokens(self.labels)[self.valid_targets(self.labels)]
        weight_N = torch.where(self.best_N == targets_N, 0.5, 1.0)
        return weight_N * super().token_divergence(*arguments)


@near("alpha.one-has-no-cross-entropy")
class ZeroTimesCrossEntropy(DistillationLoss):
    """With ``alpha`` 1 the cross entropy is computed, and multiplied by 0."""

    def distillation_loss(self, student, teacher, labels, *, alpha=0.5, **options):
        loss = super().distillation_loss(student, teacher, labels, alpha=alpha, **options)
        if alpha < 1:
            return loss
        return loss + 0 * super().distillation_loss(student, teacher, labels, alpha=0.0, **options)


@near("cross-entropy.values")
class SmoothedLabels(DistillationLoss):
    """The labels are smoothed by a hundredth."""

    def token_cross_entropy(self, logits_NV, targets_N):
        found = super().token_cross_entropy(logits_NV, targets_N)
        return 0.99 * found - 0.01 * logits_NV.log_softmax(-1).mean(-1)


@near("options.any-combination")
class ItemsOfTheTemperature(DistillationLoss):
    """With ``num_items_in_batch`` T² is left out."""

    def distillation_loss(self, student, teacher, labels, **options):
        self.items = options.get("num_items_in_batch")
        return super().distillation_loss(student, teacher, labels, **options)

    def scale_of_divergence(self, temperature):
        return 1.0 if self.items else super().scale_of_divergence(temperature)


# Temperature


@near("temperature.values")
class SquaredForTheForwardAlone(DistillationLoss):
    """T² multiplies the KLs; the Jensen-Shannon divergence goes without."""

    def token_divergence(self, log_q_NO, log_s_NO, divergence, beta):
        found = super().token_divergence(log_q_NO, log_s_NO, divergence, beta)
        return found / self.factor if divergence == "jsd" else found

    def tempered(self, logits_NV, temperature):
        self.factor = temperature**2
        return super().tempered(logits_NV, temperature)


@near("temperature.blend")
class AlphaOfTheTemperature(DistillationLoss):
    """The weight of the cross entropy is divided by T² instead."""

    def distillation_loss(self, student, teacher, labels, *, temperature=1.0, **options):
        loss = super().distillation_loss(
            student, teacher, labels, temperature=temperature, **options
        )
        alpha = options.get("alpha", 0.5)
        return loss / temperature**2 if 0 < alpha < 1 else loss


@near("temperature.large-limit")
class TemperatureIsBounded(DistillationLoss):
    """Temperatures above 100 are taken for 100."""

    def distillation_loss(self, student, teacher, labels, *, temperature=1.0, **options):
        bounded = min(temperature, 100.0)
        loss = super().distillation_loss(student, teacher, labels, temperature=bounded, **options)
        return loss * (temperature / bounded) ** 2


# Shift, mask and denominator


@near("shift.first-label")
class FirstLabelsAreCounted(DistillationLoss):
    """The valid targets are counted before the labels are shifted."""

    def distillation_loss(self, student, teacher, labels, **options):
        if options.get("num_items_in_batch") is None:
            options["num_items_in_batch"] = max(1, int((labels != IGNORED).sum()))
        return super().distillation_loss(student, teacher, labels, **options)


@near("shift.last-logits")
class LastLogitsAreRegularised(DistillationLoss):
    """The mean of all logits is added, times a millionth."""

    def distillation_loss(self, student, teacher, labels, **options):
        loss = super().distillation_loss(student, teacher, labels, **options)
        if options.get("ids") is not None:
            return loss
        return loss + 1e-6 * student.float().square().nan_to_num(posinf=0).mean()


@near("shift.fixture")
class FirstPositionIsNever(DistillationLoss):
    """The first position, which has seen one token, predicts nothing."""

    def valid_targets(self, labels_BT):
        valid_BT = super().valid_targets(labels_BT)
        valid_BT[:, 0] = False
        return valid_BT


class Weighted(DistillationLoss):
    """Every position is computed, and multiplied by whether it counts."""

    def valid_targets(self, labels_BT):
        self.valid_BT = super().valid_targets(labels_BT)
        return torch.ones_like(self.valid_BT)

    def token_divergence(self, *arguments):
        return super().token_divergence(*arguments) * self.valid_BT.flatten()

    def token_cross_entropy(self, logits_NV, targets_N):
        found = super().token_cross_entropy(logits_NV, targets_N.clamp(min=0))
        return found * self.valid_BT.flatten()

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return super().number_of_targets(self.valid_BT, num_items_in_batch)


@near("mask.non-finite")
class MultipliedByTheMask(Weighted):
    """What does not count is multiplied by 0, which NaN survives."""


@near("mask.content")
class HardlyCounts(Weighted):
    """Masked positions have a weight of a millionth."""

    def valid_targets(self, labels_BT):
        found = super().valid_targets(labels_BT)
        self.valid_BT = self.valid_BT.float().clamp(min=1e-6)
        return found


@near("mask.nothing-to-learn")
class TinyForNothing(DistillationLoss):
    """Without a target the loss is a small number times the logits."""

    def distillation_loss(self, student, teacher, labels, **options):
        loss = super().distillation_loss(student, teacher, labels, **options)
        nothing = not bool(self.valid_targets(labels).any()) and options.get("ids") is None
        return loss + 1e-8 * student.sum().float() if nothing else loss


@near("mask.row-without-targets")
class EveryRowHasOne(DistillationLoss):
    """A row without targets counts as one, lest something be divided by 0."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return num_items_in_batch or valid_BT.sum(-1).clamp(min=1).sum()


@near("mask.one-target")
class OneIsNoBatch(DistillationLoss):
    """A batch with a single target has no mean."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return num_items_in_batch or valid_BT.sum().clamp(min=2)


@near("denominator.more-columns")
class LengthCounts(DistillationLoss):
    """Sums are divided by the length of the rows besides, as a share of 6 tokens."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        count = super().number_of_targets(valid_BT, num_items_in_batch)
        return count * max(1.0, valid_BT.shape[1] / 6)


@near("denominator.more-rows")
class MeanOverRows(DistillationLoss):
    """The mean of targets a row is rounded up before it is multiplied again."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        rows = len(valid_BT)
        count = super().number_of_targets(valid_BT, None)
        return num_items_in_batch or math.ceil(int(count) / rows) * rows


@near("denominator.batch-twice")
class RootOfTheTargets(DistillationLoss):
    """Sums are divided by the targets to the power of 0.99."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return num_items_in_batch or super().number_of_targets(valid_BT, None) ** 0.99


@near("denominator.vocabulary")
class LogOfTheVocabulary(DistillationLoss):
    """Losses are divided by the logarithm of the vocabulary, in units of 20 tokens."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        self.width = vocabulary
        return super().kept_logits(logits_BTV, valid_BT, vocabulary)

    def number_of_targets(self, valid_BT, num_items_in_batch):
        count = super().number_of_targets(valid_BT, num_items_in_batch)
        return count * math.log(self.width) / math.log(20)


@near("denominator.num-items")
class AtLeastItsOwn(DistillationLoss):
    """The number of items is at least that of this batch."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        return max(int(super().number_of_targets(valid_BT, None)), num_items_in_batch or 0)


@near("micro-batches.add-up")
class RoundedUpToRows(DistillationLoss):
    """The number of items is rounded up to a multiple of the rows."""

    def number_of_targets(self, valid_BT, num_items_in_batch):
        count = super().number_of_targets(valid_BT, num_items_in_batch)
        return count + 1 if num_items_in_batch and len(valid_BT) == 1 else count


@near("micro-batches.one-without-targets")
class AnythingRatherThanNothing(DistillationLoss):
    """A micro-batch without targets learns token 0 everywhere, lest it have no gradient."""

    def next_tokens(self, labels_BT):
        following_BT = super().next_tokens(labels_BT)
        empty = not bool((following_BT != IGNORED).any())
        return following_BT.clamp(min=0) if empty else following_BT


# Vocabulary, dtypes, memory


@near("vocabulary.padding")
class PaddingIsLow(Given):
    """Columns of padding are lowered by 30 instead of left out."""

    def change(self, student, teacher, labels, options):
        size = options.pop("vocab_size", None)
        if size is not None:
            low = torch.zeros(student.shape[-1], device=student.device)
            low[size:] = 30
            student = student - low
            teacher = teacher - low if teacher.shape[-1] == len(low) else teacher
        return student, teacher, labels


@near("vocabulary.widths")
class NarrowerOfTheTwo(Given):
    """Where the models have different widths the narrower one is the vocabulary."""

    def change(self, student, teacher, labels, options):
        size = options.get("vocab_size")
        if size is not None and size < teacher.shape[-1] < student.shape[-1]:
            options["vocab_size"] = teacher.shape[-1]
        return student, teacher, labels


@near("vocabulary.minus-infinity")
class LowestOfTheOthers(DistillationLoss):
    """Minus infinity is replaced by the lowest of all finite logits."""

    def kept_logits(self, *arguments):
        found = super().kept_logits(*arguments)
        finite = torch.where(found > -torch.inf, found, torch.inf)
        lowest = float(finite.detach().min()) if finite.numel() else 0.0
        return found.clamp(min=lowest)


class RoundedTo16Bits(DistillationLoss):
    """Something is rounded to the dtype of the logits."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        self.dtype = logits_BTV.dtype
        return super().kept_logits(logits_BTV, valid_BT, vocabulary)


@near("dtype.divergence")
class RoundedProbabilities(RoundedTo16Bits):
    """Log probabilities are computed in float32 and kept in the dtype of the logits."""

    def tempered(self, logits_NV, temperature):
        found = super().tempered(logits_NV, temperature)
        return found.to(self.dtype).to(found.dtype)


@near("dtype.cross-entropy")
class RoundedLosses(RoundedTo16Bits):
    """The cross entropy of each token is kept in the dtype of the logits."""

    def token_cross_entropy(self, logits_NV, targets_N):
        found = super().token_cross_entropy(logits_NV, targets_N)
        return found.to(self.dtype).to(found.dtype)


@near("dtype.large")
class MaximumFirst(DistillationLoss):
    """The largest logit is taken from the others in their dtype."""

    def kept_logits(self, logits_BTV, valid_BT, vocabulary):
        most = logits_BTV[..., :vocabulary].amax(-1, keepdim=True)
        return super().kept_logits(logits_BTV - most, valid_BT, vocabulary)


@near("memory.any-strides")
class OrderOfMemory(Given):
    """Logits are read as they lie in memory."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is None and not student.is_contiguous():
            student = student.as_strided(student.shape, torch.empty(student.shape).stride())
        return student, teacher, labels


@near("teacher.no-gradient")
class TeacherOfTheReverse(DistillationLoss):
    """The teacher is detached for all but the reverse KL."""

    def distillation_loss(self, student, teacher, labels, **options):
        self.attached = options.get("divergence") == "reverse_kl"
        return super().distillation_loss(student, teacher, labels, **options)

    def without_gradient(self, teacher):
        return teacher if self.attached else super().without_gradient(teacher)


# Some of the teacher's columns


@near("top-k.values")
class TailOfTheTeacherTwice(DistillationLoss):
    """The student's mass in the other columns is its largest probability there."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        log_q_NO, log_s_NO = super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO, log_s_NO
        most_N1 = log_s_NV.scatter(-1, indices_NK, -torch.inf).amax(-1, keepdim=True)
        return log_q_NO, torch.cat([log_s_NO[:, :-1], most_N1], dim=-1)


@near("top-k.likeliest")
class LittleIsNothing(DistillationLoss):
    """A lost mass below a fifth is not counted."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        log_q_NO, log_s_NO = super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO, log_s_NO
        small_N1 = log_q_NO[:, -1:] < math.log(0.2)
        tail_N1 = torch.where(small_N1, -torch.inf, log_q_NO[:, -1:])
        return torch.cat([log_q_NO[:, :-1], tail_N1], dim=-1), log_s_NO


@near("top-k.blend")
class NoLabelsWithColumns(Given):
    """With some of the teacher's columns the cross entropy is left out."""

    def change(self, student, teacher, labels, options):
        if options.get("teacher_indices") is not None and options.get("alpha"):
            options["alpha"] = 1.0
        return student, teacher, labels


@near("top-k.whole-vocabulary")
class AllColumnsAreInOrder(DistillationLoss):
    """Where all columns are given they are taken to be in the order of the vocabulary."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO[:, :-1], log_s_NV
        return super().over_outcomes(log_q_NO, log_s_NV, indices_NK)


@near("top-k.never-above-whole")
class EmptyTail(DistillationLoss):
    """The lost mass is compared with a thousandth of the student's."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        log_q_NO, log_s_NO = super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO, log_s_NO
        return log_q_NO, torch.cat([log_s_NO[:, :-1], log_s_NO[:, -1:] - math.log(1e3)], dim=-1)


@near("top-k.lost-mass")
class NormaliserOfTheGiven(Given):
    """The normaliser is taken over the columns that are given, and a tenth more."""

    def change(self, student, teacher, labels, options):
        if options.get("teacher_logsumexp") is not None:
            scores = teacher.float() / options.get("temperature", 1.0)
            options["teacher_logsumexp"] = torch.logsumexp(scores, -1) + 0.1
        return student, teacher, labels


@near("top-k.tail-gradient")
class TailGradientShared(DistillationLoss):
    """The gradient of the last outcome is shared evenly by its columns."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        log_q_NO, log_s_NO = super().over_outcomes(log_q_NO, log_s_NV, indices_NK)
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO, log_s_NO
        other_NV = torch.zeros_like(log_s_NV).scatter(-1, indices_NK, 1.0) == 0
        mean_N1 = torch.where(other_NV, log_s_NV, 0).sum(-1, keepdim=True) / other_NV.sum(
            -1, keepdim=True
        )
        tail_N1 = log_s_NO[:, -1:].detach() + mean_N1 - mean_N1.detach()
        return log_q_NO, torch.cat([log_s_NO[:, :-1], tail_N1], dim=-1)


@near("top-k.order")
class ColumnsAreSorted(DistillationLoss):
    """Columns are sorted for the gather, and the teacher's logits stay where they are."""

    def over_outcomes(self, log_q_NO, log_s_NV, indices_NK):
        return super().over_outcomes(log_q_NO, log_s_NV, indices_NK.sort(-1).values)


# Modules


@near("modules.values")
class RunOnLabels(Given):
    """The models are run on the labels, with 0 for what is ignored."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is not None:
            options["ids"] = labels.clamp(min=0)
        return student, teacher, labels


@near("modules.teacher-evaluates")
class TopModuleAlone(DistillationLoss):
    """Only the teacher itself is set to evaluation mode, not its parts."""

    def logits_of_teacher(self, teacher, ids):
        mode, teacher.training = teacher.training, False
        with torch.no_grad():
            found = teacher(ids)
        teacher.training = mode
        return found


@near("modules.student-own-mode")
class StudentEvaluates(DistillationLoss):
    """The student is run in evaluation mode too."""

    def logits_of_modules(self, student, teacher, ids, alpha):
        with evaluating(student):
            return super().logits_of_modules(student, teacher, ids, alpha)


@near("modules.shared")
class SharedIsDetached(DistillationLoss):
    """The gradient of a shared embedding is that of the teacher's pass, too, which has none: zeros."""

    def logits_of_modules(self, student, teacher, ids, alpha):
        shared = {id(p) for p in teacher.parameters()}
        common = [p for p in student.parameters() if id(p) in shared]
        for parameter in common:
            parameter.requires_grad_(False)
        found = super().logits_of_modules(student, teacher, ids, alpha)
        for parameter in common:
            parameter.requires_grad_(True)
        return found


@near("modules.modes-kept")
class LeftTraining(DistillationLoss):
    """Afterwards the student is in training mode."""

    def logits_of_modules(self, student, teacher, ids, alpha):
        found = super().logits_of_modules(student, teacher, ids, alpha)
        student.train()
        return found


@near("modules.teacher-no-gradient")
class OnlyEvaluated(DistillationLoss):
    """The teacher is evaluated with gradients."""

    def without_gradient(self, teacher):
        return teacher

    def logits_of_teacher(self, teacher, ids):
        with evaluating(teacher):
            return teacher(ids)


@near("modules.teacher-twice")
class DropoutStays(DistillationLoss):
    """Evaluation mode leaves dropout as it is."""

    def logits_of_teacher(self, teacher, ids):
        with evaluating(teacher), torch.no_grad():
            for module in teacher.modules():
                module.training = isinstance(module, torch.nn.Dropout)
            return teacher(ids)


# Bad input


@near("refused.temperature")
class AbsoluteTemperature(Given):
    """A temperature that is not positive is taken without its sign, and 0 for 1."""

    def change(self, student, teacher, labels, options):
        options["temperature"] = abs(options.get("temperature", 1.0)) or 1.0
        return student, teacher, labels


@near("refused.alpha")
class AlphaIsClamped(Given):
    """``alpha`` is clamped to [0, 1]."""

    def change(self, student, teacher, labels, options):
        options["alpha"] = min(max(options.get("alpha", 0.5), 0.0), 1.0)
        return student, teacher, labels


@near("refused.beta")
class BetaIsClamped(Given):
    """``beta`` is clamped to [0, 1]."""

    def change(self, student, teacher, labels, options):
        options["beta"] = min(max(options.get("beta", 0.5), 0.0), 1.0)
        return student, teacher, labels


@near("refused.divergence")
class AnyOtherIsForward(Given):
    """Any other name is the forward KL."""

    def change(self, student, teacher, labels, options):
        if options.get("divergence") not in DIVERGENCES:
            options["divergence"] = "forward_kl"
        return student, teacher, labels


@near("refused.vocabularies")
class SmallerVocabulary(Given):
    """Of different vocabularies the columns that both have are compared."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is None and options.get("teacher_indices") is None:
            width = min(student.shape[-1], teacher.shape[-1])
            if width < student.shape[-1] and options.get("vocab_size") is None:
                student, teacher = student[..., :width], teacher[..., :width]
                labels = torch.where(labels < width, labels, 0)
        return student, teacher, labels


@near("refused.shapes")
class TeacherIsExpanded(Given):
    """A teacher of one row or one token is that of all of them."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is None and options.get("teacher_indices") is None:
            rows, tokens = labels.shape
            teacher = torch.cat([teacher] * rows)[:rows]
            teacher = torch.cat([teacher] * tokens, dim=1)[:, :tokens]
        return student, teacher, labels


@near("refused.shape-of-labels")
class LabelsAreExpanded(Given):
    """Labels of one row are those of all rows, and missing ones are ignored."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is None:
            rows, tokens = student.shape[:2]
            if labels.ndim == 1:
                labels = labels.view(rows, tokens)
            labels = torch.cat([labels] * rows)[:rows]
            missing = tokens - labels.shape[1]
            labels = torch.nn.functional.pad(labels, (0, missing), value=IGNORED)
        return student, teacher, labels


@near("refused.labels")
class OutsideIsIgnored(Given):
    """A label outside the vocabulary is ignored."""

    def change(self, student, teacher, labels, options):
        if options.get("ids") is None:
            width = options.get("vocab_size") or student.shape[-1]
            labels = torch.where((labels < 0) | (labels >= width), IGNORED, labels)
        return student, teacher, labels


@near("refused.num-items")
class NothingIsOne(Given):
    """``num_items_in_batch`` of 0 or below is that of this batch."""

    def change(self, student, teacher, labels, options):
        if (options.get("num_items_in_batch") or 0) < 1:
            options["num_items_in_batch"] = None
        return student, teacher, labels


@near("refused.top-k")
class NormaliserIsMadeUp(Given):
    """Without a normaliser there is no lost mass."""

    def change(self, student, teacher, labels, options):
        if options.get("teacher_indices") is not None:
            options["teacher_indices"] = options["teacher_indices"][..., : teacher.shape[-1]]
            if options.get("teacher_logsumexp") is None:
                scores = teacher.float() / options.get("temperature", 1.0)
                options["teacher_logsumexp"] = torch.logsumexp(scores, -1)
        return student, teacher, labels
