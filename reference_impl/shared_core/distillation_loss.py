"""Distillation of next-token distributions: a tempered divergence, and cross entropy, over one mask.

Positions that predict a valid target are taken out of the batch first, so that nothing that stands
elsewhere can reach the loss or its gradient. Axes are B batch, T tokens, V vocabulary, N valid targets,
K columns of the teacher that are kept, and O outcomes: those K and all other columns together.

Source: Hinton, Vinyals and Dean 2015 (T²); Agarwal et al. 2024 (generalised Jensen-Shannon divergence);
LawrenceRLiu/MoE_Factorize_Compress, ``src/distillation.py`` and ``src/distillation_trainer.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reference_impl.shared_core.evaluation_mode import evaluating

IGNORED = -100
"""The label of what is not to be learnt."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class DistillationLoss:
    """The contract ``distillation_loss``; the steps are methods."""

    def distillation_loss(
        self,
        student: Tensor | nn.Module,
        teacher: Tensor | nn.Module,
        labels: Tensor,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        num_items_in_batch: int | None = None,
        vocab_size: int | None = None,
        teacher_indices: Tensor | None = None,
        teacher_logsumexp: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.DistillationLoss`."""
        check_numbers(alpha, temperature, divergence, beta, num_items_in_batch)
        if ids is not None:
            student, teacher = self.logits_of_modules(student, teacher, ids, alpha)
        vocabulary = check_student(student, labels, vocab_size)
        valid_BT = self.valid_targets(labels)
        student_NV = self.kept_logits(student, valid_BT, vocabulary)
        total = student_NV.new_zeros(())
        if alpha > 0:
            check_teacher(student, teacher, teacher_indices, teacher_logsumexp, vocab_size)
            teacher = self.without_gradient(teacher)
            log_q, log_s = self.both_log_probabilities(
                student_NV, teacher, valid_BT, temperature, teacher_indices, teacher_logsumexp
            )
            divergence_N = self.token_divergence(log_q, log_s, divergence, beta)
            total = total + alpha * self.scale_of_divergence(temperature) * divergence_N.sum()
        if alpha < 1:
            targets_N = self.next_tokens(labels)[valid_BT]
            total = total + (1 - alpha) * self.token_cross_entropy(student_NV, targets_N).sum()
        return total / self.number_of_targets(valid_BT, num_items_in_batch)

    # What is compared

    def next_tokens(self, labels_BT: Tensor) -> Tensor:
        """The label that each position but the last one predicts, [B, T - 1]."""
        return labels_BT[:, 1:]

    def valid_targets(self, labels_BT: Tensor) -> Tensor:
        """Whether each position but the last one predicts a label to be learnt, bool [B, T - 1]."""
        return self.next_tokens(labels_BT) != IGNORED

    def kept_logits(self, logits_BTV: Tensor, valid_BT: Tensor, vocabulary: int) -> Tensor:
        """Logits of the positions that predict a valid target, in float32 or wider: [N, V]."""
        kept_NV = logits_BTV[:, :-1][valid_BT][:, :vocabulary]
        return kept_NV.to(torch.promote_types(kept_NV.dtype, torch.float32))

    def without_gradient(self, teacher: Tensor) -> Tensor:
        """The teacher's logits as constants."""
        return teacher.detach()

    def number_of_targets(self, valid_BT: Tensor, num_items_in_batch: int | None) -> Tensor | int:
        """What sums are divided by: the valid targets of the global batch; 1 where there is none."""
        return num_items_in_batch or valid_BT.sum().clamp(min=1)

    # Log probabilities

    def both_log_probabilities(
        self,
        student_NV: Tensor,
        teacher: Tensor,
        valid_BT: Tensor,
        temperature: float,
        indices: Tensor | None,
        logsumexp: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Tempered log probabilities of teacher and student, over the same outcomes."""
        log_s = self.tempered(student_NV, temperature)
        if indices is None:
            teacher_NV = self.kept_logits(teacher, valid_BT, student_NV.shape[-1])
            return self.tempered(teacher_NV, temperature), log_s
        teacher_NK = self.kept_logits(teacher, valid_BT, teacher.shape[-1])
        indices_NK = indices[:, :-1][valid_BT]
        check_indices(indices_NK, student_NV.shape[-1])
        wide_N = logsumexp[:, :-1][valid_BT].to(teacher_NK)
        log_q = self.teacher_over_outcomes(teacher_NK, wide_N, temperature)
        return self.over_outcomes(log_q, log_s, indices_NK)

    def tempered(self, logits_NV: Tensor, temperature: float) -> Tensor:
        """Log probabilities over the whole vocabulary at a temperature."""
        return torch.log_softmax(logits_NV / temperature, dim=-1)

    def teacher_over_outcomes(
        self, logits_NK: Tensor, logsumexp_N: Tensor, temperature: float
    ) -> Tensor:
        """Log probabilities [N, K + 1] of a teacher's columns and of all others together.

        Mass below the precision of the dtype cannot be told from none, which would make a reverse
        KL infinite.
        """
        tempered_NK = logits_NK / temperature
        kept_N = torch.logsumexp(tempered_NK, dim=-1) - logsumexp_N
        lost_N = (-torch.expm1(kept_N)).clamp(min=torch.finfo(kept_N.dtype).eps)
        return torch.cat([tempered_NK - logsumexp_N[:, None], lost_N.log()[:, None]], dim=-1)

    def over_outcomes(
        self, log_q_NO: Tensor, log_s_NV: Tensor, indices_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The student over the teacher's outcomes; without a tail where there are all columns."""
        kept_NK = log_s_NV.gather(-1, indices_NK)
        if indices_NK.shape[-1] == log_s_NV.shape[-1]:
            return log_q_NO[:, :-1], kept_NK
        other_NV = log_s_NV.scatter(-1, indices_NK, -torch.inf)
        tail_N = torch.logsumexp(other_NV, dim=-1)
        return log_q_NO, torch.cat([kept_NK, tail_N[:, None]], dim=-1)

    # The two terms

    def scale_of_divergence(self, temperature: float) -> float:
        """T²: gradients of soft targets shrink as 1/T², and keep their weight beside the labels'."""
        return temperature**2

    def token_divergence(
        self, log_q_NO: Tensor, log_s_NO: Tensor, divergence: str, beta: float
    ) -> Tensor:
        """D of each token, [N]; the ends of the Jensen-Shannon divergence are the two KLs."""
        if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
            return self.kl(log_q_NO, log_s_NO)
        if divergence == "reverse_kl" or beta == 1:
            return self.kl(log_s_NO, log_q_NO)
        log_m_NO = self.mixture(log_q_NO, log_s_NO, beta)
        return beta * self.kl(log_q_NO, log_m_NO) + (1 - beta) * self.kl(log_s_NO, log_m_NO)

    def mixture(self, log_q_NO: Tensor, log_s_NO: Tensor, beta: float) -> Tensor:
        """log(β Q + (1 − β) S); 0 for what neither can give, where a gradient would be NaN."""
        impossible = torch.isneginf(log_q_NO) & torch.isneginf(log_s_NO)
        log_q_NO, log_s_NO = (torch.where(impossible, 0.0, x) for x in (log_q_NO, log_s_NO))
        return torch.logaddexp(log_q_NO + math.log(beta), log_s_NO + math.log1p(-beta))

    def kl(self, log_p_NO: Tensor, log_r_NO: Tensor) -> Tensor:
        """KL(P ‖ R) of each token, to which what P cannot give adds nothing."""
        possible = log_p_NO > -torch.inf
        log_ratio_NO = torch.where(possible, log_p_NO - log_r_NO, 0.0)
        return (log_p_NO.exp() * log_ratio_NO).sum(-1)

    def token_cross_entropy(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """−log p of each target at temperature 1, [N]."""
        log_p_NV = torch.log_softmax(logits_NV, dim=-1)
        return -log_p_NV.gather(-1, targets_N[:, None])[:, 0]

    # Modules

    def logits_of_modules(
        self, student: nn.Module, teacher: nn.Module, ids: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of both; the teacher is not run where it has no part."""
        student_logits = as_logits(student(ids))
        return student_logits, self.logits_of_teacher(teacher, ids) if alpha > 0 else None

    def logits_of_teacher(self, teacher: nn.Module, ids: Tensor) -> Tensor:
        """The teacher's logits in evaluation mode, which no gradient goes through."""
        with evaluating(teacher), torch.no_grad():
            return as_logits(teacher(ids))


def top_k_logits(
    logits: Tensor, k: int, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What a cache keeps of a teacher: the k highest logits, their columns, and log Σ exp(logit / T).

    ``logits`` [..., vocabulary] give logits [..., k] in their dtype, int64 columns [..., k], and the
    logarithm [...] over the whole vocabulary in float32 or wider: the arguments ``teacher``,
    ``teacher_indices`` and ``teacher_logsumexp`` of the loss at this temperature. Raises ValueError
    for ``k`` outside 1 to the vocabulary and a temperature that is not positive.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}, expected 1 to {logits.shape[-1]}")
    check_temperature(temperature)
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    values, indices = logits.detach().topk(k, dim=-1)
    return values, indices, torch.logsumexp(wide / temperature, dim=-1)


def as_logits(output: Tensor | object) -> Tensor:
    """Logits as a tensor, or in the output of a model of transformers."""
    return output if isinstance(output, Tensor) else output.logits


# Bad input


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless it is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a positive number")


def check_numbers(
    alpha: float, temperature: float, divergence: str, beta: float, num_items: int | None
) -> None:
    """Raise ValueError for options outside their range."""
    check_temperature(temperature)
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0 <= weight <= 1:
            raise ValueError(f"{name} is {weight}, expected 0 to 1")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, expected one of {', '.join(DIVERGENCES)}")
    if num_items is not None and num_items < 1:
        raise ValueError(f"num_items_in_batch is {num_items}, expected 1 or more")


def check_student(student: Tensor, labels: Tensor, vocab_size: int | None) -> int:
    """The number of columns that are tokens; ValueError for shapes or labels that do not fit."""
    if student.ndim != 3 or labels.shape != student.shape[:2]:
        found = f"logits {list(student.shape)} and labels {list(labels.shape)}"
        raise ValueError(f"{found}: expected [batch, tokens, vocabulary] and [batch, tokens]")
    columns = student.shape[-1]
    vocabulary = columns if vocab_size is None else vocab_size
    if not 1 <= vocabulary <= columns:
        raise ValueError(f"vocab_size is {vocabulary}, the logits have {columns} columns")
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))
    if bool(outside.any()):
        label = int(labels[outside][0])
        raise ValueError(f"label {label} is neither {IGNORED} nor one of {vocabulary} tokens")
    return vocabulary


def check_teacher(
    student: Tensor,
    teacher: Tensor,
    indices: Tensor | None,
    logsumexp: Tensor | None,
    vocab_size: int | None,
) -> None:
    """Raise ValueError for a teacher that does not belong to the student."""
    shapes = f"student {list(student.shape)} and teacher {list(teacher.shape)}"
    if teacher.ndim != 3 or teacher.shape[:2] != student.shape[:2]:
        raise ValueError(f"{shapes} are not of the same tokens")
    if indices is None:
        fits = teacher.shape[-1] == student.shape[-1]
        if vocab_size is not None:  # each may be padded to a width of its own
            fits = teacher.shape[-1] >= vocab_size
        if not fits:
            raise ValueError(f"{shapes} have different vocabularies")
        return
    if logsumexp is None:
        raise ValueError("teacher_indices without teacher_logsumexp: the lost mass is not known")
    if indices.shape != teacher.shape or logsumexp.shape != teacher.shape[:2]:
        found = f"indices {list(indices.shape)} and logsumexp {list(logsumexp.shape)}"
        raise ValueError(f"{found} do not fit the teacher's logits {list(teacher.shape)}")


def check_indices(indices_NK: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless every token's columns are in the vocabulary, each once."""
    if not indices_NK.numel():
        return
    if int(indices_NK.min()) < 0 or int(indices_NK.max()) >= vocabulary:
        raise ValueError(f"teacher_indices go beyond the {vocabulary} tokens of the vocabulary")
    ordered = indices_NK.sort(dim=-1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError("teacher_indices name a column twice")
