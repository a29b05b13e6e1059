"""Writing a checkpoint so that the old one stays until the new one is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that at any moment either the old one or the whole new one is there.

    A link is followed, and an old file's permissions are kept.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_state(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], *, prefix: str = "", **entries: Any
) -> None:
    """Write a state dictionary as safetensors (by the path's suffix) or as a training dictionary."""
    state = {f"{prefix}{key}": tensor.cpu().contiguous() for key, tensor in state.items()}
    if str(path).endswith(".safetensors"):
        data = save_safetensors(state)
        write_atomically(path, lambda file: file.write(data))
    else:
        write_atomically(path, lambda file: torch.save({"model": state, **entries}, file))
