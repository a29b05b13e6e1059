"""Training dictionaries and state dictionaries, in memory or out of an archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reference_impl.stored import CheckpointError, StoredCheckpoint, StoredTensor


def open_dictionary(dictionary: Mapping[str, Any]) -> StoredCheckpoint:
    """A training dictionary or a state dictionary in memory; nothing in it is changed."""
    source = "the dictionary"
    state, rest = find_state(source, dictionary)
    tensors = {
        key: StoredTensor(tuple(t.shape), t.dtype, t.detach().clone) for key, t in state.items()
    }
    return StoredCheckpoint(source, tensors, rest)


STATE_ENTRIES = ("model", "state_dict")


def find_state(source: str, content: Any) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The state dictionary in what a file holds, and the other entries as far as they are plain.

    Entries with tensors in them (optimizer state, averaged weights) are left out.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(source, f"holds a {type(content).__name__}, expected a dictionary")
    holders = [entry for entry in STATE_ENTRIES if entry in content]
    if len(holders) > 1:
        raise CheckpointError(source, f"has the entries {' and '.join(holders)}, expected one")
    if holders:
        state, key = content[holders[0]], holders[0]
        rest = {k: v for k, v in content.items() if k != key and not holds_tensors(v)}
    else:
        state, key, rest = content, None, {}
    if not isinstance(state, Mapping):
        found = type(state).__name__
        raise CheckpointError(source, f"is a {found}, expected a state dictionary", key=key)
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(source, f"has a name that is no text: {name!r}", key=key)
        if not isinstance(value, Tensor):
            found = type(value).__name__
            missing = "; and there is no entry 'model'" if key is None else ""
            problem = f"is a {found}, expected a tensor{missing}"
            raise CheckpointError(source, problem, key=name)
        if value.layout is not torch.strided:
            raise CheckpointError(source, f"is {value.layout}, expected dense", key=name)
        if value.is_meta:
            raise CheckpointError(source, "has a shape and no data", key=name)
    if not state:
        missing = "; and there is no entry 'model'" if key is None else ""
        raise CheckpointError(source, f"holds no tensors{missing}", key=key)
    return state, rest


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere in nested dictionaries, lists and tuples."""
    if isinstance(value, Mapping):
        return any(holds_tensors(each) for each in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(holds_tensors(each) for each in value)
    return isinstance(value, Tensor)
