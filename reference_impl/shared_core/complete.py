"""Whether a checkpoint that a training run writes is there whole, and the digest of its weights."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

from reference_impl.hf_directory import INDEX, SINGLE
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.folders import METADATA
from reference_impl.stored import CHUNK, identity_of

CONFIG = "config.json"
OTHERS = "non_moe_weights"


class CheckpointFolder:
    """A folder ``checkpoint-{step}``, which may be half written, or gone by now."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def weight_files(self) -> list[Path] | None:
        """The files of the weights, each of its whole length; None if the checkpoint is not whole."""
        try:
            if not self.has_config():
                return None
            files = self.named_files()
            return files if files and all(map(self.is_whole, files)) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            # A small file, or a header, is gone, half written, or of another form.
            return None

    def has_config(self) -> bool:
        """Whether ``config.json`` is there and is a JSON object."""
        return isinstance(self.small_file(CONFIG), dict)

    def named_files(self) -> list[Path]:
        """The files that must be there."""
        if (self.path / SINGLE).exists():
            return [self.path / SINGLE]
        if (self.path / INDEX).exists():
            return self.shards()
        if (self.path / METADATA).exists():
            return self.compressed_files()
        return []

    def shards(self) -> list[Path]:
        """The files that the index names."""
        return [
            self.path / name for name in sorted(set(self.small_file(INDEX)["weight_map"].values()))
        ]

    def compressed_files(self) -> list[Path]:
        """The files of a compressed model."""
        layers = self.small_file(METADATA)["compressed_layer_indices"]
        stems = [f"layer_{layer}/{projection}" for layer in layers for projection in PROJECTIONS]
        return [self.tensor_file(stem) for stem in (OTHERS, *stems)]

    def tensor_file(self, stem: str) -> Path:
        """A file of tensors in the format in which it is there."""
        pickled = self.path / f"{stem}.pt"
        return pickled if pickled.exists() else self.path / f"{stem}.safetensors"

    def is_whole(self, path: Path) -> bool:
        """Whether a file of tensors has the length that it must have."""
        if path.suffix == ".pt":
            return zipfile.is_zipfile(path)  # the directory is what is written last
        return os.path.getsize(path) == self.told_length(path)

    def told_length(self, path: Path) -> int:
        """The length of a safetensors file by its header."""
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.path.getsize(path):
                raise ValueError(f"{path}: the header is not there")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return 8 + length + max((each["data_offsets"][1] for each in header.values()), default=0)

    def small_file(self, name: str) -> Any:
        """What a small file holds."""
        return json.loads((self.path / name).read_text("utf-8"))

    def identity(self, files: list[Path]) -> tuple[Any, ...]:
        """What changes when one of the files is written to or replaced."""
        return tuple((str(path), *identity_of(os.stat(path))) for path in files)

    def digest(self, files: list[Path]) -> str:
        """A digest of the files of the weights, by their names in the folder."""
        found = hashlib.sha256()
        for path in files:
            name = path.relative_to(self.path).as_posix()
            found.update(f"{name}\0{os.path.getsize(path)}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    found.update(chunk)
        return found.hexdigest()
