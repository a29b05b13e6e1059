"""TRL's generalised Jensen-Shannon divergence, as its trainer for generalised distillation calls it."""

from __future__ import annotations

from torch import Tensor


class TRLGKD:
    """``GKDTrainer.generalized_jsd_loss`` on logits and labels that are shifted as in ``compute_loss``.

    Native: the divergence, its temperature, the mask, and the denominator. Glue: ``beta`` 0 and 1 are
    the forward and the reverse KL, and the teacher is run without gradients. Declined: cross entropy,
    which the trainer does not add, and the options that it has no name for.
    """

    def distillation_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.DistillationLoss`."""
        from trl.experimental.gkd import GKDTrainer

        if alpha != 1:
            raise NotImplementedError("the trainer adds no cross entropy")
        if divergence != "jsd":
            beta = {"forward_kl": 0, "reverse_kl": 1}[divergence]
        return GKDTrainer.generalized_jsd_loss(
            student_logits=student[:, :-1, :],
            teacher_logits=teacher.detach()[:, :-1, :],
            labels=labels[:, 1:],
            beta=beta,
            temperature=temperature,
            num_items_in_batch=num_items_in_batch,
        )
