"""``HFLM`` of lm-evaluation-harness, asked for log likelihoods of ids that are encoded already.

Glue: a model that is not one of transformers' gets a method ``tie_weights`` that does nothing, and a
tokenizer that only has the vocabulary's size; ids become lists, which ``HFLM`` adds. It gives sums,
pads on the right with 0 in any case, and is not offered with another ``padding_side`` or ``pad_id``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Score:
    """See :class:`conformance.contracts.Score`."""

    logprobs: Tensor
    """[]: the sum, from a Python float."""
    is_greedy: bool


class Tied(nn.Module):
    """A model, with what ``HFLM`` asks of those of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def tie_weights(self) -> None:
        """There is nothing to tie."""

    def forward(self, *inputs: Tensor, **options: Tensor) -> Any:
        """What the model gives."""
        return self.model(*inputs, **options)


@functools.cache
def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that no text is given to."""
    words = {f"<{id}>": id for id in range(vocab_size)}
    made = Tokenizer(WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<0>", pad_token="<0>", eos_token="<0>"
    )


class LMEvalHFLM:
    """``HFLM._loglikelihood_tokens`` with its defaults."""

    options: ClassVar[dict[str, Any]] = {}
    """Further options of ``HFLM``."""

    def loglikelihood(
        self,
        model: nn.Module,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int = 1,
        max_length: int | None = None,
    ) -> list[Score]:
        """See :class:`conformance.contracts.LogLikelihood`."""
        harness = HFLM(
            pretrained=model if hasattr(model, "tie_weights") else Tied(model),
            tokenizer=tokenizer(model.config.vocab_size),
            batch_size=batch_size,
            max_length=max_length,
            **self.options,
        )
        encoded = [(None, list(context), list(cont)) for context, cont in requests]
        found = harness._loglikelihood_tokens(encoded, disable_tqdm=True)
        return [
            Score(torch.tensor(total, dtype=torch.float64), is_greedy) for total, is_greedy in found
        ]


class LMEvalHFLMFloat32(LMEvalHFLM):
    """The same with the option for a log-softmax in float32."""

    options: ClassVar[dict[str, Any]] = {"softmax_dtype": "float32"}
