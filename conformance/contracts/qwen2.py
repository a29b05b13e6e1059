"""Tensor-parallel layers, sharded weights, and a language model on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ParallelLayer(Protocol):
    """What :meth:`ParallelLinear.parallel_linear` gives: the part of a layer that a rank holds.

    The other methods may be missing; the requirements about them are then declined.
    """

    def __call__(self, x: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The layer's output on this rank; every rank calls it at the same time. Differentiable."""

    def shards(self) -> Mapping[str, Tensor]:
        """What this rank holds of each weight, under the names of ``weights``.

        Fused weights are told apart: ``q.weight``, ``k.weight``, ``gate.weight`` …
        """

    def gradients(self) -> Mapping[str, Tensor]:
        """After a backward pass on every rank: the gradients of :meth:`shards`.

        They are those of the loss with respect to the full weights, complete: equal on ranks that
        hold the same.
        """

    def reset_parameters(self) -> None:
        """Draw the weights at random; every rank does, at once and after the same ``manual_seed``.

        What several ranks hold is the same on them; what each holds alone is not the same on two.
        """


class ParallelLinear(Protocol):
    """Layers whose weights are split over the ranks of a group."""

    def parallel_linear(
        self,
        kind: str,
        weights: Mapping[str, Tensor],
        *,
        group_size: int | None = None,
        gather_output: bool = False,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        heads: tuple[int, int] | None = None,
        layout: str = "separate",
        vocab_size: int | None = None,
        eps: float = 1e-6,
        label_smoothing: float = 0.0,
    ) -> ParallelLayer:
        """This rank's part of a layer. Called on every rank of torch.distributed's default group.

        One rank calls it without a group. ``weights`` are the full weights, the same on every rank,
        in the layout of ``F.linear`` [out, in]; the layer keeps its own part, in their dtype.
        ``group_size``: the ranks of a tensor-parallel group; group g is ranks ``g * group_size`` to
        ``(g + 1) * group_size - 1``, and groups have nothing to do with each other. Default: all.

        ``"column"`` (weight, bias)
            ``x Wᵀ + b``, of which rank r has part r of the last axis; or all of it, with
            ``gather_output``.
        ``"row"`` (weight, bias)
            ``x Wᵀ + b``, where a rank has its part of ``x``; or all of it, without
            ``input_is_parallel``. Without ``reduce_results`` the sum of what the ranks return is
            the output.
        ``"qkv"`` (q.weight, q.bias, k.weight …; or weight, bias)
            queries, keys and values of the rank's heads, a tuple of three. ``heads`` are query heads
            H and key/value heads G. Query heads are split evenly. So are key/value heads; where
            there are more ranks than those, each is held by ``ranks / G`` consecutive ranks.
        ``"gate_up"`` (gate.weight, up.weight; or weight)
            the rank's part of both, a tuple of two.
        ``"mlp"`` (gate.weight, up.weight, down.weight)
            ``down(silu(gate(x)) * up(x))`` in full, with one reduction.
        ``"embedding"`` (weight)
            the rows of ids, in full, where the vocabulary is split.
        ``"head"`` (weight)
            the logits of the whole vocabulary and nothing else, in the order of the vocabulary.
        ``"norm"`` (weight)
            RMS norm over an axis that is split, ``eps`` under the root.
        ``"cross_entropy"`` (none)
            called with ``logits`` [tokens, part of the vocabulary] and ``targets`` int64 [tokens],
            gives the loss of each, 0 for a target of -100, with ``label_smoothing`` over the
            ``vocab_size`` tokens; columns behind them are padding.

        ``layout`` of fused weights: ``"concatenated"`` (all queries, all keys, all values; all of
        gate, all of up) or ``"interleaved"`` (for each key/value head its query heads, its key and
        its value; g0, u0, g1, u1 …). A vocabulary that the ranks do not divide is padded inside.

        Sizes that cannot be split raise an exception, on every rank, that names them: heads and
        widths that the ranks do not divide, key/value heads that they neither divide nor repeat,
        weights of another shape than the others ask for.

        Sources: Megatron-LM (arXiv 1909.08053); vLLM's ``QKVParallelLinear`` for the replicas.
        """


class WeightLoader(Protocol):
    """Loading the weights of a Qwen2 model from a Hugging Face directory, for one rank of several."""

    def weight_loader(
        self,
        directory: str,
        *,
        rank: int = 0,
        ranks: int = 1,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> Mapping[str, Tensor]:
        """What a rank holds of each weight, under the names of ``Qwen2ForCausalLM``'s state.

        ``directory`` has ``config.json`` and either ``model.safetensors`` or an index
        ``model.safetensors.index.json`` with the files that it names. Nothing is communicated.

        Projections are split as in :class:`ParallelLinear`: ``q_proj``, ``k_proj``, ``v_proj``
        (weights and biases) by heads, ``gate_proj`` and ``up_proj`` by rows, ``o_proj`` and
        ``down_proj`` by columns; norms are held in full. The embedding and the head are held in full,
        or split by rows in equal shares with rows of zeros behind the last. A tied head may be left
        out; if it is there, it is the embedding.

        ``rank`` of ``ranks``: whose part is loaded. ``dtype`` is that of every tensor; default: that
        of ``config.json``. ``device``: where they are; they do not change with the files. The tie is
        that of ``tie_word_embeddings``; where the file has a head of its own all the same, that head
        is used, or the directory refused. Names of the base model (without ``model.``) are
        understood, or refused.

        Every weight is loaded and every tensor of the checkpoint is used. Anything else raises an
        exception that names the file and the tensor: a missing, unknown, misshapen or transposed
        tensor, a missing or truncated file, an index that does not fit the files, a tensor in two
        files, integers, values that are not finite; and sizes that ``ranks`` cannot split.

        Sources: transformers ``modeling_qwen2``, safetensors' and transformers' file formats.
        """


class LoadedLM(Protocol):
    """What :meth:`CausalLM.causal_lm` gives: a language model on the ranks of a group.

    ``cached`` and ``generate`` may be missing; the requirements about them are then declined.
    """

    def forward(
        self,
        ids: Tensor,
        *,
        cache: Any = None,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits [batch, tokens, vocab_size] of the next tokens, and the cache with them in it.

        ``ids`` int64 [batch, tokens] are the same on every rank, and so are the logits, in the dtype
        of the model. ``cache`` is what an earlier call gave; the tokens follow on those in it, one or
        several at a time.

        ``valid`` bool [batch, tokens]
            False for padding, on either side, which no token sees and which takes no position; the
            logits at padding are unspecified.
        ``positions`` int64 [batch, tokens]
            default: the number of real tokens before each in its row.

        Tokens that are not of the vocabulary, positions beyond ``max_position_embeddings``, an empty
        sequence and a mask of another shape raise an exception.
        """

    def cached(self, cache: Any) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys, and values, of each layer: [batch, kv heads of the rank, tokens, head_dim]."""

    def generate(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        eos: Any = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The prompts and what follows, int64 [batch, tokens + at most ``max_new_tokens``].

        The same on every rank. ``eos``: the token, or a list of tokens, that ends a row; default:
        ``eos_token_id`` of ``generation_config.json`` or ``config.json``. The end token is kept; what
        stands behind it is unspecified, and generation stops when every row has ended. No new tokens
        are the prompts. Sampling needs a temperature above 0.
        """


class CausalLM(Protocol):
    """A Qwen2 language model, from a Hugging Face directory, on the ranks of a group."""

    def causal_lm(
        self,
        directory: str,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> LoadedLM:
        """The model of a directory. Called on every rank of torch.distributed's default group.

        One rank calls it without a group. ``directory``, ``dtype`` and ``device`` are as in
        :class:`WeightLoader`; the weights are split over all ranks of the group.

        The model is Qwen2: RMS norm (the mean in float32 at least, rounded to the model's dtype
        before the weight), rotary embedding of halves with ``rope_theta`` as the configuration has it
        (at the top, or in ``rope_parameters``), grouped-query attention with biases of q, k and v and
        none of o, ``head_dim`` that need not be ``hidden_size / heads``, SwiGLU, and a head that may
        be the embedding.

        Each block communicates two reductions and nothing else. A number of ranks that does not fit
        raises an exception, on every rank, that names the sizes.

        Sources: transformers ``modeling_qwen2``; Qwen2 (arXiv 2407.10671).
        """
