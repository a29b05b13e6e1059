"""The tensors of a Hugging Face directory: one safetensors file, or an index with several.

Nothing is read but headers until a tensor, or a part of one, is asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_impl.safetensors_files import SafeTensor, open_safetensors
from reference_impl.stored import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Weight:
    """A tensor of the directory, read when it is asked for."""

    file: str
    """The path of its file, or what else to call its source in an error."""
    key: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_part: Callable[[int, Sequence[range]], Tensor]
    """Ranges of indices along an axis, one behind the other; only they are read."""


def open_directory(directory: Path) -> dict[str, Weight]:
    """Every weight under the name that the model for causal language modelling has for it.

    Without safetensors files the directory is loaded by ``AutoModelForCausalLM``, whose state has the
    head. Raises :class:`CheckpointError` that names the file and the key for an index that does not
    fit the files, a tensor that two files have, and names that are not those of the model.
    """
    if not directory.is_dir():
        raise CheckpointError(str(directory), "is not a directory")
    if (directory / INDEX).exists():
        stored = from_index(directory)
        if (directory / SINGLE).exists() and str(directory / SINGLE) not in files_of(stored):
            problem = f"holds two checkpoints: {SINGLE}, and the files that {INDEX} names"
            raise CheckpointError(str(directory), problem)
    elif (directory / SINGLE).exists():
        stored = from_file(directory / SINGLE)
    elif any(directory.glob("*.safetensors")):
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        problem = f"has {', '.join(names)}, but neither {SINGLE} nor {INDEX}"
        raise CheckpointError(str(directory), problem)
    elif any(directory.glob("*.bin*")):
        stored = from_transformers(directory)
    else:
        raise CheckpointError(str(directory), f"has neither {SINGLE} nor {INDEX}")
    return with_base_prefix(stored, directory)


def files_of(stored: Mapping[str, Weight]) -> set[str]:
    """The files that the weights are in."""
    return {weight.file for weight in stored.values()}


def from_file(path: Path) -> dict[str, Weight]:
    """The weights of one safetensors file."""
    checkpoint = open_safetensors(path)
    weights = {}
    for key, tensor in checkpoint.tensors.items():
        read = tensor.read
        if not isinstance(read, SafeTensor):
            raise CheckpointError(str(path), "is not stored as a tensor of its own", key=key)
        weights[key] = Weight(str(path), key, tensor.shape, tensor.dtype, read, read.part)
    return weights


def from_index(directory: Path) -> dict[str, Weight]:
    """The weights of the files that the index names; index and files must tell the same."""
    path = directory / INDEX
    places = read_json(path).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(str(path), "is missing or empty", key="weight_map")
    for key, name in places.items():
        if not isinstance(name, str):
            raise CheckpointError(str(path), f"is in {name!r}, which names no file", key=key)
    weights: dict[str, Weight] = {}
    for name in sorted(set(places.values())):
        file = directory / name
        if Path(name).name != name:
            raise CheckpointError(str(path), f"names {name!r}, which is not in the directory")
        if not file.exists():
            key = next(key for key, place in places.items() if place == name)
            raise CheckpointError(str(file), "is named in the index and missing", key=key)
        for key, weight in from_file(file).items():
            if key in weights:
                raise CheckpointError(str(file), f"is also in {weights[key].file}", key=key)
            if places.get(key) != name:
                indexed = f"is in {places[key]} in the index" if key in places else "is not indexed"
                raise CheckpointError(str(file), indexed, key=key)
            weights[key] = weight
    for key, name in places.items():
        if key not in weights:
            raise CheckpointError(str(directory / name), "is in the index and missing", key=key)
    return weights


_LOADING = threading.Lock()
"""transformers replaces functions of its own while it loads: two threads would leave them replaced."""


def from_transformers(directory: Path) -> dict[str, Weight]:
    """The weights of a directory in another format, loaded whole by transformers.

    ``AutoModelForCausalLM``, not ``AutoModel``: the base class drops the head and the prefix.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _LOADING:
            model, report = AutoModelForCausalLM.from_pretrained(
                directory, output_loading_info=True, local_files_only=True, dtype="auto"
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(str(directory), f"cannot be loaded: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report[kind]:
            raise CheckpointError(str(directory), kind.replace("_keys", ""), key=str(key))
    tied = model.config.tie_word_embeddings
    state = {k: t for k, t in model.state_dict().items() if not (tied and k == HEAD)}
    return {key: _in_memory(str(directory), key, tensor) for key, tensor in state.items()}


def _in_memory(source: str, key: str, tensor: Tensor) -> Weight:
    def part(dim: int, ranges: Sequence[range]) -> Tensor:
        return torch.cat([tensor.narrow(dim, r.start, len(r)) for r in ranges], dim)

    return Weight(source, key, tuple(tensor.shape), tensor.dtype, tensor.clone, part)


def with_base_prefix(stored: Mapping[str, Weight], directory: Path) -> dict[str, Weight]:
    """The weights with ``model.`` in front, which a checkpoint of the base class lacks.

    All names have it or none has; anything else is not guessed at.
    """
    if EMBEDDING in stored or EMBEDDING.removeprefix("model.") not in stored:
        return dict(stored)
    for key, weight in stored.items():
        if key.startswith("model."):
            base = EMBEDDING.removeprefix("model.")
            raise CheckpointError(weight.file, f"has a prefix that {base} lacks", key=key)
    return {key if key == HEAD else f"model.{key}": weight for key, weight in stored.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; :class:`CheckpointError` where there is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "does not exist") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"is no JSON: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(str(path), "holds no JSON object")
    return dict(content)
