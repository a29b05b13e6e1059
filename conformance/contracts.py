"""What an implementation can offer: one Protocol a contract, one method a Protocol.

An adapter is any object (a module, an instance) with some of these methods. Nothing is inherited
or registered. A method that is missing is *not offered*. A case is *declined* when the method does
not take an option that the case needs, or raises ``NotImplementedError("why")``; so an adapter
names in its signature the options that it supports, and only those. Both are counted in the report.

Tensors are on one device. Inputs must not be changed, outputs must not share memory with them, and
a value is NaN or infinite only where the mathematics says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Attention(Protocol):
    """Scaled dot-product attention."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        key_valid: Tensor | None = None,
        key_lengths: Tensor | None = None,
        q_segments: Tensor | None = None,
        k_segments: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Softmax(q kᵀ · scale) v over the keys that each query sees.

        ``q`` is [batch, q_heads, q_len, head_dim], ``k`` [batch, kv_heads, kv_len, head_dim], ``v``
        [batch, kv_heads, kv_len, value_dim]; the result is [batch, q_heads, q_len, value_dim] in the
        dtype of ``q``. Query head h reads key/value head ``h // (q_heads // kv_heads)``.

        A key is visible when every option allows it. A row that sees no key gives zeros and zero
        gradients. Unless positions are given, the last query is at the position of the last key.

        ``causal``
            keys up to the query's own position.
        ``window`` (left, right)
            keys from ``position - left`` to ``position + right``, both included; None leaves a
            side open. A sliding window of W tokens is ``(W - 1, 0)``.
        ``scale``
            factor on the dot products; default ``head_dim ** -0.5``.
        ``softcap``
            scores become ``softcap * tanh(score / softcap)``, after the scale and before masks.
        ``mask``
            broadcastable to [batch, q_heads, q_len, kv_len]: bool, True where the key is visible;
            or floating, added to the scores (-inf hides a key).
        ``key_valid`` bool [batch, kv_len]
            False for padding, on either side; padding holds arbitrary finite numbers. Positions
            still count slots.
        ``key_lengths`` int64 [batch]
            a preallocated cache: only the first ``key_lengths[b]`` slots were written, the others
            are uninitialised memory (NaN included). The last query is at the last *written* slot.
        ``q_segments``, ``k_segments`` int64 [batch, length]
            packed documents: a query sees keys of its own segment only.
        ``cu_seqlens_q``, ``cu_seqlens_k`` int64 [documents + 1]
            packed documents as cumulative lengths, batch 1; positions are those in the document.
        ``q_positions`` [batch, q_len], ``k_positions`` [batch, kv_len] int64
            positions outright, in any order (a ring cache); a negative key position is a slot that
            was never written. Causal masks and windows compare positions.
        ``sinks`` [q_heads]
            one more logit a head in the softmax denominator, without a value.
        ``return_lse``
            also return the log of the softmax denominator (the sink included) as float32
            [batch, q_heads, q_len], -inf for a row that sees nothing.

        Sources: "Attention is all you need" (arXiv 1706.03762); flash-attention's documentation for
        the alignment, windows and log-sum-exp; gpt-oss for sinks; Gemma 2 (arXiv 2408.00118) for
        the soft cap.
        """


class Rotary(Protocol):
    """Rotary position embedding of queries or keys."""

    def rotary(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
        layers: Mapping[str, Mapping[str, Any] | None] | None = None,
        layer_type: str | None = None,
    ) -> Tensor:
        """Rotate each pair of channels of ``x`` by ``position * frequency``; same shape and dtype.

        ``x`` is [batch, heads, tokens, head_dim], ``positions`` int64 [batch, tokens], in any order.

        ``theta``
            pair p of P turns by ``theta ** (-p / P)`` radians a position.
        ``layout``
            ``"half"``: channel p pairs with p + P (Llama, GPT-NeoX);
            ``"interleaved"``: 2p with 2p + 1, written back in place (GPT-J);
            ``"interleaved-to-half"``: the same pairs, written back as halves (DeepSeek);
            ``"half-truncated"``: pairs as "half", turning the other way, P / 2 frequencies from 1
            to 1 / theta evenly spaced in the exponent, the other pairs not at all (modded-nanogpt).
            The first three take (a, b) to (a cos − b sin, b cos + a sin).
        ``rotary_dim``
            only the first channels are rotated, as if they were the whole head; default all.
        ``scaling``
            a table in Hugging Face's spelling: ``rope_type`` of ``linear``, ``dynamic``, ``yarn``,
            ``llama3`` or ``longrope`` with that rule's keys. Every rule but linear reads
            ``original_max_position_embeddings``; dynamic and longrope depend on the largest
            position of this call, and on no other call.
        ``layers``, ``layer_type``
            one table of the options above for each type of layer (None: no rotation), and the type
            of this layer; the other options are then not given.

        Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753),
        transformers ``modeling_rope_utils``.
        """


class RotaryModule(Protocol):
    """Rotary embedding as the module that a model holds."""

    def rotary_module(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """A module with ``forward(x, positions) -> rotated x``; options as in :class:`Rotary`.

        The suite casts it (``module.to(torch.bfloat16)``) and constructs it on the meta device; in
        that case it calls ``module.to_empty(device=...)`` and then ``module.reset_parameters()``,
        the two steps of torch's own sharded training. Tables survive both.
        """


class CachedAttention(Protocol):
    """One layer's self-attention with rotary embedding and a key/value cache."""

    def cached_attention(
        self,
        *,
        rotary: Mapping[str, Any],
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """A new, empty cache as a callable ``step(q, k, v, key_valid=None) -> out``.

        Each step takes the next T tokens, not yet rotated: ``q`` [batch, q_heads, T, head_dim],
        ``k`` and ``v`` [batch, kv_heads, T, ...], and returns [batch, q_heads, T, value_dim].
        ``key_valid`` bool [batch, T] is False for padding tokens, whose output is unspecified.

        A token's position is the number of real tokens before it in its row, whatever the cache
        has evicted. Attention is causal; ``rotary`` are the options of :class:`Rotary`, ``window``,
        ``scale`` and ``sinks`` those of :class:`Attention`. With a YaRN ``mscale_all_dim`` the
        score scale is multiplied by ``(0.1 · mscale_all_dim · ln factor + 1)²`` (DeepSeek). Scaling
        rules that depend on the length of a call (dynamic, longrope) are not asked for: keys that
        are in the cache already have been rotated by another table.
        """


class LoadedGPT(Protocol):
    """What :meth:`CheckpointReader.load` gives: the function of a checkpoint, on batches.

    ``state`` and ``save`` may be missing; the requirements about them are then declined.
    """

    def features(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        document_start: int | None = None,
        window_blocks: int | None = None,
    ) -> Tensor:
        """The residual stream after the last norm, [batch, tokens, model_dim].

        In the dtype that the model computes in.

        ``ids`` int64 [batch, tokens], of any length. Attention is causal.

        ``valid`` bool [batch, tokens]
            False for padding, on either side, which no token sees; the outputs at padding are
            unspecified.
        ``document_start``
            the token that starts a new document; tokens see their own document only.
        ``window_blocks``
            the training scripts' window in blocks of 128 tokens; comes with ``document_start``.

        An id without an embedding row raises an error. Nothing depends on earlier calls.
        """

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits after the soft cap, [batch, tokens, rows of the LM head]; options as above.

        In float32; in float64 where the model computes in that.
        """

    def state(self) -> Mapping[str, Tensor]:
        """The tensors of the checkpoint, in its own format, with the stored values and dtypes.

        Names are bare (no ``_orig_mod.``, ``module.``). With a ``dtype`` they are in that dtype.
        """

    def save(self, path: str) -> None:
        """Write a checkpoint in the format it came from; the old file stays until that is whole."""


class CheckpointReader(Protocol):
    """What :meth:`GPTCheckpoint.gpt_checkpoint` gives: one checkpoint, opened."""

    def inspect(self) -> Mapping[str, Any]:
        """What the checkpoint holds, from the names and shapes of its tensors alone.

        ``checkpoint_format`` (``"small"`` or ``"medium"``), ``vocab_size`` (rows of the embeddings),
        ``padded_vocab_size`` (rows of the LM head), ``model_dim``, ``num_layers``, ``num_heads``,
        ``head_dim``, ``scalars_size`` (stored scalars) and ``scalars_padding`` (those that mean
        nothing). Other entries are ignored.
        """

    def load(self) -> LoadedGPT:
        """The model. It does not change when the file or the dictionary changes afterwards."""


class GPTCheckpoint(Protocol):
    """Reading checkpoints of the small and the medium GPT training scripts."""

    def gpt_checkpoint(
        self,
        source: str | Mapping[str, Any],
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> CheckpointReader:
        """One checkpoint, opened: ``inspect()`` says what it holds, ``load()`` gives its model.

        ``source`` is the path of a file of ``torch.save`` (a training dictionary with an entry
        ``model``, or a bare state dictionary) or of safetensors; or such a dictionary in memory.
        Parts of names that torch.compile, DistributedDataParallel and Lightning add (``_orig_mod.``
        and ``module.`` at any depth, ``model.`` in front) are taken off; the order of names is free.

        ``head_dim``
            width of the heads, for shapes that do not tell it. Default: 128, as both scripts have;
            18 heads of 64 for 24 blocks of width 1152, 20 of 64 for 36 blocks of width 1280. For
            any other medium checkpoint that has not 16 blocks the width has to be given.
        ``dtype``
            to hold the weights and compute in. Default: weights as they are stored, bit for bit,
            and float32 arithmetic.
        ``device``
            of the model.

        The model computes what was trained. Both: RMS norm without weight, half-truncated rotary
        embedding of base 1024 on normed queries and keys, scores times 0.12, values ``a·v + b·ve``
        in the first and last three blocks and ``a·v`` in the others, squared relu, no attention in
        the eighth block, ``x = c·x + d·x0`` at the start of each block. Small: attention reads the
        normed stream; the second half of the blocks adds the outputs of the first, latest first,
        times ``scalars[0]``, ``scalars[1]`` …; logits ``30·sigmoid(z / (7.5·√model_dim))``. Medium:
        attention reads the stream itself; values are normed; blocks 9, 10 and 11 add the outputs of
        blocks 6, 4 and 2 times the scalar of the *source*; logits ``15·z / √(z² + 225)``. Scalars
        are skip weights [L], pairs (c, d) [L, 2], pairs (a, b) [L, 2], and padding.

        A checkpoint that is not whole and consistent raises an exception, here or in ``inspect`` or
        ``load``, that names the file and the tensor: nothing is loaded in part, nothing is written,
        and no pickle is executed. Optimizer state that rides along is ignored.

        Sources: ``train_gpt_small.py`` and ``train_gpt_medium.py`` of modded-ipagpt-training, after
        KellerJordan/modded-nanogpt.
        """


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


class LaidOut(Protocol):
    """What :meth:`FlatLayout.flat_layout` gives. Positions are counted in elements.

    ``rank`` is a data-parallel rank, ``tensor_rank`` a tensor-parallel one. ``range_of_parameter``,
    ``cut``, ``join`` and ``reshard`` may be missing; the requirements about them are then declined.
    """

    @property
    def shard_size(self) -> int:
        """Elements of every rank's shard, padding included."""

    def table(self) -> Mapping[str, tuple[int, int]]:
        """Where each parameter begins and ends in the buffer, in the order of the buffer."""

    def shard_pad(self, rank: int) -> int:
        """Elements of padding at the end of a rank's shard."""

    def range_in_shard(self, name: str, rank: int) -> tuple[int, int]:
        """Where a parameter begins and ends in a rank's shard; alike where it is not there."""

    def range_of_parameter(self, name: str, rank: int) -> tuple[int, int]:
        """Which elements of a parameter, in C order, are in a rank's shard."""

    def cut(self, values: Mapping[str, Tensor], rank: int, tensor_rank: int = 0) -> Tensor:
        """A rank's shard [shard_size] of whole parameters, in their dtype; padding is zero."""

    def join(self, shards: Mapping[tuple[int, int], Tensor]) -> Mapping[str, Tensor]:
        """Whole parameters of the shards of all ranks, which are given by (rank, tensor_rank)."""

    def reshard(
        self, shards: Mapping[tuple[int, int], Tensor], to: LaidOut
    ) -> Mapping[tuple[int, int], Tensor]:
        """The shards of another layout of the same parameters, from those of this one."""


class FlatLayout(Protocol):
    """Where the elements of parameters lie in flat shards: arithmetic, without ranks or weights."""

    def flat_layout(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        *,
        ranks: int = 1,
        tensor_ranks: int = 1,
        tensor_dims: Mapping[str, int] | None = None,
        weight_decay: Mapping[str, bool] | None = None,
        sequence_parallel: Sequence[str] = (),
    ) -> LaidOut:
        """The layout of parameters, names and whole shapes, over ``ranks`` shards.

        The buffer holds the parameters one behind the other, flattened in C order, without gaps, and
        padding at its end, to a multiple of 32 elements a rank: shards of one size, of which rank r
        has elements ``r * shard_size`` to ``(r + 1) * shard_size``. Padding can fill several shards.

        ``tensor_dims``: the axis along which each of ``tensor_ranks`` has an even part of a
        parameter; others are whole on all of them. Each tensor-parallel rank has a buffer of its
        own, with its parts.

        Parameters are in the order of the buffer, unless ``weight_decay`` is given (for each of
        them): then they are sorted, those that are alike in the order given, by ``(decays, decays ==
        split, decays != sequence parallel)``, False before True, where a parameter is split if it
        is one of ``tensor_dims``, and sequence parallel if it is one of ``sequence_parallel`` and
        is not split.

        What ``cut``, ``join`` and ``reshard`` give shares no memory with what they are given.

        Raises an exception that names it for an axis that ``tensor_ranks`` do not divide, a number
        of ranks below 1, a rank beyond the last, values that are missing, unknown or of another
        shape, even with as many elements, and shards that are missing or of another length.

        Source: ServiceNow/Fast-LLM, ``engine/multi_stage/fsdp.py``.
        """


class ShardedModel(Protocol):
    """What :meth:`FlatShards.flat_shards` gives: a model whose parameters are sharded over ranks.

    Every rank of the group makes the same calls. Names are those of ``nn.Sequential(*modules)``; a
    tied parameter has the first. Methods from :meth:`clip_gradients` on may be missing; the
    requirements about them are then declined.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last module, for this rank's ``x``; whatever that needs is restored."""

    def full_parameters(self) -> Mapping[str, Tensor]:
        """Every parameter, whole, in the precision that it is trained in, the same on every rank.

        They are those of now, whatever buffers hold; and copies.
        """

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter from whole tensors.

        Raises an exception that names it for one that is missing, unknown or of another shape, even
        with as many elements, and for values that are not finite; the model is then as it was.
        """

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a scalar to this rank's; with ``last``, gradients are complete then.

        Complete gradients are the mean over the ranks of what each of them added since the last
        step, any number of times, complete before or not.
        """

    def full_gradients(self) -> Mapping[str, Tensor]:
        """The complete gradient of every parameter that trains, whole; zeros where none came."""

    def step(self) -> None:
        """Let the optimizer update the parameters, and forget the gradients."""

    def clip_gradients(self, max_norm: float) -> float:
        """Scale complete gradients to a norm of at most ``max_norm``; gives the norm before.

        The norm is that of all of them together, as in ``torch.nn.utils.clip_grad_norm_``.
        """

    def save(self, directory: str) -> None:
        """Write parameters and the state of the optimizer.

        What ``directory`` held before can be loaded until the new checkpoint can, whenever the
        process ends.
        """

    def load(self, directory: str) -> None:
        """Read what :meth:`save` wrote, on any number of ranks, with other parameters frozen.

        Gradients are forgotten. The optimizer's moments of a parameter that was frozen are zero; a
        model without an optimizer takes the parameters alone. Raises an exception, on every rank,
        that names file and parameter for anything missing, unknown, truncated or of another shape;
        the model is then as it was, or refuses to be used.
        """

    def restore(self) -> None:
        """Gather all parameters, where that has not been done."""

    def invalidate(self) -> None:
        """Say that what was gathered is stale."""

    def parameter(self, name: str) -> Tensor:
        """The parameter that the module computes with, whole. It is the current one, or an error."""

    def buffers(self) -> Sequence[Tensor]:
        """What gathered parameters are views of; whoever fills it with NaN has lost nothing."""

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """The output of one module; raises an exception unless it is restored."""

    def restore_stage(self, index: int) -> None:
        """Gather the parameters of one module."""

    def get_shard(self, name: str) -> Tensor:
        """This rank's flat part of the model, itself: ``"weights"``, ``"grads"``, and what it names.

        Of each module in turn: what trains, then what is frozen; of frozen parameters weights only.
        KeyError for a name that there is not, RuntimeError or AssertionError before it is there.
        """

    def split_shard(self, name: str) -> Mapping[str, Tensor]:
        """What this rank's flat part holds of each parameter, in the order in which it does: views."""


class FlatShards(Protocol):
    """A model sharded over data-parallel ranks: parameters, gradients, optimizer, checkpoints."""

    def flat_shards(
        self,
        modules: Sequence[nn.Module],
        *,
        optimizer: Mapping[str, Any] | None = None,
        training: bool = True,
        compute_dtype: torch.dtype | None = None,
        buffers: int | None = None,
        allow_no_grad: bool = True,
    ) -> ShardedModel:
        """The sharded model. Called on every rank of torch.distributed's default group.

        One rank calls it without a group. ``modules`` are applied one after another; each is a stage
        with parameters of its own, save those that are tied (the same object in several places). The
        values that they hold, the same on every rank, are the initial ones. Parameters that do not
        require a gradient are frozen. The modules are the model's from then on.

        ``optimizer``: ``{"name": "sgd", "lr", "momentum", "weight_decay"}`` or ``{"name": "adamw",
        "lr", "weight_decay"}``, as in ``torch.optim``; parameters of one axis do not decay. Without
        one there is no ``step``. ``training``: without, there are no gradients. ``compute_dtype`` is
        that of forward and backward pass (default: float32); parameters, gradients and state are
        float32. ``buffers``: how many buffers the modules share in turn, for gathered parameters;
        default: each its own.
        ``allow_no_grad``: whether a parameter that trains may end without a gradient, which is then
        zero; otherwise completing gradients raises an exception, on every rank, that names it.

        Sources: ServiceNow/Fast-LLM, ``engine/multi_stage``; ZeRO (arXiv 1910.02054).
        """


class MoERouter(Protocol):
    """Which experts a token goes to, and with what weights."""

    def moe_router(
        self,
        logits: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
        return_balancing_loss: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Weights [tokens, top_k] and experts int64 [tokens, top_k], of ``logits`` [tokens, experts].

        The scores are the softmax over all experts, or the sigmoid, in float32 at least; a token
        goes to the ``top_k`` experts with the largest scores, each once, in any order. Its weights
        are their scores. Of experts with equal scores those with the lowest index are chosen.
        Weights are in float32 or in the dtype of ``logits``; gradients reach ``logits`` through them.

        ``score``
            ``"softmax"`` or ``"sigmoid"``.
        ``normalize``
            a token's weights are divided by their sum (``norm_topk_prob``).
        ``selection_bias`` [experts]
            added to the scores to choose, and not part of the weights (DeepSeek-V3).
        ``groups`` (number, kept)
            experts are in so many groups of neighbours; experts of other groups than the ``kept``
            best are not chosen, whatever the sign of scores. A group is as good as its best expert;
            with a ``selection_bias`` as the sum of its best two, with the bias.
        ``scaling_factor``
            on the weights, at the end.
        ``return_balancing_loss``
            also return the load-balancing loss, a scalar: experts · Σₑ fₑ Pₑ, where fₑ is how many
            of its ``top_k`` slots a token gives to expert e and Pₑ the softmax of e over all experts,
            both averaged over the tokens. Gradients reach ``logits`` through P.

        NaN among a token's logits raises an exception or gives NaN among its weights. An exception
        for a ``top_k`` that is below 1 or above the number of experts that may be chosen, groups that
        do not divide the experts, a bias of another length, and a ``score`` that there is not.

        Sources: Switch Transformer (arXiv 2101.03961), Mixtral (arXiv 2401.04088), Qwen3-MoE,
        DeepSeek-V3 (arXiv 2412.19437, and ``inference/model.py`` for the groups).
        """


class Experts(Protocol):
    """The experts of a mixture, on tokens that have been routed."""

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        layout: str = "concatenated",
        transposed: bool = False,
        activation: str = "silu",
        weight_on_input: bool = False,
    ) -> Tensor:
        """Σ over a token's slots of weight · down(activation(gate x) ⊙ up x), [tokens, hidden].

        ``hidden`` [tokens, hidden], ``indices`` int64 [tokens, slots], ``weights`` [tokens, slots]
        in the dtype of ``hidden`` or float32, ``gate_up_proj`` [experts, 2 · intermediate, hidden],
        ``down_proj`` [experts, hidden, intermediate]; the result is in the dtype of ``hidden``. There
        may be no tokens; an expert may have none, all, or several slots of a token, which all count.

        An index that is the number of experts is a slot without an expert (of another rank, or
        padding). It adds nothing, whatever its weight, and whatever its token holds, NaN included:
        not to outputs, nor to any gradient. A token with no other slots gives zeros.

        ``layout``
            of the rows of ``gate_up_proj``: ``"concatenated"`` has those of the gate and then those of
            up (transformers); ``"interleaved"`` g₀, u₀, g₁, u₁ … (gpt-oss).
        ``transposed``
            the last two axes of both weights are exchanged: [experts, hidden, 2 · intermediate] and
            [experts, intermediate, hidden] (gpt-oss, Llama 4). Shapes do not tell which it is.
        ``activation``
            ``"silu"``, or ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"relu"``.
        ``weight_on_input``
            Σ down(activation(gate (weight · x)) ⊙ up (weight · x)), as in Llama 4.

        Gradients reach ``hidden``, ``weights`` and both projections; that of an expert without tokens
        is zero. An exception for an index below 0 or beyond the number of experts, and for shapes
        that do not belong together.

        Sources: GLU variants (arXiv 2002.05202); Mixtral (arXiv 2401.04088); transformers
        ``integrations/moe.py``.
        """


class MoEBlock(Protocol):
    """A whole mixture-of-experts block: router, experts, and experts that every token goes to."""

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
        shared: tuple[Tensor, Tensor] | None = None,
        shared_gate: Tensor | None = None,
        return_logits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output [batch, tokens, hidden] of ``hidden`` [batch, tokens, hidden], in its dtype.

        ``router`` is [experts, hidden]: the logits are ``hidden @ router.T``. ``gate_up_proj`` and
        ``down_proj`` are those of :class:`Experts`, concatenated, with SiLU. Tokens do not depend on
        each other, and none is dropped.

        ``top_k``, ``score``, ``normalize``, ``selection_bias``, ``groups``, ``scaling_factor``
            of the routing, as in :class:`MoERouter`.
        ``shared`` (gate_up_proj [2 · width, hidden], down_proj [hidden, width])
            a further expert that every token goes to with weight 1; its width may differ.
        ``shared_gate`` [1, hidden]
            the shared expert's output is multiplied by ``sigmoid(hidden @ shared_gate.T)``
            (Qwen2-MoE).
        ``return_logits``
            return (output, logits [batch · tokens, experts]) as blocks of earlier transformers did; a
            decoder that unpacks two values takes a bare tensor of two rows apart without an error.

        Sources: transformers ``modeling_qwen3_moe``, ``modeling_mixtral``, ``modeling_qwen2_moe``.
        """


class ExpertParallelBlock(Protocol):
    """A mixture-of-experts block whose experts are dealt out to the ranks of a group."""

    def expert_parallel_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
    ) -> Tensor:
        """What :class:`MoEBlock` computes for ``top_k`` and ``normalize``, whole on every rank.

        Called on every rank of torch.distributed's default group; one rank calls it without a group.
        ``hidden`` and ``router`` are the same on all of them; ``gate_up_proj`` and ``down_proj`` are the
        experts of this rank, as many on each: rank r has those from ``r * len(down_proj)`` on.

        A backward pass is made on every rank, with the same gradient of the output. It gives each the
        complete gradients of ``hidden`` and ``router``, the same bits, and those of its own experts. A
        rank whose experts have no token takes part in everything. Experts that do not add up to those
        of the router raise an exception on every rank.

        Source: transformers' expert parallelism (huggingface/transformers#48205).
        """


class SharedCoreLayer(Protocol):
    """What :meth:`SharedCore.shared_core` gives: a torch module.

    ``fold`` and ``count_parameters`` may be missing; the requirements about them are then declined.
    """

    core: Tensor
    """The core [d_out, d_in], a Parameter: the only one of all experts, whatever ``.to`` was called."""

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """Rows x [..., d_in] through one expert, [..., d_out], in the dtype of ``x``."""

    def reconstruct(self, expert: int) -> Tensor:
        """The weight [d_out, d_in] of one expert, as a linear layer has it. Differentiable."""

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same experts as a shared base and low-rank pairs: (base, A, B).

        ``base`` [d_out, d_in], ``A`` [experts, d_out, 2 · rank], ``B`` [experts, 2 · rank, d_in], with
        W_e = base + A_e B_e; computed in float32 at least, and in the dtype of the core. Folding
        again gives the same, and changes nothing.
        """

    def count_parameters(self) -> Mapping[str, Any]:
        """Exact counts of this layer, and the ratio.

        ``core``, ``wrapper_params_per_expert``, ``total_wrapper``, ``total``, ``original`` (integers)
        and ``compression_ratio`` (total / original), ``reduction_percentage``. Other entries are
        ignored.
        """


class SharedCore(Protocol):
    """One projection of all experts as a shared core between low-rank wrappers."""

    def shared_core(
        self,
        core: Tensor,
        u_in: Tensor,
        v_in: Tensor,
        u_out: Tensor,
        v_out: Tensor,
        *,
        bias: Tensor | None = None,
    ) -> SharedCoreLayer:
        """The layer W_e = (I + U_out,e V_out,eᵀ) C (I + U_in,e V_in,eᵀ), y = W_e x (+ bias_e).

        ``core`` is [d_out, d_in], ``u_in`` and ``v_in`` [experts, d_in, rank], ``u_out`` and ``v_out``
        [experts, d_out, rank], ``bias`` [experts, d_out]. The layer has values of its own.

        Gradients reach the core from every expert that is used, and wrappers of those alone. An
        exception for shapes that do not belong together, and for an expert that there is not.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/shared_core.py`` and ResearchSpec.
        """


class FittedCore(Protocol):
    """What :meth:`SharedCoreFit.shared_core_fit` gives; tensors in float32.

    ``history`` may be missing.
    """

    core: Tensor
    """[d_out, d_in]"""
    u_in: Tensor
    """[experts, d_in, rank]"""
    v_in: Tensor
    """[experts, d_in, rank]"""
    u_out: Tensor
    """[experts, d_out, rank]"""
    v_out: Tensor
    """[experts, d_out, rank]"""
    history: Sequence[float]
    """The loss before each step, and at the end."""


class SharedCoreFit(Protocol):
    """Fitting a shared core and low-rank wrappers to the weights of experts."""

    def shared_core_fit(
        self,
        experts: Tensor,
        *,
        rank: int,
        num_steps: int = 1000,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> FittedCore:
        """The factors whose reconstructions are close to ``experts`` [experts, d_out, d_in].

        Minimises Σ_e ‖W_e − Ŵ_e‖² from the mean of the experts, U = 0 and random V, in float32
        whatever the dtype of ``experts``. What it gives is never worse than that beginning, whatever
        the step size ``lr``; with ``num_steps`` 0 it is the mean. The same ``seed`` gives the same
        factors, and the global random state is left alone. ``rank`` is that of each wrapper.

        An exception for no experts, values that are not finite, a rank below 1 or above the smaller
        width, and a negative number of steps.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/zero_shot_init.py``.
        """


class SharedCoreBlock(Protocol):
    """A mixture-of-experts block whose experts are compressed."""

    def shared_core_block(
        self,
        router: Tensor,
        gate_proj: Mapping[str, Tensor],
        up_proj: Mapping[str, Tensor],
        down_proj: Mapping[str, Tensor],
        *,
        top_k: int,
        normalize: bool = False,
        return_logits: bool = False,
    ) -> nn.Module:
        """A module hidden [batch, tokens, hidden] → the same shape, or with the logits as well.

        Each projection is the factors of :class:`SharedCore`, by the names ``core``, ``u_in``,
        ``v_in``, ``u_out``, ``v_out``; that of gate and up takes ``hidden`` to ``intermediate``, that
        of down the other way. It computes what :class:`MoEBlock` does with the reconstructed
        experts for ``top_k`` and ``normalize``, and returns what that returns with or without
        ``return_logits``. Its parameters are ``router`` and the factors, each
        core once; the order and the names are free.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compressed_moe_model.py``.
        """


class Statistics(Protocol):
    """What :meth:`CompressionStatistics.compression_statistics` gives."""

    def aggregate(self) -> Mapping[str, Any]:
        """The fields of ``compression_statistics.yaml``: integers exact, ratios unrounded.

        ``num_entries``, ``num_layers_compressed`` (distinct layers), ``total_params_original``,
        ``total_params_compressed``, ``total_compression_ratio``, ``total_reduction_percent``,
        ``active_params_original``, ``active_params_compressed``, ``active_compression_ratio``,
        ``active_change_percent`` (negative for fewer), ``compute_ratio``,
        ``total_memory_original_gb``, ``total_memory_compressed_gb``, ``memory_saved_gb`` and
        ``per_layer_stats``: one mapping an entry, in the order given, with ``layer_idx``,
        ``projection``, ``num_experts``, ``num_active_experts``, ``d_in``, ``d_out``, ``rank``,
        ``original_total_params``, ``original_active_params``, ``compressed_total_params``,
        ``compressed_active_params``, ``core_params``, ``wrapper_params_per_expert``,
        ``total_compression_ratio``, ``total_reduction_percent``, ``active_compression_ratio``,
        ``active_increase_percent``. Other entries are ignored.
        """

    def save(self, directory: str) -> None:
        """Write ``compression_statistics.yaml``: the aggregate, readable by any YAML parser."""

    def contradictions(self, directory: str) -> Sequence[str]:
        """What of a ``compression_statistics.yaml`` its per-layer entries contradict, one line each.

        Everything is computed again from the shapes, ranks and numbers of experts. A line names the
        field. May be missing; the requirements about it are then declined.
        """


class CompressionStatistics(Protocol):
    """Exact counts of what compressing experts saves."""

    def compression_statistics(self, entries: Sequence[Mapping[str, Any]]) -> Statistics:
        """Statistics of compressed projections.

        An entry has ``layer_idx``, ``projection``, ``num_experts`` E, ``d_in``, ``d_out``, ``rank`` r
        and ``num_active_experts`` k. Of each: original total E·d_in·d_out and active k·d_in·d_out; the
        core d_in·d_out, counted once; wrappers of an expert 2·r·(d_in + d_out); compressed total core +
        E·wrappers and active core + k·wrappers. Aggregates are ratios of sums. ``compute_ratio`` counts
        multiplications for a token, Σ k·(core + wrappers) / Σ k·d_in·d_out: each of the k experts
        applies the core. Memory is 2 bytes a parameter, in units of 10⁹ bytes.

        An exception for sizes below 1, k above E, an entry given twice, and for no entries (here, in
        ``aggregate`` or in ``save``).

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compression_stats.py``. The figures printed
        in that repository's documents (0.19 for the shapes of Mixtral at rank 64) do not follow from
        its formula, which gives 0.1652.
        """


class LoadedCompressed(Protocol):
    """What :meth:`CompressedCheckpoint.compressed_checkpoint` gives: a language model.

    ``save`` and ``export`` may be missing; the requirements about them are then declined.
    """

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of ``ids`` int64 [batch, tokens], all of them real."""

    def parameters(self) -> Mapping[str, Tensor]:
        """Every parameter, itself: what changes it changes the model.

        Those that are not of experts have their names in the original model (``model.norm.weight``);
        the factors are ``layer_{i}.{projection}.{core,u_in,v_in,u_out,v_out}``, stacked over the
        experts as in :class:`SharedCore`.
        """

    def save(self, directory: str, *, format: str = "safetensors") -> None:
        """Write the model as it is now, complete, in the layout below; ``format`` may be ``"pt"``.

        What ``directory`` held before stays until the new checkpoint is whole.
        """

    def export(self, directory: str) -> None:
        """Write an ordinary Hugging Face checkpoint with reconstructed experts.

        It has the architecture and the names of the original, and its function is this model's.
        """


class CompressedCheckpoint(Protocol):
    """Checkpoints of models with shared-core experts: loading, saving, exporting."""

    def compressed_checkpoint(
        self,
        directory: str,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> LoadedCompressed:
        """The model of a folder. Nothing else is needed: no weights of the original, no network.

        The layout: ``config.json`` of the original (Qwen3-MoE or Mixtral); ``compression_config.json``
        ``{"rank", "projections", "num_experts", "model_name", "dtype"}``;
        ``compression_statistics.yaml``; ``compressed_metadata.json`` ``{"compressed_layer_indices",
        "num_compressed_layers", "total_layers"}``; for each layer that has experts
        ``layer_{i}/{gate,up,down}_proj.pt`` ``{"layer_idx", "projection", "core", "wrappers": [{"U_in",
        "V_in", "U_out", "V_out"}, …], "metadata"}`` with the metadata ``{"num_experts", "d_in",
        "d_out", "rank"}``, which are in ``{projection}_metadata.json`` as well; and
        ``non_moe_weights.pt``, every other weight by its name in the original. Or ``.safetensors`` in
        place of ``.pt``: then the tensors of a projection are ``core``, ``wrappers.{e}.U_in`` …, and
        its metadata are in the JSON file alone. Folders without ``compression_config.json``,
        ``compression_statistics.yaml`` or (with ``.pt``) the metadata's JSON files are read: ranks and
        numbers are those of the tensors.

        ``dtype``, ``device``
            of every weight and of the computation; default: the dtype of ``non_moe_weights``, the CPU.

        Anything that is missing, unknown, of another shape, not finite, or contradicts something else
        raises an exception, here, that names the file and what is wrong in it: no layer keeps other
        weights. No pickle is executed.

        Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/compressed_moe_model.py``.
        """


@dataclass(frozen=True)
class Contract:
    """A contract by name: the name of its method, and what the method takes."""

    name: str
    protocol: type

    @property
    def summary(self) -> str:
        """The first line of the Protocol's docstring."""
        return inspect.getdoc(self.protocol).splitlines()[0]

    @cached_property
    def positional(self) -> tuple[str, ...]:
        """Names of the positional arguments."""
        return tuple(
            name
            for name, parameter in self._parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
        )

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Every option with its default; ``inspect.Parameter.empty`` where it is always given."""
        return {
            name: parameter.default
            for name, parameter in self._parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(getattr(self.protocol, self.name)).parameters

    def signature_problem(self, method: Callable) -> str | None:
        """Why ``method`` cannot be called as this contract is, in one line; None if it can."""
        try:
            parameters = inspect.signature(method).parameters.values()
        except (TypeError, ValueError):
            return None  # a builtin: nothing to read
        expected = ", ".join((*self.positional, "*options"))
        takes = f"{self.name}{inspect.signature(method)}"
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if len(places) < len(self.positional) and not variadic:
            return f"{takes} takes too few positional arguments: expected {self.name}({expected})"
        named = [
            *places[len(self.positional) :],
            *(p for p in parameters if p.kind is p.KEYWORD_ONLY),
        ]
        options = self.defaults
        unknown = [p.name for p in named if p.default is p.empty and p.name not in options]
        if unknown:
            return (
                f"{takes} requires {', '.join(map(repr, unknown))}, which the contract does not "
                f"have: expected {self.name}({expected}) with options {', '.join(options)}"
            )
        return None


CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        Contract("attention", Attention),
        Contract("rotary", Rotary),
        Contract("rotary_module", RotaryModule),
        Contract("cached_attention", CachedAttention),
        Contract("gpt_checkpoint", GPTCheckpoint),
        Contract("parallel_linear", ParallelLinear),
        Contract("weight_loader", WeightLoader),
        Contract("causal_lm", CausalLM),
        Contract("flat_layout", FlatLayout),
        Contract("flat_shards", FlatShards),
        Contract("moe_router", MoERouter),
        Contract("experts", Experts),
        Contract("moe_block", MoEBlock),
        Contract("expert_parallel_block", ExpertParallelBlock),
        Contract("shared_core", SharedCore),
        Contract("shared_core_fit", SharedCoreFit),
        Contract("shared_core_block", SharedCoreBlock),
        Contract("compression_statistics", CompressionStatistics),
        Contract("compressed_checkpoint", CompressedCheckpoint),
    )
}
