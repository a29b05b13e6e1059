"""Folders that are there whole or not at all, and the small files beside the weights."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from reference_impl.stored import CheckpointError

METADATA = "compressed_metadata.json"
"""What every compressed model has, and no other."""
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
"""Files that travel with a model unread."""


@contextmanager
def written_folder(target: Path, *, compressed: bool) -> Iterator[Path]:
    """A new folder that takes the place of ``target`` when all went well; else it is removed.

    Old and new folder are exchanged in one step: whenever the process ends, ``target`` is the old one
    or the whole new one. Raises :class:`CheckpointError` where nothing can be written, and if
    ``target`` is there and is neither empty nor a model of the same kind, ``compressed`` or not: a
    compressed model never takes the place of an original.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not may_be_replaced(target, compressed):
        kind = "a compressed model" if compressed else "an ordinary checkpoint"
        raise CheckpointError(str(target), f"is there already, and is not {kind}")
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            flush(path)
        put_in_place(fresh, target)
        flush(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(str(target), f"cannot be written: {reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def may_be_replaced(folder: Path, compressed: bool) -> bool:
    """Whether a folder is empty, or holds a model of this kind."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    holds_model = (folder / "config.json").exists()
    return holds_model and (folder / METADATA).exists() == compressed


def put_in_place(fresh: Path, target: Path) -> None:
    """Make ``fresh`` the folder ``target``; an old one is ``fresh`` afterwards."""
    if not target.exists():
        fresh.rename(target)
    elif not exchange(fresh, target):
        aside = fresh.with_suffix(".old")
        target.rename(aside)
        try:
            fresh.rename(target)
        except OSError:
            aside.rename(target)
            raise
        aside.rename(fresh)


AT_CURRENT_FOLDER, RENAME_EXCHANGE = -100, 2
"""Constants of Linux."""


def exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, which Linux and its file systems can; else False."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    names = (os.fsencode(one), os.fsencode(other))
    here = AT_CURRENT_FOLDER
    return renameat2(here, names[0], here, names[1], RENAME_EXCHANGE) == 0


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping, indented, in its own order."""
    path.write_text(json.dumps(dict(content), indent=2) + "\n", "utf-8")


def read_companions(folder: Path) -> dict[str, bytes]:
    """The files that travel with the model, by name."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(found)}


def write_companions(folder: Path, companions: Mapping[str, bytes]) -> None:
    """Put them beside a model."""
    for name, content in companions.items():
        (folder / name).write_bytes(content)
