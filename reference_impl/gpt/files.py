"""The tensors of a checkpoint file, found without executing pickle and read one at a time.

A file is a zip archive of ``torch.save`` or a safetensors file; which one is told by its first bytes.
Only the index is read at first. Each tensor is read when it is asked for, straight into memory of its
own: nothing of the file stays mapped, the file may be replaced while the model lives, and optimizer
state that rides along is never read.

Every byte that is used is checked: records of the archive against their CRC-32 (``torch.load`` itself
does not look at it), a safetensors header against the length of the file.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

CHUNK = 1 << 24
"""Bytes that are read and checked at a time."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; names the file and, where there is one, the key."""

    def __init__(self, source: str, problem: str, *, key: str | None = None) -> None:
        super().__init__(f"{source}: {problem}" if key is None else f"{source}: {key}: {problem}")
        self.source = source
        self.key = key


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Gives a new tensor each time; raises :class:`CheckpointError` for damaged bytes."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a file holds."""

    source: str
    """The path, or what else to call it in an error."""
    tensors: Mapping[str, StoredTensor]
    """The model's state dictionary under the names of the file."""
    rest: Mapping[str, Any]
    """The other entries of a training dictionary, optimizer state left out."""


class LazyState(Mapping[str, Tensor]):
    """A state dictionary whose tensors are read from the file when they are looked up."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
        return open_torch(path)
    if start[8:9] == b"{":
        return open_safetensors(path)
    raise CheckpointError(
        str(path),
        "is neither a zip archive of torch.save nor a safetensors file "
        f"({path.stat().st_size} bytes, the first {start[:4]!r})",
    )


# A dictionary in memory


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
    """The state dictionary in what a file holds, and the other entries but for optimizer state."""
    if not isinstance(content, Mapping):
        raise CheckpointError(source, f"holds a {type(content).__name__}, expected a dictionary")
    holders = [entry for entry in STATE_ENTRIES if entry in content]
    if len(holders) > 1:
        raise CheckpointError(source, f"has the entries {' and '.join(holders)}, expected one")
    if holders:
        state, key = content[holders[0]], holders[0]
        rest = {k: v for k, v in content.items() if k != key and not str(k).startswith("optim")}
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
    if not state:
        missing = "; and there is no entry 'model'" if key is None else ""
        raise CheckpointError(source, f"holds no tensors{missing}", key=key)
    return state, rest


# Archives of torch.save


def open_torch(path: Path) -> StoredCheckpoint:
    """The index of an archive that ``torch.save`` wrote."""
    source = str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:
                if "/data/" not in record.filename:
                    content = archive.read(record)
                if record.filename.endswith("/byteorder") and content.decode() != sys.byteorder:
                    raise zipfile.BadZipFile(f"its tensors are {content.decode()}-endian")
                if record.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile("the record is compressed")
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(source, f"the archive is truncated or damaged: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            source,
            f"holds more than tensors and plain values, and is not unpickled: {reason(error)}",
        ) from error
    except Exception as error:
        raise CheckpointError(source, f"torch.load refuses it: {reason(error)}") from error
    state, rest = find_state(source, content)
    record_of = records_of_storages(source, state, records, path)
    tensors = {
        key: StoredTensor(
            tuple(tensor.shape),
            tensor.dtype,
            ArchivedTensor(path, key, record_of[key], strided(tensor)),
        )
        for key, tensor in state.items()
    }
    return StoredCheckpoint(source, tensors, rest)


def reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0]


@dataclass(frozen=True)
class Strided:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, storage: Tensor) -> Tensor:
        """The contiguous tensor in a storage given as bytes."""
        values = storage.view(self.dtype)
        return values.as_strided(self.shape, self.stride, self.offset).contiguous()


def strided(tensor: Tensor) -> Strided:
    """How ``tensor`` lies in its storage."""
    return Strided(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def records_of_storages(
    source: str, state: Mapping[str, Tensor], records: list[zipfile.ZipInfo], path: Path
) -> dict[str, zipfile.ZipInfo]:
    """The record that holds each tensor's storage.

    ``state`` was loaded as a map of the file, where every storage lies at the address of the map plus
    the offset of its record. The map begins on a page, and with it every storage must fall on a
    record of its size.
    """
    offsets = data_offsets(path, records)
    storages = {
        key: (storage.data_ptr(), storage.nbytes())
        for key, tensor in state.items()
        if (storage := tensor.untyped_storage()).nbytes()
    }
    empty = next((r for r in records if r.file_size == 0), None)
    if not storages:
        return dict.fromkeys(state, empty)
    address, size = next(iter(storages.values()))
    for offset in (o for o, r in offsets.items() if r.file_size == size):
        base = address - offset
        placed = {key: offsets.get(at - base) for key, (at, _) in storages.items()}
        fits = all(r is not None and r.file_size == storages[key][1] for key, r in placed.items())
        if base % os.sysconf("SC_PAGESIZE") == 0 and fits:
            return dict.fromkeys(state, empty) | placed
    raise CheckpointError(source, "its records do not hold the tensors that its index names")


def data_offsets(path: Path, records: list[zipfile.ZipInfo]) -> dict[int, zipfile.ZipInfo]:
    """Records by the place in the file where their data begins."""
    offsets = {}
    with path.open("rb") as file:
        for record in records:
            file.seek(record.header_offset + 26)  # lengths of the name and of the extra field
            lengths = file.read(4)
            name, extra = (
                int.from_bytes(lengths[:2], "little"),
                int.from_bytes(lengths[2:], "little"),
            )
            if record.file_size:
                offsets[record.header_offset + 30 + name + extra] = record
    return offsets


@dataclass(frozen=True)
class ArchivedTensor:
    """Reads one tensor of an archive, and checks it against the record's CRC-32."""

    path: Path
    key: str
    record: zipfile.ZipInfo
    layout: Strided

    def __call__(self) -> Tensor:
        """A new tensor."""
        with self.path.open("rb") as file:
            offset = next(iter(data_offsets(self.path, [self.record])), 0)
            file.seek(offset)
            storage, checksum = read_bytes(file, self.record.file_size, str(self.path), self.key)
        if checksum != self.record.CRC:
            problem = (
                f"its bytes are damaged (CRC-32 {checksum:08x}, expected {self.record.CRC:08x})"
            )
            raise CheckpointError(str(self.path), problem, key=self.key)
        return self.layout.of(storage)


def read_bytes(file: BinaryIO, size: int, source: str, key: str) -> tuple[Tensor, int]:
    """The next ``size`` bytes of a file as a uint8 tensor, and their CRC-32."""
    storage = torch.empty(size, dtype=torch.uint8)
    view, checksum, done = memoryview(storage.numpy()), 0, 0
    while done < size:
        count = file.readinto(view[done : min(done + CHUNK, size)])
        if not count:
            raise CheckpointError(source, f"ends {size - done} bytes too early", key=key)
        checksum = zlib.crc32(view[done : done + count], checksum)
        done += count
    return storage, checksum


# safetensors

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def open_safetensors(path: Path) -> StoredCheckpoint:
    """The index of a safetensors file.

    ``save_model`` of safetensors stores one of several names that share memory, and the others in
    the metadata as ``{dropped name: stored name}``; they are restored.
    """
    source = str(path)
    try:
        with safe_open(path, framework="pt") as opened:  # the library checks header and length
            metadata = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(source, f"is truncated or damaged: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            problem = f"has dtype {entry['dtype']}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
            raise CheckpointError(source, problem, key=key)
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        place = (8 + length + begin, end - begin)
        tensors[key] = StoredTensor(shape, dtype, SafeTensor(path, key, place, dtype, shape))
    for dropped, stored in metadata.items():
        if stored in tensors and dropped not in tensors:
            tensors[dropped] = tensors[stored]
    if not tensors:
        raise CheckpointError(source, "holds no tensors")
    return StoredCheckpoint(source, tensors, metadata)


@dataclass(frozen=True)
class SafeTensor:
    """Reads one tensor of a safetensors file."""

    path: Path
    key: str
    place: tuple[int, int]
    """Where its data begins in the file, and how many bytes it has."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        """A new tensor."""
        with self.path.open("rb") as file:
            file.seek(self.place[0])
            storage, _ = read_bytes(file, self.place[1], str(self.path), self.key)
        return storage.view(self.dtype).view(self.shape)


# Writing


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
