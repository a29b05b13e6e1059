"""A language model with shared-core experts: transformers' model with other blocks of experts.

The model is made from its configuration on the meta device, so that the weights of the original are
never there; blocks are replaced and every parameter is put in by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.hf_directory import HEAD
from reference_impl.shared_core.architecture import Architecture
from reference_impl.shared_core.block import PROJECTIONS, CompressedMoEBlock
from reference_impl.shared_core.layer import SharedCoreLayer
from reference_impl.shared_core.projections import Factors

Layers = Mapping[int, Mapping[str, Factors]]
"""The factors by layer and projection."""


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """transformers' model of a configuration without any weights, on the meta device.

    Buffers that are computed from the configuration, those of the rotary embedding, are real.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=made)
    return model.eval()


def names_of_others(model: nn.Module, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names in files, and shapes, of every weight that is not of an expert.

    A head that is the embedding has no name of its own.
    """
    shapes = {}
    for name, parameter in model.state_dict().items():
        if ".mlp.experts." in name or (name == HEAD and model.config.tie_word_embeddings):
            continue
        shapes[name.replace(".mlp.", f".{architecture.block}.")] = tuple(parameter.shape)
    return shapes


class CompressedModel:
    """A model, and its parameters by name."""

    def __init__(self, module: nn.Module, architecture: Architecture) -> None:
        self.module = module
        self.architecture = architecture

    @classmethod
    def of(
        cls,
        module: nn.Module,
        architecture: Architecture,
        others: Mapping[str, Tensor],
        layers: Layers,
        *,
        dtype: torch.dtype,
        device: str,
    ) -> CompressedModel:
        """The empty model with these weights, in ``dtype``; names and shapes have been checked."""
        cast = lambda tensor: tensor.to(device=device, dtype=dtype)
        for layer in architecture.expert_layers:
            made = {
                projection: SharedCoreLayer(*(cast(x) for x in layers[layer][projection].values()))
                for projection in PROJECTIONS
            }
            module.model.layers[layer].mlp = CompressedMoEBlock(
                cast(others[architecture.router_key(layer)]),
                made,
                top_k=architecture.top_k,
                normalize=architecture.normalize,
            )
        routers = {architecture.router_key(layer) for layer in architecture.expert_layers}
        state = {
            name.replace(f".{architecture.block}.", ".mlp."): cast(tensor)
            for name, tensor in others.items()
            if name not in routers
        }
        module.load_state_dict(state, strict=False, assign=True)  # names have been checked
        module.tie_weights()
        module.model.rotary_emb.to(device)
        module.config.dtype = dtype
        return cls(module, architecture)

    def block(self, layer: int) -> CompressedMoEBlock:
        """The experts of a layer."""
        return self.module.model.layers[layer].mlp

    def others(self) -> dict[str, Tensor]:
        """The weights that are not of experts, themselves, by their names in files."""
        found = {}
        for name, parameter in self.module.named_parameters():
            if name.endswith(".mlp.router"):
                layer = int(name.split(".")[2])
                found[self.architecture.router_key(layer)] = parameter
            elif ".mlp.layers." not in name:
                found[name.replace(".mlp.", f".{self.architecture.block}.")] = parameter
        return found

    def layers(self) -> dict[int, dict[str, Factors]]:
        """The factors, themselves, by layer and projection."""
        return {
            layer: {name: self.block(layer).layers[name].factors() for name in PROJECTIONS}
            for layer in self.architecture.expert_layers
        }

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by the names of :class:`conformance.contracts.LoadedCompressed`."""
        return self.others() | {
            f"layer_{layer}.{projection}.{name}": factor
            for layer, projections in self.layers().items()
            for projection, factors in projections.items()
            for name, factor in factors.items()
        }

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, tokens, vocabulary] of tokens that are all real."""
        return self.module(input_ids=ids, use_cache=False).logits
