"""Checkpoints of whole tensors: the parameters and their optimizer state by name.

``metadata.yaml`` has ``state_index``, which says in which file the tensor ``{parameter}/{shard}`` is;
``model_{n}.safetensors`` has those of one unit. Every tensor is whole, so that nothing depends on
the ranks that saved it. Frozen parameters have weights alone, and are listed.

The first rank writes; it needs the memory for a unit and its state at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reference_impl.flat_shards.config import ShardName
from reference_impl.flat_shards.directories import (
    METADATA,
    STATE_FORMAT,
    DirectoryWriter,
    check_finite,
    check_keys,
    file_in,
    file_name,
    flush,
    global_rank,
    read_header,
)
from reference_impl.flat_shards.layout import Overlap
from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.flat_shards.safe_load import Fresh, SafeLoad, empty_shards
from reference_impl.flat_shards.unit import FlatUnit
from reference_impl.stored import CheckpointError


def save_state_dict(model: MultiStageModel, directory: str | Path, **values: Any) -> None:
    """Write every parameter and its optimizer state whole. Collective.

    ``values`` are plain values that loading gives back. ``directory`` may hold a checkpoint in either
    format, which is replaced as :func:`reference_impl.flat_shards.checkpoint.save` does it.
    """
    StateWriter(model, directory).save(values)


class StateWriter(DirectoryWriter):
    """Writes one checkpoint of whole tensors."""

    def save(self, values: Mapping[str, Any]) -> None:
        """See :func:`save_state_dict`."""
        self.index: dict[str, str] = {}
        super().save(values)

    def write(self, number: int) -> None:
        """Gather one unit after the other; the first rank writes it."""
        problem = None
        for place, unit in enumerate(self.model.units):
            tensors = whole_tensors(self.model, unit)  # collective: after an error, too
            name = file_name(place, number, "model")
            self.index |= dict.fromkeys(tensors, name)
            if global_rank(self.model) == 0 and problem is None:
                try:
                    save_file(tensors, self.directory / name)
                    flush(self.directory / name)
                except (OSError, SafetensorError) as error:
                    problem = error
        if problem is not None:
            raise problem

    def metadata(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What ``metadata.yaml`` says."""
        frozen = [unit for unit in self.model.units if not unit.trainable]
        return {
            "format": STATE_FORMAT,
            "shards": list(self.model.state_shard_names),
            "state_index": self.index,
            "frozen": [name for unit in frozen for name in unit.layout.names],
            "tied": dict(self.model.tied),
            "values": dict(values),
        }


def whole_tensors(model: MultiStageModel, unit: FlatUnit) -> dict[str, Tensor]:
    """The parameters of a unit and their state by ``{parameter}/{shard}``. Collective."""
    return {
        f"{name}/{shard_name}": tensor.contiguous()
        for shard_name in model.state_shard_names
        if unit.shard_length(shard_name)
        for name, tensor in unit.export_shard(unit.shards[shard_name])
    }


# Loading


def read_state(model: MultiStageModel, directory: Path, metadata: Mapping[str, Any]) -> Fresh:
    """This rank's part of every tensor. Raises :class:`CheckpointError` for what does not fit."""
    index = {key: file_in(directory, name) for key, name in metadata["state_index"].items()}
    check_files(index)
    frozen, stored_names = set(metadata["frozen"]), metadata["shards"]
    own = [name for unit in model.units for name in unit.layout.names]
    expected = {
        f"{name}/{shard_name}"
        for name in own
        for shard_name in stored_names
        if shard_name == ShardName.weights or name not in frozen
    }
    check_keys(directory / METADATA, index, dict.fromkeys(expected))
    fresh = empty_shards(model)
    with ExitStack() as opened:
        files = {
            path: opened.enter_context(safe_open(path, framework="pt"))
            for path in sorted(set(index.values()))
        }
        for unit in model.units:
            loading = SafeLoad(unit, model.state_shard_names)
            for name in unit.layout.names:
                for shard_name in loading.shard_names:
                    key, target = f"{name}/{shard_name}", fresh[unit.name][shard_name]
                    if key in index:
                        tensor = files[index[key]].get_tensor(key)
                        put = put_tensor(unit, name, target, tensor, index[key], key)
                        loading.count(put, shard_name)
                    elif shard_name != ShardName.weights and name in frozen:
                        loading.count(own_elements(unit, name), shard_name)  # stays zero
            loading.check(str(directory))
    return fresh


def check_files(index: Mapping[str, Path]) -> None:
    """Raise :class:`CheckpointError` unless each file has the tensors that the index names it for."""
    for path in sorted(set(index.values())):
        expected = {key: None for key, place in index.items() if place == path}
        found, _ = read_header(path)
        for key in sorted(found.keys() - expected.keys()):
            if key in index:
                problem = f"is also in {index[key].name}"
                raise CheckpointError(str(path), problem, key=key)
        check_keys(path, found, expected)


def put_tensor(
    unit: FlatUnit, name: str, target: Tensor, tensor: Tensor, path: Path, key: str
) -> Overlap:
    """Write this rank's elements of a whole tensor to a shard; which they are."""
    try:
        own = unit.parameter_global_to_shard(tensor, name)
    except ValueError as error:
        raise CheckpointError(str(path), str(error), key=key) from error
    place = own_elements(unit, name)
    target[place.target : place.target + place.count] = check_finite(own, path, key, name)
    return place


def own_elements(unit: FlatUnit, name: str) -> Overlap:
    """This rank's elements of a parameter: where they begin in it and in the shard, how many."""
    first, last = unit.layout.range_of_parameter(name, unit.ranks.rank)
    begin, _ = unit.range_in_shard(name)
    return Overlap(name, first, begin, last - first)
