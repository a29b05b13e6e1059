"""transformers' loss of causal language models: the cross entropy of a distillation loss."""

from __future__ import annotations

from torch import Tensor


class TransformersLoss:
    """``ForCausalLMLoss``, which shifts, masks and divides by itself.

    Declined: any part of a teacher. The temperature is none of a cross entropy.
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
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.DistillationLoss`."""
        from transformers.loss.loss_utils import ForCausalLMLoss

        if alpha != 0:
            raise NotImplementedError("transformers' loss knows no teacher")
        return ForCausalLMLoss(
            student,
            labels,
            vocab_size=student.shape[-1],
            num_items_in_batch=num_items_in_batch,
        )
