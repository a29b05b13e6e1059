"""Other right ways to load the weights of a Qwen2 directory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from conformance.correct_variants import correct_variant
from reference_impl.hf_directory import EMBEDDING, HEAD, INDEX, SINGLE
from reference_impl.qwen2 import sharding
from reference_impl.qwen2.config import read_config
from reference_impl.qwen2.loading import load_shards, shard_rules

VOCABULARY = (EMBEDDING, HEAD)


@correct_variant("loader-replicated-vocabulary", contract="weight_loader")
class ReplicatedVocabulary:
    """Embedding and head are held in full on every rank."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        options = {"dtype": dtype, "device": device}
        own = load_shards(directory, rank=rank, ranks=ranks, **options)
        if ranks > 1:
            every = [load_shards(directory, rank=r, ranks=ranks, **options) for r in range(ranks)]
            rows = read_config(Path(directory)).vocab_size
            for key in set(own) & set(VOCABULARY):
                own[key] = torch.cat([parts[key] for parts in every])[:rows].clone()
        return own


@correct_variant("loader-padded-vocabulary", contract="weight_loader")
class PaddedVocabulary(ReplicatedVocabulary):
    """The embedding is padded to a multiple of 64 rows for the ranks, the head is held in full."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        own = super().weight_loader(directory, rank=rank, ranks=ranks, dtype=dtype, device=device)
        if ranks > 1:
            full = own[EMBEDDING]
            share = 64 * math.ceil(len(full) / (64 * ranks))
            padded = torch.cat([full, full.new_zeros(share * ranks - len(full), full.shape[1])])
            own[EMBEDDING] = padded[rank * share : (rank + 1) * share].clone()
        return own


@correct_variant("loader-explicit-tied-head", contract="weight_loader")
class ExplicitTiedHead:
    """A tied head is in the result, the very tensor of the embedding."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        parts = load_shards(directory, rank=rank, ranks=ranks, dtype=dtype, device=device)
        parts.setdefault(HEAD, parts[EMBEDDING])
        return parts


class Refused(ValueError):
    """A directory that the loader does not take."""


@correct_variant("loader-whole-files", contract="weight_loader")
class WholeFiles:
    """Whole files by ``safetensors.torch.load_file``, in the dtype that is asked for, then sliced.

    Names of the base model, and a head of its own in spite of a tie, are refused; all parts of a
    rank are copied out of the mapped files at the end.
    """

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        path = Path(directory)
        config = read_config(path)
        config.check_ranks(ranks)
        sharding.check_ranks(rank, ranks)
        tensors = {}
        for file, names in self.files(path).items():
            loaded = self.read(path / file)
            for name in loaded.keys() ^ names if names is not None else ():
                raise Refused(f"{path / file}: {name}: the index and the file differ")
            tensors |= loaded
        head = tensors.get(HEAD)
        if config.tied and head is not None:
            if not torch.equal(head, tensors.get(EMBEDDING, head[:0])):
                raise Refused(f"{path}: {HEAD}: is tied, and not the embedding")
            del tensors[HEAD]
        shapes = config.shapes()
        for name in shapes.keys() ^ tensors.keys():
            raise Refused(f"{path}: {name}: is missing, or not a tensor of the model")
        rules = shard_rules(config, rank, ranks)
        dtype = dtype or config.dtype
        parts = {}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise Refused(f"{path}: {name}: is {tensor.dtype} {tuple(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise Refused(f"{path}: {name}: is not finite")
            parts[name] = sharding.take(tensor.to(dtype), rules[name]).to(device)
        return parts

    def files(self, path):
        """The files of the checkpoint, with the names that the index has for each."""
        if not (path / INDEX).exists():
            return {SINGLE: None}
        try:
            places = json.loads((path / INDEX).read_text())["weight_map"].items()
            files = {}
            for name, file in places:
                files.setdefault(Path(file).name if Path(file).name == file else 0, set()).add(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path / INDEX}: weight_map is no map of names to files") from error
        if 0 in files or not files:
            raise Refused(f"{path / INDEX}: {[*files.get(0, ())][:1]} is not in the directory")
        return files

    def read(self, file):
        """The tensors of a file."""
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise Refused(f"{file}: cannot be read: {error}") from error


@correct_variant("loader-slices", contract="weight_loader")
class Slices(WholeFiles):
    """Tensors are read one by one, as slices of an opened file, which is closed before they are cut."""

    def read(self, file):
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_slice(name)[...] for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise Refused(f"{file}: cannot be read: {error}") from error


@correct_variant("loader-fused-then-split", contract="weight_loader")
class FusedThenSplit:
    """Queries, keys and values of a layer are views of one fused tensor, as are gate and up."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        parts = load_shards(directory, rank=rank, ranks=ranks, dtype=dtype, device=device)
        groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
        for first in [name for name in parts if name.rsplit(".", 2)[-2] in ("q_proj", "gate_proj")]:
            kind = first.rsplit(".", 2)[-2]
            names = [
                first.replace(kind, each) for group in groups if kind in group for each in group
            ]
            fused = torch.cat([parts[name] for name in names])
            sizes = [len(parts[name]) for name in names]
            parts |= zip(names, fused.split(sizes))
        return parts


@correct_variant("loader-cast-first", contract="weight_loader")
class CastFirst:
    """The whole model is cast and kept on one rank's terms, then the part is taken from it."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        config = read_config(Path(directory))
        config.check_ranks(ranks)
        sharding.check_ranks(rank, ranks)
        whole = load_shards(directory, dtype=dtype, device=device)
        rules = shard_rules(config, rank, ranks)
        return {name: sharding.take(tensor, rules[name]) for name, tensor in whole.items()}


@correct_variant("loader-parameters", contract="weight_loader")
class Parameters:
    """The result is an OrderedDict of parameters, in reversed order, that are columns first."""

    def weight_loader(self, directory, *, rank=0, ranks=1, dtype=None, device="cpu"):
        parts = load_shards(directory, rank=rank, ranks=ranks, dtype=dtype, device=device)
        return {
            name: torch.nn.Parameter(part.t().contiguous().t() if part.ndim == 2 else part)
            for name, part in reversed(parts.items())
        }
