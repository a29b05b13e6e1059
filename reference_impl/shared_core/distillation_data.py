"""The text that a model is distilled on: rows of ids, from a file or from memory, and their batches.

A row is a document, or a piece of a long one. Batches are filled up on the right; what was filled up
is told by the length of a row, so that an id that also serves as padding is learnt where it is real.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference_impl.safetensors_files import open_safetensors
from reference_impl.shared_core.distillation_loss import IGNORED
from reference_impl.shared_core.trained_model import read_tokenizer
from reference_impl.stored import CheckpointError


@dataclass(frozen=True)
class Rows(Sequence[Mapping[str, Any]]):
    """Rows of ids, as a data set: ``rows[i]`` is ``{"ids": int64 [tokens], "row": i}``."""

    ids: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        return {"ids": self.ids[row], "row": row}

    def digest(self) -> str:
        """SHA-256 of all ids and of where rows begin."""
        found = hashlib.sha256()
        for row in self.ids:
            found.update(len(row).to_bytes(8, "little"))
            found.update(row.contiguous().numpy().tobytes())
        return found.hexdigest()


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch: ``input_ids``, ``attention_mask``, ``labels`` int64 [batch, tokens]; ``rows`` [batch].

    Labels are the ids, and −100 where a row was filled up. Shifting is the loss's.
    """
    longest = max(len(item["ids"]) for item in items)
    ids_BT = torch.zeros(len(items), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, item in enumerate(items):
        ids_BT[b, : len(item["ids"])] = item["ids"]
        mask_BT[b, : len(item["ids"])] = 1
    return {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "labels": ids_BT.masked_fill(mask_BT == 0, IGNORED),
        "rows": torch.tensor([item["row"] for item in items]),
    }


def valid_targets(labels_BT: Tensor) -> Tensor:
    """How many tokens of a batch are targets: the first of a row is predicted from nothing."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def read_rows(
    data: str | Path | Iterable[Sequence[int]], *, max_length: int, vocab_size: int, tokenizer: str
) -> Rows:
    """The rows of a file, or of sequences of ids; see ``docs/distillation.md`` for the formats.

    Documents longer than ``max_length`` are cut into pieces; a piece of one token has nothing to learn
    and is left out. ``tokenizer`` is the folder of the one that text is read with. Raises
    :class:`CheckpointError` that names file and line for what cannot be read, and for an id outside
    the vocabulary.
    """
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2")
    in_memory = not isinstance(data, str | Path)
    source = "the given ids" if in_memory else str(data)
    documents = enumerate(data, 1) if in_memory else from_file(Path(data), tokenizer)
    pieces = []
    for number, document in documents:
        row = as_ids(document, f"{source}, row {number}", vocab_size)
        pieces += [piece for piece in row.split(max_length) if len(piece) > 1]
    if not pieces:
        raise CheckpointError(source, "holds no row of two tokens or more")
    return Rows(tuple(pieces))


def as_ids(document: Any, source: str, vocab_size: int) -> Tensor:
    """A row of ids, int64 [tokens], all in the vocabulary."""
    if isinstance(document, Tensor):
        document = document.tolist()
    good = isinstance(document, Sequence) and not isinstance(document, str)
    if not good or not all(type(each) is int for each in document):
        raise CheckpointError(source, "is not a list of ids")
    for each in document:
        if not 0 <= each < vocab_size:
            raise CheckpointError(source, f"has id {each}, the vocabulary has {vocab_size}")
    return torch.tensor(document, dtype=torch.int64)


def from_file(path: Path, tokenizer: str) -> Iterator[tuple[int, Any]]:
    """Rows and their numbers: of ``.safetensors`` tensors, of ``.jsonl`` and of other text."""
    if not path.is_file():
        raise CheckpointError(str(path), "is not a file")
    if path.suffix == ".safetensors":
        return enumerate(from_safetensors(path), 1)
    return from_lines(path, tokenizer)


def from_safetensors(path: Path) -> Iterator[list[int]]:
    """``input_ids`` [rows, tokens], of which ``lengths`` [rows] are real where it is there."""
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except Exception as error:  # the library has no class of errors of its own for this
        open_safetensors(path)  # raises the error that names the file
        raise CheckpointError(str(path), f"cannot be read: {error}") from error
    if "input_ids" not in tensors or tensors["input_ids"].ndim != 2:
        raise CheckpointError(str(path), "is missing, or not [rows, tokens]", key="input_ids")
    ids_RT = tensors["input_ids"]
    lengths = tensors.get("lengths", torch.full((len(ids_RT),), ids_RT.shape[1]))
    fit = lengths.shape == ids_RT.shape[:1] and bool((lengths <= ids_RT.shape[1]).all())
    if not fit or bool((lengths < 0).any()):
        problem = f"does not fit input_ids {list(ids_RT.shape)}"
        raise CheckpointError(str(path), problem, key="lengths")
    for row, length in zip(ids_RT, lengths.tolist()):
        yield row[:length].tolist()


def from_lines(path: Path, tokenizer: str) -> Iterator[tuple[int, Any]]:
    """A document a line: as JSON ``{"input_ids": […]}`` or ``{"text": "…"}``, else plain text."""
    reader = None
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            found = line.rstrip("\n")
            if path.suffix == ".jsonl":
                found = from_json(line, f"{path}, line {number}")
            if isinstance(found, str):
                reader = reader or read_tokenizer(tokenizer)
                found = reader(found)["input_ids"]
            yield number, found


def from_json(line: str, source: str) -> Any:
    """The ids or the text of a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CheckpointError(source, f"is not JSON: {error}") from error
    for name in ("input_ids", "text"):
        if isinstance(found, Mapping) and name in found:
            return found[name]
    raise CheckpointError(source, "has neither input_ids nor text")
