"""Writing a checkpoint so that the old one stays until the new one is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from reference_impl.atomic_files import write_atomically


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
