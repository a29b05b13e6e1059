"""Directories of checkpoints: the files of a save, its metadata, and how one save replaces another.

The metadata is written last and replaces the old one in one step, and files that it does not name
are only then removed: whenever a save breaks off, the directory holds the checkpoint before it or the
one after it. What the files hold is the format's.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reference_impl.flat_shards.model import MultiStageModel
from reference_impl.ranks import agree
from reference_impl.stored import CheckpointError, all_finite

FORMAT = "flat_shards"
STATE_FORMAT = "flat_shards_state"
METADATA = "metadata.yaml"
OWN_FILE = re.compile(r"(?:rank|model)_(\d+)(?:-(\d+))?\.safetensors")
"""Number of the file, and of the save if the directory was saved to before."""
# The pure-Python parser takes longer over the metadata of a small model than loading does.
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


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


# Saving


class DirectoryWriter(ABC):
    """Writes one checkpoint of a model, in a format of its own."""

    def __init__(self, model: MultiStageModel, directory: str | Path) -> None:
        self.model = model
        self.directory = Path(directory)

    def save(self, values: Mapping[str, Any]) -> None:
        """Write a checkpoint, which may replace one in the directory. Collective.

        ``values`` are plain values that loading gives back. Raises :class:`CheckpointError` or
        RuntimeError, on every rank, if one cannot write.
        """
        self.model._need_weights()
        number = self.on_all_ranks(self.prepare) or 0
        number = self.model.tensor.exchange(self.model.ranks.exchange(number)[0])[0]
        self.on_all_ranks(self.write, number)
        self.on_all_ranks(self.finish, number, values)

    def on_all_ranks(self, step: Any, *arguments: Any) -> Any:
        """What a step gives; raises on every rank if it cannot write on any."""
        result, error = None, None
        try:
            result = step(*arguments)
        except (OSError, SafetensorError) as problem:
            error = CheckpointError(str(self.directory), f"cannot be written: {problem}")
        agree_everywhere(self.model, error)
        return result

    def prepare(self) -> int:
        """Make the directory; a number that no file of an earlier save in it has."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return next_number(self.directory)

    @abstractmethod
    def write(self, number: int) -> None:
        """Write the files of this rank. Collective."""

    def finish(self, number: int, values: Mapping[str, Any]) -> None:
        """On the first rank: put the metadata in place, and remove what it does not name."""
        if global_rank(self.model) == 0:
            write_metadata(self.directory, self.metadata(number, values))
            remove_old_files(self.directory, number)

    @abstractmethod
    def metadata(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What ``metadata.yaml`` says."""


def next_number(directory: Path) -> int:
    """A number that no file of an earlier save has."""
    found = [OWN_FILE.fullmatch(path.name) for path in directory.iterdir()]
    return max((int(match[2] or 0) + 1 for match in found if match), default=0)


def file_name(index: int, number: int, kind: str = "rank") -> str:
    """The name of a file of a save; plain in a directory that holds no earlier one."""
    return f"{kind}_{index}-{number}.safetensors" if number else f"{kind}_{index}.safetensors"


def flush(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_metadata(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Put the metadata in place, in one step: from here on the new checkpoint is the one.

    Its last line tells it from a file that was cut off behind a whole line.
    """
    fresh = directory / f"{METADATA}.new"
    text = yaml.dump(dict(metadata) | {"complete": True}, Dumper=YAML_DUMPER, sort_keys=False)
    fresh.write_text(text)
    flush(fresh)
    fresh.replace(directory / METADATA)
    flush(directory)


def remove_old_files(directory: Path, number: int) -> None:
    """Remove the files of other saves, finished or not."""
    for path in directory.iterdir():
        match = OWN_FILE.fullmatch(path.name)
        if match and int(match[2] or 0) != number:
            path.unlink(missing_ok=True)


# Reading


def file_in(directory: Path, name: Any) -> Path:
    """A file of the directory itself; raises :class:`CheckpointError` for any other."""
    if not isinstance(name, str) or not OWN_FILE.fullmatch(name):
        raise CheckpointError(str(directory / METADATA), f"names a file {name!r}")
    return directory / name


KEYS: dict[str, dict[str, type]] = {
    FORMAT: {"ranks": int, "tensor_ranks": int, "dtype": str, "files": list, "units": list},
    STATE_FORMAT: {"state_index": dict, "frozen": list},
}
"""What the metadata of a format has besides what both have."""


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata; raises :class:`CheckpointError` for a file that is missing or another's."""
    try:
        metadata = yaml.load(path.read_text(), YAML_LOADER)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), "is no YAML") from error
    if not isinstance(metadata, dict) or metadata.get("format") not in KEYS:
        raise CheckpointError(str(path), f"is not the metadata of {' or '.join(KEYS)}")
    wanted = {"shards": list, "values": dict, "tied": dict} | KEYS[metadata["format"]]
    for key, kind in wanted.items():
        if not isinstance(metadata.get(key), kind):
            raise CheckpointError(str(path), f"expected {kind.__name__}", key=key)
    if metadata.get("complete") is not True:
        raise CheckpointError(str(path), "is truncated: its last line is missing")
    return metadata


Header = dict[str, tuple[list[int], str]]
"""Shape and dtype of each tensor of a file."""


def read_header(path: Path) -> tuple[Header, dict[str, str]]:
    """The header of a file, and its own metadata; raises :class:`CheckpointError`."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            header = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
            return header, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(path), f"is truncated or damaged: {error}") from error


def check_keys(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` that names a key that is missing or unknown."""
    for key in sorted(expected.keys() - found.keys()):
        raise CheckpointError(str(path), "is missing", key=key)
    for key in sorted(found.keys() - expected.keys()):
        raise CheckpointError(str(path), "is unknown", key=key)


def check_finite(part: Tensor, path: Path, key: str, name: str) -> Tensor:
    """``part``; raises :class:`CheckpointError` if one of its elements is not finite."""
    if not all_finite(part):
        number = int((~part.isfinite()).sum())
        problem = f"{number} elements of {name} are not finite"
        raise CheckpointError(str(path), problem, key=key)
    return part
