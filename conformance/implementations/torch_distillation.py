"""torch's ``kl_div`` and ``cross_entropy``, put together as distillation usually is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class TorchKLDiv:
    """``T² · kl_div(…, reduction="batchmean")`` and ``cross_entropy``, on flattened valid tokens.

    The composition of PyTorch's tutorial on knowledge distillation, with a row for each valid target.
    Native: the softmaxes, both means and the ignored index. Declined: what torch has no function for,
    the Jensen-Shannon divergence among it.
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
    ) -> Tensor:
        """See :class:`conformance.contracts.DistillationLoss`."""
        targets_BT = labels[:, 1:]
        valid_BT = targets_BT != -100
        student_NV, teacher_NV = student[:, :-1][valid_BT], teacher.detach()[:, :-1][valid_BT]
        log_s_NV = F.log_softmax(student_NV / temperature, dim=-1)
        log_q_NV = F.log_softmax(teacher_NV / temperature, dim=-1)
        if divergence == "jsd":
            raise NotImplementedError("torch has no Jensen-Shannon divergence")
        given, target = {
            "forward_kl": (log_s_NV, log_q_NV),
            "reverse_kl": (log_q_NV, log_s_NV),
        }[divergence]
        soft = F.kl_div(given, target, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(student_NV, targets_BT[valid_BT])
        return alpha * temperature**2 * soft + (1 - alpha) * hard
