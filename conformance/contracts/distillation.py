"""Distilling a compressed model from its original, and evaluating what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class DistillationLoss(Protocol):
    """The loss that draws a student's next-token distributions to a teacher's."""

    def distillation_loss(
        self,
        student: Tensor | nn.Module,
        teacher: Tensor | nn.Module,
        labels: Tensor,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        num_items_in_batch: int | None = None,
        vocab_size: int | None = None,
        teacher_indices: Tensor | None = None,
        teacher_logsumexp: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """``alpha · T² · D + (1 − alpha) · CE``, a scalar; differentiable in the student alone.

        ``student`` and ``teacher`` are logits [batch, tokens, vocabulary] in any floating dtype, as the
        models give them; ``labels`` int64 [batch, tokens] are the ids, and −100 where nothing is to be
        learnt. Logits at t are about the label at t + 1: the last logits and the first label have no
        part. One mask, that of the shifted labels, holds for both terms. Both are sums over the valid
        targets, divided by their number, or by ``num_items_in_batch``; with no valid target the loss is
        0 and so are its gradients. It is computed in float32 or wider.

        With S and Q the softmax of the student's and the teacher's logits over ``temperature`` T, D of
        a token is, by ``divergence``,

        ``"forward_kl"``
            KL(Q ‖ S) = Σ Q (log Q − log S)
        ``"reverse_kl"``
            KL(S ‖ Q)
        ``"jsd"``
            β KL(Q ‖ M) + (1 − β) KL(S ‖ M) with M = β Q + (1 − β) S, the generalised Jensen–Shannon
            divergence with weight ``beta``; at β = 0 the forward KL, and at β = 1 the reverse one.

        What has no probability in either, as a column of −inf in both, adds nothing. CE is
        the cross entropy of the labels at temperature 1. A term with weight 0 is not computed from
        what it alone would need: with ``alpha`` = 0 the teacher has no part.

        ``num_items_in_batch``
            the number of valid targets in the global batch of which this call sees a part: losses and
            gradients of the parts, over micro-batches and ranks, add up to those of the whole.
        ``vocab_size``
            columns from this one on are padding of the vocabulary, in both: they have no probability.
            Each may have its own number of them.
        ``teacher_indices``, ``teacher_logsumexp``
            ``teacher`` holds [batch, tokens, k] logits alone, of the columns ``teacher_indices`` int64
            [batch, tokens, k], all different and below the vocabulary; ``teacher_logsumexp`` [batch,
            tokens] is log Σ exp(logit / T) over the teacher's whole vocabulary. D is then between
            distributions over k + 1 outcomes, the last of which is all other columns together: never
            above that of the whole vocabulary, and equal to it where all columns are given.
        ``ids``
            int64 [batch, tokens]: ``student`` and ``teacher`` are modules that take ids and give
            logits, and are run here; they may share modules. The teacher is run in evaluation mode,
            and no gradient reaches what is its alone. Every module has afterwards the mode it had
            before, and the student is run in its own.

        An exception for a ``temperature`` that is not positive, ``alpha`` or ``beta`` outside [0, 1],
        another ``divergence``, vocabularies or shapes that do not belong together, a label that is
        neither −100 nor in the vocabulary, ``num_items_in_batch`` below 1, and indices without
        ``teacher_logsumexp``.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/distillation.py`` and
        ``src/distillation_trainer.py``; Hinton, Vinyals and Dean 2015 (T²); Agarwal et al. 2024 (GKD)
        for ``"jsd"``.
        """


class Score(Protocol):
    """What :meth:`LogLikelihood.loglikelihood` gives for a request.

    ``is_greedy`` may be missing; the requirements about it are then declined.
    """

    logprobs: Tensor
    """[continuation] log p of each token of the continuation given all before it, float32 or wider.

    Or [], their sum, from code that keeps no more: requirements about single tokens are then declined.
    """
    is_greedy: bool
    """Whether every token of the continuation is the most likely one, given all before it.

    Of tokens that are equally likely at least one counts as such, and no other.
    """


class LogLikelihood(Protocol):
    """Log likelihoods of continuations: what evaluation by multiple choice is made of."""

    def loglikelihood(
        self,
        model: nn.Module,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        batch_size: int = 1,
        padding_side: str = "right",
        pad_id: int = 0,
        max_length: int | None = None,
    ) -> Sequence[Score]:
        """One score a request, in the order of ``requests``.

        ``model`` is called as causal language models of transformers are: ``model(input_ids,
        attention_mask=…, position_ids=…)``, int64 [batch, tokens] each, and its answer's ``logits`` are
        [batch, tokens, vocabulary]. Without ``attention_mask`` every token is attended to, without
        ``position_ids`` the first column has position 0. Its positions are absolute. ``model.config``
        has ``vocab_size`` and ``max_position_embeddings``, ``model.device`` its device.

        A request is ``(context, continuation)``, ids. The score of a request is that which it has
        alone: it depends neither on ``batch_size``, nor on the other requests and their order, nor
        on ``padding_side`` (``"right"`` or ``"left"``) and ``pad_id``, which may be a real token's.
        The model is run in evaluation mode without gradients, and has its mode back afterwards.
        Nothing is kept from one call to the next. At most ``batch_size`` rows are run at once.

        ``max_length``
            the most tokens that the model is given at once, default ``max_position_embeddings``. A
            longer request loses the beginning of its context: the model sees the last ``max_length``
            of all tokens but the last one.

        An exception for an empty context or continuation, a continuation longer than ``max_length``,
        an id outside the vocabulary, and another ``padding_side``. No requests have no scores.

        Source: EleutherAI/lm-evaluation-harness, ``lm_eval/models/huggingface.py``.
        """


class Watcher(Protocol):
    """What :meth:`CheckpointWatcher.checkpoint_watcher` gives."""

    def poll(self) -> Sequence[str]:
        """Evaluate what is complete and was not evaluated yet, in numeric order of the steps.

        Gives the names of the checkpoints that gave results now, ``["checkpoint-900",
        "checkpoint-1000"]``, without those that failed; does not wait for more. An ``evaluate`` that
        raises ends the attempt at its checkpoint, not the pass: the others are evaluated, and it is
        tried again at the next poll, by this watcher or one that is made later, ``attempts`` times in
        all. Only an ``Exception`` is a failure: KeyboardInterrupt and SystemExit come through and leave
        no line. Two processes may poll at the same time: the second waits.
        """


class CheckpointWatcher(Protocol):
    """Evaluating the checkpoints of a training run while it writes them."""

    def checkpoint_watcher(
        self,
        directory: str,
        evaluate: Callable[[str], Mapping[str, Any]],
        *,
        results: str,
        attempts: int = 3,
    ) -> Watcher:
        """A watcher of the folders ``checkpoint-{step}`` in ``directory``, which may not be there yet.

        ``evaluate`` takes the path of a checkpoint itself, a ``str``, and gives its metrics, a mapping
        of names to numbers; what is no mapping, or JSON cannot hold, is a failure. (A number that is
        not finite may be kept or be a failure; it never becomes another.) ``results`` is a file of JSON
        lines, whose folder is made: one line for each checkpoint that was evaluated, and one for each
        failure, written before the next evaluation begins,

            {"checkpoint": "checkpoint-900", "step": 900, "digest": "…", "results": {"loss": 2.5}}
            {"checkpoint": "checkpoint-900", "step": 900, "digest": "…", "error": "RuntimeError: …"}

        with further entries if it likes. Lines that are whole stay as they are, byte for byte, and new
        ones are added behind them; what stands behind the last end of a line is not a line, and is cut
        off before the next is written. ``digest`` is that of the weights. A checkpoint is known by its
        name and digest: one that was replaced by other weights since is evaluated again, and its
        failures are counted anew; two with the same weights are both evaluated.

        Each complete checkpoint is evaluated once: what ``results`` has is not evaluated again, by
        whatever watcher it was written. A process that is ended at any moment leaves a file that the
        next watcher reads. Of every checkpoint there is one line of results in the end, with what
        ``evaluate`` gave for it.

        A checkpoint is complete when its ``config.json`` is there and is JSON, and its weights are
        there: ``model.safetensors``; or every file that ``model.safetensors.index.json`` names; or
        those of a compressed model (:class:`CompressedCheckpoint`), ``non_moe_weights`` and each
        projection of each layer that ``compressed_metadata.json`` names. A file of tensors whose length
        is not what its header says (of ``.pt``: that does not end with its directory) is not there yet.
        What is not complete is left for a later poll, as is a folder that vanishes. Anything else in
        ``directory`` is not a checkpoint: other names, ``checkpoint-12.tmp``,
        ``.checkpoint-12.x.tmp``, ``checkpoint-best``, files.

        An exception, here or at the next poll, for ``attempts`` below 1, and for a file ``results``
        that has a line which is not JSON; it names the file and the line, counted from 1, and leaves
        it as it is.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/async_eval.py``.
        """
