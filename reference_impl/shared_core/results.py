"""A file of JSON lines that survives the end of any process that writes to it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference_impl.stored import CheckpointError


class ResultsFile:
    """Lines that are whole stay as they are for ever; what is behind the last one is not a line.

    A process that ends while it writes leaves part of a line without its end. It is passed over, and
    cut off before the next line is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the file; wait until they have done. The file is made."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:  # not only by closing: a process that was forked since has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)

    def read(self) -> list[dict[str, Any]]:
        """What the lines hold; :class:`CheckpointError` that names the first which is not JSON."""
        return [self.parsed(number, line) for number, line in enumerate(self.lines(), start=1)]

    def lines(self) -> list[bytes]:
        """The lines that are whole."""
        return self.content().split(b"\n")[:-1]

    def content(self) -> bytes:
        """All bytes; none if the file is not there."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def parsed(self, number: int, line: bytes) -> dict[str, Any]:
        """What a line holds."""
        try:
            found = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{self.path}, line {number}", f"is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path}, line {number}", "is not a JSON object")
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        self.cut_off_rest()
        line = self.encoded(record)
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def encoded(self, record: Mapping[str, Any]) -> bytes:
        """A line with its end."""
        return json.dumps(dict(record)).encode() + b"\n"

    def cut_off_rest(self) -> None:
        """Remove what is behind the last line."""
        content = self.content()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
