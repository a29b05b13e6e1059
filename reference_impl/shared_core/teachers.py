"""Where a teacher's logits come from: the model itself, or a file of its largest ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference_impl.shared_core.trained_model import TrainedModel, frozen


class LiveTeacher:
    """The teacher, run on each batch; in evaluation mode, without gradients, never trained."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = frozen(model)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``teacher``: logits [batch, tokens, vocabulary]."""
        module = self.model.module.to(inputs["input_ids"].device)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return {"teacher": module(**given, use_cache=False).logits}
