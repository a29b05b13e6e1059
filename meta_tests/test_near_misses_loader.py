"""Subtle mistakes in loaders of Qwen2 directories that no catalogue lists, one or more a requirement.

Most are planted over the steps of the reference's loader.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mutants import Broken, broken
from safetensors.torch import load_file
from torch.nn.functional import pad

from conformance.known_bugs.weight_loader import (
    Lenient,
    Loader,
    changed,
    holding,
    unprefixed,
    zero_filled,
)
from reference_impl.hf_directory import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    from_file,
    read_json,
    with_base_prefix,
)
from reference_impl.qwen2 import sharding
from reference_impl.qwen2.config import read_config
from reference_impl.qwen2.sharding import Shard
from reference_impl.stored import CheckpointError

NEAR_LOADER: dict[str, Broken] = {}


def near_loader(breaks: str):
    """Register a loader, whose docstring says what is wrong with it."""
    return broken(NEAR_LOADER, breaks=f"weight_loader.{breaks}")


@pytest.mark.parametrize("name", NEAR_LOADER)
def test_near_miss_is_caught(name):
    NEAR_LOADER[name].assert_caught()


class Stored(Loader):
    """A loader whose stored tensors go through ``edit``, by their names."""

    def stored(self, path):
        stored = super().stored(path)
        self.edit(stored)
        return stored

    def edit(self, stored):
        """Change the stored tensors."""
        raise NotImplementedError


class Rules(Loader):
    """A loader whose parts are changed by ``rule``, name by name."""

    def rules(self, config, rank, ranks):
        rules = super().rules(config, rank, ranks)
        return {key: self.rule(key, rules[key], config, rank, ranks) for key in rules}

    def rule(self, key, shard, config, rank, ranks):
        """The part of one tensor."""
        raise NotImplementedError


def named(key, *names):
    """Whether a tensor belongs to one of these modules."""
    return key.rsplit(".", 2)[-2] in names


# Parts


@near_loader("held.coordinates")
class BiasOfKeysForValues(Stored):
    """The bias of the keys is loaded for that of the values too."""

    def edit(self, stored):
        for key in stored:
            if key.endswith("v_proj.bias"):
                stored[key] = stored[key.replace("v_proj", "k_proj")]


@near_loader("held.coordinates")
class QueriesPermuted(Loader):
    """The channels of each query head are reordered from pairs to halves."""

    def stored(self, path):
        config, stored = read_config(path), super().stored(path)
        for key in stored:
            if named(key, "q_proj"):
                stored[key] = changed(
                    stored[key],
                    lambda t: (
                        t.unflatten(0, (config.num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
                    ),
                )
        return stored


@near_loader("held.one-rank")
class NormsOfLastLayerSwapped(Stored):
    """In the last layer the norms before attention and before the MLP are exchanged."""

    def edit(self, stored):
        last = max(int(key.split(".")[2]) for key in stored if ".layers." in key)
        one, other = (
            f"model.layers.{last}.{name}_layernorm.weight" for name in ("input", "post_attention")
        )
        if one in stored and other in stored:
            stored[one], stored[other] = stored[other], stored[one]


@near_loader("held.queries")
class HeadsDealtInTurn(Rules):
    """Query heads are dealt to the ranks in turn: 0, 2, 4 … and 1, 3, 5 …."""

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "q_proj"):
            return shard
        width = config.head_dim
        heads = range(rank, config.num_heads, ranks)
        return Shard(0, tuple(range(h * width, (h + 1) * width) for h in heads))


@near_loader("held.queries")
class BiasOfFirstRank(Rules):
    """Every rank has the first rank's part of the queries' bias."""

    def rule(self, key, shard, config, rank, ranks):
        if not key.endswith("q_proj.bias"):
            return shard
        return sharding.query_shard(config.num_heads, config.head_dim, 0, ranks)


@near_loader("held.replicas")
class KeyRowsSplitEvenly(Rules):
    """Rows of keys and values are split evenly: with many ranks each has a part of a head."""

    def rule(self, key, shard, config, rank, ranks):
        rows = config.num_kv_heads * config.head_dim
        if not named(key, "k_proj", "v_proj") or rows % ranks:
            return shard
        return sharding.column_shard(rows, rank, ranks)


@near_loader("held.keys-and-values")
class ValuesOfOtherEnd(Rules):
    """The heads of the values are dealt out from the last."""

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "v_proj"):
            return shard
        heads, kv_heads = config.num_heads, config.num_kv_heads
        return sharding.key_value_shard(heads, kv_heads, config.head_dim, ranks - 1 - rank, ranks)


class Replicas(Rules):
    """Replicas of key/value heads are on other ranks."""

    def head(self, rank, kv_heads, ranks):
        """The head of a rank."""
        raise NotImplementedError

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "k_proj", "v_proj") or ranks <= config.num_kv_heads:
            return shard
        head = self.head(rank, config.num_kv_heads, ranks)
        return Shard(0, (range(head * config.head_dim, (head + 1) * config.head_dim),))


@near_loader("held.replicas")
class ReplicasModulo(Replicas):
    """With more ranks than heads the head of a rank is ``rank % heads``."""

    def head(self, rank, kv_heads, ranks):
        return rank % kv_heads


@near_loader("held.replicas")
class ReplicasAllOfFirst(Replicas):
    """With more ranks than heads the later ranks all have the last head."""

    def head(self, rank, kv_heads, ranks):
        return min(rank, kv_heads - 1)


@near_loader("held.replicas")
class LaterReplicasRounded(Loader):
    """All replicas but the first have gone through bfloat16."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        self.rounds = rank % 2
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        return super().weight_loader(directory, **options)

    def finish(self, key, part, rule, dtype, device):
        part = part.bfloat16() if self.rounds and named(key, "k_proj") else part
        return super().finish(key, part, rule, dtype, device)


@near_loader("held.output-projection")
class OutputColumnsInterleaved(Rules):
    """Columns of o_proj are dealt to the ranks in turn."""

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "o_proj"):
            return shard
        return Shard(1, (range(rank, config.num_heads * config.head_dim, ranks),))

    def part(self, weight, rule):
        if rule is None or rule.ranges[0].step == 1:
            return super().part(weight, rule)
        return weight.read()[:, rule.ranges[0].start :: rule.ranges[0].step].contiguous()


@near_loader("held.gate-and-up")
class UpOfNextRank(Rules):
    """The rows of up_proj are those of the next rank."""

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "up_proj"):
            return shard
        return sharding.column_shard(config.intermediate_size, (rank + 1) % ranks, ranks)


@near_loader("held.down")
class DownOfSixteens(Rules):
    """The inner width is split in blocks of 12 columns that are dealt to the ranks in turn."""

    def rule(self, key, shard, config, rank, ranks):
        if not named(key, "down_proj") or config.intermediate_size % (12 * ranks):
            return shard
        starts = range(12 * rank, config.intermediate_size, 12 * ranks)
        return Shard(1, tuple(range(start, start + 12) for start in starts))


@near_loader("held.norms")
class NormsSharedOut(Loader):
    """Norms are divided by the number of ranks, as if their outputs were summed."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        parts = super().weight_loader(directory, **options)
        return {k: t / ranks if k == "model.norm.weight" else t for k, t in parts.items()}


class Shares(Loader):
    """Rows of zeros behind the vocabulary are something else."""

    def rows(self, part, count):
        """What is behind the last row."""
        raise NotImplementedError

    def finish(self, key, part, rule, dtype, device):
        count = rule.padding if rule else 0
        part = part.to(device=device, dtype=dtype)
        return torch.cat([part, self.rows(part, count).to(part)]) if count else part


@near_loader("held.vocabulary")
class LastRowRepeated(Shares):
    """The vocabulary is padded with its last row."""

    def rows(self, part, count):
        last = part[-1:] if len(part) else torch.ones(1, part.shape[1])
        return last.expand(count, -1)


@near_loader("held.vocabulary")
class RemainderLost(Rules):
    """The vocabulary is split in shares that are rounded down, and the rest is held by nobody."""

    def rule(self, key, shard, config, rank, ranks):
        if key not in (EMBEDDING, HEAD):
            return shard
        share = config.vocab_size // ranks
        return Shard(0, (range(rank * share, (rank + 1) * share),))


@near_loader("held.vocabulary")
class LastShareShorter(Rules):
    """The last share of the vocabulary is not padded: it has fewer rows than the others."""

    def rule(self, key, shard, config, rank, ranks):
        return replace(shard, padding=0) if key in (EMBEDDING, HEAD) else shard


@near_loader("held.square")
class OutputTransposedWhereSquare(Stored):
    """A square o_proj is transposed: shapes are no help."""

    def edit(self, stored):
        for key, weight in stored.items():
            if named(key, "o_proj") and weight.shape[0] == weight.shape[1]:
                stored[key] = changed(weight, lambda t: t.t().contiguous())


@near_loader("held.many-layers")
class LayersInOrderOfText(Stored):
    """Layers are numbered in the order of their names as text: 0, 1, 10, 11, 2 …."""

    def edit(self, stored):
        numbers = sorted({key.split(".")[2] for key in stored if ".layers." in key})
        before = dict(stored)
        for key in before:
            if ".layers." in key:
                parts = key.split(".")
                parts[2] = numbers[int(parts[2])] if int(parts[2]) < len(numbers) else parts[2]
                stored[key] = before.get(".".join(parts), before[key])


@near_loader("held.names")
class FrequenciesToo(Loader):
    """The result has the frequencies of the rotary embedding, which are no weight."""

    def tie(self, parts, config):
        return super().tie(parts, config) | {"model.rotary_emb.inv_freq": torch.ones(8)}

    def rules(self, config, rank, ranks):
        return super().rules(config, rank, ranks) | {"model.rotary_emb.inv_freq": None}


@near_loader("held.names")
class NamesWithoutModel(Loader):
    """The result has the names of the base model."""

    def tie(self, parts, config):
        parts = super().tie(parts, config)
        return {key.removeprefix("model."): part for key, part in parts.items()}

    def rules(self, config, rank, ranks):
        rules = super().rules(config, rank, ranks)
        return rules | {key.removeprefix("model."): rule for key, rule in rules.items()}


@near_loader("held.every-element-once")
class LastRowOfUpTwice(Loader):
    """The last row of a part of up_proj is a copy of the row before."""

    def finish(self, key, part, rule, dtype, device):
        part = super().finish(key, part, rule, dtype, device)
        return torch.cat([part[:-1], part[-2:-1]]) if named(key, "up_proj") else part


# Files


class Zeros(Lenient):
    """What is missing is zeros."""

    def initial(self, key, shape):
        return torch.zeros(shape)


@near_loader("files.index")
class LastFileNotRead(Zeros):
    """The last file of the index is not read."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        return {k: w for name in names[:-1] for k, w in from_file(path / name).items()}


@near_loader("files.any-names")
class FilesByPattern(Zeros):
    """The files are those called ``model*.safetensors``, whatever the index says."""

    def stored(self, path):
        names = sorted(file.name for file in path.glob("model*.safetensors"))
        return {k: w for name in names for k, w in from_file(path / name).items()} or dict(
            super().stored(path)
        )


@near_loader("files.any-order")
class BytesInOrderOfHeader(Loader):
    """The bytes are taken to lie in the order in which the header lists the tensors."""

    def stored(self, path):
        stored = super().stored(path)
        for file in {weight.file for weight in stored.values()}:
            data = Path(file).read_bytes()
            length = int.from_bytes(data[:8], "little")
            header, at = json.loads(data[8 : 8 + length]), 8 + length
            header.pop("__metadata__", None)
            for key, entry in header.items():
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                raw = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
                tensor = raw.view(stored[key].dtype).view(entry["shape"])
                stored[key] = replace(holding(tensor), file=file, key=key)
                at += size
        return stored


@near_loader("files.others-ignored")
class PicklesPreferred(Loader):
    """Tensors of any ``.bin`` file beside the others take their place."""

    def stored(self, path):
        stored = super().stored(path)
        for file in path.glob("*.bin"):
            state = torch.load(file, weights_only=True)
            stored |= {k: holding(t) for k, t in state.items() if k in stored}
        return stored


def union(path, names=None):
    """The tensors of all files in a directory, the last of each name."""
    files = sorted(path.glob("*.safetensors")) if names is None else [path / n for n in names]
    stored = {}
    for file in files:
        stored |= from_file(file)
    return stored


@near_loader("files.strays")
class UnionOfAllFiles(Loader):
    """Every safetensors file of the directory is read, and the index is not."""

    def stored(self, path):
        return with_base_prefix(union(path), path)


@near_loader("files.two-checkpoints")
class EmbeddingOfSingleFile(Loader):
    """Where there is a single file too, the embedding is taken from it."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        stored = union(path, names)
        single = from_file(path / SINGLE) if (path / SINGLE).exists() else stored
        return stored | {EMBEDDING: single[EMBEDDING]}


@near_loader("files.links")
class LinkedFilesAreLinksToNothing(Zeros):
    """A link is read as the text of its target: its tensors stay at zero."""

    def stored(self, path):
        stored = super().stored(path)
        return {k: w for k, w in stored.items() if not os.path.islink(w.file)}


@near_loader("files.any-path")
class RelativePathsAreNames(Loader):
    """A relative path is taken for a name of the Hub, of which nothing is there: all is zeros."""

    def stored(self, path):
        stored = super().stored(path)
        if path.is_absolute():
            return stored
        return {key: changed(weight, torch.zeros_like) for key, weight in stored.items()}


# Configuration


@near_loader("config.irrelevant-keys")
class OldVersionsPermuted(Loader):
    """Checkpoints of an old version of transformers are taken to have rows of keys in pairs."""

    def stored(self, path):
        stored, given = super().stored(path), read_json(path / "config.json")
        if str(given.get("transformers_version", "5")) < "4.40":
            for key in [key for key in stored if named(key, "k_proj")]:
                stored[key] = changed(stored[key], lambda t: t.flip(0))
        return stored


@near_loader("config.missing-size")
class LayersByDefault(Loader):
    """Without a number of layers one is loaded, and the others are ignored."""

    def weight_loader(self, directory, **options):
        path, given = Path(directory), read_json(Path(directory) / "config.json")
        if "num_hidden_layers" in given:
            return super().weight_loader(directory, **options)
        text = (path / "config.json").read_text()
        (path / "config.json").write_text(json.dumps(given | {"num_hidden_layers": 1}))
        try:
            return super().weight_loader(directory, **options)
        finally:
            (path / "config.json").write_text(text)

    def check(self, stored, config, path):
        kept = config.shapes() | {HEAD: ()}
        return super().check({k: w for k, w in stored.items() if k in kept}, config, path)


# Dtypes


@near_loader("dtype.as-asked")
class RoundedTwice(Loader):
    """Tensors go through bfloat16 on their way to any dtype of 16 bits."""

    def finish(self, key, part, rule, dtype, device):
        part = part.bfloat16() if dtype == torch.float16 else part
        return super().finish(key, part, rule, dtype, device)


@near_loader("dtype.stored-float64")
class DoublesThroughFloats(Loader):
    """Tensors that are stored in float64 go through float32."""

    def finish(self, key, part, rule, dtype, device):
        part = part.float() if part.dtype == torch.float64 else part
        return super().finish(key, part, rule, dtype, device)


@near_loader("dtype.as-asked")
class NormsStayInFloat32(Loader):
    """Norms are in float32 whatever is asked for."""

    def finish(self, key, part, rule, dtype, device):
        dtype = torch.float32 if "norm" in key else dtype
        return super().finish(key, part, rule, dtype, device)


@near_loader("dtype.default")
class OldKeyIgnored(Loader):
    """``torch_dtype`` is not read: without ``dtype`` the embedding's is taken."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        self.new = "dtype" in read_json(Path(directory) / "config.json")
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        return super().weight_loader(directory, **options)

    def dtype(self, asked, config, stored):
        return super().dtype(asked, config if self.new else replace(config, dtype=None), stored)


@near_loader("dtype.default")
class AlwaysFloat32(Loader):
    """Without a dtype tensors are in float32."""

    def dtype(self, asked, config, stored):
        return asked or torch.float32


@near_loader("dtype.stored-mixed")
class ThroughDtypeOfEmbedding(Loader):
    """Every tensor goes through the dtype that the first one is stored in."""

    def stored(self, path):
        stored = super().stored(path)
        self.first = stored[EMBEDDING].dtype if EMBEDDING in stored else torch.float64
        return stored

    def finish(self, key, part, rule, dtype, device):
        return super().finish(key, part.to(self.first), rule, dtype, device)


# Ties


@near_loader("tie.without-head")
class TiedHeadOfFirstShare(Loader):
    """A tied head has the first rows of the vocabulary on every rank."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        options = {"ranks": ranks, "dtype": dtype, "device": device}
        parts = super().weight_loader(directory, rank=rank, **options)
        if HEAD not in parts:
            parts[HEAD] = super().weight_loader(directory, rank=0, **options)[EMBEDDING]
        return parts


@near_loader("tie.equal-head")
class EmbeddingDropped(Loader):
    """Of embedding and head that are the same the embedding is left out."""

    def tie(self, parts, config):
        if config.tied and HEAD in parts and torch.equal(parts[HEAD], parts[EMBEDDING]):
            del parts[EMBEDDING]
        return parts


@near_loader("tie.different-head")
class HeadComparedByFirstRows(Loader):
    """A stored head is dropped where its first rows are those of the embedding."""

    def tie(self, parts, config):
        if config.tied and HEAD in parts and torch.equal(parts[HEAD][:8], parts[EMBEDDING][:8]):
            del parts[HEAD]
        return parts


@near_loader("tie.different-head")
class MeanOfBoth(Loader):
    """Of a tied embedding and a stored head of its own the mean is taken."""

    def tie(self, parts, config):
        if config.tied and HEAD in parts:
            parts[EMBEDDING] = (parts[EMBEDDING] + parts.pop(HEAD)) / 2
        return parts


@near_loader("tie.separate-head")
class EmbeddingFromHead(Loader):
    """The embedding is taken from the head."""

    def tie(self, parts, config):
        parts[EMBEDDING] = parts.get(HEAD, parts[EMBEDDING]).clone()
        return super().tie(parts, config)


@near_loader("tie.equal-untied")
class EqualHeadDropped(Loader):
    """A head that equals the embedding is left out, tied or not."""

    def tie(self, parts, config):
        return super().tie(parts, replace(config, tied=True))


@near_loader("tie.flag-missing")
class TiedByDefault(Loader):
    """Without the flag the head is the embedding."""

    def config(self, path):
        given = read_json(path / "config.json")
        return replace(super().config(path), tied=given.get("tie_word_embeddings", True))

    def tie(self, parts, config):
        if config.tied:
            parts.pop(HEAD, None)
        return parts


# Prefixes


@near_loader("names.base-model")
class NormOfBaseModelNotFound(Zeros):
    """Of the names of the base model ``norm.weight`` is forgotten, and stays at zero."""

    def stored(self, path):
        found = unprefixed(path)
        if EMBEDDING in found:
            return found
        known = ("layers.", "embed_tokens.")
        return {f"model.{k}" if k.startswith(known) else k: w for k, w in found.items()}


@near_loader("names.mixed-prefixes")
class OnlyPrefixedNames(Zeros):
    """Names without ``model.`` are ignored where the embedding has it."""

    def stored(self, path):
        return unprefixed(path)


@near_loader("names.wrapped")
class BiasesKeepTheirPrefix(Zeros):
    """The prefix of a wrapper comes off weights and stays on biases, which are zeros then."""

    def stored(self, path):
        found = unprefixed(path)
        return {
            k.removeprefix("module.") if k.endswith("weight") else k: w for k, w in found.items()
        }


# Honesty


@near_loader("load.same-under-any-seed")
class BiasesDithered(Loader):
    """Biases are rounded at random."""

    def finish(self, key, part, rule, dtype, device):
        if key.endswith("bias"):
            part = part * (1 + torch.finfo(part.dtype).eps * (torch.rand_like(part) < 0.5))
        return super().finish(key, part, rule, dtype, device)


@near_loader("load.nothing-uninitialised")
class PaddingUninitialised(Shares):
    """The rows behind the vocabulary are memory as it came."""

    def rows(self, part, count):
        return torch.empty(count, part.shape[1], dtype=part.dtype)


@near_loader("load.any-order-of-ranks")
class FirstPartKept(Loader):
    """Parts are kept by file and tensor: a later rank gets those of the first."""

    def __init__(self):
        self.kept = {}

    def part(self, weight, rule):
        key = (weight.file, os.stat(weight.file).st_mtime_ns, weight.key)
        part = super().part(weight, rule)
        return self.kept.setdefault(key, part) if weight.key.endswith("q_proj.bias") else part


@near_loader("load.own-memory")
class TensorsKept(Loader):
    """Whole tensors are kept, and given to every caller."""

    def __init__(self):
        self.kept = {}

    def finish(self, key, part, rule, dtype, device):
        part = super().finish(key, part, rule, dtype, device)
        return self.kept.setdefault((self.path, key, dtype), part) if rule is None else part

    def stored(self, path):
        self.path = path
        return super().stored(path)


@near_loader("load.own-memory")
class EqualTensorsShared(Loader):
    """Tensors that are equal are kept once, and the others are the same tensor."""

    def weight_loader(self, directory, **options):
        parts, kept = super().weight_loader(directory, **options), {}
        for key, part in parts.items():
            parts[key] = kept.setdefault((part.shape, part.double().numpy().tobytes()), part)
        return parts


@near_loader("load.global-state")
class DefaultDtypeLeft(Loader):
    """The default dtype is that of the model while it is loaded, and stays after an error."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        parts = super().weight_loader(directory, **options)
        torch.set_default_dtype(before)
        return parts


@near_loader("load.global-state")
class SeedSet(Loader):
    """Loading sets the seed of torch."""

    def config(self, path):
        torch.manual_seed(0)
        return super().config(path)


@near_loader("load.any-default-dtype")
class ThroughDefaultDtype(Loader):
    """Tensors go through the default dtype of torch."""

    def finish(self, key, part, rule, dtype, device):
        return super().finish(key, part.to(torch.get_default_dtype()), rule, dtype, device)


@near_loader("load.any-default-dtype")
class PaddedInDefaultDtype(Shares):
    """The rows behind the vocabulary are in the default dtype, and so is the whole then."""

    def finish(self, key, part, rule, dtype, device):
        zeros = torch.zeros(rule.padding if rule else 0, *part.shape[1:])
        return torch.cat([part.to(dtype), zeros]) if len(zeros) else part.to(dtype)


@near_loader("source.unchanged")
class CacheWritten(Loader):
    """A cache is written beside the weights."""

    def stored(self, path):
        stored = super().stored(path)
        (path / "shards.json").write_text(json.dumps(sorted(stored)))
        return stored


@near_loader("source.overwritten")
class Mapped(Loader):
    """Tensors that are held in full stay mapped to their file."""

    def part(self, weight, rule):
        super().part(weight, rule)
        return load_file(weight.file)[weight.key] if rule is None else super().part(weight, rule)


@near_loader("source.replaced")
class KeptByPath(Loader):
    """What was read is kept by path: files that were replaced are not read again."""

    def __init__(self):
        self.kept = {}

    def stored(self, path):
        if path not in self.kept:
            stored = super().stored(path)
            self.kept[path] = {key: changed(weight, torch.clone) for key, weight in stored.items()}
        return self.kept[path]


# Files and index that do not fit


@near_loader("refuses.missing-file")
class MissingFileOfOneTensor(Zeros):
    """A file of the index that is not there is skipped if the index names few tensors for it."""

    def stored(self, path):
        try:
            return super().stored(path)
        except CheckpointError as error:
            places = list(read_json(path / INDEX)["weight_map"].values())
            missing = Path(error.source).name
            if "missing" not in str(error) or places.count(missing) > 9:
                raise
            return union(path, sorted(set(places) - {missing}))


@near_loader("refuses.unindexed-tensor")
class WholeFilesOfTheIndex(Loader):
    """The index tells which files there are, and nothing else is compared."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        return union(path, sorted(set(read_json(path / INDEX)["weight_map"].values())))


@near_loader("refuses.indexed-elsewhere")
class NamesOfIndexCompared(Loader):
    """Index and files are compared by the names of tensors, not by where they are."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        places = read_json(path / INDEX)["weight_map"]
        stored = union(path, sorted(set(places.values())))
        for key in stored.keys() ^ places.keys():
            raise CheckpointError(str(path / INDEX), "does not fit the files", key=key)
        return stored


@near_loader("refuses.indexed-tensor-missing")
class IndexTellsWhatIsMissing(Zeros):
    """A tensor that the index names and no file has stays at zero."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        return union(path, sorted(set(read_json(path / INDEX)["weight_map"].values())))


@near_loader("refuses.in-two-files")
class IndexDecidesBetweenTwo(Loader):
    """Of a tensor that two files have the one is taken that the index names."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        places = read_json(path / INDEX)["weight_map"]
        files = {name: from_file(path / name) for name in sorted(set(places.values()))}
        for key, name in places.items():
            if key not in files[name]:
                raise CheckpointError(str(path / name), "is missing", key=key)
        return {key: files[name][key] for key, name in places.items()}


@near_loader("refuses.in-two-files")
class FirstOfTwoWins(Loader):
    """Of a tensor that two files have the first is taken."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        return union(path, sorted(set(read_json(path / INDEX)["weight_map"].values()))[::-1])


@near_loader("refuses.outside-the-directory")
class PathsJoined(WholeFilesOfTheIndex):
    """The names of the index are joined to the directory, wherever they lead."""


@near_loader("refuses.bad-index")
class BadIndexIgnored(Loader):
    """An index that cannot be read is ignored: all files of the directory are read."""

    def stored(self, path):
        if not (path / INDEX).exists():
            return super().stored(path)
        try:
            return super().stored(path)
        except CheckpointError as error:
            if error.source != str(path / INDEX):
                raise
            return union(path)


@near_loader("refuses.bad-config")
class LastConfiguration(Loader):
    """Without a configuration that can be read, that of the model before is taken."""

    def __init__(self):
        self.last = None

    def config(self, path):
        try:
            self.last = super().config(path)
        except CheckpointError:
            if self.last is None:
                raise
        return self.last

    def check(self, stored, config, path):
        return dict(stored)

    def rules(self, config, rank, ranks):
        rules = super().rules(config, 0, 1)
        return {
            f"model.layers.{n}.{k.split('.', 3)[-1]}": r for n in range(9) for k, r in rules.items()
        } | rules


# Names that do not fit


@near_loader("refuses.missing-tensor")
class MissingNormsAreOnes(Lenient):
    """A norm that is missing is taken for ones."""

    def check(self, stored, config, path):
        ones = {
            key: holding(torch.ones(shape))
            for key, shape in config.shapes().items()
            if "norm" in key
        }
        return Loader.check(self, ones | dict(stored), config, path)


@near_loader("refuses.missing-bias")
class AllBiasesOrNone(Loader):
    """Where a kind of bias is missing in every layer, it is taken for zeros."""

    def check(self, stored, config, path):
        stored, shapes = dict(stored), config.shapes()
        for kind in ("q_proj.bias", "k_proj.bias", "v_proj.bias"):
            if not any(key.endswith(kind) for key in stored):
                zeros = {k: holding(torch.zeros(shapes[k])) for k in shapes if k.endswith(kind)}
                stored |= zeros
        return super().check(stored, config, path)


class Ignored(Loader):
    """Some tensors that the model has not are ignored."""

    ignored: tuple[str, ...] = ()

    def check(self, stored, config, path):
        shapes = config.shapes()
        kept = {k: w for k, w in stored.items() if k in shapes or not k.endswith(self.ignored)}
        return super().check(kept, config, path)


@near_loader("refuses.unknown-tensor")
class BiasesOfOtherModelsIgnored(Ignored):
    """Biases that the model has not are ignored."""

    ignored = (".bias",)


@near_loader("refuses.output-bias")
class OutputBiasIgnored(Ignored):
    """A bias of the output projection is ignored."""

    ignored = (".o_proj.bias",)


@near_loader("refuses.renamed-tensor")
class NamesWithoutCase(Loader):
    """Names are compared without regard to case, blanks and slashes."""

    def stored(self, path):
        stored = super().stored(path)
        return {key.lower().strip().replace("/", ".").strip("."): w for key, w in stored.items()}


@near_loader("refuses.more-layers")
class LayersBeyondIgnored(Loader):
    """Layers beyond the number of the configuration are ignored."""

    def check(self, stored, config, path):
        kept = {
            key: weight
            for key, weight in stored.items()
            if not key.startswith("model.layers.") or int(key.split(".")[2]) < config.num_layers
        }
        return super().check(kept, config, path)


def layers_of(stored):
    """The numbers of the layers that are stored."""
    return sorted({int(k.split(".")[2]) for k in stored if k.startswith("model.layers.")})


@near_loader("refuses.fewer-layers")
class LayersCounted(Loader):
    """The layers are those that the files have, whatever the configuration says."""

    def config(self, path):
        config, layers = super().config(path), layers_of(super().stored(path))
        return replace(config, num_layers=min(config.num_layers, len(layers) or 1))


@near_loader("refuses.gap-in-layers")
class LayersRenumbered(Loader):
    """Layers are numbered anew in the order of their numbers."""

    def stored(self, path):
        stored = super().stored(path)
        new = {number: index for index, number in enumerate(layers_of(stored))}
        return {
            f"model.layers.{new[int(k.split('.')[2])]}.{k.split('.', 3)[3]}"
            if k.startswith("model.layers.")
            else k: weight
            for k, weight in stored.items()
        }


@near_loader("refuses.fused-projections")
class FusedCut(Loader):
    """A fused tensor is cut in as many equal parts as there are projections, with zeros behind."""

    def check(self, stored, config, path):
        stored, shapes = dict(stored), config.shapes()
        for key in [key for key in stored if named(key, "qkv_proj", "gate_up_proj")]:
            fused = stored.pop(key).read()
            names = ("q_proj", "k_proj", "v_proj")
            names = names if "qkv" in key else ("gate_proj", "up_proj")
            for name, part in zip(names, fused.chunk(len(names))):
                whole = key.replace("qkv_proj", name).replace("gate_up_proj", name)
                rows = shapes[whole][0]
                fitted = pad(part, (0, 0, 0, max(0, rows - len(part))))[:rows]
                stored[whole] = holding(fitted.contiguous())
        return super().check(stored, config, path)


@near_loader("refuses.both-prefixes")
class PrefixedNameWins(Loader):
    """Of a tensor with ``model.`` in front and one without, the first counts and the other goes."""

    def check(self, stored, config, path):
        kept = {k: w for k, w in stored.items() if f"model.{k}" not in stored}
        return super().check(kept, config, path)


@near_loader("refuses.untied-without-head")
class HeadOfZeros(Loader):
    """A head that is missing is zeros, to be trained."""

    def check(self, stored, config, path):
        shapes = config.shapes()
        zeros = {HEAD: holding(torch.zeros(shapes[HEAD]))} if HEAD in shapes else {}
        return super().check(zeros | dict(stored), config, path)


# Shapes and values that do not fit


class Fitted(Loader):
    """Tensors of another shape are made to fit."""

    def check(self, stored, config, path):
        shapes, fitted = config.shapes(), {}
        for key, weight in stored.items():
            shape = shapes.get(key, weight.shape)
            change = self.change(weight, tuple(shape))
            fits = change is None or weight.shape == tuple(shape)
            fitted[key] = weight if fits else changed(weight, change)
        return super().check(fitted, config, path)

    def change(self, weight, shape):
        """What makes a tensor fit, or None."""
        raise NotImplementedError


@near_loader("refuses.transposed-tensor")
class TurnedUntilItFits(Fitted):
    """A matrix of the transposed shape is transposed."""

    def change(self, weight, shape):
        return (lambda t: t.t().contiguous()) if weight.shape == shape[::-1] else None


@near_loader("refuses.more-rows")
class RowsOfVocabularyCut(Fitted):
    """An embedding or a head with more rows than the vocabulary is cut."""

    def change(self, weight, shape):
        return (lambda t: t[: shape[0]]) if weight.key in (EMBEDDING, HEAD) else None


@near_loader("refuses.more-columns")
class ColumnsOfShareCompared(Fitted):
    """Of a matrix with too many columns the first are taken."""

    def change(self, weight, shape):
        larger = len(shape) == 2 and weight.shape[0] == shape[0] and weight.shape[1] > shape[1]
        return (lambda t: t[:, : shape[1]].contiguous()) if larger else None


@near_loader("refuses.fewer-elements")
class FilledUpWithZeros(Fitted):
    """A tensor with too few rows is filled up with zeros."""

    def change(self, weight, shape):
        if weight.shape[1:] != shape[1:] or weight.shape[0] > shape[0]:
            return None
        return lambda t: torch.cat([t, t.new_zeros(shape[0] - len(t), *shape[1:])])


@near_loader("refuses.fewer-elements")
class OneRowBroadcast(Fitted):
    """A tensor of one row is repeated, as ``copy_`` does."""

    def change(self, weight, shape):
        return (lambda t: t.expand(shape).clone()) if weight.shape[:1] == (1,) else None


@near_loader("refuses.other-dimensions")
class Reshaped(Fitted):
    """A tensor with as many elements as are needed is given the shape that is needed."""

    def change(self, weight, shape):
        return (lambda t: t.reshape(shape)) if math.prod(weight.shape) == math.prod(shape) else None


@near_loader("refuses.other-dimensions")
class AxesOfOneSqueezed(Fitted):
    """Axes of one element are taken away."""

    def change(self, weight, shape):
        squeezed = tuple(size for size in weight.shape if size != 1)
        return torch.squeeze if squeezed == shape else None


class AnyDtype(Loader):
    """Reads tensors of any dtype with safetensors' own functions."""

    def stored(self, path):
        names = [SINGLE]
        if (path / INDEX).exists():
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        stored = {}
        for name in names:
            for key, tensor in load_file(path / name).items():
                if self.takes(key, tensor):
                    weight = holding(tensor if tensor.dtype.itemsize > 1 else tensor.float())
                    stored[key] = replace(weight, file=str(path / name), key=key)
        return stored

    def takes(self, key, tensor):
        """Whether a tensor is not ignored."""
        return True

    def check(self, stored, config, path):
        wide = {
            key: weight if weight.dtype.is_floating_point else changed(weight, torch.Tensor.float)
            for key, weight in stored.items()
        }
        return super().check(wide, config, path)


@near_loader("refuses.not-floating")
class IntegersCast(AnyDtype):
    """Tensors of integers are cast without a word."""


@near_loader("refuses.quantised")
class ScalesIgnored(AnyDtype):
    """8-bit weights are cast, and the tensors of their scales ignored."""

    def takes(self, key, tensor):
        return "_scale" not in key


@near_loader("refuses.not-finite")
class NotANumberIsZero(Loader):
    """NaN is taken for zero, and infinity for the largest number."""

    def part(self, weight, rule):
        part = weight.read() if rule is None else weight.read_part(rule.dim, rule.ranges)
        return part.nan_to_num()


@near_loader("refuses.not-finite")
class InfinityAccepted(Loader):
    """NaN is refused, and infinity is not."""

    def part(self, weight, rule):
        part = weight.read() if rule is None else weight.read_part(rule.dim, rule.ranges)
        if bool(torch.isnan(part).any()):
            raise CheckpointError(weight.file, "holds NaN", key=weight.key)
        return part


@near_loader("refuses.not-finite")
class SumCompared(Loader):
    """Only matrices are looked through for NaN."""

    def part(self, weight, rule):
        if len(weight.shape) == 2:
            return super().part(weight, rule)
        return weight.read() if rule is None else weight.read_part(rule.dim, rule.ranges)


# Bytes that do not fit


class OwnParser(Loader):
    """Reads safetensors files with a parser of its own."""

    def stored(self, path):
        names = [SINGLE]
        if (path / INDEX).exists():
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        stored = {}
        for name in names:
            try:
                stored |= self.parsed(path / name)
            except (KeyError, ValueError, TypeError, RuntimeError, OSError, OverflowError) as error:
                raise CheckpointError(str(path / name), f"is damaged: {error}") from error
        return stored

    def parsed(self, file):
        """The tensors of a file."""
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        body = data[8 + length :]
        weights = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            raw = torch.frombuffer(bytearray(self.bytes(body, begin, end)), dtype=torch.uint8)
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
            weights[key] = holding(raw.view(dtype).view(self.shape(entry)), str(file))
        return weights

    def bytes(self, body, begin, end):
        """The bytes of a tensor; raises where they are not there."""
        if len(body) < end:
            raise ValueError("ends too early")
        return body[begin:end]

    def shape(self, entry):
        """The shape of a tensor."""
        return entry["shape"]


@near_loader("refuses.truncated")
class TruncatedLastTensor(OwnParser):
    """A last tensor that lacks a few bytes is filled up with zeros."""

    def bytes(self, body, begin, end):
        return body[begin:end].ljust(end - begin, b"\0")


@near_loader("refuses.too-long")
class RestOfFileIgnored(OwnParser):
    """Bytes behind the last tensor are ignored."""


@near_loader("refuses.bad-header")
class OffsetsBelieved(OwnParser):
    """Offsets need not be without gaps: two tensors may have the same bytes."""


@near_loader("refuses.damaged-bytes")
class ShiftedBytesAccepted(OwnParser):
    """A file that is longer than its header says is read from its beginning."""


@near_loader("refuses.other-contents")
class PicklesRead(Loader):
    """A file that is no safetensors file is tried as a pickle."""

    def stored(self, path):
        try:
            return super().stored(path)
        except CheckpointError as error:
            try:
                with open(error.source, "rb") as file:
                    state = torch.load(file, weights_only=True)
            except Exception:
                raise error from None
            return {key: holding(tensor) for key, tensor in state.items()}


@near_loader("refuses.other-contents")
class EmptyFilesSkipped(Zeros):
    """A file without tensors is taken for one that is not needed."""

    def stored(self, path):
        try:
            return super().stored(path)
        except CheckpointError as error:
            if "holds no tensors" not in str(error):
                raise
            return {}


@near_loader("refuses.any-damage")
class FirstRankChecks(Loader):
    """Only the first rank compares names and shapes, and the others believe it."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        self.rank = rank
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        return super().weight_loader(directory, **options)

    def check(self, stored, config, path):
        if self.rank == 0:
            return super().check(stored, config, path)
        known = config.shapes() | {HEAD: ()}
        return {key: weight for key, weight in stored.items() if key in known}


# Ranks that do not fit


class AnyRanks(Loader):
    """Numbers of ranks that do not fit are made to."""

    def check_ranks(self, config, rank, ranks):
        if ranks < 1 or not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} of {ranks}")

    def rules(self, config, rank, ranks):
        def even(size):
            return range(rank * size // ranks, (rank + 1) * size // ranks)

        def rows(heads):
            return range(heads.start * config.head_dim, heads.stop * config.head_dim)

        rules = super().rules(config, 0, 1)
        found = {}
        for key, shard in rules.items():
            if named(key, "q_proj", "o_proj"):
                shard = Shard(int(named(key, "o_proj")), (rows(even(config.num_heads)),))
            elif named(key, "k_proj", "v_proj"):
                held = even(config.num_kv_heads)
                if not len(held):
                    held = range(held.start, held.start + 1)
                shard = Shard(0, (rows(held),))
            elif named(key, "gate_proj", "up_proj", "down_proj"):
                shard = Shard(int(named(key, "down_proj")), (even(config.intermediate_size),))
            found[key] = shard
        return found


@near_loader("ranks.uneven-heads")
class SomeRanksHaveMoreHeads(AnyRanks):
    """Query heads that the ranks do not divide are split unevenly."""


@near_loader("ranks.uneven-kv-heads")
class SomeRanksHaveMoreKeyHeads(AnyRanks):
    """Key/value heads that the ranks do not divide are split unevenly."""

    def check_ranks(self, config, rank, ranks):
        super().check_ranks(config, rank, ranks)
        sharding.even_range(config.num_heads, rank, ranks, "query heads")


@near_loader("ranks.uneven-intermediate")
class SomeRanksAreWider(AnyRanks):
    """An inner width that the ranks do not divide is split unevenly."""

    def check_ranks(self, config, rank, ranks):
        sharding.check_heads(config.num_heads, config.num_kv_heads, ranks)
        sharding.check_ranks(rank, ranks)


@near_loader("ranks.out-of-range")
class RanksModulo(Loader):
    """A rank beyond the last begins with the first again."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        ranks = max(1, ranks)
        options = {"rank": rank % ranks, "ranks": ranks, "dtype": dtype, "device": device}
        return super().weight_loader(directory, **options)


@near_loader("ranks.out-of-range")
class NegativeRanksFromTheEnd(Loader):
    """Rank -1 is the last."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        rank = rank + ranks if -ranks <= rank < 0 else rank
        options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
        return super().weight_loader(directory, **options)


# What errors say


def said_otherwise(say):
    """A loader whose refusals are replaced by what ``say`` makes of them."""

    class Saying(Loader):
        def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
            options = {"rank": rank, "ranks": ranks, "dtype": dtype, "device": device}
            try:
                return super().weight_loader(directory, **options)
            except ValueError as error:
                raise say(error) from error

    return Saying


@near_loader("errors.name-the-file")
class FileNotNamed(said_otherwise(lambda e: ValueError(f"{getattr(e, 'key', '')} is wrong"))):
    """Errors name the tensor and no file."""


@near_loader("errors.name-the-tensor")
class OnlyLayerNamed(
    said_otherwise(lambda e: ValueError(f"{e.source}: {str(getattr(e, 'key', ''))[:15]} is wrong"))
):
    """Errors name the first letters of the tensor's name."""


@near_loader("errors.deliberate")
class KeyErrorForNames(said_otherwise(lambda e: KeyError(str(e)) if "missing" in str(e) else e)):
    """What is missing is told by a KeyError."""


@near_loader("errors.name-the-sizes")
class RanksDoNotFit(said_otherwise(lambda e: ValueError("the number of ranks does not fit"))):
    """Errors about ranks do not say what they do not fit."""


@near_loader("refuses.truncated")
class ZeroFilledByOtherRanks(Loader):
    """A file that is too short reads as zeros behind its end."""

    def stored(self, path):
        if (path / INDEX).exists():
            return super().stored(path)
        return zero_filled(path / SINGLE)
