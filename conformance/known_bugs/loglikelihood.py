"""Planted bugs of the contract ``loglikelihood``."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace

import torch

from conformance.known_bugs import known_bug
from reference_impl.shared_core.likelihood import LogLikelihood, Row, Score

# Which logits are a continuation's


@known_bug(
    "eval-continuation-slice-offset",
    contract="loglikelihood",
    breaks="loglikelihood.score.tokens",
)
class SlicedFromTheContextsLength(LogLikelihood):
    """The whole text is run and sliced from len(context): each token is scored by what follows it."""

    def row_of(self, number, context, continuation, limit):
        return Row(number, (context + continuation)[-limit:], continuation)


@known_bug(
    "eval-continuation-slice-offset.bos",
    contract="loglikelihood",
    breaks="loglikelihood.score.one-token",
)
class CountedWithBos(LogLikelihood):
    """The context is counted without its first token: every score is taken one place too early."""

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        first = max(0, len(shown_TV) - len(row.continuation) - 1)
        return shown_TV[first : first + len(row.continuation)]


@known_bug(
    "eval-continuation-slice-offset.truncated",
    contract="loglikelihood",
    breaks="loglikelihood.truncation.around-the-limit",
)
class BoundaryOfTheWholeText(LogLikelihood):
    """The place of a continuation is that of before truncation; what is beyond the end is the last."""

    def row_of(self, number, context, continuation, limit):
        self.contexts = [*getattr(self, "contexts", [])[:number], len(context)]
        return super().row_of(number, context, continuation, limit)

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        places_C = self.contexts[row.number] - 1 + torch.arange(len(row.continuation))
        return shown_TV[places_C.clamp(max=len(shown_TV) - 1).to(shown_TV.device)]


# Padding


@known_bug(
    "eval-batch-padding-changes-scores",
    contract="loglikelihood",
    breaks="loglikelihood.padding.left",
)
class PositionsCountPadding(LogLikelihood):
    """Positions are counted from the first column, which is padding on the left."""

    def token_positions(self, attended_BT):
        rows, columns = attended_BT.shape
        return torch.arange(columns, device=attended_BT.device).expand(rows, columns)


@known_bug(
    "eval-batch-padding-changes-scores.attended",
    contract="loglikelihood",
    breaks="loglikelihood.padding.left",
)
class PaddingIsAttendedTo(LogLikelihood):
    """Positions are right, but padding on the left is attended to."""

    def run_model(self, model, input_ids, **inputs):
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return super().run_model(model, input_ids, **inputs)


@known_bug(
    "eval-batch-padding-changes-scores.mask-by-id",
    contract="loglikelihood",
    breaks="loglikelihood.padding.real-token",
)
class MaskByPadId(LogLikelihood):
    """The mask is id != pad_id, which hides real tokens of that id."""

    def batch_logits(self, model, batch, padding_side, pad_id):
        ids_BT = self.padded_ids(batch, padding_side, pad_id).to(model.device)
        attended_BT = ids_BT != pad_id
        positions_BT = self.token_positions(self.attended_tokens(batch, padding_side))
        mask_BT = attended_BT.to(torch.int64)
        return self.run_model(
            model, ids_BT, attention_mask=mask_BT, position_ids=positions_BT.to(model.device)
        )


@known_bug(
    "eval-batch-padding-changes-scores.last-columns",
    contract="loglikelihood",
    breaks="loglikelihood.padding.right",
)
class ReadsTheLastColumns(LogLikelihood):
    """The last columns are read, which are padding on the right."""

    def continuation_logits(self, logits_TV, row, padding_side):
        return logits_TV[-len(row.continuation) :]


@known_bug(
    "eval-batch-padding-changes-scores.between",
    contract="loglikelihood",
    breaks="loglikelihood.batch.longer-company",
)
class PaddingBeforeTheContinuation(LogLikelihood):
    """Contexts are padded to one length, so that padding stands before shorter ones' continuations."""

    def batch_logits(self, model, batch, padding_side, pad_id):
        lengths = [len(row.shown) - len(row.continuation) + 1 for row in batch]
        limit = model.config.max_position_embeddings
        longest = limit - max(len(row.continuation) for row in batch)
        rows = []
        for row, length in zip(batch, lengths):
            pads = (pad_id,) * (max(length, min(max(lengths), longest)) - length)
            rows.append(replace(row, shown=pads + row.shown))
        logits_BTV = super().batch_logits(model, rows, "right", pad_id)
        width = max(len(row.shown) for row in batch)
        kept = [
            logits[len(padded.shown) - len(row.shown) :]
            for logits, padded, row in zip(logits_BTV, rows, batch)
        ]
        made = logits_BTV.new_zeros(len(batch), width, logits_BTV.shape[-1])
        for made_TV, kept_TV, row in zip(made, kept, batch):
            made_TV[self.token_columns(row, width, padding_side)] = kept_TV[: len(row.shown)]
        return made


# Caches


class _CachesPrefixes(LogLikelihood):
    """Knows how much of a request an earlier one of the same call has left in the cache."""

    def loglikelihood(self, model, requests, **options):
        self.earlier = []
        return super().loglikelihood(model, requests, **options)

    def cached(self, shown):
        """How many tokens at the beginning were seen before; at least one is run."""
        most = 0
        for other in self.earlier:
            equal = [a == b for a, b in zip(other, shown)]
            most = max(most, equal.index(False) if False in equal else len(equal))
        self.earlier.append(shown)
        return min(most, len(shown) - 1)


@known_bug(
    "eval-prefix-cache-truncated-logits",
    contract="loglikelihood",
    breaks="loglikelihood.sharing.context",
)
class IndexedAsIfComplete(_CachesPrefixes):
    """Logits come for what is not in the cache alone, and are indexed as if they were complete."""

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        given_TV = shown_TV[self.cached(row.shown) :]
        places_C = len(row.shown) - len(row.continuation) + torch.arange(len(row.continuation))
        return given_TV[places_C.clamp(max=len(given_TV) - 1).to(given_TV.device)]


@known_bug(
    "eval-prefix-cache-truncated-logits.looked-up",
    contract="loglikelihood",
    breaks="loglikelihood.padding.both-real",
)
class FoundByItsTokens(LogLikelihood):
    """The continuation is looked for among the tokens, and found where they come for the first time."""

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        text, length = (*row.shown, row.continuation[-1]), len(row.continuation)
        places = range(1, len(text) - length + 1)
        at = next(at for at in places if text[at : at + length] == row.continuation)
        return shown_TV[at - 1 : at - 1 + length]


@known_bug(
    "eval-scores-kept-over-calls",
    contract="loglikelihood",
    breaks="loglikelihood.state.new-weights",
)
class KeptOverCalls(LogLikelihood):
    """Logits of a batch are kept by the model and the ids: a model that was trained on has old ones."""

    def __init__(self):
        self.kept = {}

    def run_model(self, model, input_ids, **inputs):
        key = (id(model), str(input_ids.tolist()), str(inputs["attention_mask"].tolist()))
        if key not in self.kept:  # the model is kept too, so that no other has its id
            self.kept[key] = (model, super().run_model(model, input_ids, **inputs))
        return self.kept[key][1]


# Truncation


@known_bug(
    "eval-truncation-keeps-the-beginning",
    contract="loglikelihood",
    breaks="loglikelihood.truncation.far-beyond",
)
class BeginningIsKept(LogLikelihood):
    """A request that is too long loses its end."""

    def row_of(self, number, context, continuation, limit):
        return Row(number, (context + continuation)[:-1][:limit], continuation)


@known_bug(
    "eval-truncation-drops-one-more",
    contract="loglikelihood",
    breaks="loglikelihood.truncation.around-the-limit",
)
class OneMoreIsLost(LogLikelihood):
    """The last ``max_length`` tokens are kept, and of these the last one dropped: one too few."""

    def row_of(self, number, context, continuation, limit):
        row = super().row_of(number, context, continuation, limit)
        shown = (context + continuation)[-limit:][:-1]
        # A continuation as long as the limit would have nothing before it.
        return row if len(shown) < len(continuation) else Row(number, shown, continuation)


@known_bug(
    "eval-continuation-truncated",
    contract="loglikelihood",
    breaks="loglikelihood.refused.long-continuation",
)
class ContinuationIsCut(LogLikelihood):
    """A continuation that is too long loses its beginning, and the rest is its score."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        super().check_request(number, context, continuation, vocab_size, math.inf)

    def row_of(self, number, context, continuation, limit):
        return super().row_of(number, context, continuation[-limit:], limit)


# From logits to scores


@known_bug(
    "eval-softmax-in-16-bits",
    contract="loglikelihood",
    breaks="loglikelihood.numerics.sixteen-bits",
)
class SoftmaxInTheModelsDtype(LogLikelihood):
    """The log-softmax is computed in the dtype of the logits, and widened afterwards."""

    def token_logprobs(self, logits_CV, ids_C):
        return logits_CV.log_softmax(-1).gather(-1, ids_C[:, None])[:, 0].float()


@known_bug(
    "eval-greedy-by-rounded-logprobs",
    contract="loglikelihood",
    breaks="loglikelihood.greedy.small-differences",
)
class GreedyByRoundedLogprobs(LogLikelihood):
    """The most likely token is the first of the largest log probabilities, rounded to 16 bits."""

    def is_greedy(self, logits_CV, ids_C):
        return bool((logits_CV.log_softmax(-1).argmax(-1) == ids_C).all())


@known_bug(
    "eval-score-is-a-mean",
    contract="loglikelihood",
    breaks="loglikelihood.score.additive",
)
class DividedByTheLength(LogLikelihood):
    """Scores are divided by the number of tokens, which favours long continuations."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV, ids_C) / len(ids_C)


@known_bug(
    "eval-log-of-softmax",
    contract="loglikelihood",
    breaks="loglikelihood.numerics.large-logits",
)
class LogOfSoftmax(LogLikelihood):
    """The logarithm is taken of a softmax, which is 0 for all but the largest of large logits."""

    def token_logprobs(self, logits_CV, ids_C):
        return logits_CV.float().softmax(-1).log().gather(-1, ids_C[:, None])[:, 0]


@known_bug(
    "eval-greedy-by-first-token",
    contract="loglikelihood",
    breaks="loglikelihood.greedy.last-is-other",
)
class GreedyByTheFirstToken(LogLikelihood):
    """A continuation counts as greedy when its first token is the most likely one."""

    def is_greedy(self, logits_CV, ids_C):
        return super().is_greedy(logits_CV[:1], ids_C[:1])


# Order


@known_bug(
    "eval-sorted-order-kept",
    contract="loglikelihood",
    breaks="loglikelihood.order.of-requests",
)
class OrderOfBatches(LogLikelihood):
    """Scores come in the order in which they were computed, the longest first, and are sums."""

    def in_order_of_requests(self, scores):
        return [Score(score.logprobs.sum(), score.is_greedy) for _, score in scores]


@known_bug(
    "eval-keyed-by-text",
    contract="loglikelihood",
    breaks="loglikelihood.sharing.split-anywhere",
)
class KeyedByText(LogLikelihood):
    """Scores are put together by the text of a request: another split of it has the same score."""

    def loglikelihood(self, model, requests, **options):
        found = super().loglikelihood(model, requests, **options)
        texts = [(*context, *continuation) for context, continuation in requests]
        by_text = dict(zip(texts, found))
        return [Score(by_text[text].logprobs.sum(), by_text[text].is_greedy) for text in texts]


@known_bug(
    "eval-grouped-takes-first-logits",
    contract="loglikelihood",
    breaks="loglikelihood.sharing.split-anywhere",
)
class FirstLogitsOfTheGroup(LogLikelihood):
    """Requests that show the model the same share logits: the longest continuation's first ones."""

    def loglikelihood(self, model, requests, **options):
        self.longest = {}
        for context, continuation in requests:
            shown = (*context, *continuation[:-1])
            self.longest[shown] = max(len(continuation), self.longest.get(shown, 0))
        return super().loglikelihood(model, requests, **options)

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        longest = self.longest.get(row.shown, len(row.continuation))
        return shown_TV[len(shown_TV) - longest :][: len(row.continuation)]


@known_bug(
    "eval-duplicates-dropped",
    contract="loglikelihood",
    breaks="loglikelihood.order.repeated",
)
class DuplicatesDropped(LogLikelihood):
    """A request that comes again is left out, and the scores of all behind it move up."""

    def loglikelihood(self, model, requests, **options):
        distinct = list(dict.fromkeys((tuple(a), tuple(b)) for a, b in requests))
        found = super().loglikelihood(model, distinct, **options)
        summed = [Score(score.logprobs.sum(), score.is_greedy) for score in found]
        return [*summed, *summed[: len(requests) - len(distinct)]]


@known_bug(
    "eval-last-batch-scored-again",
    contract="loglikelihood",
    breaks="loglikelihood.batch.last-is-smaller",
)
class LastBatchFilledUp(LogLikelihood):
    """The last batch is filled up with rows of the first, whose scores take the places of its own."""

    def row_batches(self, rows, batch_size):
        for batch in super().row_batches(rows, batch_size):
            missing = batch_size - len(batch)
            filled = [*rows[:missing], *batch]
            # As with a sampler that fills up in front: the numbers are those of the batch.
            yield [replace(row, number=at.number) for row, at in zip(filled, batch)]

    def in_order_of_requests(self, scores):
        found = super().in_order_of_requests(scores)
        return [Score(score.logprobs.sum(), score.is_greedy) for score in found]


# The model


@known_bug(
    "eval-dropout-left-on",
    contract="loglikelihood",
    breaks="loglikelihood.mode.evaluation",
)
class RunInItsOwnMode(LogLikelihood):
    """The model is run in the mode that it has, with dropout when it is being trained."""

    @contextmanager
    def evaluating(self, model):
        with torch.no_grad():
            yield


@known_bug(
    "eval-left-in-evaluation-mode",
    contract="loglikelihood",
    breaks="loglikelihood.mode.restored",
)
class LeftInEvaluationMode(LogLikelihood):
    """The model stays in evaluation mode: training goes on without dropout."""

    @contextmanager
    def evaluating(self, model):
        model.eval()
        with torch.no_grad():
            yield


@known_bug(
    "eval-gradients-recorded",
    contract="loglikelihood",
    breaks="loglikelihood.gradients.none",
)
class GradientsAreRecorded(LogLikelihood):
    """The model is run with gradients: all activations of all batches are kept with the scores."""

    @contextmanager
    def evaluating(self, model):
        with super().evaluating(model), torch.enable_grad():
            yield


# Bad requests


@known_bug(
    "eval-empty-context-predicted-by-padding",
    contract="loglikelihood",
    breaks="loglikelihood.refused.empty-context",
)
class EmptyContextIsPadding(LogLikelihood):
    """Without a context the first token is predicted by a padding token that nobody asked for."""

    def loglikelihood(self, model, requests, *, pad_id=0, **options):
        filled = [(context or [pad_id], continuation) for context, continuation in requests]
        return super().loglikelihood(model, filled, pad_id=pad_id, **options)


@known_bug(
    "eval-empty-continuation-is-certain",
    contract="loglikelihood",
    breaks="loglikelihood.refused.empty-continuation",
)
class EmptyIsCertain(LogLikelihood):
    """An empty continuation has log probability 0, and wins every choice."""

    def loglikelihood(self, model, requests, **options):
        found = iter(super().loglikelihood(model, [r for r in requests if len(r[1])], **options))
        return [next(found) if len(r[1]) else Score(torch.zeros(0), True) for r in requests]


@known_bug(
    "eval-id-clamped",
    contract="loglikelihood",
    breaks="loglikelihood.refused.id-outside-vocabulary",
)
class IdsAreClamped(LogLikelihood):
    """An id outside the vocabulary is taken for the nearest one inside."""

    def loglikelihood(self, model, requests, **options):
        most = model.config.vocab_size - 1
        inside = lambda ids: [min(max(id, 0), most) for id in ids]
        return super().loglikelihood(
            model, [(inside(a), inside(b)) for a, b in requests], **options
        )
