"""Folders as plain torch, safetensors, json and yaml read them: what was saved or exported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from conformance.harness.compressed_cases import CompressedCase
from conformance.harness.core_cases import PROJECTIONS

STORED = {"u_in": "U_in", "v_in": "V_in", "u_out": "U_out", "v_out": "V_out"}


def expected_files(case: CompressedCase, format: str) -> set[str]:
    """Every file that a saved folder has, by its path in it."""
    found = {
        "config.json",
        "compression_config.json",
        "compressed_metadata.json",
        "compression_statistics.yaml",
        f"non_moe_weights.{format}",
    }
    for i in case.expert_layers:
        for projection in PROJECTIONS:
            found |= {f"layer_{i}/{projection}.{format}", f"layer_{i}/{projection}_metadata.json"}
    return found


def files_in(folder: str | Path) -> set[str]:
    """Every file below a folder, by its path in it."""
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def digests(folder: str | Path) -> dict[str, str]:
    """A digest of every file below a folder, and every folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "folder"
        for p in Path(folder).rglob("*")
    }


def read_mapping(path: Path) -> Any:
    """What a JSON or a YAML file holds."""
    text = path.read_text("utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def read_weights(folder: str | Path, case: CompressedCase, format: str) -> dict[str, Tensor]:
    """All weights of a folder, under the names of ``parameters()``."""
    folder = Path(folder)
    if format == "pt":
        found = dict(torch.load(folder / "non_moe_weights.pt", weights_only=True))
    else:
        found = safetensors.torch.load_file(folder / "non_moe_weights.safetensors")
    for i in case.expert_layers:
        for projection in PROJECTIONS:
            path = folder / f"layer_{i}" / f"{projection}.{format}"
            named = by_key(path, format)
            found[f"layer_{i}.{projection}.core"] = named.pop("core")
            for name, stored in STORED.items():
                parts = [named.pop(f"wrappers.{e}.{stored}") for e in range(case.experts)]
                found[f"layer_{i}.{projection}.{name}"] = torch.stack(parts)
            for key, tensor in named.items():  # what has no place
                found[f"layer_{i}.{projection}.{key}"] = tensor
    return found


def by_key(path: Path, format: str) -> dict[str, Tensor]:
    """The tensors of one projection under the keys of safetensors."""
    if format == "safetensors":
        return safetensors.torch.load_file(path)
    content = torch.load(path, weights_only=True)
    found = {"core": content["core"]}
    for e, wrapper in enumerate(content["wrappers"]):
        found |= {f"wrappers.{e}.{name}": tensor for name, tensor in wrapper.items()}
    return found


def read_pt_entries(folder: str | Path, case: CompressedCase) -> dict[tuple[int, str], dict]:
    """What the ``.pt`` files of projections hold beside tensors."""
    found = {}
    for i in case.expert_layers:
        for projection in PROJECTIONS:
            path = Path(folder) / f"layer_{i}" / f"{projection}.pt"
            content = torch.load(path, weights_only=True)
            found[i, projection] = {
                name: content.get(name) for name in ("layer_idx", "projection", "metadata")
            }
    return found


def read_exported(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an ordinary checkpoint: of one file, or of those that its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        found |= safetensors.torch.load_file(folder / name)
    return found


def exported_name(case: CompressedCase, layer: int, expert: int, projection: str) -> str:
    """What an expert's weight is called in the original."""
    mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    name = mixtral[projection] if case.model == "mixtral" else projection
    return f"model.layers.{layer}.{case.block}.experts.{expert}.{name}.weight"


def true_weights(call: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """What the call's lines have put into the folder, under the names of ``parameters()``."""
    found: dict[str, Tensor] = {k: t.detach() for k, t in call.named("others").items()}
    for (i, projection), factors in call.named("factors").items():
        place = f"layer_{i}.{projection}"
        found[f"{place}.core"] = factors["core"].detach()
        for name, stored in STORED.items():
            parts = [wrapper[stored].detach() for wrapper in factors["wrappers"]]
            found[f"{place}.{name}"] = torch.stack(parts)
    return {k: (t if dtype is None else t.to(dtype)).contiguous() for k, t in found.items()}


def experts_of(weights: Mapping[str, Tensor], case: CompressedCase) -> dict[str, Tensor]:
    """The experts that factors make [d_out, d_in], in float64, under their names in the original."""
    found = {}
    for i in case.expert_layers:
        for projection in PROJECTIONS:
            place = f"layer_{i}.{projection}"
            core, *wrappers = (weights[f"{place}.{name}"].double() for name in ("core", *STORED))
            for e in range(case.experts):
                u_in, v_in, u_out, v_out = (x[e] for x in wrappers)
                inner = torch.eye(core.shape[1]) + u_in @ v_in.T
                outer = torch.eye(core.shape[0]) + u_out @ v_out.T
                found[exported_name(case, i, e, projection)] = outer @ core @ inner
    return found
