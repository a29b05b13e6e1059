"""Documented bugs of checkpoint loaders and savers, planted over the reference's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from conformance.known_bugs import known_bug
from reference_impl.gpt import CheckpointError, CheckpointReader, GPTBatched
from reference_impl.gpt.config import (
    GPTConfig,
    head_key,
    next_multiple,
    scalars_needed,
    state_shapes,
)
from reference_impl.gpt.dictionaries import open_dictionary
from reference_impl.gpt.saving import save_state
from reference_impl.stored import StoredTensor

REFUSES = "gpt_checkpoint.refuses"
FUNCTION = "gpt_checkpoint.function"


def planted(id: str, *, breaks: str) -> Callable[[type], type]:
    """Register an adapter that opens checkpoints with the decorated reader, or model."""

    def register(wrong: type) -> type:
        class Reader(CheckpointReader):
            model_class = wrong

        reader = Reader if issubclass(wrong, GPTBatched) else wrong

        class Adapter:
            __doc__ = wrong.__doc__

            def gpt_checkpoint(self, source, *, head_dim=None, dtype=None, device="cpu"):
                return reader(source, head_dim=head_dim, dtype=dtype, device=device)

        Adapter.__name__ = Adapter.__qualname__ = wrong.__name__
        known_bug(id, contract="gpt_checkpoint", breaks=breaks)(Adapter)
        return wrong

    return register


def holding(tensor: torch.Tensor) -> StoredTensor:
    """A tensor in memory as if it were stored."""
    return StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.clone)


class Lenient(CheckpointReader):
    """``strict=False``: what is missing gets its initial value, what is left over is ignored."""

    def missing(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The initial value of a tensor that is not in the file."""
        return 0.02 * torch.randn(shape)

    def check_layout(self, config):
        shapes = state_shapes(config)
        for key, shape in shapes.items():
            if key not in self.tensors:
                self.tensors[key] = holding(self.missing(key, shape))
        self.tensors = {key: self.tensors[key] for key in shapes}
        super().check_layout(config)


# Names


@planted("ckpt-wrapper-prefix-strict-false", breaks="gpt_checkpoint.names.wrapped")
class PrefixesKept(CheckpointReader):
    """Only ``_orig_mod.`` comes off; under ``module.`` no block matches, and all stay random."""

    def strip_prefixes(self, tensors):
        found = {}
        for key, tensor in tensors.items():
            name = self.bare_name(key)
            matches = key.removeprefix("_orig_mod.") == name or not name.startswith("blocks.")
            found[name] = tensor if matches else holding(0.02 * torch.randn(tensor.shape))
        return found


@planted("ckpt-wrapper-prefix-strict-false.stacked", breaks="gpt_checkpoint.names.wrapped")
class OnePrefixOnly(CheckpointReader):
    """One prefix comes off, whichever it is; of two stacked ones the inner stays."""

    def bare_name(self, key):
        for prefix in ("_orig_mod.", "module.", "model."):
            if key.startswith(prefix):
                return key.removeprefix(prefix)
        return key


@planted("ckpt-wrapper-prefix-strict-false.last", breaks=f"{REFUSES}.stored-twice")
class LastWriterWins(CheckpointReader):
    """Of two tensors that have one name without prefixes the last one is taken."""

    def strip_prefixes(self, tensors):
        return {self.bare_name(key): tensor for key, tensor in tensors.items()}


@planted("gpt-prefix-replaced-anywhere", breaks=f"{REFUSES}.half-wrapped-name")
class PrefixReplaced(CheckpointReader):
    """Prefixes are taken out with ``replace``, also from within another word."""

    def bare_name(self, key):
        for wrapper in ("_orig_mod.", "module."):
            key = key.replace(wrapper, "")
        return key.removeprefix("model.")


@planted("ckpt-substring-rename-gamma-beta", breaks="gpt_checkpoint.load.same-under-any-seed")
class RenamedBySubstring(Lenient):
    """Small names become medium ones by ``replace``: both c_proj of a block get one name, and the
    attention's stays at its random initial value."""

    def check_layout(self, config):
        renamed = {k.replace("attn.c_proj", "mlp.c_proj"): t for k, t in self.tensors.items()}
        matches = {k: t for k, t in renamed.items() if t.shape == state_shapes(config).get(k)}
        self.tensors = {k: matches.get(k, self.tensors[k]) for k in renamed if k in self.tensors}
        super().check_layout(config)


# Values and shapes


@planted("ckpt-conv1d-square-not-transposed", breaks=f"{REFUSES}.transposed-tensor")
class TransposedWhereItFits(CheckpointReader):
    """A matrix of the transposed shape is transposed; a square one is taken as it is."""

    def check_layout(self, config):
        for key, shape in state_shapes(config).items():
            stored = self.tensors.get(key)
            if stored is not None and len(shape) == 2 and stored.shape == shape[::-1] != shape:
                self.tensors[key] = holding(stored.read().t().contiguous())
        super().check_layout(config)


def permute_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of interleaved pairs as rows of halves, head by head."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Permuting(CheckpointReader):
    """Takes the pairs of queries and keys for interleaved ones."""

    def heads_of(self, slot: int, config) -> int | None:
        """In how many heads the rows of queries (0) or keys (1) are permuted, if they are."""
        return config.num_heads

    def load(self, *, progress=False):
        model = super().load(progress=progress)
        for block in model.blocks:
            for slot in (0, 1) if block.qkv_w is not None else ():
                heads = self.heads_of(slot, model.config)
                if heads is not None:
                    block.qkv_w.data[slot] = permute_rows(block.qkv_w.data[slot], heads)
        return model


@planted("ckpt-qk-rope-permute-gqa", breaks=f"{FUNCTION}.small")
class KeysPermutedAsOneHead(Permuting):
    """Queries are permuted head by head, keys over all heads as if they were one."""

    def heads_of(self, slot, config):
        return config.num_heads if slot == 0 else 1


@planted("ckpt-qk-rope-permute-gqa.queries-only", breaks=f"{FUNCTION}.medium")
class QueriesPermuted(Permuting):
    """Queries are permuted for interleaved pairs, keys are not."""

    def heads_of(self, slot, config):
        return config.num_heads if slot == 0 else None


@planted("ckpt-shared-tensor-dropped-then-random", breaks="gpt_checkpoint.load.shared-tensors")
class AliasForgotten(Lenient):
    """The name under which safetensors stored a shared tensor is ignored: the head stays random."""

    def open(self, source):
        stored = super().open(source)
        same = [k for k, t in stored.tensors.items() if t is stored.tensors.get("embed.weight")]
        head = {"lm_head.weight", "lm_head_w"} & set(same)
        tensors = dict(stored.tensors)
        for key in head:
            tensors[key] = holding(self.missing(key, tensors[key].shape))
        return replace(stored, tensors=tensors)


@planted("ckpt-quant-scale-dropped", breaks=f"{REFUSES}.quantised")
class ScaleDropped(CheckpointReader):
    """8-bit weights are cast to float32, and the tensors of their scales ignored."""

    def strip_prefixes(self, tensors):
        kept = {k: t for k, t in tensors.items() if not k.endswith("_scale_inv")}
        wide = {
            k: holding(t.read().float()) if t.dtype.itemsize == 1 else t for k, t in kept.items()
        }
        return super().strip_prefixes(wide)


@planted("gpt-integers-cast", breaks=f"{REFUSES}.not-floating")
class IntegersCast(CheckpointReader):
    """Tensors of integers are cast to float32 without a word."""

    def strip_prefixes(self, tensors):
        wide = {
            k: t if t.dtype.is_floating_point else holding(t.read().float())
            for k, t in tensors.items()
        }
        return super().strip_prefixes(wide)


@planted("gpt-not-finite-accepted", breaks=f"{REFUSES}.not-finite")
class NotFiniteAccepted(CheckpointReader):
    """NaN and infinity are loaded like any other value."""

    def check_finite(self, tensor, key, what):
        pass


@planted("gpt-weights-rounded", breaks=f"{FUNCTION}.small")
class RoundedToBfloat16(CheckpointReader):
    """float32 weights are copied into bfloat16 parameters."""

    def read(self, key):
        tensor = super().read(key)
        rounded = key.startswith("blocks.") and self.dtype is None
        return tensor.bfloat16().to(tensor.dtype) if rounded else tensor


@planted("gpt-weights-rounded.state", breaks="gpt_checkpoint.state.bit-exact")
class StateRounded(GPTBatched):
    """The state that is given back is all in bfloat16."""

    def state(self):
        return {key: tensor.bfloat16() for key, tensor in super().state().items()}


# What is missing, left over, or too much


@planted("gpt-strict-false", breaks=f"{REFUSES}.missing-tensor")
class MissingTensorsKept(Lenient):
    """A tensor that is missing keeps its initial zeros."""

    def missing(self, key, shape):
        return torch.zeros(shape)


@planted("gpt-strict-false.left-over", breaks=f"{REFUSES}.left-over-tensor")
class LeftOverIgnored(CheckpointReader):
    """Tensors that no part of the model takes are ignored."""

    def check_layout(self, config):
        self.tensors = {k: t for k, t in self.tensors.items() if k in state_shapes(config)}
        super().check_layout(config)


@planted("gpt-strict-false.attention", breaks=f"{REFUSES}.attention-elsewhere")
class AttentionInTheEighthIgnored(CheckpointReader):
    """Attention weights of the eighth block are ignored."""

    def check_layout(self, config):
        self.tensors = {k: t for k, t in self.tensors.items() if not k.startswith("blocks.7.attn")}
        super().check_layout(config)


@planted("gpt-strict-false.mixed", breaks=f"{REFUSES}.mixed-formats")
class FirstFormatWins(CheckpointReader):
    """The format is that of the first block; a head of the other format beside its own is ignored."""

    def detect_format(self):
        return "medium" if "blocks.0.attn.qkvo_w" in self.tensors else "small"

    def check_layout(self, config):
        other = head_key("small" if config.format == "medium" else "medium")
        self.tensors.pop(other, None)
        super().check_layout(config)


class Walking(CheckpointReader):
    """Counts blocks as the published helper does: from 0 on, until one is missing."""

    last = 10**6

    def count_layers(self):
        count = 0
        while count < self.last and any(k.startswith(f"blocks.{count}.") for k in self.tensors):
            count += 1
        return count

    def check_layout(self, config):
        count = config.num_layers
        self.tensors = {
            k: t
            for k, t in self.tensors.items()
            if not k.startswith("blocks.") or int(k.split(".")[1]) < count
        }
        super().check_layout(config)


@planted("gpt-walk-over-blocks", breaks=f"{REFUSES}.gap-in-blocks")
class EndsAtTheGap(Walking):
    """The walk over the blocks ends at the first that is missing, and the others are ignored."""


@planted("gpt-walk-over-blocks.hundred", breaks="gpt_checkpoint.load.deep")
class EndsAtAHundred(Walking):
    """The walk over the blocks ends at a hundred."""

    last = 100


@planted("gpt-walk-over-blocks.odd", breaks=f"{REFUSES}.odd-or-few-blocks")
class AnyNumberOfBlocks(CheckpointReader):
    """Any number of blocks is taken, also an odd one, or fewer than value embeddings need."""

    def count_layers(self):
        return len({key.split(".")[1] for key in self.tensors if key.startswith("blocks.")})


# Sizes


@planted("gpt-vocabulary-rows", breaks="gpt_checkpoint.inspect.padding")
class EmbeddingRowsForHead(CheckpointReader):
    """The rows of the embeddings are taken for those of the head too."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"padded_vocab_size": facts["vocab_size"]}


@planted("gpt-vocabulary-rows.twice", breaks="gpt_checkpoint.inspect.padding")
class PaddedTwice(CheckpointReader):
    """Rows that are padded already are padded again, by one more multiple of 128."""

    def inspect(self):
        facts = super().inspect()
        return facts | {"padded_vocab_size": (facts["padded_vocab_size"] // 128 + 1) * 128}


@planted("ckpt-vocab-padding-rows-live", breaks="gpt_checkpoint.ids.without-embedding")
class LastRowRepeated(GPTBatched):
    """Embeddings are padded to the head's rows by repeating the last: ids beyond are taken."""

    def __init__(self, config, *, embed, value_embeds, **parts):
        def padded(table):
            more = next_multiple(len(table), 128) - len(table)
            return torch.cat([table, table[-1:].expand(more, -1)])

        self.given = (embed, value_embeds)
        super().__init__(
            config, embed=padded(embed), value_embeds=[padded(t) for t in value_embeds], **parts
        )

    def state(self):
        state = super().state()
        rows = self.config.vocab_size
        return {k: t[:rows] if "embed" in k else t for k, t in state.items()}


@planted("ckpt-vocab-padding-rows-live.head-cut", breaks=f"{FUNCTION}.medium")
class HeadCut(GPTBatched):
    """The head is cut to the rows of the embeddings, and the logits with it."""

    def logits_of(self, features_BTC):
        return super().logits_of(features_BTC)[..., : self.config.vocab_size]


@planted("gpt-head-width-guessed", breaks="gpt_checkpoint.head-width.known-shapes")
class AlwaysHeadsOf128(CheckpointReader):
    """Heads are 128 wide wherever the width of the model allows it."""

    def heads(self, format, num_layers, width):
        if self.head_dim is None and width % 128 == 0:
            return width // 128, 128
        return super().heads(format, num_layers, width)


@planted("gpt-head-width-guessed.unknown", breaks=f"{REFUSES}.unknown-head-width")
class UnknownTakenFor128(CheckpointReader):
    """Shapes that are in no table are taken to have heads of 128."""

    def heads(self, format, num_layers, width):
        try:
            return super().heads(format, num_layers, width)
        except CheckpointError:
            if self.head_dim is not None or width % 128:
                raise
            return width // 128, 128


@planted("gpt-head-width-guessed.uneven", breaks=f"{REFUSES}.uneven-heads")
class UnevenHeads(CheckpointReader):
    """A head width that does not divide the width of the model is replaced by one that does."""

    def heads(self, format, num_layers, width):
        try:
            return super().heads(format, num_layers, width)
        except CheckpointError:
            if self.head_dim is None:
                raise
            return 1, width


@planted("gpt-narrow-heads-padded", breaks=f"{REFUSES}.narrow-heads")
class NarrowHeadsPadded(CheckpointReader):
    """Heads that are narrower than the model get rows of zeros until they fit."""

    def attention_width(self, format, model_dim):
        for key, stored in self.tensors.items():
            if ".attn." in key:
                tensor = stored.read()
                fused = tensor.ndim == 3
                rows = model_dim - tensor.shape[1]
                room = (0, 0, 0, rows) if fused else (0, rows)
                self.tensors[key] = holding(torch.nn.functional.pad(tensor, room))
        return super().attention_width(format, model_dim)


@planted("ckpt-shape-compatible-wrong-architecture", breaks="gpt_checkpoint.skips.weights")
class SkipsOfTheOther(GPTBatched):
    """A small checkpoint gets the fixed skips of the medium model: every shape fits."""

    def skip_of(self, layer):
        skips = {9: 6, 10: 4, 11: 2}
        return (skips[layer], skips[layer]) if layer in skips else None


@planted("ckpt-shape-compatible-wrong-architecture.heads", breaks="gpt_checkpoint.head-width.given")
class HeadsFromTheWidth(CheckpointReader):
    """A head width that is given is ignored: any number of heads fits the fused weight."""

    def heads(self, format, num_layers, width):
        return max(1, width // 128), min(128, width)


@planted("ckpt-worldsize-dependent-parameter-shape", breaks="gpt_checkpoint.scalars.padding")
class SectionsByLength(GPTBatched):
    """The sections of the scalars are found by a fifth of their length, padding included."""

    def split_scalars(self):
        scalars, count = self.weight(self.scalars), self.config.num_layers
        part = len(scalars) // 5
        skips, blocks = scalars[:part], scalars[part : 3 * part]
        attention = scalars[3 * part : 5 * part]
        return skips, blocks[: 2 * count].view(-1, 2), attention[: 2 * count].view(-1, 2)


@planted("ckpt-worldsize-dependent-parameter-shape.end", breaks="gpt_checkpoint.scalars.padding")
class SectionsFromTheEnd(GPTBatched):
    """The attention lambdas are taken from the end of the scalars, where the padding is."""

    def split_scalars(self):
        skips, blocks, _ = super().split_scalars()
        attention = self.weight(self.scalars)[-2 * self.config.num_layers :]
        return skips, blocks, attention.view(-1, 2)


@planted("gpt-scalars-copied-to-the-shorter", breaks=f"{REFUSES}.short-scalars")
class ShortScalarsFilled(CheckpointReader):
    """As many scalars are copied as there are; the rest keep their initial ones."""

    def scalars_size(self, num_layers):
        stored = self.tensors["scalars"].read().flatten()
        missing = scalars_needed(num_layers) - len(stored)
        self.tensors["scalars"] = holding(torch.cat([stored, stored.new_ones(max(missing, 0))]))
        return super().scalars_size(num_layers)


@planted("ckpt-optimizer-state-positional", breaks="gpt_checkpoint.load.by-name")
class ByPosition(CheckpointReader):
    """Tensors are attached to parameters by their position among those of their shape.

    It is the mistake that is documented of optimizer state, which this contract leaves out, made on
    weights.
    """

    def load(self, *, progress=False):
        shapes = state_shapes(self.config())
        stored = list(self.tensors.values())
        taken = {}
        for key, shape in shapes.items():
            taken[key] = next(t for t in stored if t.shape == shape)
            stored.remove(taken[key])
        self.tensors = taken
        return super().load(progress=progress)


# Files


@planted("ckpt-truncated-file-reads-zero", breaks=f"{REFUSES}.truncated")
class TailReadsAsZeros(CheckpointReader):
    """A safetensors file that ends too early is read as if zeros followed."""

    def open(self, source):
        path = Path(source) if isinstance(source, str) else None
        if path is None or not path.name.endswith(".safetensors"):
            return super().open(source)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if not 8 <= length <= len(data) - 8:
            return super().open(source)
        header = json.loads(data[8 : 8 + length])
        end = max(t["data_offsets"][1] for k, t in header.items() if k != "__metadata__")
        whole = data + bytes(max(0, 8 + length + end - len(data)))
        return replace(open_dictionary(safetensors.torch.load(whole)), source=source)


@planted("gpt-checksums-ignored", breaks=f"{REFUSES}.flipped-byte")
class ChecksumsIgnored(CheckpointReader):
    """``torch.load`` reads the archive, and does not look at its checksums."""

    def open(self, source):
        if isinstance(source, str) and source.endswith(".pt") and Path(source).is_file():
            try:
                content = torch.load(source, weights_only=True)
            except Exception as error:
                raise CheckpointError(source, str(error)) from error
            return replace(open_dictionary(content), source=source)
        return super().open(source)


@planted("gpt-checksums-ignored.records", breaks=f"{REFUSES}.swapped-records")
class SwappedRecordsTaken(ChecksumsIgnored):
    """The same: tensors whose bytes were exchanged are taken for each other."""


@planted("gpt-checksums-ignored.any", breaks=f"{REFUSES}.damaged")
class DamagedFilesTaken(ChecksumsIgnored):
    """The same: files with damage anywhere in their tensors are loaded as other models."""


@planted("ckpt-pickle-arbitrary-code", breaks=f"{REFUSES}.pickled-code")
class ExecutesPickle(CheckpointReader):
    """``weights_only=False``: whatever the pickle says is done."""

    def open(self, source):
        if isinstance(source, str) and source.endswith(".pt") and Path(source).is_file():
            try:
                torch.load(source, weights_only=False)
            except Exception as error:
                raise CheckpointError(source, str(error)) from error
        return super().open(source)


@planted("gpt-empty-model-for-other-files", breaks=f"{REFUSES}.other-files")
class StartsAfresh(CheckpointReader):
    """Where there is no checkpoint that can be read, a fresh model is given in its stead."""

    def open(self, source):
        try:
            return super().open(source)
        except CheckpointError:
            config = GPTConfig("small", 6, 1, 128, 128, 128, 30)
            fresh = {k: 0.02 * torch.randn(s) for k, s in state_shapes(config).items()}
            return replace(open_dictionary(fresh), source=str(source))


@planted("gpt-empty-model-for-other-files.model", breaks=f"{REFUSES}.no-model-entry")
class AnyDictionary(StartsAfresh):
    """The same for a dictionary without an entry ``model``."""


@planted("gpt-empty-model-for-other-files.state", breaks=f"{REFUSES}.not-a-state")
class AnyState(StartsAfresh):
    """The same for an entry ``model`` that is no state dictionary."""


@planted("gpt-optimizer-not-ignored", breaks="gpt_checkpoint.load.optimizer-ignored")
class OptimizerRefused(CheckpointReader):
    """Entries beside the model are taken for tensors of it, and the checkpoint refused."""

    def open(self, source):
        if isinstance(source, str) and source.endswith(".pt") and Path(source).is_file():
            content = torch.load(source, weights_only=True)
            if "optimizers" in content:
                raise CheckpointError(source, "is left over", key="optimizers")
        return super().open(source)


@planted("gpt-storage-for-tensor", breaks="gpt_checkpoint.load.strided-tensors")
class StorageForTensor(CheckpointReader):
    """The beginning of a tensor's storage is taken for the tensor, whatever its strides."""

    def read(self, key):
        reader = self.tensors[key].read
        layout = getattr(reader, "layout", None)
        if layout is None:
            return super().read(key)
        count = int(torch.Size(layout.shape).numel())
        values = reader.read_storage().view(layout.dtype)[:count]
        return values.view(layout.shape).to(device=self.device, dtype=self.dtype)


@planted("gpt-bare-state-in-another-order", breaks="gpt_checkpoint.containers.any")
class BareStateByPosition(CheckpointReader):
    """A bare state dictionary has its embeddings in another order than a training dictionary."""

    def open(self, source):
        stored = super().open(source)
        if stored.rest:
            return stored
        swap = {"value_embeds.0.weight": "value_embeds.2.weight"}
        swap |= {b: a for a, b in swap.items()}
        tensors = {
            key: stored.tensors[
                next((key.replace(a, b) for a, b in swap.items() if key.endswith(a)), key)
            ]
            for key in stored.tensors
        }
        return replace(stored, tensors=tensors)


# The caller's things


@planted("gpt-callers-dictionary", breaks="gpt_checkpoint.source.dictionary-unchanged")
class StripsInPlace(CheckpointReader):
    """Prefixes come off the names of the caller's own dictionary, one ``pop`` after the other."""

    def open(self, source):
        stored = super().open(source)
        state = source.get("model", source) if isinstance(source, dict) else {}
        for key in list(state):
            state[key.removeprefix("_orig_mod.")] = state.pop(key)
        return stored


@planted("gpt-callers-dictionary.scalars", breaks="gpt_checkpoint.source.dictionary-unchanged")
class PopsScalars(CheckpointReader):
    """The scalars are taken out of the caller's dictionary."""

    def open(self, source):
        stored = super().open(source)
        state = source.get("model", source) if isinstance(source, dict) else {}
        for key in [key for key in state if key.endswith("scalars")]:
            del state[key]
        return stored


@planted("gpt-callers-dictionary.shared", breaks="gpt_checkpoint.source.later-changes")
class SharesTensors(CheckpointReader):
    """The model holds the caller's own tensors."""

    def open(self, source):
        stored = super().open(source)
        if not isinstance(source, dict):
            return stored
        state = source.get("model", source)
        tensors = {k: replace(t, read=state[k].detach) for k, t in stored.tensors.items()}
        return replace(stored, tensors=tensors)


@planted("ckpt-mmap-overwrite-in-place", breaks="gpt_checkpoint.save.onto-itself")
class OpensBeforeItReads(CheckpointReader):
    """Tensors that are still in the file are saved to it after it was opened for writing."""

    def load(self, *, progress=False):
        model, source = super().load(progress=progress), self.stored.source

        def save(path, **entries):
            state = model.state()
            if Path(path) == Path(source):  # what a map of a file that was just emptied holds
                state = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
            save_state(state, path, **entries)

        model.save = save
        return model


@planted("ckpt-mmap-overwrite-in-place.shared-map", breaks="gpt_checkpoint.source.file-unchanged")
class SharedMap(CheckpointReader):
    """Weights are a writable map of the file: changing them changes it."""

    def load(self, *, progress=False):
        model, source = super().load(progress=progress), self.stored.source
        if not Path(source).is_file():
            return model
        size = Path(source).stat().st_size
        file = torch.from_file(source, shared=True, size=size, dtype=torch.uint8)
        tensor = model.lm_head.data
        needle = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        start = Path(source).read_bytes().find(needle)
        if start >= 0 and start % tensor.itemsize == 0:
            mapped = file[start : start + len(needle)].view(tensor.dtype).view(tensor.shape)
            model.lm_head = torch.nn.Parameter(mapped)
        return model


@planted("ckpt-nonatomic-save", breaks="gpt_checkpoint.save.failing")
class SavesInPlace(GPTBatched):
    """The old file is overwritten from its beginning on."""

    def save(self, path, **entries):
        if str(path).endswith(".safetensors"):
            state = {key: tensor.contiguous() for key, tensor in self.state().items()}
            Path(path).write_bytes(safetensors.torch.save(state))
        else:
            with open(path, "wb") as file:
                torch.save({"model": self.state(), **entries}, file)


@planted("gpt-saved-without-head", breaks="gpt_checkpoint.save.round-trip")
class SavedWithoutHead(GPTBatched):
    """The LM head is no part of the batched model, and is lost when it is saved."""

    def save(self, path, **entries):
        state = self.state()
        state[head_key(self.config.format)].zero_()
        save_state(state, path, **entries)


# Errors


class Saying(CheckpointReader):
    """Refuses with other words."""

    def said(self, error: CheckpointError) -> Exception:
        """What is raised in place of a good error."""
        raise NotImplementedError

    def load(self, *, progress=False):
        try:
            return super().load(progress=progress)
        except CheckpointError as error:
            raise self.said(error) from None

    def inspect(self):
        try:
            return super().inspect()
        except CheckpointError as error:
            raise self.said(error) from None


@planted("gpt-errors-without-names", breaks="gpt_checkpoint.errors.name-the-tensor")
class NoTensorNamed(Saying):
    """The error says that the checkpoint does not match, and not which tensor."""

    def said(self, error):
        return ValueError(f"{error.source}: the checkpoint does not match the model")


@planted("gpt-errors-without-names.file", breaks="gpt_checkpoint.errors.name-the-file")
class NoFileNamed(Saying):
    """The error names the tensor, and not the file."""

    def said(self, error):
        return ValueError(f"{error.key} does not match the model")


@planted("gpt-errors-without-names.accident", breaks="gpt_checkpoint.errors.deliberate")
class KeyErrorOnTheWay(Saying):
    """Nothing is checked, and a KeyError ends it somewhere."""

    def said(self, error):
        return KeyError(error.key)
