"""An ordinary Hugging Face checkpoint of a compressed model: a file a layer, one layer in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference_impl.hf_directory import INDEX
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.shared_core.folders import write_companions, write_json
from reference_impl.shared_core.model import CompressedModel


def write_export(
    folder: Path,
    model: CompressedModel,
    config: Mapping[str, Any],
    companions: Mapping[str, bytes],
) -> None:
    """Write configuration, weights and index into a folder."""
    others = {name: each.detach() for name, each in model.others().items()}
    dtype = next(iter(others.values())).dtype
    write_json(folder / "config.json", dict(config) | {"dtype": str(dtype).removeprefix("torch.")})
    layers = model.architecture.expert_layers
    files = len(layers) + 1
    places, size = {}, 0
    for number in range(files):
        tensors = others if number == 0 else reconstructed(model, layers[number - 1])
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)
    write_companions(folder, companions)


@torch.no_grad()
def reconstructed(model: CompressedModel, layer: int) -> dict[str, Tensor]:
    """The weights of every expert of a layer, by their names in the original's files."""
    block, architecture = model.block(layer), model.architecture
    return {
        architecture.expert_key(layer, expert, projection): block.layers[projection].reconstruct(
            expert
        )
        for expert in range(architecture.num_experts)
        for projection in PROJECTIONS
    }
