"""The file of one projection: a core and the wrappers of every expert, as ``.pt`` or safetensors.

In a ``.pt`` file wrappers are a list of dictionaries ``{"U_in", "V_in", "U_out", "V_out"}``, in
safetensors tensors ``wrappers.{e}.U_in`` …; in memory they are stacked over the experts. No pickle is
executed.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference_impl.hf_directory import read_json
from reference_impl.safetensors_files import open_safetensors
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.folders import write_json
from reference_impl.shared_core.layer import FACTORS
from reference_impl.stored import CheckpointError, all_finite

SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors"}
"""File suffixes by format."""
STORED = {"u_in": "U_in", "v_in": "V_in", "u_out": "U_out", "v_out": "V_out"}
"""What the wrappers' factors are called in files."""
METADATA = ("num_experts", "d_in", "d_out", "rank")
ENTRIES = ("core", "wrappers", "metadata", "layer_idx", "projection")
"""Of a ``.pt`` file; the last two may be missing."""

Factors = dict[str, Tensor]
"""``core`` [d_out, d_in], and the others [experts, width, rank]."""


def metadata_of(factors: Mapping[str, Tensor]) -> dict[str, int]:
    """What the metadata of a projection must say."""
    d_out, d_in = factors["core"].shape
    number, _, rank = factors["u_in"].shape
    return {"num_experts": number, "d_in": d_in, "d_out": d_out, "rank": rank}


# Writing


def write_projection(
    folder: Path, layer: int, projection: str, factors: Mapping[str, Tensor], format: str
) -> None:
    """Write the file of a projection and its metadata into the folder of its layer."""
    factors = {name: factor.detach().cpu().contiguous() for name, factor in factors.items()}
    metadata = metadata_of(factors)
    path = folder / f"{projection}{SUFFIXES[format]}"
    if format == "pt":
        content = {
            "layer_idx": layer,
            "projection": projection,
            "core": factors["core"],
            "wrappers": [
                {stored: factors[name][expert].clone() for name, stored in STORED.items()}
                for expert in range(metadata["num_experts"])
            ],
            "metadata": metadata,
        }
        save_pt(content, path)
    else:
        tensors = {"core": factors["core"]}
        for expert in range(metadata["num_experts"]):
            for name, stored in STORED.items():
                tensors[f"wrappers.{expert}.{stored}"] = factors[name][expert].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / f"{projection}_metadata.json", metadata)


def save_pt(content: Any, path: Path) -> None:
    """Write what ``torch.save`` makes of plain values and tensors; OSError if the disk is full.

    By way of memory: on a full disk ``torch.save`` itself ends the process.
    """
    made = io.BytesIO()
    torch.save(content, made)
    path.write_bytes(made.getbuffer())


# Reading


def read_layer(folder: Path, layer: int) -> dict[str, Factors]:
    """The factors of the three projections of a layer; nothing else may be in its folder."""
    files = {path.name for path in folder.iterdir()}
    for projection in PROJECTIONS:
        names = [f"{projection}{suffix}" for suffix in SUFFIXES.values()]
        there = [name for name in names if name in files]
        if not there:
            raise CheckpointError(str(folder / names[-1]), "is missing")
        if len(there) > 1:
            raise CheckpointError(str(folder), f"holds {there[0]} and {there[1]}")
    known = {f"{p}{end}" for p in PROJECTIONS for end in (*SUFFIXES.values(), "_metadata.json")}
    for name in sorted(files - known):
        raise CheckpointError(str(folder / name), "is not of a compressed layer")
    return {projection: read_projection(folder, layer, projection) for projection in PROJECTIONS}


def read_projection(folder: Path, layer: int, projection: str) -> Factors:
    """The factors of one projection, checked against their metadata."""
    path = folder / f"{projection}.pt"
    if path.exists():
        factors, metadata = read_pt(path, layer, projection)
    else:
        path = folder / f"{projection}.safetensors"
        factors, metadata = read_tensors(path), None
    beside = folder / f"{projection}_metadata.json"
    for source, found in ((str(path), metadata), (str(beside), optional_json(beside))):
        if found is not None:
            check_metadata(source, found, metadata_of(factors))
    if metadata is None and not beside.exists():
        raise CheckpointError(str(beside), "is missing")
    return factors


def optional_json(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds, or None if there is none."""
    return read_json(path) if path.exists() else None


def check_metadata(source: str, found: Any, expected: Mapping[str, int]) -> None:
    """Raise unless metadata say what the tensors say, and nothing else."""
    if not isinstance(found, Mapping):
        raise CheckpointError(source, f"is a {type(found).__name__}", key="metadata")
    for name in METADATA:
        if name not in found:
            raise CheckpointError(source, "is missing", key=f"metadata.{name}")
        if found[name] != expected[name] or isinstance(found[name], bool):
            problem = f"is {found[name]!r}, the tensors have {expected[name]}"
            raise CheckpointError(source, problem, key=f"metadata.{name}")


def read_pt(path: Path, layer: int, projection: str) -> tuple[Factors, Any]:
    """The factors of a ``.pt`` file, and its metadata."""
    content = load_pt(path)
    refuse_unless(path, isinstance(content, dict), f"holds a {type(content).__name__}")
    for name in content:
        refuse_unless(path, name in ENTRIES, "is not an entry of a projection", str(name))
    for name in ENTRIES[:3]:
        refuse_unless(path, name in content, "is missing", name)
    for name, expected in (("layer_idx", layer), ("projection", projection)):
        found = content.get(name, expected)
        refuse_unless(path, found == expected, f"is {found!r}, expected {expected!r}", name)
    wrappers = content["wrappers"]
    refuse_unless(path, isinstance(wrappers, list), "is not a list", "wrappers")
    named = {"core": content["core"]}
    for expert, wrapper in enumerate(wrappers):
        refuse_unless(path, isinstance(wrapper, dict), "is not a dictionary", f"wrappers.{expert}")
        named |= {f"wrappers.{expert}.{name}": value for name, value in wrapper.items()}
    return stacked(path, named), content["metadata"]


def load_pt(path: Path) -> Any:
    """What a file of ``torch.save`` holds, checksums verified, without executing its pickle."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        refuse_unless(path, damaged is None, f"is damaged: the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        problem = f"holds more than tensors and plain values: {first_line(error)}"
        raise CheckpointError(str(path), problem) from error
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(str(path), f"is damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's text."""
    return str(error).strip().split("\n")[0][:200]


def read_tensors(path: Path) -> Factors:
    """The factors of a safetensors file."""
    stored = open_safetensors(path).tensors
    return stacked(path, {name: tensor.read() for name, tensor in stored.items()})


def stacked(path: Path, named: Mapping[str, Any]) -> Factors:
    """The factors of tensors named ``core`` and ``wrappers.{e}.U_in`` …, stacked over the experts.

    Raises :class:`CheckpointError` for anything missing, unknown, mis-shaped or not finite.
    """
    numbers = {int(number) for number in map(expert_number, named) if number}
    refuse_unless(path, bool(numbers), "holds no expert", "wrappers")
    experts = len(numbers)  # not the largest number: a damaged file may name the billionth
    expected = [f"wrappers.{e}.{name}" for e in range(experts) for name in STORED.values()]
    known = {"core", *expected}
    for key in ("core", *expected):
        refuse_unless(path, key in named, "is missing", key)
    for key, tensor in named.items():
        refuse_unless(path, key in known, "is not of a projection", str(key))
        check_tensor(path, key, tensor)
    refuse_unless(path, named["core"].ndim == 2, "is not a matrix", "core")
    d_out, d_in = named["core"].shape
    rank = named["wrappers.0.U_in"].shape[-1] if named["wrappers.0.U_in"].ndim == 2 else 0
    for key in expected:
        shape = [d_in if key.endswith("_in") else d_out, rank]
        found = list(named[key].shape)
        refuse_unless(path, found == shape and rank, f"has shape {found}, expected {shape}", key)
    refuse_unless(path, rank <= min(d_out, d_in), f"have rank {rank}", "wrappers")
    factors = {"core": named["core"]}
    for name, stored in STORED.items():
        parts = [named[f"wrappers.{expert}.{stored}"] for expert in range(experts)]
        factors[name] = torch.stack(parts)
    return {name: factors[name] for name in FACTORS}


def expert_number(key: str) -> str:
    """The number of the expert in a key, as it is written; empty if there is none."""
    parts = str(key).split(".")
    is_wrapper = len(parts) == 3 and parts[0] == "wrappers" and parts[1].isdecimal()
    return parts[1] if is_wrapper and parts[1] == str(int(parts[1])) else ""


def check_tensor(path: Path, key: str, tensor: Any) -> None:
    """Raise unless a value is a finite floating tensor."""
    is_floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
    refuse_unless(path, is_floating, "is not a floating tensor", key)
    refuse_unless(path, all_finite(tensor), "holds values that are not finite", key)


def refuse_unless(path: Path, good: bool, problem: str, key: str | None = None) -> None:
    """Raise :class:`CheckpointError` unless all is well."""
    if not good:
        raise CheckpointError(str(path), problem, key=key)
