"""Checkpoints of flat shards: one file a rank, read by any number of ranks.

``metadata.yaml`` says how the shards are laid out and names the files; ``rank_{r}.safetensors`` has
one flat tensor ``{shard}_shard`` a shard. The metadata is written last and replaces the old one in one
step, and files that it does not name are only then removed: whenever a save breaks off, the
directory holds the checkpoint before it or the one after it.

Loading takes parameters by name. It reads the elements that this rank holds and no others, counts
them, and changes the model only when every rank has all of its elements.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.layout import FlatLayout, Overlap, ParameterMeta, overlaps
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.safe_load import SafeLoad
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.ranks import agree
from reference_impl.safetensors_files import DTYPES
from reference_impl.stored import CheckpointError

FORMAT = "flat_shards"
METADATA = "metadata.yaml"
RANK_FILE = re.compile(r"rank_(\d+)(?:-(\d+))?\.safetensors")
"""Number of the rank, and of the save if the directory was saved to before."""


# Saving


def save(model: MultiStageModel, directory: str | Path, values: Mapping[str, Any]) -> None:
    """Write the shards of all ranks, optimizer state included. Collective.

    ``values`` are plain values that :func:`load` gives back. ``directory`` may hold a checkpoint,
    which is replaced.
    """
    model._need_weights()
    directory = Path(directory)
    number, error = 0, None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        number = next_number(directory)
    except OSError as problem:
        error = unwritable(directory, problem)
    agree_everywhere(model, error)
    number = model.tensor.exchange(model.ranks.exchange(number)[0])[0]
    try:
        write_rank(model, directory / file_name(global_rank(model), number))
    except (OSError, SafetensorError) as problem:
        error = unwritable(directory, problem)
    agree_everywhere(model, error)
    if global_rank(model) == 0:
        try:
            write_metadata(directory, metadata_of(model, number, values))
            remove_old_files(directory, number)
        except OSError as problem:
            error = unwritable(directory, problem)
    agree_everywhere(model, error)


def unwritable(directory: Path, problem: Exception) -> CheckpointError:
    """What is raised on every rank when one cannot write."""
    return CheckpointError(str(directory), f"cannot be written: {problem}")


def global_rank(model: MultiStageModel) -> int:
    """The number of a rank's file: tensor-parallel ranks of one shard lie side by side."""
    return model.ranks.rank * model.tensor.size + model.tensor.rank


def agree_everywhere(model: MultiStageModel, error: Exception | None) -> None:
    """Raise on every rank if there is an error on any."""
    try:
        agree(model.ranks, error)
    except Exception as problem:
        error = problem
    agree(model.tensor, error)


def next_number(directory: Path) -> int:
    """A number that no file of an earlier save has."""
    found = [RANK_FILE.fullmatch(path.name) for path in directory.iterdir()]
    return max((int(match[2] or 0) + 1 for match in found if match), default=0)


def file_name(rank: int, number: int) -> str:
    """The name of a rank's file; plain in a directory that holds no earlier save."""
    return f"rank_{rank}-{number}.safetensors" if number else f"rank_{rank}.safetensors"


def write_rank(model: MultiStageModel, path: Path) -> None:
    """Write this rank's shards."""
    shards = {f"{name}_shard": model.get_shard(name) for name in model.state_shard_names}
    save_file(shards, path)
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def metadata_of(model: MultiStageModel, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metadata.yaml`` says."""
    ranks, tensor_ranks = model.ranks.size, model.tensor.size
    return {
        "format": FORMAT,
        "ranks": ranks,
        "tensor_ranks": tensor_ranks,
        "dtype": str(model.get_shard(ShardName.weights).dtype).removeprefix("torch."),
        "shards": list(model.state_shard_names),
        "files": [file_name(rank, number) for rank in range(ranks * tensor_ranks)],
        "units": [unit_metadata(unit) for unit in model.units],
        "tied": dict(model.tied),
        "values": dict(values),
    }


def unit_metadata(unit: FlatUnit) -> dict[str, Any]:
    """How the parameters of a unit lie in its shard."""
    parameters = [asdict(p) | {"shape": list(p.shape)} for p in unit.layout.parameters]
    return {"name": unit.name, "trainable": unit.trainable, "parameters": parameters}


def write_metadata(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Put the metadata in place, in one step: from here on the new checkpoint is the one."""
    fresh = directory / f"{METADATA}.new"
    fresh.write_text(yaml.safe_dump(dict(metadata), sort_keys=False))
    flush(fresh)
    fresh.replace(directory / METADATA)
    flush(directory)


def remove_old_files(directory: Path, number: int) -> None:
    """Remove the files of other saves, finished or not."""
    for path in directory.iterdir():
        match = RANK_FILE.fullmatch(path.name)
        if match and int(match[2] or 0) != number:
            path.unlink(missing_ok=True)


# Reading


@dataclass(frozen=True)
class StoredUnit:
    """A unit as it was saved."""

    layout: FlatLayout
    trainable: bool
    starts: Mapping[str, int]
    """Where its part of a shard begins, by shard name; only of shards that it has."""


@dataclass(frozen=True)
class StoredShards:
    """A checkpoint whose metadata and file headers were read and fit one another."""

    directory: Path
    metadata: Mapping[str, Any]
    units: tuple[StoredUnit, ...]
    files: tuple[Path, ...]

    @classmethod
    def open(cls, directory: str | Path) -> StoredShards:
        """Read metadata and headers. Raises :class:`CheckpointError` for anything that does not fit."""
        directory = Path(directory)
        metadata = read_metadata(directory / METADATA)
        ranks, tensor_ranks = metadata["ranks"], metadata["tensor_ranks"]
        if len(metadata["files"]) != ranks * tensor_ranks:
            problem = f"names {len(metadata['files'])} files, expected {ranks * tensor_ranks}"
            raise CheckpointError(str(directory / METADATA), problem)
        lengths = dict.fromkeys(metadata["shards"], 0)
        units = []
        for entry in metadata["units"]:
            parameters = tuple(
                ParameterMeta(**(fields | {"shape": tuple(fields["shape"])}))
                for fields in entry["parameters"]
            )
            layout = FlatLayout(parameters, ranks, tensor_ranks)
            own = [n for n in lengths if entry["trainable"] or n == ShardName.weights]
            units.append(StoredUnit(layout, entry["trainable"], {n: lengths[n] for n in own}))
            for name in own:
                lengths[name] += layout.shard_size
        files = tuple(directory / name for name in metadata["files"])
        for path in files:
            check_header(path, lengths, metadata["dtype"])
        return cls(directory, metadata, tuple(units), files)

    def parameters(self) -> dict[str, ParameterMeta]:
        """Every parameter of the checkpoint."""
        return {p.name: p for unit in self.units for p in unit.layout.parameters}


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata; raises :class:`CheckpointError` for a file that is missing or another's."""
    try:
        metadata = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), "is no YAML") from error
    wanted = {"ranks": int, "tensor_ranks": int, "dtype": str, "shards": list, "files": list}
    wanted |= {"units": list, "values": dict, "tied": dict}
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(str(path), f"is not the metadata of {FORMAT}")
    for key, kind in wanted.items():
        if not isinstance(metadata.get(key), kind):
            raise CheckpointError(str(path), f"expected {kind.__name__}", key=key)
    return metadata


def check_header(path: Path, lengths: Mapping[str, int], dtype: str) -> None:
    """Raise :class:`CheckpointError` unless a rank's file holds the shards and nothing else."""
    expected = {f"{name}_shard": length for name, length in lengths.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"is truncated or damaged: {error}") from error
    for key in expected.keys() - found.keys():
        raise CheckpointError(str(path), "is missing", key=key)
    for key in found.keys() - expected.keys():
        raise CheckpointError(str(path), "is unknown", key=key)
    for key, (shape, stored) in found.items():
        if shape != [expected[key]]:
            problem = f"has shape {shape}, expected {[expected[key]]}"
            raise CheckpointError(str(path), problem, key=key)
        if str(DTYPES.get(stored)) != f"torch.{dtype}":
            raise CheckpointError(str(path), f"has dtype {stored}, expected {dtype}", key=key)


# Loading


def load(model: MultiStageModel, directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint into the shards, and give the plain values that were saved. Collective.

    The checkpoint may be of other numbers of ranks, and other parameters may have been frozen: the
    optimizer state of a parameter that was is zero. Raises :class:`CheckpointError`, on every rank,
    for anything that does not fit, and the model is as it was.
    """
    error, stored, fresh = None, None, {}
    try:
        stored = StoredShards.open(directory)
        check_fits(model, stored)
        fresh = read_shards(model, stored)
    except Exception as problem:
        error = problem
    agree_everywhere(model, error)
    for unit in model.units:
        for shard_name, shard in fresh[unit.name].items():
            unit.shards[shard_name].copy_(shard)
    model.usable = True
    model.invalidate_buffers()
    return dict(stored.metadata["values"])


def check_fits(model: MultiStageModel, stored: StoredShards) -> None:
    """Raise unless the checkpoint has the model's parameters, in their shapes, and its shards."""
    path = str(stored.directory / METADATA)
    own = {p.name: p for unit in model.units for p in unit.layout.parameters}
    found = stored.parameters()
    for name in own.keys() - found.keys():
        raise CheckpointError(path, "is missing", key=name)
    for name in found.keys() - own.keys():
        raise CheckpointError(path, "is unknown", key=name)
    for name, parameter in own.items():
        if parameter.shape != found[name].shape:
            problem = f"has shape {list(found[name].shape)}, expected {list(parameter.shape)}"
            raise CheckpointError(path, problem, key=name)
    if tuple(stored.metadata["shards"]) != model.state_shard_names:
        problem = (
            f"has shards {stored.metadata['shards']}, expected {list(model.state_shard_names)}"
        )
        raise CheckpointError(path, problem)


def read_shards(model: MultiStageModel, stored: StoredShards) -> dict[str, dict[str, Tensor]]:
    """This rank's shards, new ones, by unit and shard name."""
    fresh = {
        unit.name: {name: torch.zeros_like(unit.shards[name]) for name in model.state_shard_names}
        for unit in model.units
    }
    with ExitStack() as opened:
        for unit in model.units:
            loading = SafeLoad(unit, model.state_shard_names)
            for number, path in enumerate(stored.files):
                copy_from_file(model, unit, loading, stored, number, path, fresh, opened)
            loading.check(str(stored.directory))
    return fresh


def copy_from_file(
    model: MultiStageModel,
    unit: FlatUnit,
    loading: SafeLoad,
    stored: StoredShards,
    number: int,
    path: Path,
    fresh: dict[str, dict[str, Tensor]],
    opened: ExitStack,
) -> None:
    """Copy what a rank's file holds of a unit's shards."""
    rank, tensor_rank = divmod(number, stored.metadata["tensor_ranks"])
    file = None
    for old in stored.units:
        for overlap in overlaps(
            old.layout,
            rank,
            unit.layout,
            model.ranks.rank,
            source_tensor_rank=tensor_rank,
            target_tensor_rank=model.tensor.rank,
        ):
            file = file or opened.enter_context(safe_open(path, framework="pt"))
            for shard_name, target in fresh[unit.name].items():
                if not target.numel():
                    continue
                if shard_name in old.starts:
                    begin = old.starts[shard_name] + overlap.source
                    part = read(path, file, shard_name, begin, overlap)
                    target[overlap.target : overlap.target + overlap.count] = part
                loading.count(overlap, shard_name)


def read(path: Path, file: Any, shard_name: str, begin: int, overlap: Overlap) -> Tensor:
    """Elements of a shard in a file; raises :class:`CheckpointError` if one is not finite."""
    key = f"{shard_name}_shard"
    part = file.get_slice(key)[begin : begin + overlap.count]
    if not bool(part.isfinite().all()):
        number = int((~part.isfinite()).sum())
        problem = f"{number} elements of {overlap.name} are not finite"
        raise CheckpointError(str(path), problem, key=key)
    return part
