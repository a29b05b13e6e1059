"""Opening a checkpoint: which kind of file it is is told by its first bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference_impl.gpt.archives import open_archive
from reference_impl.gpt.dictionaries import open_dictionary
from reference_impl.safetensors_files import open_safetensors
from reference_impl.stored import CheckpointError, StoredCheckpoint


def open_checkpoint(source: str | os.PathLike[str] | Mapping[str, Any]) -> StoredCheckpoint:
    """The index of a checkpoint file, or of a dictionary that is in memory already."""
    if isinstance(source, Mapping):
        return open_dictionary(source)
    path = Path(source)
    if not path.is_file():
        found = "is a folder, expected a file" if path.is_dir() else "there is no such file"
        raise CheckpointError(str(path), found)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    if start[:4] == b"PK\x03\x04":
        return open_archive(path)
    if start[8:9] == b"{":
        return open_safetensors(path)
    raise CheckpointError(
        str(path),
        "is neither a zip archive of torch.save nor a safetensors file "
        f"({path.stat().st_size} bytes, the first {start[:4]!r})",
    )
