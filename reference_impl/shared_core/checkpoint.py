"""Folders of compressed models: everything that is needed, written at once and read without mercy.

``load_compressed_model``, ``save_compressed_model`` and ``export_to_hf_format`` have the names and the
layout of LawrenceRLiu/MoE_Factorize_Compress (``src/compressed_moe_model.py``). They differ in what
they promise: a folder is complete (the source's lacked the configuration that its loader wanted),
loading needs no weights of the original, and what does not fit is an error that names file and key (the
source kept the original's experts, and wrote a line to its log).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_impl.hf_directory import read_json
from reference_impl.safetensors_files import open_safetensors
from reference_impl.shared_core.architecture import Architecture, architecture_of
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.export import write_export
from reference_impl.shared_core.folders import (
    METADATA,
    read_companions,
    write_companions,
    write_json,
    written_folder,
)
from reference_impl.shared_core.model import CompressedModel, Layers, empty_model, names_of_others
from reference_impl.shared_core.projections import (
    SUFFIXES,
    check_tensor,
    load_pt,
    metadata_of,
    read_layer,
    refuse_unless,
    save_pt,
    write_projection,
)
from reference_impl.shared_core.statistics import CompressionStats
from reference_impl.shared_core.stored_statistics import check_statistics
from reference_impl.stored import CheckpointError

CONFIG = "config.json"
COMPRESSION = "compression_config.json"
COMPRESSION_YAML = "compression_config.yaml"
STATISTICS = "compression_statistics.yaml"
OTHERS = "non_moe_weights"


@dataclass
class Folder:
    """What a folder of a compressed model holds, checked."""

    config: dict[str, Any]
    architecture: Architecture
    module: nn.Module
    """The model without weights."""
    others: dict[str, Tensor]
    """The weights that are not of experts."""
    layers: Layers
    model_name: str = ""
    companions: dict[str, bytes] = field(default_factory=dict)
    """Tokenizer files and the like, by name."""


# Reading


def read_folder(directory: str | Path) -> Folder:
    """Everything in a folder; raises :class:`CheckpointError` for what is missing or contradicts."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(str(directory), "is not a directory")
    config = read_json(directory / CONFIG)
    architecture = architecture_of(config, str(directory / CONFIG))
    check_layers(directory, architecture)
    layers = {i: read_layer(directory / f"layer_{i}", i) for i in architecture.expert_layers}
    check_sizes(directory, architecture, layers)
    model_name = check_compression(directory, architecture, layers)
    if (directory / STATISTICS).exists():
        check_statistics(directory / STATISTICS, statistics_of(architecture, layers))
    module = empty_model(config)
    others = read_others(directory, names_of_others(module, architecture))
    companions = read_companions(directory)
    return Folder(config, architecture, module, others, layers, model_name, companions)


def check_layers(directory: Path, architecture: Architecture) -> None:
    """Raise unless the folders of layers, and the metadata, are those that the model must have."""
    expected = set(architecture.expert_layers)
    for layer in architecture.expert_layers:
        if not (directory / f"layer_{layer}").is_dir():
            raise CheckpointError(str(directory / f"layer_{layer}"), "is missing")
    for path in directory.glob("layer_*"):
        number = path.name.removeprefix("layer_")
        if not number.isdecimal() or int(number) not in expected or number != str(int(number)):
            raise CheckpointError(str(path), "is not a layer of the model that has experts")
    path = directory / METADATA
    found = read_json(path)
    for name, value in layer_metadata(architecture).items():
        refuse_unless(path, name in found, "is missing", name)
        refuse_unless(path, found[name] == value, f"is {found[name]}, expected {value}", name)


def layer_metadata(architecture: Architecture) -> dict[str, Any]:
    """What ``compressed_metadata.json`` says."""
    return {
        "compressed_layer_indices": list(architecture.expert_layers),
        "num_compressed_layers": len(architecture.expert_layers),
        "total_layers": architecture.num_layers,
    }


def check_sizes(directory: Path, architecture: Architecture, layers: Layers) -> None:
    """Raise unless the factors have the widths and the number of experts of the model."""
    for layer, projections in layers.items():
        for projection, factors in projections.items():
            found, shape = metadata_of(factors), architecture.shape(projection)
            expected = dict(
                zip(("num_experts", "d_out", "d_in"), (architecture.num_experts, *shape))
            )
            for name, value in expected.items():
                if found[name] != value:
                    source = str(directory / f"layer_{layer}" / projection)
                    problem = f"is {found[name]}, {CONFIG} says {value}"
                    raise CheckpointError(source, problem, key=name)


def check_compression(directory: Path, architecture: Architecture, layers: Layers) -> str:
    """Raise unless the compression's configuration, if there is one, says what the tensors say.

    Gives the name of the original. The source wrote this file as JSON, and later as YAML; it may
    hold further entries (``num_steps``, ``lr``, ``output_dir``).
    """
    path = directory / COMPRESSION
    if path.exists():
        found = read_json(path)
    elif (directory / COMPRESSION_YAML).exists():
        path = directory / COMPRESSION_YAML
        found = read_yaml(path)
    else:
        return ""
    projections = found.get("projections", list(PROJECTIONS))
    good = isinstance(projections, list) and sorted(map(str, projections)) == sorted(PROJECTIONS)
    refuse_unless(path, good, f"is {projections!r}, expected {list(PROJECTIONS)}", "projections")
    number = found.get("num_experts", architecture.num_experts)
    expected = architecture.num_experts
    refuse_unless(path, number == expected, f"is {number!r}, expected {expected}", "num_experts")
    ranks = {metadata_of(f)["rank"] for each in layers.values() for f in each.values()}
    rank = found.get("rank")
    if rank is not None:
        problem = f"is {rank!r}, the tensors have {', '.join(map(str, sorted(ranks)))}"
        refuse_unless(path, {rank} == ranks or not ranks, problem, "rank")
    dtype = found.get("dtype")
    known = dtype is None or isinstance(getattr(torch, str(dtype), None), torch.dtype)
    refuse_unless(path, known, f"is {dtype!r}, which is not a dtype", "dtype")
    return str(found.get("model_name", ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(str(path), f"is not YAML: {error}") from error
    refuse_unless(path, isinstance(found, dict), f"holds a {type(found).__name__}")
    return found


def read_others(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights that are not of experts: exactly these names and shapes, finite."""
    there = [s for s in SUFFIXES.values() if (directory / f"{OTHERS}{s}").exists()]
    path = directory / f"{OTHERS}{there[0] if there else '.safetensors'}"
    refuse_unless(path, bool(there), "is missing")
    if len(there) > 1:
        raise CheckpointError(str(directory), f"holds {OTHERS}.pt and {OTHERS}.safetensors")
    if path.suffix == ".pt":
        found = load_pt(path)
        refuse_unless(path, isinstance(found, Mapping), f"holds a {type(found).__name__}")
    else:
        found = {name: t.read() for name, t in open_safetensors(path).tensors.items()}
    for name in shapes:
        refuse_unless(path, name in found, "is missing", name)
    for name, tensor in found.items():
        refuse_unless(path, name in shapes, "is not of this model", str(name))
        check_tensor(path, name, tensor)
        shape = list(shapes[name])
        problem = f"has shape {list(tensor.shape)}, expected {shape}"
        refuse_unless(path, list(tensor.shape) == shape, problem, name)
    return {name: found[name] for name in shapes}


# Writing


def statistics_of(architecture: Architecture, layers: Layers) -> CompressionStats:
    """The statistics of these factors."""
    stats = CompressionStats()
    for layer, projections in layers.items():
        for projection, factors in projections.items():
            sizes = metadata_of(factors)
            stats.add_layer_stats(layer, projection, **sizes, num_active_experts=architecture.top_k)
    return stats


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    others: Mapping[str, Tensor],
    *,
    rank: int,
    dtype: torch.dtype,
    model_name: str,
    companions: Mapping[str, bytes],
    format: str,
) -> None:
    """Write everything of a folder but the layers and their statistics."""
    name = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG, dict(config) | {"dtype": name})
    compression = {
        "model_name": model_name,
        "rank": rank,
        "projections": list(PROJECTIONS),
        "num_experts": architecture.num_experts,
        "dtype": name,
    }
    write_json(folder / COMPRESSION, compression)
    write_json(folder / METADATA, layer_metadata(architecture))
    others = {name: each.detach().cpu().contiguous().clone() for name, each in others.items()}
    if format == "pt":
        save_pt(others, folder / f"{OTHERS}.pt")
    else:
        save_file(others, folder / f"{OTHERS}.safetensors", metadata={"format": "pt"})
    write_companions(folder, companions)


class LoadedCompressed(CompressedModel):
    """See :class:`conformance.contracts.LoadedCompressed`."""

    folder: Folder

    def save(self, directory: str | Path, *, format: str = "safetensors") -> None:
        """See :func:`save_compressed_model`."""
        save_compressed_model(self, directory, format=format)

    def export(self, directory: str | Path) -> None:
        """See :func:`export_to_hf_format`."""
        export_to_hf_format(self, directory)


def load_compressed_model(
    directory: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> LoadedCompressed:
    """The model of a folder, see :class:`conformance.contracts.CompressedCheckpoint`.

    Raises :class:`CheckpointError` that names file and key for anything that does not fit.
    """
    folder = read_folder(directory)
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, {t.dtype for t in folder.others.values()})
    weights = (folder.others, folder.layers)
    model = LoadedCompressed.of(
        folder.module, folder.architecture, *weights, dtype=dtype, device=device
    )
    # Tensors have been copied or are the model's now; what is kept is what they do not tell.
    folder.others, folder.layers = {}, {}
    model.folder = folder
    return model


def save_compressed_model(
    model: LoadedCompressed, directory: str | Path, *, format: str = "safetensors"
) -> None:
    """Write a model as it is now; what the folder held before stays until the new one is whole."""
    if format not in SUFFIXES:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(SUFFIXES)}")
    layers, others = model.layers(), model.others()
    rank = next((metadata_of(f)["rank"] for each in layers.values() for f in each.values()), 0)
    with written_folder(Path(directory), compressed=True) as fresh:
        for layer, projections in layers.items():
            (fresh / f"layer_{layer}").mkdir()
            for projection, factors in projections.items():
                write_projection(fresh / f"layer_{layer}", layer, projection, factors, format)
        statistics_of(model.architecture, layers).save(fresh)
        write_folder(
            fresh,
            model.folder.config,
            model.architecture,
            others,
            rank=rank,
            dtype=next(iter(others.values())).dtype,
            model_name=model.folder.model_name,
            companions=model.folder.companions,
            format=format,
        )


def export_to_hf_format(model: LoadedCompressed, directory: str | Path) -> None:
    """Write an ordinary Hugging Face checkpoint, a file a layer, whose experts are reconstructed."""
    with written_folder(Path(directory), compressed=False) as fresh:
        write_export(fresh, model, model.folder.config, model.folder.companions)


class CompressedCheckpoint:
    """The contract ``compressed_checkpoint``."""

    def compressed_checkpoint(
        self, directory: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
    ) -> LoadedCompressed:
        """See :class:`conformance.contracts.CompressedCheckpoint`."""
        return load_compressed_model(directory, dtype=dtype, device=device)
