"""Log likelihoods of continuations: what evaluation by multiple choice is made of.

Requests are run longest first, so that a batch has little padding and one that does not fit into
memory comes at once. Only the logits of continuations become log probabilities. Axes are B rows of a
batch, T columns, C tokens of a continuation and V vocabulary.

Source: EleutherAI/lm-evaluation-harness, ``lm_eval/models/huggingface.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_impl.shared_core.evaluation_mode import evaluating

Request = tuple[Sequence[int], Sequence[int]]
PADDING_SIDES = ("right", "left")


@dataclass(frozen=True)
class Score:
    """See :class:`conformance.contracts.Score`."""

    logprobs: Tensor
    is_greedy: bool


@dataclass(frozen=True)
class Row:
    """A request as the model sees it."""

    number: int
    """Its place among the requests."""
    shown: tuple[int, ...]
    """The tokens that the model is given."""
    continuation: tuple[int, ...]
    """The tokens that are scored: the last ones of what is shown predict them."""


class LogLikelihood:
    """The contract ``loglikelihood``; the steps are methods."""

    def loglikelihood(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        *,
        batch_size: int = 1,
        padding_side: str = "right",
        pad_id: int = 0,
        max_length: int | None = None,
    ) -> list[Score]:
        """See :class:`conformance.contracts.LogLikelihood`."""
        limit = self.longest_shown(model, max_length)
        if padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side is {padding_side!r}, not one of {PADDING_SIDES}")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, not at least 1")
        rows = []
        for number, (context, continuation) in enumerate(requests):
            self.check_request(number, context, continuation, model.config.vocab_size, limit)
            rows.append(self.row_of(number, tuple(context), tuple(continuation), limit))
        scores = []
        with self.evaluating(model):
            for batch in self.row_batches(rows, batch_size):
                logits_BTV = self.batch_logits(model, batch, padding_side, pad_id)
                scores.extend(self.batch_scores(logits_BTV, batch, padding_side))
        return self.in_order_of_requests(scores)

    def longest_shown(self, model: nn.Module, max_length: int | None) -> int:
        """The most tokens that the model is given at once."""
        return model.config.max_position_embeddings if max_length is None else max_length

    def check_request(
        self,
        number: int,
        context: Sequence[int],
        continuation: Sequence[int],
        vocab_size: int,
        limit: int,
    ) -> None:
        """Raise for a request that has no score."""
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise ValueError(f"request {number} has an empty {empty}")
        if len(continuation) > limit:
            length = len(continuation)
            raise ValueError(f"the continuation of request {number} has {length} > {limit} tokens")
        for id in (*context, *continuation):
            if not 0 <= id < vocab_size:
                raise ValueError(f"request {number} has the id {id}, outside 0 … {vocab_size - 1}")

    def row_of(
        self, number: int, context: tuple[int, ...], continuation: tuple[int, ...], limit: int
    ) -> Row:
        """The last tokens of the request that fit, but for the last one, which predicts nothing."""
        return Row(number, (context + continuation)[:-1][-limit:], continuation)

    def row_batches(self, rows: Sequence[Row], batch_size: int) -> Iterator[list[Row]]:
        """Batches of rows, the longest first."""
        ordered = sorted(rows, key=lambda row: -len(row.shown))
        for begin in range(0, len(ordered), batch_size):
            yield ordered[begin : begin + batch_size]

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Evaluation mode without gradients; every module has its own mode back afterwards."""
        with evaluating(model), torch.no_grad():
            yield

    def batch_logits(
        self, model: nn.Module, batch: Sequence[Row], padding_side: str, pad_id: int
    ) -> Tensor:
        """The logits [B, T, V] of a padded batch."""
        attended_BT = self.attended_tokens(batch, padding_side).to(model.device)
        return self.run_model(
            model,
            self.padded_ids(batch, padding_side, pad_id).to(model.device),
            attention_mask=attended_BT.to(torch.int64),
            position_ids=self.token_positions(attended_BT),
        )

    def run_model(self, model: nn.Module, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """The logits [B, T, V] that the model gives."""
        return model(input_ids, **inputs).logits

    def token_columns(self, row: Row, width: int, padding_side: str) -> slice:
        """Where the tokens of a row stand in a batch so wide."""
        begin = width - len(row.shown) if padding_side == "left" else 0
        return slice(begin, begin + len(row.shown))

    def padded_ids(self, batch: Sequence[Row], padding_side: str, pad_id: int) -> Tensor:
        """What is shown of each row, padded to the longest, int64 [B, T]."""
        width = max(len(row.shown) for row in batch)
        ids_BT = torch.full((len(batch), width), pad_id)
        for ids_T, row in zip(ids_BT, batch):
            ids_T[self.token_columns(row, width, padding_side)] = torch.tensor(row.shown)
        return ids_BT

    def attended_tokens(self, batch: Sequence[Row], padding_side: str) -> Tensor:
        """Where there are tokens and not padding, bool [B, T]; by lengths, for ids cannot tell."""
        width = max(len(row.shown) for row in batch)
        attended_BT = torch.zeros(len(batch), width, dtype=torch.bool)
        for attended_T, row in zip(attended_BT, batch):
            attended_T[self.token_columns(row, width, padding_side)] = True
        return attended_BT

    def token_positions(self, attended_BT: Tensor) -> Tensor:
        """Tokens are counted from 0 in each row; padding has any position that there is."""
        return (attended_BT.cumsum(1) - 1).clamp(min=0)

    def batch_scores(
        self, logits_BTV: Tensor, batch: Sequence[Row], padding_side: str
    ) -> Iterator[tuple[int, Score]]:
        """The score of each row, with the number of its request."""
        for logits_TV, row in zip(logits_BTV, batch):
            logits_CV = self.continuation_logits(logits_TV, row, padding_side)
            ids_C = torch.tensor(row.continuation, device=logits_CV.device)
            logprobs_C = self.token_logprobs(logits_CV, ids_C)
            yield row.number, Score(logprobs_C, self.is_greedy(logits_CV, ids_C))

    def continuation_logits(self, logits_TV: Tensor, row: Row, padding_side: str) -> Tensor:
        """The logits [C, V] that predict the continuation: the last ones of what is shown."""
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        return shown_TV[len(shown_TV) - len(row.continuation) :]

    def token_logprobs(self, logits_CV: Tensor, ids_C: Tensor) -> Tensor:
        """log p [C] of these tokens, in float32 or wider."""
        wide = torch.promote_types(logits_CV.dtype, torch.float32)
        logprobs_CV = logits_CV.log_softmax(-1, dtype=wide)
        return logprobs_CV.gather(-1, ids_C[:, None])[:, 0]

    def is_greedy(self, logits_CV: Tensor, ids_C: Tensor) -> bool:
        """Whether no token has a larger logit than these; of equally likely ones each is greedy."""
        chosen_C = logits_CV.gather(-1, ids_C[:, None])[:, 0]
        return bool((chosen_C == logits_CV.amax(-1)).all())

    def in_order_of_requests(self, scores: Sequence[tuple[int, Score]]) -> list[Score]:
        """The scores by the numbers of their requests."""
        return [score for _, score in sorted(scores, key=lambda pair: pair[0])]
