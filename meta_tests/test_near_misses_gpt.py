"""Subtle mistakes in loaders of GPT checkpoints that no catalogue lists, one or more a requirement.

Most are planted over the reference: in its reader (:func:`near_reader`) or its model
(:func:`near_model`).
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from mutants import Broken

from reference_impl.gpt import CheckpointError, CheckpointReader, GPTBatched, layers, masks
from reference_impl.gpt.checkpoint import KNOWN_HEADS
from reference_impl.gpt.config import scalars_needed, state_shapes
from reference_impl.rotary import rotary
from reference_impl.stored import StoredTensor

NEAR_GPT: dict[str, Broken] = {}


def near_reader(breaks: str):
    """Register a reader, whose docstring says what is wrong with it."""

    def decorate(reader: type) -> type:
        wrong, adapter = " ".join(reader.__doc__.split()), SimpleNamespace(gpt_checkpoint=reader)
        slug = f"gpt_checkpoint.{breaks}"
        NEAR_GPT[reader.__name__] = Broken(reader.__name__, slug, wrong, lambda: adapter)
        return reader

    return decorate


def near_model(breaks: str):
    """Register a model, which the reference's reader loads into."""

    def decorate(model: type) -> type:
        near_reader(breaks)(
            type(
                model.__name__,
                (CheckpointReader,),
                {"model_class": model, "__doc__": model.__doc__},
            )
        )
        return model

    return decorate


@pytest.mark.parametrize("name", NEAR_GPT)
def test_near_miss_is_caught(name):
    NEAR_GPT[name].assert_caught()


def changed(stored: StoredTensor, change) -> StoredTensor:
    """A stored tensor whose values go through ``change`` when they are read."""
    shape = tuple(change(torch.zeros(stored.shape, dtype=stored.dtype)).shape)
    return replace(stored, shape=shape, read=lambda: change(stored.read()))


class Tensors(CheckpointReader):
    """A reader whose tensors go through ``edit``, by their bare names."""

    def strip_prefixes(self, tensors):
        bare = super().strip_prefixes(tensors)
        self.edit(bare)
        return bare


class Weights(CheckpointReader):
    """A reader whose model goes through ``edit``."""

    def load(self, **options):
        model = super().load(**options)
        with torch.no_grad():
            self.edit(model)
        return model


# What the checkpoint holds


@near_reader("inspect.architecture")
class BlocksWithAttentionCounted(CheckpointReader):
    """The blocks are counted by their attention: the eighth is missing from the number told."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"num_layers": facts["num_layers"] - (facts["num_layers"] > 7)}


@near_reader("inspect.padding")
class PaddingOfEightRanks(CheckpointReader):
    """Padding is told as if eight ranks had trained, whatever is stored."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"scalars_padding": -facts["num_layers"] * 5 % 8}


@near_reader("load.deep")
class TellsAHundred(CheckpointReader):
    """Blocks are told up to a hundred."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"num_layers": min(facts["num_layers"], 100)}


# Width of heads


@near_reader("head-width.default")
class TwoHeadsAreFour(CheckpointReader):
    """A small model of width 256 is taken to have heads of 64."""

    def heads(self, format, num_layers, width):
        if self.head_dim is None and width == 256:
            return 4, 64
        return super().heads(format, num_layers, width)


@near_model("head-width.given")
class RotaryInEights(GPTBatched):
    """Rotating channels come in eights: heads of 12 or 20 have one pair fewer."""

    def rotate(self, x):
        out, quarter = super().rotate(x), x.shape[-1] // 4
        still = [
            i for i in range(x.shape[-1]) if i % (2 * quarter) in range(quarter // 2 * 2, quarter)
        ]
        out[..., still] = x[..., still]
        return out


@near_reader("head-width.known-shapes")
class OnlyLargeLiteKnown(CheckpointReader):
    """Of the published shapes with heads of 64 only that of 24 blocks is known."""

    def heads(self, format, num_layers, width):
        if self.head_dim is None and (num_layers, width) == (36, 1280):
            return 10, 128
        return super().heads(format, num_layers, width)


# The function


class OtherNorm(GPTBatched):
    """A model with another norm."""

    @staticmethod
    def norm(x):
        raise NotImplementedError

    def features(self, ids, **options):
        before, layers.norm = layers.norm, type(self).norm
        try:
            return super().features(ids, **options)
        finally:
            layers.norm = before


@near_model("function.small")
class EpsilonOfLayerNorm(OtherNorm):
    """The epsilon of every norm is 1e-5."""

    @staticmethod
    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@near_model("dtype.float64")
class EpsilonOfFloat32(OtherNorm):
    """The epsilon of every norm is float32's in float64 too."""

    @staticmethod
    def norm(x):
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@near_model("dtype.float64")
class EpsilonOutsideTheRoot(OtherNorm):
    """Epsilon is added to the root of the mean square."""

    @staticmethod
    def norm(x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + torch.finfo(x.dtype).eps ** 0.5)


@near_model("dtype.float64")
class RotaryInFloat32(GPTBatched):
    """Queries and keys are rotated in float32, whatever is computed in."""

    def rotate(self, x):
        return super().rotate(x.float()).to(x.dtype)


@near_model("function.small")
class LastBlockWithoutSkip(GPTBatched):
    """The stack is empty one block too early: the last block has no skip."""

    def skip_of(self, layer):
        small, last = self.config.format == "small", layer == self.config.num_layers - 1
        return None if small and last else super().skip_of(layer)


@near_model("function.small")
class ScaleOfAnEighth(GPTBatched):
    """Scores are scaled by 1/8 and not by 0.12."""

    def attend(self, q, k, v, visible):
        return super().attend(q * (0.125 / 0.12), k, v, visible)


@near_model("function.small")
class RotaryWithoutLowestFrequency(GPTBatched):
    """The lowest of the frequencies is left out with the zeros."""

    def rotate(self, x):
        out, half = super().rotate(x), x.shape[-1] // 2
        lowest = [half // 2 - 1, half + half // 2 - 1]
        out[..., lowest] = x[..., lowest]
        return out


@near_model("function.small")
class ValuesBehindTheEighthShift(GPTBatched):
    """With ten blocks the eighth, which has no attention, does not use up a value embedding."""

    def value_embedding(self, layer, ids):
        if self.config.num_layers == 10 and layer > 7:
            return super().value_embedding(layer - 1, ids)
        return super().value_embedding(layer, ids)


@near_model("function.small")
class ThirdHeadNotRotated(GPTBatched):
    """Only the first two heads are rotated."""

    def rotate(self, x):
        return torch.cat([super().rotate(x[:, :2]), x[:, 2:]], 1)


@near_model("function.medium")
class SkipFromTheBlockBehind(GPTBatched):
    """Block 9 takes the output of block 7, with the weight of block 6."""

    def skip_of(self, layer):
        medium = self.config.format == "medium"
        return (7, 6) if medium and layer == 9 else super().skip_of(layer)


@near_model("function.medium")
class ValuesNormedOverHeads(GPTBatched):
    """Values of the medium model are normed over all heads together."""

    def values(self, v):
        if self.config.format == "small":
            return v
        return layers.split_heads(layers.norm(layers.join_heads(v)), self.config.num_heads)


@near_model("function.medium")
class ValueEmbeddingsNormed(GPTBatched):
    """Value embeddings of the medium model are normed as its values are."""

    def value_embedding(self, layer, ids):
        table = super().value_embedding(layer, ids)
        return table if table is None or self.config.format == "small" else layers.norm(table)


@near_model("function.medium")
class NoSkipsInDeepModels(GPTBatched):
    """A medium model of more than 16 blocks has no skips."""

    def skip_of(self, layer):
        deep = self.config.format == "medium" and self.config.num_layers > 16
        return None if deep else super().skip_of(layer)


@near_reader("function.stored-dtypes")
class ScalarsRoundedWithTheEmbedding(Weights):
    """Scalars are rounded to the dtype of the embedding."""

    def edit(self, model):
        model.scalars.copy_(model.scalars.to(model.embed.dtype))


@near_model("function.stored-dtypes")
class EmbeddingNormedAsStored(GPTBatched):
    """The embedding is normed in its stored dtype, and converted then."""

    def embed_tokens(self, ids):
        return self.weight(layers.norm(torch.nn.functional.embedding(ids, self.embed)))


@near_model("dtype.bfloat16")
class FeaturesInFloat32(GPTBatched):
    """Features come in float32 whatever is computed in."""

    def features(self, ids, **options):
        x = super().features(ids, **options)
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def logits_of(self, features):
        return super().logits_of(features.to(self.compute_dtype))


@near_model("skips.weights")
class SmallSkipsByBlock(GPTBatched):
    """Skip weights of the small model have the number of the block, the second half of them."""

    def skip_of(self, layer):
        found = super().skip_of(layer)
        if found is None or self.config.format == "medium":
            return found
        return found[0], layer


@near_model("scalars.padding")
class LambdasFromTheEnd(GPTBatched):
    """Lambdas are counted from the end of the scalars, padding included."""

    def split_scalars(self):
        count, scalars = self.config.num_layers, self.weight(self.scalars)
        return layers.split_scalars(torch.cat([scalars[:count], scalars[-4 * count :]]), count)


@near_model("blocks.eighth-without-attention")
class EighthBlockByItsLambda(GPTBatched):
    """The MLP of the eighth block is multiplied by that block's attention lambda."""

    def mlp(self, layer, x):
        out = super().mlp(layer, x)
        return out if layer != 7 else out * self.split_scalars()[2][7, 0]


@near_model("values.embeddings")
class FalsyLambdaIsOther(GPTBatched):
    """``b or a``: a second lambda of 0 is taken for none."""

    def mix_values(self, v, value, lambdas):
        if not bool(lambdas[1]):
            lambdas = lambdas[:1].expand(2)
        return super().mix_values(v, value, lambdas)


@near_model("heads.normed")
class QueriesNormedOverHeads(GPTBatched):
    """Queries and keys are normed over all heads together."""

    def norm_and_rotate(self, x):
        normed = layers.norm(layers.join_heads(x))
        return self.rotate(layers.split_heads(normed, self.config.num_heads))


@near_model("logits.soft-cap")
class CapSaturatesEarly(GPTBatched):
    """Logits stay 0.01 within their bounds."""

    def soft_cap(self, logits):
        capped = super().soft_cap(logits)
        low, high = (0, 30) if self.config.format == "small" else (-15, 15)
        return capped.clamp(low + 0.01, high - 0.01)


# Batches


@near_model("batch.rows-independent")
class ScaledByTheBatch(GPTBatched):
    """Embeddings are scaled by the largest of the batch and back: its last bits depend on it."""

    def embed_tokens(self, ids):
        x = super().embed_tokens(ids)
        return x / x.abs().amax() * x.abs().amax()


@near_model("causal.later-tokens")
class ScaledByTheRow(GPTBatched):
    """Embeddings are scaled by the largest of the row and back: its last bits depend on it."""

    def embed_tokens(self, ids):
        x = super().embed_tokens(ids)
        largest = x.abs().amax((1, 2), keepdim=True)
        return x / largest * largest


@near_model("length.any")
class RotaryTableOfForty(GPTBatched):
    """The rotary table has 40 rows, and later positions take the last."""

    def rotate(self, x):
        positions = torch.arange(x.shape[2])[None].clamp_max(39)
        return rotary(x, positions, theta=layers.ROTARY_BASE, layout="half-truncated")


@near_model("length.any")
class MaskOfLongestCall(GPTBatched):
    """The mask of the longest call is kept, and shorter ones take its last rows."""

    def visible(self, ids, valid, document_start, window_blocks):
        given = super().visible(ids, valid, document_start, window_blocks)
        if valid is not None or document_start is not None:
            return given
        kept = self.__dict__.get("kept")
        tokens = ids.shape[1]
        if kept is None or kept.shape[-1] < tokens:
            self.kept = kept = masks.causal(tokens)
        mask = kept[-tokens:, :tokens][None, None].expand(len(ids), -1, -1, -1)
        return [mask] * self.config.num_layers


class OtherPadding(GPTBatched):
    """A model that takes other tokens for padding."""

    def features(self, ids, *, valid=None, **options):
        return super().features(ids, valid=None if valid is None else self.other(valid), **options)


@near_model("padding.right")
class LastTokenIsPadding(OtherPadding):
    """The last token before padding on the right is taken for padding."""

    def other(self, valid):
        return valid & torch.cat([valid[:, 1:], valid[:, -1:]], 1)


@near_model("padding.left")
class FirstSlotIsSink(OtherPadding):
    """The first slot is always seen, padding or not."""

    def other(self, valid):
        return valid | (torch.arange(valid.shape[1]) == 0)


@near_model("padding.left")
class PaddingOfOneIgnored(OtherPadding):
    """A single slot of padding is taken for a token."""

    def other(self, valid):
        return valid | ((~valid).sum(-1, keepdim=True) == 1)


@near_model("documents.separate")
class StartEndsTheDocument(GPTBatched):
    """The token that starts a document is the last of the one before."""

    def visible(self, ids, valid, document_start, window_blocks):
        if document_start is not None and window_blocks is None:
            ids = torch.cat([ids[:, :1] * 0 + document_start, ids[:, :-1]], 1)
        return super().visible(ids, valid, document_start, window_blocks)


@near_model("window.of-training")
class EleventhLayerIsShort(GPTBatched):
    """The window of the twelfth block is short."""

    def visible(self, ids, valid, document_start, window_blocks):
        found = super().visible(ids, valid, document_start, window_blocks)
        found[11] = found[10]
        return found


@near_model("window.of-training")
class ShortWindowRoundsUp(GPTBatched):
    """Half an odd window is rounded up."""

    def visible(self, ids, valid, document_start, window_blocks):
        found = super().visible(ids, valid, document_start, window_blocks)
        if window_blocks is None or window_blocks % 2 == 0:
            return found
        even = super().visible(ids, valid, document_start, window_blocks + 1)
        return [even[i] if i not in (0, 4, 7, 11) else mask for i, mask in enumerate(found)]


@near_model("ids.without-embedding")
class IdsUpToTheHead(GPTBatched):
    """Ids up to the rows of the head are taken; those without an embedding get the last one."""

    def features(self, ids, **options):
        last, rows = len(self.embed) - 1, len(self.lm_head)
        ids = torch.where((ids > last) & (ids < rows), last, ids)
        return super().features(ids, **options)


# Names and containers


@near_reader("names.wrapped")
class CompiledBlocksStayFresh(CheckpointReader):
    """Of a block that was compiled on its own the MLP keeps its initial zeros."""

    def strip_prefixes(self, tensors):
        bare = super().strip_prefixes(tensors)
        for key in tensors:
            if "._orig_mod.mlp." in key and "proj" in key:
                name = self.bare_name(key)
                bare[name] = changed(bare[name], torch.zeros_like)
        return bare


@near_reader("containers.any")
class SafetensorsInHalf(Tensors):
    """Tensors of safetensors files go through float16."""

    def edit(self, bare):
        if self.stored.source.endswith(".safetensors"):
            for key, stored in bare.items():
                bare[key] = changed(stored, lambda t: t.half().to(t.dtype))


# Honesty


@near_reader("load.same-under-any-seed")
class PaddedRowsOfTheHeadRandom(Weights):
    """Rows of the head beyond the vocabulary stay as they were initialised."""

    def edit(self, model):
        model.lm_head[len(model.embed) :].normal_()


@near_reader("load.every-tensor-counts")
class EvenMLPsTwice(Weights):
    """Every second block has the MLP of the block before it."""

    def edit(self, model):
        for even, odd in zip(model.blocks[::2], model.blocks[1::2]):
            odd.fc_w.copy_(even.fc_w)
            odd.proj_w.copy_(even.proj_w)


@near_reader("load.every-element-counts")
class EvenRowsTwice(Weights):
    """Odd rows of the MLPs are copies of the even ones, as in tensors read with a wrong stride."""

    def edit(self, model):
        for block in model.blocks:
            block.fc_w[1::2] = block.fc_w[::2]
            block.proj_w[1::2] = block.proj_w[::2]


@near_reader("load.by-name")
class BlocksInOrderOfText(Tensors):
    """Block 10 comes before block 2, as text is sorted."""

    def edit(self, bare):
        given = dict(bare)
        for name in {key.split(".", 2)[2] for key in given if key.startswith("blocks.")}:
            keys = [key for key in given if key.startswith("blocks.") and key.endswith(name)]
            number = {key: int(key.split(".")[1]) for key in keys}
            for key, taken in zip(sorted(keys, key=number.get), sorted(keys)):
                bare[key] = given[taken]


@near_reader("load.shared-tensors")
class SharedHeadFreed(Weights):
    """A head that is the embedding is freed with it: zeros."""

    def edit(self, model):
        if model.embed.shape == model.lm_head.shape and torch.equal(model.embed, model.lm_head):
            model.lm_head.zero_()


@near_reader("load.strided-tensors")
class OffsetOfViewsIgnored(Tensors):
    """A view is read from the beginning of its storage."""

    def edit(self, bare):
        for key, stored in bare.items():
            layout = getattr(stored.read, "layout", None)
            if layout is not None:
                bare[key] = replace(
                    stored, read=replace(stored.read, layout=replace(layout, offset=0))
                )


@near_reader("load.optimizer-ignored")
class WeightDecayedAgain(Tensors):
    """With optimizer state in the file its weight decay is applied once more."""

    def edit(self, bare):
        source = self.stored.source
        if os.path.exists(source) and not source.endswith(".safetensors"):
            content = torch.load(source, weights_only=True)
            if "optimizers" in content:
                for key, stored in bare.items():
                    bare[key] = changed(stored, lambda t: t * 0.999)


@near_model("state.bit-exact")
class StateWithoutPadding(GPTBatched):
    """The state holds the scalars that mean something."""

    def state(self):
        state = super().state()
        return state | {"scalars": state["scalars"][: scalars_needed(self.config.num_layers)]}


@near_model("save.round-trip")
class HeadCutToVocabulary(GPTBatched):
    """Saving cuts the head to the rows of the vocabulary."""

    def save(self, path, **entries):
        head, self.lm_head = self.lm_head, torch.nn.Parameter(self.lm_head[: len(self.embed)])
        super().save(path, **entries)
        self.lm_head = head


@near_model("save.onto-itself")
class FileEmptiedFirst(GPTBatched):
    """Weights are read while saving, of a file that is emptied first: zeros."""

    def save(self, path, **entries):
        if os.path.exists(path):
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.zero_()
        super().save(path, **entries)


@near_model("save.failing")
class OldFileRemovedFirst(GPTBatched):
    """The old file is removed before the new one is written."""

    def save(self, path, **entries):
        Path(path).unlink(missing_ok=True)
        super().save(path, **entries)


@near_reader("source.file-unchanged")
class IndexBesideTheFile(CheckpointReader):
    """The index of the file is kept in a file beside it."""

    def open(self, source):
        if isinstance(source, str) and os.path.isfile(source):
            Path(source + ".index").touch()
        return super().open(source)


@near_reader("source.dictionary-unchanged")
class EntriesPopped(CheckpointReader):
    """The validation loss is popped from the caller's dictionary."""

    def open(self, source):
        if isinstance(source, dict):
            source.pop("val_loss", None)
        return super().open(source)


@near_reader("source.later-changes")
class ScalarsNotCopied(Tensors):
    """The scalars of a dictionary in memory are used as they are, not copied."""

    def open(self, source):
        self.given = source if isinstance(source, Mapping) else {}
        return super().open(source)

    def edit(self, bare):
        for key, tensor in self.given.get("model", {}).items():
            if key.endswith("scalars"):
                bare["scalars"] = replace(bare["scalars"], read=lambda tensor=tensor: tensor)


# What is refused


@near_reader("refuses.no-model-entry")
class OnlyDictionaryIsTheModel(CheckpointReader):
    """Without an entry model the only dictionary in the file is taken."""

    def open(self, source):
        try:
            return super().open(source)
        except CheckpointError:
            content = torch.load(source, weights_only=True)
            found = [value for value in content.values() if isinstance(value, dict) and value]
            if "model" in content or len(found) != 1:
                raise
            return super().open(found[0])


@near_reader("refuses.not-a-state")
class NoneIsDefault(CheckpointReader):
    """Scalars of None are those of a fresh model."""

    def open(self, source):
        try:
            return super().open(source)
        except CheckpointError:
            content = torch.load(source, weights_only=True)
            state = content.get("model", content)
            if not isinstance(state, dict) or state.get("scalars", 0) is not None:
                raise
            return super().open(state | {"scalars": torch.ones(64)})


@near_reader("refuses.missing-tensor")
class MissingHeadIsTied(Tensors):
    """Without a head the embedding is taken for it."""

    def edit(self, bare):
        if not any(key.startswith("lm_head") for key in bare) and "embed.weight" in bare:
            small = "blocks.0.attn.qkv_w" in bare
            bare["lm_head.weight" if small else "lm_head_w"] = bare["embed.weight"]


@near_reader("refuses.missing-tensor")
class MissingValueEmbeddingIsFirst(Tensors):
    """A value embedding that is missing is the first."""

    def edit(self, bare):
        for i in (1, 2):
            if f"value_embeds.{i}.weight" not in bare and "value_embeds.0.weight" in bare:
                bare[f"value_embeds.{i}.weight"] = bare["value_embeds.0.weight"]


@near_reader("refuses.left-over-tensor")
class BiasesDropped(Tensors):
    """Names that end in bias are dropped."""

    def edit(self, bare):
        for key in [key for key in bare if key.endswith(".bias")]:
            del bare[key]


@near_reader("refuses.left-over-tensor")
class UnknownOutsideBlocksDropped(Tensors):
    """Names outside the blocks that mean nothing are dropped."""

    def edit(self, bare):
        known = ("blocks.", "embed.", "value_embeds.", "lm_head", "scalars")
        for key in [key for key in bare if not key.startswith(known)]:
            del bare[key]


@near_reader("refuses.mixed-formats")
class OtherNamesOfMLPsTaken(Tensors):
    """The MLP of a block may have the names of the other format."""

    def edit(self, bare):
        small = "blocks.0.attn.qkv_w" in bare
        names = {"fc_w": "c_fc.weight", "proj_w": "c_proj.weight"}
        for key in [key for key in bare if ".mlp." in key]:
            block, name = key.split(".mlp.")
            other = names.get(name) if small else {v: k for k, v in names.items()}.get(name)
            if other:
                bare[f"{block}.mlp.{other}"] = bare.pop(key)


@near_reader("refuses.gap-in-blocks")
class GapFilledFromBefore(Tensors):
    """A block that is missing is that before it."""

    def edit(self, bare):
        count = 1 + max((int(k.split(".")[1]) for k in bare if k.startswith("blocks.")), default=-1)
        for layer in range(2, count):
            names = [k for k in bare if k.startswith(f"blocks.{layer - 1 - (layer == 8)}.")]
            if not any(k.startswith(f"blocks.{layer}.") for k in bare):
                for key in names:
                    if layer != 7 or ".mlp." in key:
                        bare[f"blocks.{layer}.{key.split('.', 2)[2]}"] = bare[key]


@near_reader("refuses.odd-or-few-blocks")
class OddIsRoundedDown(Tensors):
    """Of an odd number of blocks the last is dropped."""

    def edit(self, bare):
        count = len({key.split(".")[1] for key in bare if key.startswith("blocks.")})
        for key in [key for key in bare if key.startswith(f"blocks.{count - 1}.")]:
            if count % 2:
                del bare[key]


@near_reader("refuses.attention-elsewhere")
class EighthAttentionDropped(Tensors):
    """Attention of the eighth block is dropped."""

    def edit(self, bare):
        for key in [key for key in bare if key.startswith("blocks.7.attn.")]:
            del bare[key]


@near_reader("refuses.stored-twice")
class EqualShapesAreEqual(CheckpointReader):
    """A tensor stored under two names of one shape is taken once."""

    def strip_prefixes(self, tensors):
        kept = {}
        for key, tensor in tensors.items():
            name = self.bare_name(key)
            if name not in kept or tensors[kept[name]].shape != tensor.shape:
                kept.setdefault(name, key)
        return {name: tensors[key] for name, key in kept.items()}


@near_reader("refuses.half-wrapped-name")
class AnythingInFrontIsAPrefix(CheckpointReader):
    """Whatever stands in front of a known part of a name is a prefix."""

    def bare_name(self, key):
        known = ("embed", "value_embeds", "blocks", "lm_head", "lm_head_w", "scalars")
        parts = super().bare_name(key).split(".")
        at = next((i for i, part in enumerate(parts) if part in known), 0)
        return ".".join(parts[at:])


@near_reader("refuses.short-head")
class ShortHeadFilledUp(Tensors):
    """A head with fewer rows than the embedding is filled up with zeros."""

    def edit(self, bare):
        rows = bare["embed.weight"].shape[0] if "embed.weight" in bare else 0
        for key in ("lm_head.weight", "lm_head_w"):
            missing = rows - bare[key].shape[0] if key in bare else 0
            if missing > 0:
                fill = partial(torch.nn.functional.pad, pad=(0, 0, 0, missing))
                bare[key] = changed(bare[key], fill)


@near_reader("refuses.narrow-heads")
class NarrowHeadsFilledUp(Tensors):
    """Heads that are narrower than the model are filled up with zeros."""

    def edit(self, bare):
        width = bare["embed.weight"].shape[-1] if "embed.weight" in bare else 0
        for key, stored in bare.items():
            if ".attn." in key and len(stored.shape) > 1 and stored.shape[1] < width:
                missing = width - stored.shape[1]
                sides = (0, missing) if len(stored.shape) == 2 else (0, 0, 0, missing)
                bare[key] = changed(
                    stored, lambda t, sides=sides: torch.nn.functional.pad(t, sides)
                )


@near_reader("refuses.uneven-heads")
class UnevenWidthIsOneHead(CheckpointReader):
    """A head width that does not divide the model's is taken for one head."""

    def heads(self, format, num_layers, width):
        if self.head_dim and self.head_dim > 0 and width % self.head_dim:
            return 1, width
        return super().heads(format, num_layers, width)


@near_reader("refuses.unknown-head-width")
class HeadsOf64ForDeepModels(CheckpointReader):
    """Any model of 24 or 36 blocks has heads of 64."""

    def heads(self, format, num_layers, width):
        if self.head_dim is None and num_layers in (24, 36):
            return width // 64, 64
        return super().heads(format, num_layers, width)


@near_reader("refuses.short-scalars")
class ScalarsFlattened(Tensors):
    """Scalars of any dimensions are flattened."""

    def edit(self, bare):
        if "scalars" in bare:
            bare["scalars"] = changed(bare["scalars"], torch.flatten)


@near_reader("refuses.not-finite")
class EmbeddingsNotChecked(CheckpointReader):
    """Embeddings are not checked for NaN, for they are large."""

    def check_finite(self, tensor, key, what):
        if "embed" not in key:
            super().check_finite(tensor, key, what)


@near_reader("refuses.not-finite")
class InfinityTaken(CheckpointReader):
    """NaN is refused, and infinity is not."""

    def check_finite(self, tensor, key, what):
        super().check_finite(torch.nan_to_num(tensor, nan=torch.nan), key, what)


@near_reader("refuses.not-floating")
class BytesTaken(Tensors):
    """Integers of 8 bits are taken for weights."""

    def edit(self, bare):
        for key, stored in bare.items():
            if stored.dtype in (torch.int8, torch.uint8):
                bare[key] = replace(
                    stored, dtype=torch.float32, read=lambda read=stored.read: read().float()
                )


@near_reader("refuses.quantised")
class ScalesDropped(Tensors):
    """8-bit floats are taken without their scale."""

    def edit(self, bare):
        for key, stored in list(bare.items()):
            if key.endswith("_scale_inv"):
                del bare[key]
            elif stored.dtype == torch.float8_e4m3fn:
                bare[key] = replace(
                    stored, dtype=torch.float32, read=lambda read=stored.read: read().float()
                )


@near_reader("refuses.truncated")
class MissingBytesAreZero(CheckpointReader):
    """What is missing at the end of a safetensors file is read as zeros."""

    def open(self, source):
        try:
            return super().open(source)
        except CheckpointError:
            data = Path(source).read_bytes() if os.path.isfile(source) else b""
            header = int.from_bytes(data[:8], "little")
            if len(data) < 9 or data[8:9] != b"{" or len(data) < 8 + header:
                raise
            import json

            entries = json.loads(data[8 : 8 + header])
            ends = [entry["data_offsets"][1] for entry in entries.values() if "dtype" in entry]
            self.folder = tempfile.TemporaryDirectory()
            path = Path(self.folder.name) / "whole.safetensors"
            path.write_bytes(data.ljust(8 + header + max(ends), b"\0"))
            return super().open(path)


class OtherChecksums(Tensors):
    """A reader that compares other checksums."""

    def edit(self, bare):
        for key, stored in bare.items():
            if hasattr(stored.read, "place"):
                bare[key] = replace(
                    stored, read=lambda key=key, read=stored.read: self.of(key, read)
                )

    def of(self, key, read):
        try:
            return read()
        except CheckpointError as error:
            if not self.lenient(key, read, str(error)):
                raise
            actual = int(str(error).split("CRC-32 ")[1][:8], 16)
            return replace(read, place=replace(read.place, checksum=actual), shared=None)()


@near_reader("refuses.flipped-byte")
class ChecksumsOfBlocksOnly(OtherChecksums):
    """The checksums of embeddings are not compared, for they are large."""

    def lenient(self, key, read, problem):
        return "CRC-32" in problem and "embed" in key


@near_reader("refuses.swapped-records")
class ChecksumOfAnyRecord(OtherChecksums):
    """A checksum is right if any record has it."""

    def lenient(self, key, read, problem):
        every = [getattr(t.read, "place", None) for t in self.stored.tensors.values()]
        return any(place and f"CRC-32 {place.checksum:08x}," in problem for place in every)


@near_reader("refuses.damaged")
class ChecksumsOfSmallRecords(OtherChecksums):
    """The checksums of records of more than 2048 bytes are not compared."""

    def lenient(self, key, read, problem):
        return "CRC-32" in problem and read.place.size > 2048


@near_reader("refuses.pickled-code")
class RefusedByTypeAfterwards(CheckpointReader):
    """A pickle is executed to say what is in it, and then refused."""

    def open(self, source):
        try:
            return super().open(source)
        except CheckpointError as error:
            if "not unpickled" in str(error):
                torch.load(source, weights_only=False)
            raise


@near_reader("refuses.other-files")
class LastGoodCheckpoint(CheckpointReader):
    """A path with nothing behind it gives the checkpoint that was opened last."""

    last: ClassVar[dict] = {}

    def open(self, source):
        missing = isinstance(source, str) and not os.path.exists(source)
        if not missing:
            self.last["opened"] = super().open(source)
        return self.last["opened"]


# What errors say


def said_otherwise(say):
    """A reader whose refusals are replaced by what ``say`` makes of them."""

    class Reader(CheckpointReader):
        def __init__(self, source, **options):
            with otherwise(say):
                super().__init__(source, **options)

        def inspect(self):
            with otherwise(say):
                return super().inspect()

        def load(self):
            with otherwise(say):
                return super().load()

    return Reader


class otherwise:
    """A context whose checkpoint errors are replaced."""

    def __init__(self, say):
        self.say = say

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, CheckpointError):
            raise self.say(error) from error


@near_reader("errors.name-the-file")
class FolderNamed(
    said_otherwise(lambda e: ValueError(str(e).replace(os.path.basename(e.source), "")))
):
    """Errors name the folder and not the file."""


@near_reader("errors.name-the-tensor")
class OnlyBlockNamed(
    said_otherwise(lambda e: ValueError(f"{e.source}: {e.key and e.key.split('.')[0]} is wrong"))
):
    """Errors name the first part of the tensor's name."""


@near_reader("errors.deliberate")
class KeyErrorForNames(said_otherwise(lambda e: KeyError(str(e)) if "missing" in str(e) else e)):
    """What is missing is told by a KeyError."""


# How a loaded model is used


@near_model("length.long")
class RotaryTableOf512(GPTBatched):
    """The rotary table has 512 rows; later positions take the last."""

    def rotate(self, x_BHTD):
        positions = torch.arange(x_BHTD.shape[2])[None].clamp_max(511)
        return rotary(x_BHTD, positions, theta=1024.0, layout="half-truncated")


@near_model("calls.options-not-kept")
class MaskKeptByShape(GPTBatched):
    """The mask is kept by shape and by whether padding and documents are given."""

    def visible(self, ids, valid, document_start, window_blocks):
        kept = self.__dict__.setdefault("kept", {})
        key = (ids.shape, valid is None, document_start, window_blocks)
        if key not in kept:
            kept[key] = super().visible(ids, valid, document_start, window_blocks)
        return kept[key]


@near_model("calls.options-not-kept")
class PaddingMaskKeptAfterCall(GPTBatched):
    """The mask of a call with padding stays for later calls of the shape without any."""

    def visible(self, ids, valid, document_start, window_blocks):
        kept = self.__dict__.setdefault("kept", {})
        if document_start is not None:
            return super().visible(ids, valid, document_start, window_blocks)
        if valid is not None or ids.shape not in kept:
            kept[ids.shape] = super().visible(ids, valid, document_start, window_blocks)
        return kept[ids.shape]


@near_model("documents.separate")
class OnlyTwoDocuments(GPTBatched):
    """Documents after the second are taken for one with it."""

    def visible(self, ids, valid, document_start, window_blocks):
        if document_start is None or window_blocks is not None:
            return super().visible(ids, valid, document_start, window_blocks)
        first = (ids == document_start).cumsum(-1).clamp_max(1)
        ids = torch.cat([torch.zeros_like(first[:, :1]), first.diff(dim=-1)], -1)
        return super().visible(ids, valid, 1, None)


@near_model("window.of-training")
class WindowOfFirstRow(GPTBatched):
    """The window mask of the first row is that of every row."""

    def visible(self, ids, valid, document_start, window_blocks):
        if window_blocks is not None:
            ids = ids[:1].expand_as(ids)
        return super().visible(ids, valid, document_start, window_blocks)


@near_model("documents.padded")
class PaddingIgnoredWithDocuments(GPTBatched):
    """Padding is seen where documents are separate."""

    def visible(self, ids, valid, document_start, window_blocks):
        valid = valid if document_start is None else None
        return super().visible(ids, valid, document_start, window_blocks)


@near_model("padding.either-side")
class MixedSidesRolled(GPTBatched):
    """Rows are rolled to the left by their padding if any row has padding on the left."""

    def features(self, ids_BT, *, valid=None, **options):
        if valid is None or options.get("document_start") is not None or bool(valid[:, 0].all()):
            return super().features(ids_BT, valid=valid, **options)
        shifts = (~valid).sum(-1).tolist()
        rolled = torch.stack([row.roll(-n) for row, n in zip(ids_BT, shifts)])
        out = super().features(rolled, **options)
        return torch.stack([row.roll(n, 0) for row, n in zip(out, shifts)])


@near_reader("inspect.padding")
class RowsOfHeadComputed(CheckpointReader):
    """The rows of the head are told as the next multiple of 128 behind those of the embeddings."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"padded_vocab_size": (facts["vocab_size"] // 128 + 1) * 128}


@near_reader("head-width.known-shapes")
class TableOverGiven(CheckpointReader):
    """The table of published shapes goes before the head width that is given."""

    def heads(self, format, num_layers, width):
        if (num_layers, width) in KNOWN_HEADS:
            heads = KNOWN_HEADS[num_layers, width]
            return heads, width // heads
        return super().heads(format, num_layers, width)


@near_reader("head-width.known-shapes")
class TableByWidth(CheckpointReader):
    """Any model of width 1152 or 1280 has heads of 64."""

    def heads(self, format, num_layers, width):
        if self.head_dim is None and width in (1152, 1280):
            return width // 64, 64
        return super().heads(format, num_layers, width)


@near_reader("state.in-dtype")
class StateKeepsStoredDtype(CheckpointReader):
    """Weights are converted where they are used: with a dtype the state is as it was stored."""

    def load(self, **options):
        dtype, self.dtype = self.dtype, None
        model = super().load(**options)
        self.dtype = dtype
        model.compute_dtype = dtype or model.compute_dtype
        return model


@near_reader("load.global-state")
class ThreadsChanged(CheckpointReader):
    """Loading sets the number of threads of the process."""

    def load(self, **options):
        torch.set_num_threads(2)
        return super().load(**options)


@near_reader("load.global-state")
class DefaultDtypeLeft(CheckpointReader):
    """A checkpoint that is refused leaves the default dtype changed."""

    def __init__(self, source, **options):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        super().__init__(source, **options)
        self.rows_and_width("embed.weight")
        torch.set_default_dtype(before)


@near_model("calls.with-autograd")
class WrongWithGradients(GPTBatched):
    """The activation takes another path when gradients are recorded."""

    def activation(self, x):
        return super().activation(x) * (2 if torch.is_grad_enabled() else 1)


@near_model("calls.outputs-kept")
class OutputBufferReused(GPTBatched):
    """Logits of one shape are written into one buffer: the next call overwrites the last."""

    def logits(self, ids_BT, **options):
        out = super().logits(ids_BT, **options)
        kept = self.__dict__.setdefault("buffers", {})
        return kept.setdefault(out.shape, torch.empty_like(out)).copy_(out)


@near_model("calls.outputs-kept")
class OneModelAtATime(GPTBatched):
    """The scalars are those of the model that was loaded last."""

    latest: ClassVar = None

    def __init__(self, config, **given):
        super().__init__(config, **given)
        type(self).latest = self

    def split_scalars(self):
        latest = type(self).latest
        if latest.config.num_layers < self.config.num_layers:
            return tuple(-part for part in super().split_scalars())
        return super().split_scalars()


@near_reader("load.twice")
class SecondLoadOfZeros(CheckpointReader):
    """The second load of a reader finds its tensors empty."""

    def load(self, **options):
        model = super().load(**options)
        for key, stored in self.tensors.items():
            self.tensors[key] = changed(stored, torch.zeros_like)
        return model


class KeptByPath:
    """Models are kept by path: a file that was replaced is not read again."""

    def __init__(self):
        self.readers = {}

    def gpt_checkpoint(self, source, *, head_dim=None, dtype=None, device="cpu"):
        options = {"head_dim": head_dim, "dtype": dtype, "device": device}
        if not isinstance(source, str):
            return CheckpointReader(source, **options)
        if source not in self.readers:
            reader = CheckpointReader(source, **options)
            self.readers[source] = SimpleNamespace(inspect=reader.inspect, load=cache(reader.load))
        return self.readers[source]


NEAR_GPT["KeptByPath"] = Broken(
    "KeptByPath", "gpt_checkpoint.source.replaced", KeptByPath.__doc__, KeptByPath
)


@near_reader("containers.kinds-of-states")
class ParametersNotRead(CheckpointReader):
    """Tensors that need a gradient are taken for buffers, and left at zero."""

    def open(self, source):
        stored = super().open(source)
        content = torch.load(source, weights_only=True) if str(source).endswith(".pt") else {}
        state = content.get("model", content)
        tensors = {
            key: changed(tensor, torch.zeros_like)
            if state.get(key, tensor.read()).requires_grad
            else tensor
            for key, tensor in stored.tensors.items()
        }
        return replace(stored, tensors=tensors)


@near_reader("names.wrapped")
class WrappersNotDeep(Tensors):
    """Wrappers come off in front and behind the number of a block; deeper, the tensor stays zero."""

    def strip_prefixes(self, tensors):
        deep = {key: "attn._orig_mod" in key for key in tensors}
        zeroed = {k: changed(t, torch.zeros_like) if deep[k] else t for k, t in tensors.items()}
        return super().strip_prefixes(zeroed)

    def edit(self, bare):
        pass


@near_reader("refuses.missing-tensor")
class MissingScalarsAreDefaults(Tensors):
    """Without scalars those of a fresh model are taken."""

    def edit(self, bare):
        if "scalars" not in bare and "embed.weight" in bare:
            blocks = {key.split(".")[1] for key in bare if key.startswith("blocks.")}
            fresh = torch.ones(5 * len(blocks))
            bare["scalars"] = StoredTensor(tuple(fresh.shape), fresh.dtype, fresh.clone)


@near_reader("refuses.not-finite")
class ScalarsNotChecked(CheckpointReader):
    """NaN in the scalars is taken."""

    def check_finite(self, tensor, key, what):
        if key != "scalars":
            super().check_finite(tensor, key, what)


@near_reader("refuses.misshapen-tensor")
class ReshapedWhereItFits(CheckpointReader):
    """A weight of as many elements as are needed is given the shape that is needed."""

    def attention_width(self, format, model_dim):
        for key, stored in self.tensors.items():
            if ".attn.qkv" in key and stored.shape[-1:] == (model_dim,):
                wanted = (-1, model_dim, model_dim)
                self.tensors[key] = changed(stored, partial(torch.reshape, shape=wanted))
        return super().attention_width(format, model_dim)


@near_reader("refuses.misshapen-tensor")
class LargerOnesCut(CheckpointReader):
    """Of a tensor that is too large the beginning is taken."""

    def check_layout(self, config):
        for key, shape in state_shapes(config).items():
            stored = self.tensors.get(key)
            if stored is not None and len(stored.shape) == len(shape):
                cut = tuple(slice(size) for size in shape)
                self.tensors[key] = changed(stored, partial(take, cut))
        super().check_layout(config)


def take(cut, tensor):
    """A contiguous part of a tensor."""
    return tensor[cut].clone()
