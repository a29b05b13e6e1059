"""Checkpoints of flat shards: one file a rank, read by any number of ranks.

``metadata.yaml`` says how the shards are laid out and names the files; ``rank_{r}.safetensors`` has
one flat tensor ``{shard}_shard`` a shard. How a save replaces another is for
:mod:`reference_impl.flat_shards.directories` to say.

Loading takes parameters by name. It reads the elements that this rank holds and no others, counts
them, and changes the model only when every rank has all of its elements.

Whole tensors by name are the other format, see :mod:`reference_impl.flat_shards.state_dict`; both are
written alike and loaded by the same :func:`load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.directories import (
    FORMAT,
    METADATA,
    STATE_FORMAT,
    DirectoryWriter,
    agree_everywhere,
    check_finite,
    check_keys,
    file_in,
    file_name,
    flush,
    global_rank,
    read_header,
    read_metadata,
)
from reference_impl.flat_shards.layout import FlatLayout, Overlap, ParameterMeta, overlaps
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.safe_load import Fresh, SafeLoad, empty_shards
from reference_impl.flat_shards.state_dict import read_state
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.safetensors_files import DTYPES
from reference_impl.stored import CheckpointError


def save(model: MultiStageModel, directory: str | Path, values: Mapping[str, Any]) -> None:
    """Write the shards of all ranks, optimizer state included. Collective.

    ``values`` are plain values that :func:`load` gives back. ``directory`` may hold a checkpoint,
    which is replaced.
    """
    Writer(model, directory).save(values)


def load(model: MultiStageModel, directory: str | Path) -> dict[str, Any]:
    """Read a checkpoint into the shards, and give the plain values that were saved. Collective.

    The checkpoint may be of other numbers of ranks and in either format, and other parameters may
    have been frozen: the optimizer state of a parameter that was is zero. A model without optimizer
    state takes the weights. Gradients are forgotten. Raises :class:`CheckpointError`, on every rank,
    for anything that does not fit, and the model is as it was.
    """
    return Reader(model, directory).load()


# Saving


class Writer(DirectoryWriter):
    """Writes one checkpoint of flat shards."""

    def write(self, number: int) -> None:
        """Write this rank's file."""
        rank = global_rank(self.model)
        path = self.directory / file_name(rank, number)
        save_file(self.tensors(), path, metadata={"rank": str(rank)})
        flush(path)

    def tensors(self) -> dict[str, Tensor]:
        """What this rank's file holds."""
        names = self.model.state_shard_names
        return {f"{name}_shard": self.model.get_shard(name) for name in names}

    def metadata(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What ``metadata.yaml`` says."""
        model = self.model
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
    def open(cls, directory: Path, metadata: Mapping[str, Any]) -> StoredShards:
        """Read headers. Raises :class:`CheckpointError` for anything that does not fit."""
        path = directory / METADATA
        expected = metadata["ranks"] * metadata["tensor_ranks"]
        if len(metadata["files"]) != expected:
            raise CheckpointError(
                str(path), f"names {len(metadata['files'])} files, expected {expected}"
            )
        lengths = dict.fromkeys(metadata["shards"], 0)
        try:
            units = stored_units(metadata, lengths)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(str(path), f"is damaged: {error!r}", key="units") from error
        files = tuple(file_in(directory, name) for name in metadata["files"])
        for rank, file in enumerate(files):
            check_header(file, rank, lengths, metadata["dtype"])
        return cls(directory, metadata, units, files)

    def parameters(self) -> dict[str, ParameterMeta]:
        """Every parameter of the checkpoint."""
        return {p.name: p for unit in self.units for p in unit.layout.parameters}


def stored_units(metadata: Mapping[str, Any], lengths: dict[str, int]) -> tuple[StoredUnit, ...]:
    """The units of a checkpoint; ``lengths`` of shards are counted up."""
    units = []
    for entry in metadata["units"]:
        parameters = tuple(
            ParameterMeta(**(fields | {"shape": tuple(fields["shape"])}))
            for fields in entry["parameters"]
        )
        layout = FlatLayout(parameters, metadata["ranks"], metadata["tensor_ranks"])
        own = [name for name in lengths if entry["trainable"] or name == ShardName.weights]
        units.append(StoredUnit(layout, entry["trainable"], {n: lengths[n] for n in own}))
        for name in own:
            lengths[name] += layout.shard_size
    return tuple(units)


def check_header(path: Path, rank: int, lengths: Mapping[str, int], dtype: str) -> None:
    """Raise :class:`CheckpointError` unless a rank's file holds its shards and nothing else."""
    expected = {f"{name}_shard": length for name, length in lengths.items()}
    found, own = read_header(path)
    if own.get("rank") != str(rank):
        problem = f"is the file of rank {own.get('rank', 'unknown')}, expected {rank}"
        raise CheckpointError(str(path), problem)
    check_keys(path, found, expected)
    for key, (shape, stored) in found.items():
        if shape != [expected[key]]:
            problem = f"has shape {shape}, expected {[expected[key]]}"
            raise CheckpointError(str(path), problem, key=key)
        if str(DTYPES.get(stored)) != f"torch.{dtype}":
            raise CheckpointError(str(path), f"has dtype {stored}, expected {dtype}", key=key)


# Loading


class Reader:
    """Loads a checkpoint into a model."""

    def __init__(self, model: MultiStageModel, directory: str | Path) -> None:
        self.model = model
        self.directory = Path(directory)

    def load(self) -> dict[str, Any]:
        """See :func:`load`."""
        error, metadata, fresh = None, {}, {}
        try:
            metadata = read_metadata(self.directory / METADATA)
            self.check_shards(metadata)
            fresh = self.read(metadata)
        except Exception as problem:
            error = problem
        agree_everywhere(self.model, error)
        self.put(fresh)
        return dict(metadata["values"])

    def put(self, fresh: Fresh) -> None:
        """Let the model have the shards; nothing that it held before is used again."""
        for unit in self.model.units:
            for shard_name, shard in fresh[unit.name].items():
                unit.shards[shard_name].copy_(shard)
        self.model.usable = True
        self.model.invalidate_buffers()
        if self.model.mode.support_backward:
            self.model.reset_gradients()

    def read(self, metadata: Mapping[str, Any]) -> Fresh:
        """This rank's shards, new ones; raises :class:`CheckpointError` if they are not all there."""
        if metadata["format"] == STATE_FORMAT:
            return read_state(self.model, self.directory, metadata)
        stored = StoredShards.open(self.directory, metadata)
        self.check_parameters(stored)
        return self.read_shards(stored)

    def check_shards(self, metadata: Mapping[str, Any]) -> None:
        """Raise unless the model's shards are the first ones of the checkpoint's."""
        own = list(self.model.state_shard_names)
        if metadata["shards"][: len(own)] != own:
            problem = f"has shards {metadata['shards']}, expected {own}"
            raise CheckpointError(str(self.directory / METADATA), problem)

    def check_parameters(self, stored: StoredShards) -> None:
        """Raise unless the checkpoint has the model's parameters, in their shapes."""
        path = self.directory / METADATA
        own = {p.name: p for unit in self.model.units for p in unit.layout.parameters}
        found = stored.parameters()
        check_keys(path, found, own)
        for name, parameter in own.items():
            if parameter.shape != found[name].shape:
                problem = f"has shape {list(found[name].shape)}, expected {list(parameter.shape)}"
                raise CheckpointError(str(path), problem, key=name)

    def read_shards(self, stored: StoredShards) -> Fresh:
        """The elements that this rank holds of each rank's file."""
        fresh = empty_shards(self.model)
        with ExitStack() as opened:
            for unit in self.model.units:
                loading = SafeLoad(unit, self.model.state_shard_names)
                for number, path in enumerate(stored.files):
                    self.copy_from_file(unit, loading, stored, number, path, fresh, opened)
                loading.check(str(stored.directory))
        return fresh

    def copy_from_file(
        self,
        unit: FlatUnit,
        loading: SafeLoad,
        stored: StoredShards,
        number: int,
        path: Path,
        fresh: Fresh,
        opened: ExitStack,
    ) -> None:
        """Copy what a rank's file holds of a unit's shards."""
        file = None
        for old, overlap in self.overlaps(unit, stored, number):
            file = file or opened.enter_context(safe_open(path, framework="pt"))
            for shard_name, target in fresh[unit.name].items():
                if not target.numel():
                    continue
                if shard_name in old.starts:
                    begin = old.starts[shard_name] + overlap.source
                    part = self.part(path, file, shard_name, begin, overlap)
                    target[overlap.target : overlap.target + overlap.count] = part
                loading.count(overlap, shard_name)

    def overlaps(self, unit: FlatUnit, stored: StoredShards, number: int):
        """What the file of a rank and a unit of this rank both hold, with the unit it was saved in."""
        rank, tensor_rank = divmod(number, stored.metadata["tensor_ranks"])
        for old in stored.units:
            for overlap in overlaps(
                old.layout,
                rank,
                unit.layout,
                self.model.ranks.rank,
                source_tensor_rank=tensor_rank,
                target_tensor_rank=self.model.tensor.rank,
            ):
                yield old, overlap

    def part(self, path: Path, file: Any, shard_name: str, begin: int, overlap: Overlap) -> Tensor:
        """Elements of a shard in a file; raises :class:`CheckpointError` if one is not finite."""
        key = f"{shard_name}_shard"
        part = file.get_slice(key)[begin : begin + overlap.count]
        return check_finite(part, path, key, overlap.name)
