"""Defects of the function of the small and the medium GPT: checkpoints load, and compute otherwise.

Each class is the batched model with one step replaced. Most are wrong for both formats; the
docstring says so where only one is concerned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.known_bugs import known_bug
from reference_impl.gpt import CheckpointReader, GPTBatched, layers, masks
from reference_impl.gpt.batched import as_parameter
from reference_impl.rotary import Rotary, default_frequencies

SMALL = "gpt_checkpoint.function.small"
MEDIUM = "gpt_checkpoint.function.medium"
SKIPS = "gpt_checkpoint.skips.weights"
NORMED = "gpt_checkpoint.heads.normed"
CAP = "gpt_checkpoint.logits.soft-cap"
DOCUMENTS = "gpt_checkpoint.documents.separate"
WINDOW = "gpt_checkpoint.window.of-training"


def planted(id: str, *, breaks: str) -> Callable[[type[GPTBatched]], type[GPTBatched]]:
    """Register a reader of good checkpoints that loads them into the decorated class."""

    def register(model: type[GPTBatched]) -> type[GPTBatched]:
        class Reader(CheckpointReader):
            model_class = model

        class Adapter:
            __doc__ = model.__doc__

            def gpt_checkpoint(self, source, *, head_dim=None, dtype=None, device="cpu"):
                return Reader(source, head_dim=head_dim, dtype=dtype, device=device)

        Adapter.__name__ = Adapter.__qualname__ = model.__name__
        known_bug(id, contract="gpt_checkpoint", breaks=breaks)(Adapter)
        return model

    return register


# The output projection


def transpose_output(blocks) -> None:
    """Transpose every output projection in place."""
    for block in blocks:
        if block.o_w is not None:
            block.o_w = as_parameter(block.o_w.T.contiguous())


@planted("gpt-output-projection-transposed", breaks=SMALL)
class SmallOutputTransposed(GPTBatched):
    """Small: c_proj.weight is transposed on its way into the slot that F.linear reads."""

    def __init__(self, config, *, blocks, **parts):
        if config.format == "small":
            transpose_output(blocks)
        super().__init__(config, blocks=blocks, **parts)


@planted("gpt-output-projection-transposed.medium", breaks=MEDIUM)
class MediumOutputTransposed(GPTBatched):
    """Medium: qkvo_w[3] is applied as y @ W, after its shape [heads, width], and not y @ W.T."""

    def __init__(self, config, *, blocks, **parts):
        if config.format == "medium":
            transpose_output(blocks)
        super().__init__(config, blocks=blocks, **parts)


@planted("gpt-projections-left-at-zero", breaks="gpt_checkpoint.load.every-tensor-counts")
class OutputLeftAtZero(GPTBatched):
    """The attention's output projections are never loaded and keep their initial zeros."""

    def __init__(self, config, *, blocks, **parts):
        for block in blocks:
            if block.o_w is not None:
                block.o_w = as_parameter(torch.zeros_like(block.o_w))
        super().__init__(config, blocks=blocks, **parts)


@planted("gpt-projections-left-at-zero.mlp", breaks="gpt_checkpoint.load.every-tensor-counts")
class MLPLeftAtZero(GPTBatched):
    """The MLP's second matrices are never loaded and keep their initial zeros."""

    def __init__(self, config, *, blocks, **parts):
        for block in blocks:
            block.proj_w = as_parameter(torch.zeros_like(block.proj_w))
        super().__init__(config, blocks=blocks, **parts)


@planted("gpt-projections-left-at-zero.scalars", breaks=SKIPS)
class ScalarsLeftAtFirst(GPTBatched):
    """The scalars are never loaded and keep the values that training starts from."""

    def __init__(self, config, *, scalars, **parts):
        count = config.num_layers
        first = torch.tensor([1.0] * count + [1.0, 0.0] * count + [0.5, 0.5] * count)
        scalars = torch.cat([first.to(scalars), scalars[len(first) :]])
        super().__init__(config, scalars=scalars, **parts)


# Norms


@planted("gpt-attention-input-norm", breaks=SMALL)
class SmallWithoutInputNorm(GPTBatched):
    """Small: attention reads the stream itself, as in the medium model."""

    def attention_input(self, x_BTC):
        return x_BTC


@planted("gpt-value-norm", breaks=SMALL)
class SmallWithValueNorm(GPTBatched):
    """Small: values are normed a head, as in the medium model."""

    def values(self, v_BHTD):
        return layers.norm(v_BHTD)


@planted("gpt-value-norm.missing", breaks=MEDIUM)
class MediumWithoutValueNorm(GPTBatched):
    """Medium: values are not normed, as in the small model."""

    def values(self, v_BHTD):
        return v_BHTD


def norm_of_all_heads(x_BHTD: Tensor) -> Tensor:
    """The norm over the channels of all heads at once."""
    normed_BTC = layers.norm(layers.join_heads(x_BHTD))
    return layers.split_heads(normed_BTC, x_BHTD.shape[1])


@planted("gpt-norm-over-all-heads", breaks=NORMED)
class NormOverAllHeads(GPTBatched):
    """Queries and keys are normed before they are split into heads."""

    def norm_and_rotate(self, x_BHTD):
        return self.rotate(norm_of_all_heads(x_BHTD))


@planted("gpt-norm-over-all-heads.values", breaks=NORMED)
class ValueNormOverAllHeads(GPTBatched):
    """Medium: values are normed before they are split into heads."""

    def values(self, v_BHTD):
        return norm_of_all_heads(v_BHTD) if self.config.format == "medium" else v_BHTD


@planted("gpt-norm-subtracts-mean", breaks=SMALL)
class LastNormSubtractsMean(GPTBatched):
    """The last norm is a layer norm: it subtracts the mean."""

    def features(self, ids_BT, **options):
        x = super().features(ids_BT, **options)
        return layers.norm(x - x.mean(-1, keepdim=True))


@planted("gpt-norm-subtracts-mean.embedding", breaks=SMALL)
class EmbeddingNormSubtractsMean(GPTBatched):
    """The norm of the embeddings is a layer norm."""

    def embed_tokens(self, ids_BT):
        x = self.weight(F.embedding(ids_BT, self.embed))
        return layers.norm(x - x.mean(-1, keepdim=True))


@planted("gpt-norm-subtracts-mean.heads", breaks=MEDIUM)
class HeadNormSubtractsMean(GPTBatched):
    """The norm of queries and keys is a layer norm."""

    def norm_and_rotate(self, x_BHTD):
        return super().norm_and_rotate(x_BHTD - x_BHTD.mean(-1, keepdim=True))


@planted("gpt-norm-with-weight", breaks="gpt_checkpoint.load.same-under-any-seed")
class LastNormHasWeight(GPTBatched):
    """The last norm has a weight, which no checkpoint holds: it stays as it was drawn."""

    def features(self, ids_BT, **options):
        if not hasattr(self, "norm_w"):
            self.norm_w = torch.randn(self.config.model_dim).to(ids_BT.device, self.compute_dtype)
        return super().features(ids_BT, **options) * self.norm_w


# Skip connections and scalars


@planted("gpt-skips-of-other-format", breaks=SMALL)
class SmallWithMediumSkips(GPTBatched):
    """Small: blocks 9, 10, 11 add the outputs of blocks 6, 4, 2, as in the medium model."""

    def skip_of(self, layer):
        return layers.skip_of(layer, self.config.num_layers, "medium")


@planted("gpt-skips-of-other-format.small", breaks=MEDIUM)
class MediumWithSmallSkips(GPTBatched):
    """Medium: the second half of the blocks adds the outputs of the first, as in the small model."""

    def skip_of(self, layer):
        return layers.skip_of(layer, self.config.num_layers, "small")


@planted("gpt-skip-stack-as-queue", breaks=SMALL)
class SkipsAsQueue(GPTBatched):
    """Small: the second half takes the outputs of the first with the earliest first."""

    def skip_of(self, layer):
        skip = super().skip_of(layer)
        return (skip[1], skip[1]) if skip and self.config.format == "small" else skip


@planted("gpt-skip-weight-index", breaks=SKIPS)
class SkipWeightOfBlock(GPTBatched):
    """Small: block i reads skip weight i, and not i minus half of the blocks."""

    def skip_of(self, layer):
        skip = super().skip_of(layer)
        return (skip[0], layer) if skip and self.config.format == "small" else skip


@planted("gpt-skip-weight-index.target", breaks=SKIPS)
class SkipWeightOfTarget(GPTBatched):
    """Medium: a skip connection has the scalar of the block that it ends in, not of its source."""

    def skip_of(self, layer):
        skip = super().skip_of(layer)
        return (skip[0], layer) if skip and self.config.format == "medium" else skip


def halves(pairs_L2: Tensor) -> Tensor:
    """The same numbers, with all the first of a pair in the first half."""
    return pairs_L2.reshape(2, -1).T


@planted("gpt-lambdas-by-stride", breaks=SMALL)
class BlockLambdasByStride(GPTBatched):
    """Block lambdas are read as [L:2L] and [2L:3L], and not as pairs."""

    def split_scalars(self):
        skips, blocks, attention = super().split_scalars()
        return skips, halves(blocks), attention


@planted("gpt-lambdas-by-stride.attention", breaks=MEDIUM)
class AttentionLambdasByStride(GPTBatched):
    """Attention lambdas are read as [3L:4L] and [4L:5L], and not as pairs."""

    def split_scalars(self):
        skips, blocks, attention = super().split_scalars()
        return skips, blocks, halves(attention)


# Value embeddings, and the block without attention


@planted("gpt-value-embedding-layers", breaks=SMALL)
class LastValueEmbeddingsReversed(GPTBatched):
    """The last three blocks take the value embeddings in reverse, as a U-net would."""

    def value_embedding(self, layer, ids_BT):
        from_end = self.config.num_layers - 1 - layer
        return super().value_embedding(from_end if from_end < 3 else layer, ids_BT)


@planted("gpt-value-embedding-layers.shifted", breaks=MEDIUM)
class FirstValueEmbeddingsShifted(GPTBatched):
    """The first value embeddings go to blocks 1, 2, 3 instead of 0, 1, 2."""

    def value_embedding(self, layer, ids_BT):
        if layer == 0:
            return None
        return super().value_embedding(layer - 1 if layer <= 3 else layer, ids_BT)


@planted("gpt-eighth-block-attention", breaks="gpt_checkpoint.blocks.eighth-without-attention")
class EighthBlockAttends(GPTBatched):
    """The eighth block has attention too, with the weights of the block before it."""

    def has_attention(self, layer):
        return True

    def attention(self, layer, *inputs):
        return super().attention(layer - (layer == 7), *inputs)


# Rotary embedding


class OtherRotary(GPTBatched):
    """The model with another rotary embedding."""

    _Rotary: type[Rotary] = Rotary
    theta = layers.ROTARY_BASE

    def rotate(self, x_BHTD):
        positions_1T = torch.arange(x_BHTD.shape[2], device=x_BHTD.device)[None]
        return self._Rotary().rotary(
            x_BHTD, positions_1T, theta=self.theta, layout="half-truncated"
        )


@planted("gpt-rotary-pairs", breaks=SMALL)
class RotaryInterleaved(OtherRotary):
    """Channels 2p and 2p + 1 are turned as a pair, and not p and p + D/2."""

    class _Rotary(Rotary):
        def rotate(self, x_BHTR, cos, sin, layout):
            return super().rotate(x_BHTR, cos, -sin, "interleaved")


@planted("gpt-rotary-direction", breaks=SMALL)
class RotaryBackwards(OtherRotary):
    """Pairs are turned the other way round, as most models do."""

    class _Rotary(Rotary):
        def rotate(self, x_BHTR, cos, sin, layout):
            return super().rotate(x_BHTR, cos, -sin, layout)


@planted("gpt-rotary-frequencies", breaks=MEDIUM)
class RotaryWithoutZeros(OtherRotary):
    """Every pair turns: the half of the frequencies that is zero is missing."""

    class _Rotary(Rotary):
        def frequencies(self, rotary_dim, theta, layout, scaling, length):
            return default_frequencies(rotary_dim, theta), 1.0


@planted("gpt-rotary-frequencies.exclusive-end", breaks=SMALL)
class RotaryExclusiveEnd(OtherRotary):
    """The exponents of the frequencies stop short of 1, as those of the usual formula do."""

    class _Rotary(Rotary):
        def frequencies(self, rotary_dim, theta, layout, scaling, length):
            turning = default_frequencies(rotary_dim // 2, theta)
            return torch.cat([turning, torch.zeros_like(turning)]), 1.0


@planted("gpt-rotary-frequencies.base", breaks=MEDIUM)
class RotaryBase10000(OtherRotary):
    """The base is 10000, and not 1024."""

    theta = 10000.0


# Attention and MLP


@planted("gpt-attention-scale", breaks=SMALL)
class UsualAttentionScale(GPTBatched):
    """Scores are divided by the square root of the head width, and not multiplied by 0.12."""

    def attend(self, q, k, v, visible_B1TT):
        factor = q.shape[-1] ** -0.5 / layers.ATTENTION_SCALE
        return super().attend(q * factor, k, v, visible_B1TT)


@planted("gpt-qkv-chunked-by-head", breaks=SMALL)
class FusedRowsByHead(GPTBatched):
    """The fused weight is taken for query, key and value of each head in turn."""

    def queries_keys_values(self, x_BTC, qkv_w):
        projected = F.linear(x_BTC, qkv_w.flatten(0, 1))
        return layers.split_heads(projected, self.config.num_heads).chunk(3, dim=-1)


@planted("gpt-activation", breaks=SMALL)
class PlainRelu(GPTBatched):
    """The MLP has a relu that is not squared."""

    def activation(self, x):
        return F.relu(x)


@planted("gpt-activation.gelu", breaks=MEDIUM)
class Gelu(GPTBatched):
    """The MLP has a GELU."""

    def activation(self, x):
        return F.gelu(x)


@planted("gpt-soft-cap-of-other-format", breaks=CAP)
class SoftCapOfOtherFormat(GPTBatched):
    """The logits of the small model are capped as those of the medium one, and the reverse."""

    def soft_cap(self, logits_BTV):
        other = "medium" if self.config.format == "small" else "small"
        return layers.soft_cap(logits_BTV, other, self.config.model_dim)


@planted("gpt-soft-cap-of-other-format.width", breaks=SMALL)
class SoftCapWithoutWidth(GPTBatched):
    """Small: logits are divided by 7.5 alone, and not by 7.5 times the root of the width."""

    def soft_cap(self, logits_BTV):
        return layers.soft_cap(logits_BTV, self.config.format, 1)


@planted("gpt-soft-cap-of-other-format.tanh", breaks=CAP)
class SoftCapByTanh(GPTBatched):
    """Small: the cap is a tanh within 15, which is lower by 15: no loss shows it, logits do."""

    def soft_cap(self, logits_BTV):
        return super().soft_cap(logits_BTV) - 15 * (self.config.format == "small")


# Masks and batches


@planted("gpt-mask-next-token", breaks="gpt_checkpoint.causal.later-tokens")
class NextTokenSeen(GPTBatched):
    """The causal mask is off by one: a token sees the one behind it."""

    def visible(self, ids_BT, *options):
        following = torch.ones(len(ids_BT[0]) - 1, dtype=torch.bool, device=ids_BT.device).diag(1)
        return [mask | following for mask in super().visible(ids_BT, *options)]


@planted("gpt-document-mask", breaks=DOCUMENTS)
class DocumentsIgnored(GPTBatched):
    """Tokens see earlier documents although they are asked not to."""

    def visible(self, ids_BT, valid, document_start, window_blocks):
        never = None if document_start is None else -1
        return super().visible(ids_BT, valid, never, window_blocks)


@planted("gpt-document-mask.constant", breaks=DOCUMENTS)
class DocumentTokenConstant(GPTBatched):
    """A document starts at GPT-2's token 50256, whatever token is given."""

    def visible(self, ids_BT, valid, document_start, window_blocks):
        constant = None if document_start is None else 50256
        return super().visible(ids_BT, valid, constant, window_blocks)


@planted("gpt-document-mask.after", breaks=DOCUMENTS)
class DocumentStartsAfterToken(GPTBatched):
    """The token that starts a document is counted to the document before it."""

    def visible(self, ids_BT, *options):
        return super().visible(ids_BT.roll(1, dims=-1), *options)


@planted("gpt-window-of-blocks", breaks=WINDOW)
class WindowWithoutOwnBlock(GPTBatched):
    """The window is one block longer than asked: the token's own block is not counted."""

    def visible(self, ids_BT, valid, document_start, window_blocks):
        more = None if window_blocks is None else window_blocks + 1
        return super().visible(ids_BT, valid, document_start, more)


@planted("gpt-window-of-blocks.all-long", breaks=WINDOW)
class EveryWindowLong(GPTBatched):
    """Every block has the long window."""

    def visible(self, *options):
        return super().visible(*options)[:1] * self.config.num_layers


@planted("gpt-window-of-blocks.tokens", breaks=WINDOW)
class WindowOfTokens(GPTBatched):
    """The window slides with the token, and is not made of whole blocks."""

    def visible(self, ids_BT, valid, document_start, window_blocks):
        seen = super().visible(ids_BT, valid, document_start, None)
        if window_blocks is None:
            return seen
        tokens = [
            masks.BLOCK
            * max(1, window_blocks // (2 - masks.has_long_window(layer, self.config.format)))
            for layer in range(self.config.num_layers)
        ]
        return [mask & ~mask.new_ones(mask.shape[-2:]).tril(-n) for mask, n in zip(seen, tokens)]


@planted("gpt-padding-mask-ignored", breaks="gpt_checkpoint.padding.left")
class PaddingSeen(GPTBatched):
    """Padding is not masked; on the right the causal mask happens to hide it."""

    def visible(self, ids_BT, valid, *options):
        return super().visible(ids_BT, None, *options)


@planted("gpt-padding-mask-ignored.inverted", breaks="gpt_checkpoint.padding.right")
class PaddingInverted(GPTBatched):
    """The padding mask is taken for True at padding, as torch's key_padding_mask is."""

    def visible(self, ids_BT, valid, *options):
        return super().visible(ids_BT, None if valid is None else ~valid, *options)


@planted("gpt-mask-of-other-row-or-call", breaks="gpt_checkpoint.padding.right")
class PaddingOfFirstRow(GPTBatched):
    """The padding of the first row is masked in every row."""

    def visible(self, ids_BT, valid, *options):
        return super().visible(ids_BT, None if valid is None else valid[:1], *options)


@planted("gpt-mask-of-other-row-or-call.length", breaks="gpt_checkpoint.length.any")
class CausalMaskOfFirstLength(GPTBatched):
    """The causal mask is made for the first call's length; nothing beyond it is masked."""

    def visible(self, ids_BT, *options):
        seen = super().visible(ids_BT, *options)
        first = self.__dict__.setdefault("first_length", ids_BT.shape[1])
        beyond = torch.arange(ids_BT.shape[1], device=ids_BT.device) >= first
        return [mask | beyond | beyond[:, None] for mask in seen]


@planted("gpt-mask-of-other-row-or-call.kept", breaks=DOCUMENTS)
class MaskKeptByShape(GPTBatched):
    """The mask is kept by the shape of the ids, and serves later calls with other options."""

    def visible(self, ids_BT, *options):
        kept = self.__dict__.setdefault("kept_masks", {})
        if ids_BT.shape not in kept:
            kept[ids_BT.shape] = super().visible(ids_BT, *options)
        return kept[ids_BT.shape]


# All of it together


@planted("gpt-published-conversion", breaks=SMALL)
class PublishedConversion(
    SmallOutputTransposed, SmallWithoutInputNorm, SmallWithValueNorm, SmallWithMediumSkips
):
    """Small: converted as published: into the medium function, its output projection transposed,
    its matrices rounded to bfloat16. The head and its soft cap are kept."""

    def __init__(self, config, *, blocks, **parts):
        super().__init__(config, blocks=blocks, **parts)
        if config.format == "small":
            for block in self.blocks:
                for name, weight in list(block.named_parameters()):
                    setattr(block, name, as_parameter(weight.bfloat16()))
