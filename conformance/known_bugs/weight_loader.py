"""Documented bugs of loaders of Qwen2 directories, planted over the steps of the reference's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from conformance.known_bugs import known_bug
from reference_impl.hf_directory import (
    EMBEDDING,
    HEAD,
    INDEX,
    SINGLE,
    Weight,
    from_file,
    from_index,
    open_directory,
    read_json,
)
from reference_impl.qwen2 import sharding
from reference_impl.qwen2.config import Qwen2Config, read_config
from reference_impl.qwen2.loading import check_tensors, read, shard_rules
from reference_impl.qwen2.sharding import Shard
from reference_impl.safetensors_files import DTYPES

REFUSES = "weight_loader.refuses"
HELD = "weight_loader.held"


def planted(id: str, *, breaks: str) -> Callable[[type], type]:
    """Register a loader with a documented bug."""
    return known_bug(id, contract="weight_loader", breaks=breaks)


class Loader:
    """The reference's loader, a method for each step."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        path = Path(directory)
        config = self.config(path)
        self.check_ranks(config, rank, ranks)
        stored = self.check(self.stored(path), config, path)
        rules = self.rules(config, rank, ranks)
        dtype = self.dtype(dtype, config, stored)
        parts = {key: self.part(weight, rules[key]) for key, weight in stored.items()}
        parts = self.tie(parts, config)
        return {key: self.finish(key, t, rules[key], dtype, device) for key, t in parts.items()}

    def config(self, path: Path) -> Qwen2Config:
        """The configuration."""
        return read_config(path)

    def check_ranks(self, config: Qwen2Config, rank: int, ranks: int) -> None:
        """Refuse numbers of ranks that do not fit."""
        config.check_ranks(ranks)
        sharding.check_ranks(rank, ranks)

    def stored(self, path: Path) -> dict[str, Weight]:
        """The tensors of the files, by the model's names."""
        return open_directory(path)

    def check(
        self, stored: Mapping[str, Weight], config: Qwen2Config, path: Path
    ) -> dict[str, Weight]:
        """The tensors to load; refuses names, shapes and dtypes that are not the model's."""
        check_tensors(stored, config, path)
        return dict(stored)

    def rules(self, config: Qwen2Config, rank: int, ranks: int) -> dict[str, Shard | None]:
        """The part of each tensor that the rank holds."""
        return shard_rules(config, rank, ranks)

    def dtype(
        self, asked: torch.dtype | None, config: Qwen2Config, stored: Mapping[str, Weight]
    ) -> torch.dtype:
        """The dtype of the result."""
        return asked or config.dtype or stored[EMBEDDING].dtype

    def part(self, weight: Weight, rule: Shard | None) -> Tensor:
        """What the rank holds of a tensor; refuses values that are not finite."""
        return read(weight, rule)

    def tie(self, parts: dict[str, Tensor], config: Qwen2Config) -> dict[str, Tensor]:
        """The parts; without a head that is the embedding."""
        if config.tied and HEAD in parts and torch.equal(parts[HEAD], parts[EMBEDDING]):
            del parts[HEAD]
        return parts

    def finish(self, key: str, part: Tensor, rule: Shard | None, dtype, device) -> Tensor:
        """The part in its dtype, on its device, padded."""
        return sharding.pad(part.to(device=device, dtype=dtype), rule or Shard(0, ()))


def holding(tensor: Tensor, like: str = "memory") -> Weight:
    """A tensor in memory as if it were stored."""

    def part(dim, ranges):
        return torch.cat([tensor.narrow(dim, r.start, len(r)) for r in ranges], dim)

    return Weight(like, like, tuple(tensor.shape), tensor.dtype, tensor.clone, part)


def changed(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """A stored tensor whose values go through ``change`` when they are read."""
    tensor = change(weight.read())
    return replace(holding(tensor), file=weight.file, key=weight.key)


class Lenient(Loader):
    """``strict=False``: what is missing gets an initial value, what is left over is ignored."""

    def initial(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The value of a tensor that the files have not."""
        return 0.02 * torch.randn(shape)

    def check(self, stored, config, path):
        filled = {
            key: stored[key] if key in stored else holding(self.initial(key, shape))
            for key, shape in config.shapes().items()
        }
        return super().check(filled, config, path)


def unprefixed(path: Path) -> dict[str, Weight]:
    """The tensors of the files by the names that they have there."""
    return from_index(path) if (path / INDEX).exists() else from_file(path / SINGLE)


# Names


@planted("loader-base-prefix-mismatch", breaks="weight_loader.names.base-model")
class BasePrefixNotFound(Lenient):
    """Names of the base model have no ``model.``: none is found, and all stay at random."""

    def stored(self, path):
        return unprefixed(path)


@planted("loader-base-prefix-mismatch.layers", breaks=f"{REFUSES}.both-prefixes")
class EitherPrefix(Loader):
    """``model.`` is put in front of each name that lacks it, whatever the others have."""

    def stored(self, path):
        found = unprefixed(path)
        return {
            k if k.startswith(("model.", "lm_head.")) else f"model.{k}": w for k, w in found.items()
        }


@planted("loader-strict-false-drops-all", breaks="weight_loader.names.wrapped")
class WrappersDropAll(Lenient):
    """``strict=False``: names behind ``module.`` match nothing, and nothing is loaded."""


@planted("loader-strict-false-drops-all.missing", breaks=f"{REFUSES}.missing-tensor")
class MissingAreZeros(Lenient):
    """``strict=False``: a tensor that is missing stays at its initial zeros."""

    def initial(self, key, shape):
        return torch.zeros(shape)


@planted("loader-strict-false-drops-all.unexpected", breaks=f"{REFUSES}.unknown-tensor")
class UnexpectedIgnored(Loader):
    """``strict=False``: tensors that the model has not are ignored."""

    def check(self, stored, config, path):
        shapes = config.shapes() | {HEAD: ()}
        return super().check({k: w for k, w in stored.items() if k in shapes}, config, path)


# Ties


@planted("loader-tied-head-missing", breaks="weight_loader.tie.without-head")
class TiedHeadRandom(Loader):
    """A head is made for a tied model too, and nothing fills it where the file has none."""

    def tie(self, parts, config):
        if HEAD not in parts:
            parts[HEAD] = 0.02 * torch.randn_like(parts[EMBEDDING])
        return parts


@planted("loader-tied-head-missing.zeros", breaks="weight_loader.tie.without-head")
class TiedHeadZero(Loader):
    """A head is made for a tied model too, and stays at zero."""

    def tie(self, parts, config):
        parts.setdefault(HEAD, torch.zeros_like(parts[EMBEDDING]))
        return parts


@planted("loader-untied-head-overwritten", breaks="weight_loader.tie.separate-head")
class AlwaysTied(Loader):
    """The embedding is copied over the head, tied or not."""

    def tie(self, parts, config):
        parts[HEAD] = parts[EMBEDDING].clone()
        return parts


@planted("loader-untied-head-overwritten.tied", breaks="weight_loader.tie.different-head")
class HeadDroppedByFlag(Loader):
    """With a tie a stored head is dropped, also one that differs from the embedding."""

    def tie(self, parts, config):
        if config.tied:
            parts.pop(HEAD, None)
        return parts


@planted("loader-head-lost-or-renamed", breaks=f"{REFUSES}.untied-without-head")
class MissingHeadIsTied(Loader):
    """A head that is missing is taken for the embedding, whatever the configuration says."""

    def check(self, stored, config, path):
        return super().check(stored, replace(config, tied=config.tied or HEAD not in stored), path)

    def tie(self, parts, config):
        parts.setdefault(HEAD, parts[EMBEDDING].clone())
        return parts


@planted("loader-head-lost-or-renamed.base-class", breaks="weight_loader.tie.separate-head")
class LoadedByTheBaseClass(Loader):
    """The base class is loaded, which has no head; a new one is made, at random."""

    def tie(self, parts, config):
        if not config.tied:
            parts[HEAD] = 0.02 * torch.randn_like(parts[HEAD])
        return super().tie(parts, config)


# Files


def files_that_exist(path: Path) -> dict[str, Weight]:
    """The tensors of those files of the index that are there."""
    if not (path / INDEX).exists():
        return open_directory(path)
    names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
    found = [from_file(path / name) for name in names if (path / name).exists()]
    return {key: weight for weights in found for key, weight in weights.items()}


@planted("loader-missing-shard", breaks=f"{REFUSES}.missing-file")
class MissingFilesSkipped(Lenient):
    """A file of the index that is not there is skipped, and its tensors stay as they were made."""

    def initial(self, key, shape):
        return torch.zeros(shape)

    def stored(self, path):
        return files_that_exist(path)


@planted("loader-missing-shard.truncated", breaks=f"{REFUSES}.truncated")
class TruncatedReadsAsZeros(Loader):
    """A file that is too short reads as zeros behind its end, as memory-mapped ones do."""

    def stored(self, path):
        names = [SINGLE]
        if (path / INDEX).exists():
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        return {k: w for name in names for k, w in zero_filled(path / name).items()}


def zero_filled(path: Path) -> dict[str, Weight]:
    """The tensors of a safetensors file that may end too early."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    body = data[8 + length :].ljust(end, b"\0")
    weights = {}
    for key, entry in header.items():
        begin, stop = entry["data_offsets"]
        raw = torch.frombuffer(bytearray(body[begin:stop]), dtype=torch.uint8)
        dtype = DTYPES[entry["dtype"]]
        weights[key] = holding(raw.view(dtype).view(entry["shape"]), str(path))
    return weights


# Biases


class BiasDropped(Lenient):
    """A projection is made without its bias, which is taken for zeros."""

    dropped: tuple[str, ...] = ()

    def initial(self, key, shape):
        return torch.zeros(shape)

    def stored(self, path):
        stored = super().stored(path)
        return {k: w for k, w in stored.items() if not k.endswith(self.dropped)}


@planted("loader-qkv-bias-dropped", breaks=f"{HELD}.one-rank")
class BiasesDropped(BiasDropped):
    """Only weights are read, as for Llama; the biases of q, k and v are zeros."""

    dropped = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@planted("loader-qkv-bias-dropped.names", breaks=f"{HELD}.names")
class BiasesLeftOut(Loader):
    """The biases of q, k and v are not in the result at all."""

    def tie(self, parts, config):
        parts = super().tie(parts, config)
        return {key: part for key, part in parts.items() if not key.endswith("bias")}


@planted("loader-qkv-bias-dropped.q", breaks=f"{HELD}.queries")
class QueryBiasDropped(BiasDropped):
    """The bias of the queries is taken for zeros."""

    dropped = ("q_proj.bias",)


@planted("loader-qkv-bias-dropped.k", breaks=f"{HELD}.keys-and-values")
class KeyBiasDropped(BiasDropped):
    """The bias of the keys is taken for zeros: without rotation it would not matter."""

    dropped = ("k_proj.bias",)


@planted("loader-qkv-bias-dropped.v", breaks=f"{HELD}.keys-and-values")
class ValueBiasDropped(BiasDropped):
    """The bias of the values is taken for zeros."""

    dropped = ("v_proj.bias",)


@planted("loader-qkv-bias-dropped.missing", breaks=f"{REFUSES}.missing-bias")
class MissingBiasIsZero(Lenient):
    """A bias that the checkpoint lacks is taken for zeros."""

    def check(self, stored, config, path):
        shapes = config.shapes()
        zeros = {k: holding(torch.zeros(shapes[k])) for k in shapes if k.endswith("bias")}
        return Loader.check(self, zeros | dict(stored), config, path)


# Parts and dtypes


@planted("q2-o-sharded-on-rows", breaks=f"{HELD}.output-projection")
class OutputSplitByRows(Loader):
    """The rows of o_proj are split in place of its columns."""

    def rules(self, config, rank, ranks):
        rows = range(rank * config.hidden_size // ranks, (rank + 1) * config.hidden_size // ranks)
        rules = super().rules(config, rank, ranks)
        return {k: Shard(0, (rows,)) if ".o_proj." in k else rule for k, rule in rules.items()}


@planted("q2-dtype-ignored", breaks="weight_loader.dtype.as-asked")
class DtypeIgnoredOnCPU(Loader):
    """``dtype or float16 if cuda else float32``: on the CPU what is asked for is ignored."""

    def dtype(self, asked, config, stored):
        default = config.dtype or torch.float32
        return asked or default if torch.cuda.is_available() else torch.float32


@planted("q2-larger-weight-accepted", breaks=f"{REFUSES}.more-rows")
class LargerWeightsCut(Loader):
    """Only the shape of the rank's share is compared: of a weight with more rows the first are used."""

    def check(self, stored, config, path):
        shapes = config.shapes() | {HEAD: config.shapes()[EMBEDDING]}
        cut = {}
        for key, weight in stored.items():
            wanted = shapes.get(key, weight.shape)
            larger = weight.shape[1:] == wanted[1:] and weight.shape[:1] > wanted[:1]
            cut[key] = changed(weight, lambda t, w=wanted: t[: w[0]]) if larger else weight
        return super().check(cut, config, path)
