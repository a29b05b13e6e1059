"""A model to train or to learn from: a folder of either kind, compressed or ordinary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.hf_directory import read_json
from reference_impl.shared_core.checkpoint import LoadedCompressed, load_compressed_model
from reference_impl.shared_core.folders import (
    METADATA,
    read_companions,
    write_companions,
    written_folder,
)
from reference_impl.stored import CheckpointError

WEIGHTS = (".safetensors", ".bin", ".pt")
"""How the names of files of weights end."""

TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
"""Files that have the words of a tokenizer, of which one must be there."""


@dataclass
class TrainedModel:
    """A causal language model of transformers, and how it is saved."""

    module: nn.Module
    """What is called and trained; its calls are those of transformers."""
    compressed: LoadedCompressed | None
    """The compressed model whose module it is."""
    companions: Mapping[str, bytes]
    """Tokenizer files and the like, by name."""

    @property
    def vocab_size(self) -> int:
        """The width of the logits."""
        return self.module.config.vocab_size

    def parameters(self) -> dict[str, Tensor]:
        """Parameters, themselves, by the names that patterns of parameter groups are held against."""
        return dict(self.module.named_parameters())

    def save(self, folder: str | Path) -> None:
        """Write the model as it is now, in the kind of folder it came from, whole or not at all."""
        if self.compressed is not None:
            self.compressed.save(folder)
            return
        with written_folder(Path(folder), compressed=False) as fresh:
            self.module.save_pretrained(fresh)
            write_companions(fresh, self.companions)

    @torch.no_grad()
    def take(self, other: TrainedModel) -> None:
        """Copy the weights of another model; raises ValueError if it is not the same one."""
        own, given = self.parameters(), other.parameters()
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in given.items()}:
            raise ValueError("the weights are those of another model")
        for name, parameter in own.items():
            parameter.copy_(given[name])


def is_compressed(folder: str | Path) -> bool:
    """Whether a folder is that of a compressed model."""
    return (Path(folder) / METADATA).is_file()


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> TrainedModel:
    """The model of a folder of either kind, in evaluation mode; nothing is downloaded.

    ``dtype`` None is that of the file. Raises :class:`CheckpointError` for what cannot be loaded whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(str(folder), "is not a directory")
    companions = read_companions(folder)
    if is_compressed(folder):
        loaded = load_compressed_model(folder, dtype=dtype, device=str(device))
        return TrainedModel(loaded.module, loaded, companions)
    read_json(folder / "config.json")
    return TrainedModel(ordinary(folder, dtype).to(device).eval(), None, companions)


def ordinary(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """transformers' model of a folder, refused where weights are missing, unknown or do not fit."""
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(str(folder), f"cannot be loaded: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in report[kind]:
            raise CheckpointError(str(folder), kind.replace("_keys", ""), key=str(key))
    return model


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside a model; raises :class:`CheckpointError` where there is none.

    Files are looked for here: without them transformers makes one of the model's type, without words.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZERS for path in Path(folder).glob(pattern)):
        raise CheckpointError(str(folder), "has no tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            str(folder), f"has a tokenizer that cannot be read: {reason}"
        ) from error


def frozen(model: TrainedModel) -> TrainedModel:
    """The same model, in evaluation mode and without gradients."""
    model.module.eval().requires_grad_(False)
    return model


def folder_digest(folder: str | Path) -> str:
    """SHA-256 of configuration and weights of a folder: names and contents of their files."""
    folder, found = Path(folder), hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != "config.json" and path.suffix not in WEIGHTS:
            continue
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found.update(f"{name}\0{content}\n".encode())
    return found.hexdigest()


def check_vocabularies(
    student: str | Path, teacher: str | Path, vocab_size: int | None = None
) -> None:
    """Raise ValueError unless the models of both folders mean the same tokens by the same ids.

    Widths are always known, and may differ in padding beyond ``vocab_size``; the words are known only
    where both folders have a ``tokenizer.json``.
    """
    folders = Path(student), Path(teacher)
    widths = [read_json(folder / "config.json").get("vocab_size") for folder in folders]
    for folder, width in zip(folders, widths):
        if not isinstance(width, int):
            raise CheckpointError(str(folder / "config.json"), "is no number", key="vocab_size")
    if vocab_size is not None and not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size is {vocab_size}, the models have {widths[0]} and {widths[1]}")
    if vocab_size is None and widths[0] != widths[1]:
        raise ValueError(f"the student's vocabulary has {widths[0]} ids, the teacher's {widths[1]}")
    words = [words_of(read_companions(folder)) for folder in folders]
    if None in words:
        return
    for word in sorted({*words[0], *words[1]}):
        ids = [each.get(word) for each in words]
        if ids[0] != ids[1]:
            found = f"{word!r} has id {ids[0]} for the student and {ids[1]} for the teacher"
            raise ValueError(f"the tokenizers differ: {found}")


def words_of(companions: Mapping[str, bytes]) -> dict[str, int] | None:
    """The ids of words in ``tokenizer.json``; None where it is missing or of a kind without ids."""
    try:
        stored: Any = json.loads(companions["tokenizer.json"])
        words = stored["model"]["vocab"]
        added = {each["content"]: each["id"] for each in stored.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError):
        return None
    if isinstance(words, list):  # Unigram: pairs of a piece and its score, in the order of ids
        words = {piece: number for number, (piece, _) in enumerate(words)}
    return {**words, **added}
