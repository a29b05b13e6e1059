"""Writing several files into a folder, all of them or none, and never over one that is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reference_impl.atomic_files import write_atomically


class CannotWrite(OSError):
    """A file that cannot be written; the message is one line, and names it."""


@dataclass(frozen=True)
class NewFile:
    """A file that is not there yet."""

    path: Path
    content: bytes


@dataclass(frozen=True)
class Extended:
    """A file that is there, with the content that it is to have."""

    path: Path
    before: bytes
    content: bytes


def check(folder: Path, files: Iterable[NewFile | Extended]) -> None:
    """Raise :class:`CannotWrite` for what can be seen to be in the way before anything is written."""
    if folder.exists() and not folder.is_dir():
        raise CannotWrite(f"{folder} is a file; expected a folder")
    if not folder.exists():
        raise CannotWrite(f"there is no folder {folder}")
    for file in files:
        shown = _shown(file.path, folder)
        if file.path.is_dir():
            raise CannotWrite(f"{shown} is a folder; expected a file, or nothing")
        parents = [file.path.parent, *file.path.parent.parents]
        nearest = next(parent for parent in parents if os.path.lexists(parent))
        if not nearest.is_dir():
            raise CannotWrite(f"{_shown(nearest, folder)} is a file; expected a folder for {shown}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise CannotWrite(f"{shown} cannot be written: {nearest} is read-only")
        if isinstance(file, Extended) and not os.access(file.path, os.W_OK):
            raise CannotWrite(f"{shown} is read-only")


def write(folder: Path, files: Iterable[NewFile | Extended]) -> None:
    """Write the files; where one cannot be written, take back the others and say which it was."""
    with contextlib.ExitStack() as undo:
        for file in files:
            try:
                _make_folders(file.path.parent, undo)
                if isinstance(file, Extended):
                    undo.callback(_put_back, file)
                    write_atomically(
                        file.path, lambda out, content=file.content: out.write(content)
                    )
                else:
                    with file.path.open("xb") as out:
                        undo.callback(file.path.unlink, missing_ok=True)
                        out.write(file.content)
            except OSError as error:
                why = error.strerror or error
                raise CannotWrite(f"{_shown(file.path, folder)} cannot be written: {why}") from None
        undo.pop_all()


def _make_folders(folder: Path, undo: contextlib.ExitStack) -> None:
    if not folder.is_dir():
        _make_folders(folder.parent, undo)
        folder.mkdir()
        undo.callback(_remove_folder, folder)


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else has put something there
        folder.rmdir()


def _put_back(file: Extended) -> None:
    if file.path.read_bytes() != file.before:
        write_atomically(file.path, lambda out: out.write(file.before))


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
