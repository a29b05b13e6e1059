"""Subtle mistakes in scoring continuations that no catalogue lists, for every requirement."""

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mutants import Broken

from reference_impl.shared_core.likelihood import LogLikelihood, Score

NEAR_LIKELIHOOD: dict[str, Broken] = {}
MAY_RAISE = {"AddsLists", "FillingContinuationsAreRefused"}
"""Those whose fault it is to raise."""


def near(breaks: str):
    """Register an adapter, whose docstring says what is wrong with it."""

    def decorate(adapter: type) -> type:
        wrong, slug = " ".join(adapter.__doc__.split()), f"loglikelihood.{breaks}"
        NEAR_LIKELIHOOD[adapter.__name__] = Broken(adapter.__name__, slug, wrong, adapter)
        return adapter

    return decorate


@pytest.mark.parametrize("name", NEAR_LIKELIHOOD)
def test_near_miss_is_caught(name):
    NEAR_LIKELIHOOD[name].assert_caught(may_raise=name in MAY_RAISE)


# Values


@near("score.one-per-token")
class ContextIsScoredToo(LogLikelihood):
    """The tokens of the context but for its first are scored with the continuation's."""

    def row_of(self, number, context, continuation, limit):
        return super().row_of(number, context[:1], context[1:] + continuation, limit)


@near("score.one-per-token")
class LastTokenIsMissing(LogLikelihood):
    """The last token of longer continuations is taken for the end of text, and has no score."""

    def token_logprobs(self, logits_CV, ids_C):
        logprobs_C = super().token_logprobs(logits_CV, ids_C)
        return logprobs_C[:-1] if len(logprobs_C) > 1 else logprobs_C


@near("score.tokens")
class TokensInReverse(LogLikelihood):
    """The numbers of longer continuations are in reverse: their sum is right."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV, ids_C).flip(0)


@near("score.probabilities")
class PaddingHasNoProbability(LogLikelihood):
    """The first column of the vocabulary, which pads, is left out of the softmax's sum."""

    def token_logprobs(self, logits_CV, ids_C):
        wide_CV = logits_CV.float()
        return wide_CV.gather(-1, ids_C[:, None])[:, 0] - wide_CV[:, 1:].logsumexp(-1)


@near("score.probabilities-of-pairs")
class SmallPerTokenOffset(LogLikelihood):
    """A thousandth is added to each log probability, against log of 0."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV, ids_C) + 1e-3


@near("score.cross-entropy")
class LabelsAreSmoothed(LogLikelihood):
    """The loss that scores are made of smooths its labels by a hundredth."""

    def token_logprobs(self, logits_CV, ids_C):
        smooth = torch.nn.functional.cross_entropy
        return -smooth(logits_CV.float(), ids_C, reduction="none", label_smoothing=0.01)


@near("score.additive")
class FirstTokenIsNotCounted(LogLikelihood):
    """The first token of longer continuations, a space mostly, counts nothing."""

    def token_logprobs(self, logits_CV, ids_C):
        logprobs_C = super().token_logprobs(logits_CV, ids_C)
        if len(logprobs_C) > 1:
            logprobs_C[0] = 0
        return logprobs_C


# Batches and padding


@near("batch.at-most-so-many-rows")
class LengthsTogether(LogLikelihood):
    """All requests are one batch, whatever its size may be."""

    def row_batches(self, rows, batch_size):
        return [rows] if rows else []


@near("batch.larger-than-requests")
class PaddingOfOneRow(LogLikelihood):
    """What is attended to is as much in every row as in the first."""

    def attended_tokens(self, batch, padding_side):
        attended_BT = super().attended_tokens(batch, padding_side)
        return attended_BT[:1].expand_as(attended_BT)

    def row_batches(self, rows, batch_size):
        ordered = sorted(rows, key=lambda row: len(row.shown))
        return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]


@near("padding.any-token")
class LastPadsAreSeen(LogLikelihood):
    """One token of padding on the left is attended to."""

    def attended_tokens(self, batch, padding_side):
        attended_BT = super().attended_tokens(batch, padding_side)
        if padding_side == "left":
            attended_BT[:, :-1] |= attended_BT[:, 1:].clone()
        return attended_BT


@near("padding.left")
class PositionsFromOne(LogLikelihood):
    """Positions of padded rows are counted from 1."""

    def token_positions(self, attended_BT):
        positions_BT = attended_BT.cumsum(1)
        padded = ~attended_BT.all(1, keepdim=True) & ~attended_BT[:, :1]
        return torch.where(padded, positions_BT, positions_BT - 1).clamp(min=0)


@near("padding.both-real")
class StripsTrailingRepeats(LogLikelihood):
    """Repeated tokens at the end of what is shown are taken for padding, and hidden but for one."""

    def attended_tokens(self, batch, padding_side):
        attended_BT = super().attended_tokens(batch, padding_side)
        for attended_T, row in zip(attended_BT, batch):
            columns = range(len(attended_T))[self.token_columns(row, len(attended_T), padding_side)]
            for column, token, other in zip(columns, row.shown, row.shown[1:]):
                attended_T[column] = token != other
        return attended_BT


# Sharing


@near("sharing.choices")
class ChoicesAreSorted(LogLikelihood):
    """Of requests that show the model the same, the scores are in the order of the choices."""

    def in_order_of_requests(self, scores):
        found = super().in_order_of_requests(scores)
        groups = defaultdict(list)
        for number, key in enumerate(self.keys):
            groups[key].append(number)
        moved = list(found)
        for numbers in groups.values():
            ordered = sorted(numbers, key=lambda number: self.chosen[number])
            for number, other in zip(numbers, ordered):
                moved[number] = found[other]
        return moved

    def loglikelihood(self, model, requests, **options):
        self.keys = [(*context, *continuation[:-1]) for context, continuation in requests]
        self.chosen = [continuation[-1] if continuation else 0 for _, continuation in requests]
        return super().loglikelihood(model, requests, **options)


@near("sharing.prefix")
class PrefixesAreLeftOut(LogLikelihood):
    """A request that is the beginning of another is scored in its row, by that row's last logits."""

    def row_of(self, number, context, continuation, limit):
        row = super().row_of(number, context, continuation, limit)
        longer = [other.shown for other in self.rows if other.shown[: len(row.shown)] == row.shown]
        self.rows.append(row)
        return replace(row, shown=longer[0]) if longer else row

    def loglikelihood(self, model, requests, **options):
        self.rows = []
        return super().loglikelihood(model, requests, **options)


# Truncation


@near("truncation.width")
class LastTokenIsShown(LogLikelihood):
    """The last token is shown to the model as well, one more than there may be."""

    def row_of(self, number, context, continuation, limit):
        row = super().row_of(number, context, continuation, limit)
        room = self.room > len(row.shown)
        return replace(row, shown=(*row.shown, continuation[-1])) if room else row

    def longest_shown(self, model, max_length):
        self.room = model.config.max_position_embeddings
        return super().longest_shown(model, max_length)

    def continuation_logits(self, logits_TV, row, padding_side):
        shown_TV = logits_TV[self.token_columns(row, len(logits_TV), padding_side)]
        if row.shown[-1] == row.continuation[-1] and len(row.shown) < self.room:
            shown_TV = shown_TV[:-1]
        return shown_TV[len(shown_TV) - len(row.continuation) :]


@near("truncation.default")
class OnePositionIsKeptFree(LogLikelihood):
    """Without ``max_length`` one position of the model is kept free."""

    def longest_shown(self, model, max_length):
        limit = super().longest_shown(model, max_length)
        return limit - 1 if max_length is None else limit


@near("truncation.padded")
class PositionsOfTheWholeText(LogLikelihood):
    """Positions count padding on the left, as if every row were as long as the longest."""

    def token_positions(self, attended_BT):
        rows, columns = attended_BT.shape
        return torch.arange(columns, device=attended_BT.device).expand(rows, columns)


@near("truncation.continuation-fills")
class FillingContinuationsAreRefused(LogLikelihood):
    """A continuation as long as the limit is refused, though its context keeps a token."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        super().check_request(number, context, continuation, vocab_size, limit - 1)


@near("truncation.far-beyond")
class HeadAndTail(LogLikelihood):
    """Of contexts far beyond the limit the first token is kept, as if it began the text."""

    def row_of(self, number, context, continuation, limit):
        row = super().row_of(number, context, continuation, limit)
        if len(row.shown) < len(context) and len(continuation) < limit:
            return replace(row, shown=(context[0], *row.shown[1:]))
        return row


# Greedy


@near("greedy.first-is-other")
class GreedyByTheLastToken(LogLikelihood):
    """The last token alone decides."""

    def is_greedy(self, logits_CV, ids_C):
        return super().is_greedy(logits_CV[-1:], ids_C[-1:])


@near("greedy.most-likely")
class NeverGreedyIfLong(LogLikelihood):
    """The logits are compared with those of the place behind: greedy are single tokens alone."""

    def is_greedy(self, logits_CV, ids_C):
        return super().is_greedy(logits_CV.roll(1, 0), ids_C)


@near("greedy.each-request")
class GreedyTogether(LogLikelihood):
    """A batch is greedy or not."""

    def batch_scores(self, logits_BTV, batch, padding_side):
        scores = list(super().batch_scores(logits_BTV, batch, padding_side))
        together = all(score.is_greedy for _, score in scores)
        for number, score in scores:
            yield number, replace(score, is_greedy=together)


@near("greedy.ties")
class NoneOfEqualOnes(LogLikelihood):
    """The most likely token is one that all others are below: among equal ones there is none."""

    def is_greedy(self, logits_CV, ids_C):
        others_CV = logits_CV.scatter(-1, ids_C[:, None], -torch.inf)
        chosen_C = logits_CV.gather(-1, ids_C[:, None])[:, 0]
        return bool((chosen_C > others_CV.amax(-1)).all())


@near("greedy.small-differences")
class GreedyUpToATolerance(LogLikelihood):
    """A token counts as the most likely one if it is within a hundredth of it."""

    def is_greedy(self, logits_CV, ids_C):
        chosen_C = logits_CV.gather(-1, ids_C[:, None])[:, 0]
        return bool((chosen_C >= logits_CV.amax(-1) - 1e-2).all())


# Numerics


@near("numerics.wide-scores")
class ScoresInTheModelsDtype(LogLikelihood):
    """Scores are rounded to the model's dtype at the end."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV, ids_C).to(logits_CV.dtype)


@near("numerics.impossible-tokens")
class NeverInfinite(LogLikelihood):
    """Log probabilities of -inf become the lowest number there is, so that means stay finite."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV, ids_C).nan_to_num()


@near("numerics.large-logits")
class SumOfExponentials(LogLikelihood):
    """The largest logit is not taken out before the exponential."""

    def token_logprobs(self, logits_CV, ids_C):
        wide_CV = logits_CV.float()
        return wide_CV.gather(-1, ids_C[:, None])[:, 0] - wide_CV.exp().sum(-1).log()


# What is left behind


@near("mode.of-parts-restored")
class AllPartsAsTheModel(LogLikelihood):
    """model.train(mode) afterwards: every part has the model's mode."""

    @contextmanager
    def evaluating(self, model):
        training = model.training
        with torch.no_grad():
            model.eval()
            try:
                yield
            finally:
                model.train(training)


@near("mode.evaluation")
class OnlyIfItIsTraining(LogLikelihood):
    """model.eval() is called if the model is in training mode, whatever its parts are in."""

    @contextmanager
    def evaluating(self, model):
        if model.training:
            with super().evaluating(model):
                yield
        else:
            with torch.no_grad():
                yield


@near("mode.restored-after-error")
class NotAfterAnError(LogLikelihood):
    """The mode is put back in the last line, which an exception does not reach."""

    @contextmanager
    def evaluating(self, model):
        modes = [module.training for module in model.modules()]
        model.eval()
        with torch.no_grad():
            yield
        for module, training in zip(model.modules(), modes):
            module.training = training


@near("mode.restored-after-error")
class ErrorsAreScores(LogLikelihood):
    """A batch for which the model raises has scores of -inf, and nothing is said."""

    def run_model(self, model, input_ids, **inputs):
        try:
            return super().run_model(model, input_ids, **inputs)
        except RuntimeError:
            vocab = model.config.vocab_size
            return torch.full((*input_ids.shape, vocab), -torch.inf)


@near("gradients.none")
class RecordedAndDetached(LogLikelihood):
    """The model records, and scores are detached afterwards."""

    def run_model(self, model, input_ids, **inputs):
        with torch.enable_grad():
            return super().run_model(model, input_ids, **inputs).detach()


@near("gradients.switch-restored")
class GradientsOffForGood(LogLikelihood):
    """Gradients are switched off, and never on again."""

    @contextmanager
    def evaluating(self, model):
        with super().evaluating(model):
            yield
        torch.set_grad_enabled(False)


@near("gradients.switch-restored")
class GradientsAlwaysOn(LogLikelihood):
    """Gradients are switched on afterwards, although they were off."""

    @contextmanager
    def evaluating(self, model):
        with super().evaluating(model):
            yield
        torch.set_grad_enabled(True)


class Kept(LogLikelihood):
    """Keeps scores from call to call."""

    def __init__(self):
        self.kept = {}

    def loglikelihood(self, model, requests, **options):
        key = self.key(model, requests, options)
        if key not in self.kept:
            self.kept[key] = (model, super().loglikelihood(model, requests, **options))
        return self.kept[key][1]


@near("state.other-model")
class KeptByRequests(Kept):
    """Scores are kept by the requests and sizes of the model, whichever model it is."""

    def key(self, model, requests, options):
        sizes = tuple(tuple(weight.shape) for weight in model.parameters())
        dtype = next(model.parameters()).dtype
        return repr(requests), repr(options), sizes, dtype


@near("state.other-requests")
class KeptByLengths(Kept):
    """Scores are kept by the model and the number of tokens."""

    def key(self, model, requests, options):
        totals = tuple(len(context) + len(continuation) for context, continuation in requests)
        return id(model), totals, repr(options)

    def in_order_of_requests(self, scores):
        found = super().in_order_of_requests(scores)
        return [Score(score.logprobs.sum(), score.is_greedy) for score in found]


@near("state.new-weights")
class KeptByModel(Kept):
    """Scores are kept by the model and the requests."""

    def key(self, model, requests, options):
        return id(model), repr(requests), repr(options)


# Requests


@near("requests.none")
class OneScoreAtLeast(LogLikelihood):
    """No requests have the score of nothing."""

    def in_order_of_requests(self, scores):
        return super().in_order_of_requests(scores) or [Score(torch.zeros(()), True)]


@near("requests.tuples")
class AddsLists(LogLikelihood):
    """The text is the context plus a list, which only a list can be added to."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        text = context + list(continuation)
        assert text
        super().check_request(number, context, continuation, vocab_size, limit)


@near("requests.tuples")
class TuplesAreOneChoice(LogLikelihood):
    """Requests in a tuple are taken for one request more than there are: the last comes twice."""

    def loglikelihood(self, model, requests, **options):
        found = super().loglikelihood(model, requests, **options)
        return found if isinstance(requests, list) else [*found, found[-1]]


@near("requests.unchanged")
class ContextsGrow(LogLikelihood):
    """The continuation is appended to the caller's list of the context."""

    def loglikelihood(self, model, requests, **options):
        found = super().loglikelihood(model, requests, **options)
        for context, continuation in requests:
            if isinstance(context, list):
                context += continuation[:-1]
        return found


@near("requests.unchanged")
class SortedInPlace(LogLikelihood):
    """The caller's list of requests is sorted by length, and the scores are right."""

    def loglikelihood(self, model, requests, **options):
        found = super().loglikelihood(model, requests, **options)
        if isinstance(requests, list):
            requests.sort(key=lambda request: -len(request[0]) - len(request[1]))
        return found


@near("requests.unchanged")
class WeightsAreRounded(LogLikelihood):
    """The model's weights are rounded to bfloat16 and back after the run, to save memory."""

    def loglikelihood(self, model, requests, **options):
        found = super().loglikelihood(model, requests, **options)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
        return found


# Bad requests


class Lenient(LogLikelihood):
    """Checks less than it must."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        pass


@near("refused.long-continuation")
class OneMoreIsTaken(Lenient):
    """A continuation of one token more is scored, its first token by padding."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        LogLikelihood.check_request(self, number, context, continuation, vocab_size, limit + 1)

    def row_of(self, number, context, continuation, limit):
        return super().row_of(number, context, continuation[-limit:], limit)


@near("refused.id-outside-vocabulary")
class NegativeIdsCountFromTheEnd(LogLikelihood):
    """A negative id is one counted from the end, as in indexing."""

    def loglikelihood(self, model, requests, **options):
        count = model.config.vocab_size
        positive = lambda ids: [id + count if -count <= id < 0 else id for id in ids]
        requests = [(positive(a), positive(b)) for a, b in requests]
        return super().loglikelihood(model, requests, **options)


@near("refused.id-outside-vocabulary")
class LastTokenIsNotChecked(LogLikelihood):
    """The last token, which the model never sees, is taken modulo the vocabulary."""

    def loglikelihood(self, model, requests, **options):
        count = model.config.vocab_size
        last = lambda ids: [*ids[:-1], ids[-1] % count] if len(ids) else ids
        requests = [(context, last(continuation)) for context, continuation in requests]
        return super().loglikelihood(model, requests, **options)


@near("refused.id-that-is-lost")
class CheckedAfterTruncation(LogLikelihood):
    """Only ids that the model sees are checked."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        seen = context[max(0, len(context) + len(continuation) - 1 - limit) :] or context[-1:]
        super().check_request(number, seen, continuation, vocab_size, limit)


@near("refused.empty-context")
class BeginsWithItsFirstToken(LogLikelihood):
    """Without a context the first token of the continuation is taken for it."""

    def loglikelihood(self, model, requests, **options):
        moved = [(a, b) if len(a) or len(b) < 2 else (b[:1], b[1:]) for a, b in requests]
        found = super().loglikelihood(model, moved, **options)
        return [Score(score.logprobs.sum(), score.is_greedy) for score in found]


@near("refused.empty-continuation")
class EmptyIsImpossible(LogLikelihood):
    """An empty continuation has log probability -inf."""

    def loglikelihood(self, model, requests, **options):
        found = iter(super().loglikelihood(model, [r for r in requests if len(r[1])], **options))
        impossible = Score(torch.tensor(-torch.inf), False)
        return [next(found) if len(r[1]) else impossible for r in requests]


@near("refused.padding-side")
class AnythingElseIsRight(LogLikelihood):
    """What is not "left" is taken for "right"."""

    def loglikelihood(self, model, requests, *, padding_side="right", **options):
        side = padding_side if padding_side == "left" else "right"
        return super().loglikelihood(model, requests, padding_side=side, **options)
