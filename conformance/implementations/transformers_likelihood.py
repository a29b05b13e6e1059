"""The loss of transformers' causal language models as a score: each request alone, and in sum.

Glue: labels that are -100 in the context, the model in evaluation mode without gradients. The loss has
no batches of requests, does not truncate and says nothing of what is greedy: that is not offered. An
empty context or continuation is nothing that a loss could refuse, and is declined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from reference_impl.shared_core.evaluation_mode import evaluating


@dataclass(frozen=True)
class Score:
    """See :class:`conformance.contracts.Score`; without ``is_greedy``."""

    logprobs: Tensor
    """[]: the sum."""


class TransformersLossScorer:
    """``-ForCausalLMLoss`` with ``num_items_in_batch`` 1, which makes it a sum."""

    def loglikelihood(
        self,
        model: nn.Module,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int = 1,
    ) -> list[Score]:
        """See :class:`conformance.contracts.LogLikelihood`; ``batch_size`` is not read."""
        with evaluating(model), torch.no_grad():
            return [self.score(model, *map(list, request)) for request in requests]

    def score(self, model: nn.Module, context: list[int], continuation: list[int]) -> Score:
        """Of one request, alone."""
        if not context or not continuation:
            raise NotImplementedError("a loss of nothing, or without a context, is 0")
        if len(context) + len(continuation) > model.config.max_position_embeddings:
            raise NotImplementedError("does not truncate")
        ids = torch.tensor([context + continuation], device=model.device)
        labels = ids.clone()
        labels[:, : len(context)] = -100
        vocab_size = model.config.vocab_size
        loss = ForCausalLMLoss(model(ids).logits, labels, vocab_size, num_items_in_batch=1)
        return Score(-loss)
