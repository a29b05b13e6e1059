"""Other right ways to offer the contract ``loglikelihood``."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.correct_variants import correct_variant
from reference_impl.shared_core.likelihood import LogLikelihood, Score


@correct_variant("likelihood-order-given", contract="loglikelihood")
class OrderGiven(LogLikelihood):
    """Batches are of requests in the order given, and scores come in a tuple."""

    def row_batches(self, rows, batch_size):
        return [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]

    def in_order_of_requests(self, scores):
        return tuple(score for _, score in scores)


@correct_variant("likelihood-shortest-first", contract="loglikelihood")
class ShortestFirst(LogLikelihood):
    """The shortest are run first, in batches of one length each."""

    def row_batches(self, rows, batch_size):
        lengths = defaultdict(list)
        for row in sorted(rows, key=lambda row: (len(row.shown), row.shown)):
            lengths[len(row.shown)].append(row)
        for equal in lengths.values():
            yield from super().row_batches(equal, batch_size)


@correct_variant("likelihood-one-by-one", contract="loglikelihood")
class OneByOne(LogLikelihood):
    """Each request alone: no padding, and neither a mask nor positions are given to the model."""

    def row_batches(self, rows, batch_size):
        return [[row] for row in rows]

    def run_model(self, model, input_ids, **inputs):
        return model(input_ids=input_ids).logits


@correct_variant("likelihood-always-right", contract="loglikelihood")
class AlwaysOnTheRight(LogLikelihood):
    """Padding is on the right whatever is asked for, where a causal model needs no mask."""

    def batch_logits(self, model, batch, padding_side, pad_id):
        return super().batch_logits(model, batch, "right", pad_id)

    def run_model(self, model, input_ids, **inputs):
        return model(input_ids).logits

    def continuation_logits(self, logits_TV, row, padding_side):
        return super().continuation_logits(logits_TV, row, "right")


@correct_variant("likelihood-padded-to-the-limit", contract="loglikelihood")
class PaddedToTheLimit(LogLikelihood):
    """Every batch is as wide as the model allows, as compiled models need it, with left padding."""

    def batch_logits(self, model, batch, padding_side, pad_id):
        widest = replace(batch[0], shown=(0,) * self.limit)
        return super().batch_logits(model, [*batch, widest], "left", pad_id)[:-1]

    def longest_shown(self, model, max_length):
        self.limit = super().longest_shown(model, max_length)
        return self.limit

    def row_batches(self, rows, batch_size):
        return super().row_batches(rows, max(1, batch_size - 1))

    def continuation_logits(self, logits_TV, row, padding_side):
        return super().continuation_logits(logits_TV, row, "left")


@correct_variant("likelihood-positions-of-transformers", contract="loglikelihood")
class PaddingHasPositionOne(LogLikelihood):
    """Padding has position 1, as in the generation of transformers."""

    def token_positions(self, attended_BT):
        positions_BT = attended_BT.long().cumsum(-1) - 1
        return positions_BT.masked_fill(~attended_BT, 1)


@correct_variant("likelihood-shared-forwards", contract="loglikelihood")
class SharedForwards(LogLikelihood):
    """Requests that show the model the same are run once, and each takes the last logits it needs."""

    def row_batches(self, rows, batch_size):
        self.groups = defaultdict(list)
        for row in rows:
            self.groups[row.shown].append(row)
        return super().row_batches([group[0] for group in self.groups.values()], batch_size)

    def batch_scores(self, logits_BTV, batch, padding_side):
        for logits_TV, row in zip(logits_BTV, batch):
            group = self.groups[row.shown]
            repeated_BTV = logits_TV.expand(len(group), -1, -1)
            yield from super().batch_scores(repeated_BTV, group, padding_side)


class Pair(NamedTuple):
    """A score that is a tuple."""

    logprobs: Tensor
    is_greedy: bool


@correct_variant("likelihood-sums", contract="loglikelihood")
class Sums(LogLikelihood):
    """Scores are named tuples of sums in float64, as of lm-eval, and the sequence is a tuple."""

    def in_order_of_requests(self, scores):
        found = super().in_order_of_requests(scores)
        return tuple(
            Pair(torch.tensor(score.logprobs.double().sum().item()).double(), score.is_greedy)
            for score in found
        )


@dataclass(frozen=True)
class WithoutGreedy:
    """A score that does not know what is greedy."""

    logprobs: Tensor


@correct_variant("likelihood-without-greedy", contract="loglikelihood")
class NotGreedy(LogLikelihood):
    """Scores have log probabilities alone, in float64, which are views of one tensor."""

    def token_logprobs(self, logits_CV, ids_C):
        return super().token_logprobs(logits_CV.double(), ids_C)

    def in_order_of_requests(self, scores):
        found = [score.logprobs for score in super().in_order_of_requests(scores)]
        if not found:
            return []
        return [WithoutGreedy(x) for x in torch.cat(found).split([len(x) for x in found])]


@correct_variant("likelihood-cross-entropy", contract="loglikelihood")
class ByCrossEntropy(LogLikelihood):
    """Log probabilities are −cross entropy of logits that were made float32."""

    def token_logprobs(self, logits_CV, ids_C):
        return -F.cross_entropy(logits_CV.float(), ids_C, reduction="none")


@correct_variant("likelihood-logsumexp", contract="loglikelihood")
class ByLogsumexp(LogLikelihood):
    """log p is the logit less logsumexp; greedy is what argmax takes, the first of equal ones."""

    def token_logprobs(self, logits_CV, ids_C):
        wide_CV = logits_CV.float()
        return wide_CV.gather(-1, ids_C[:, None])[:, 0] - wide_CV.logsumexp(-1)

    def is_greedy(self, logits_CV, ids_C):
        return torch.equal(logits_CV.argmax(-1), ids_C)


@correct_variant("likelihood-greedy-by-logprobs", contract="loglikelihood")
class GreedyByLogprobs(LogLikelihood):
    """Greedy is the last one of the largest log probabilities in float32; a tensor of one bool."""

    def is_greedy(self, logits_CV, ids_C):
        logprobs_CV = logits_CV.float().log_softmax(-1)
        last_C = logits_CV.shape[-1] - 1 - logprobs_CV.flip(-1).argmax(-1)
        return (last_C == ids_C).all()


@correct_variant("likelihood-whole-batch", contract="loglikelihood")
class WholeBatch(LogLikelihood):
    """The log-softmax is of a whole batch at once, and what is not asked for is thrown away."""

    def batch_scores(self, logits_BTV, batch, padding_side):
        logprobs_BTV = logits_BTV.log_softmax(-1, dtype=torch.float32)
        for logits_TV, logprobs_TV, row in zip(logits_BTV, logprobs_BTV, batch):
            ids_C = torch.tensor(row.continuation, device=logits_TV.device)
            logits_CV = self.continuation_logits(logits_TV, row, padding_side)
            logprobs_CV = self.continuation_logits(logprobs_TV, row, padding_side)
            logprobs_C = logprobs_CV.gather(-1, ids_C[:, None]).flatten()
            yield row.number, Score(logprobs_C.cpu(), self.is_greedy(logits_CV, ids_C))


@correct_variant("likelihood-inference-mode", contract="loglikelihood")
class InferenceMode(LogLikelihood):
    """Inference mode in the place of no_grad: what comes out is never again part of a graph."""

    @contextmanager
    def evaluating(self, model):
        with super().evaluating(model), torch.inference_mode():
            yield


@correct_variant("likelihood-plain-objects", contract="loglikelihood")
class PlainObjects(LogLikelihood):
    """Refuses with assertions, asks the model by keyword, and gives namespaces."""

    def check_request(self, number, context, continuation, vocab_size, limit):
        assert len(context) > 0
        assert 0 < len(continuation) <= limit
        assert all(id in range(vocab_size) for id in [*context, *continuation])

    def run_model(self, model, input_ids, **inputs):
        return model(input_ids=input_ids, use_cache=False, return_dict=True, **inputs).logits

    def in_order_of_requests(self, scores):
        found = super().in_order_of_requests(scores)
        return [SimpleNamespace(logprobs=s.logprobs, is_greedy=int(s.is_greedy)) for s in found]
