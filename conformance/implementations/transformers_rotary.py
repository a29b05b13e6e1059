"""transformers' rotary embedding modules, each built from a small configuration of its model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.phi3 import modeling_phi3

Scaling = Mapping[str, Any]


class TransformersRotary:
    """The rotary embedding of the model that has the features asked for.

    Native: frequencies, scaling rules, tables and rotation. Half-split channels are Llama's,
    rotated in part GPT-NeoX's, with LongRoPE Phi 3's; interleaved ones Cohere's, in part GLM's;
    "interleaved-to-half" is DeepSeek V3's; tables by layer type are Gemma 3's, and a layer without
    rotation is left alone as in SmolLM 3. Glue: the options become a configuration, and a module is
    kept from call to call, as a model keeps its own.
    """

    def __init__(self) -> None:
        self._kept: dict[str, nn.Module] = {}

    def rotary(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
        layers: Mapping[str, Mapping[str, Any] | None] | None = None,
        layer_type: str | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.Rotary`."""
        head_dim = x.shape[-1]
        if layers is None:
            options = dict(theta=theta, layout=layout, rotary_dim=rotary_dim, scaling=scaling)
            module = self._keep(RotaryOfModel, head_dim, **options)
            return module(x, positions)
        if layers[layer_type] is None:
            return x.clone()
        return self._keep(RotaryByLayerType, head_dim, layers=layers)(x, positions, layer_type)

    def rotary_module(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
    ) -> nn.Module:
        """See :class:`conformance.contracts.RotaryModule`."""
        return RotaryOfModel(
            head_dim, theta=theta, layout=layout, rotary_dim=rotary_dim, scaling=scaling
        )

    def _keep(self, build: type[nn.Module], head_dim: int, **options: Any) -> nn.Module:
        key = repr((build.__name__, head_dim, options))
        if key not in self._kept:
            self._kept[key] = build(head_dim, **options)
        return self._kept[key]


class RotaryOfModel(nn.Module):
    """A model's rotary embedding module and its ``apply_rotary_pos_emb``."""

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        self.options = rope_options(head_dim, theta, scaling)
        build = {
            "half": self._half,
            "interleaved": self._interleaved,
            "interleaved-to-half": self._interleaved_to_half,
        }.get(layout)
        if build is None:
            raise NotImplementedError(f"no model in transformers has the layout {layout!r}")
        partial = None if rotary_dim in (None, head_dim) else rotary_dim
        if partial is not None:
            self.options["rope_parameters"]["partial_rotary_factor"] = share(partial, head_dim)
        self.rope, self.apply_rotary = build(head_dim, partial)

    def _half(self, head_dim: int, partial: int | None) -> tuple[nn.Module, Callable]:
        if self.options["rope_parameters"]["rope_type"] == "longrope":
            trained = self.options["rope_parameters"]["original_max_position_embeddings"]
            config = Phi3Config(**self.options, original_max_position_embeddings=trained)
            return modeling_phi3.Phi3RotaryEmbedding(config), modeling_phi3.apply_rotary_pos_emb
        if partial is not None:
            config = GPTNeoXConfig(**self.options)
            module = modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)
            return module, modeling_gpt_neox.apply_rotary_pos_emb
        config = LlamaConfig(**self.options)
        return modeling_llama.LlamaRotaryEmbedding(config), modeling_llama.apply_rotary_pos_emb

    def _interleaved(self, head_dim: int, partial: int | None) -> tuple[nn.Module, Callable]:
        if partial is not None:
            config = GlmConfig(**self.options, head_dim=head_dim)
            return modeling_glm.GlmRotaryEmbedding(config), modeling_glm.apply_rotary_pos_emb
        config = CohereConfig(**self.options)
        return modeling_cohere.CohereRotaryEmbedding(config), modeling_cohere.apply_rotary_pos_emb

    def _interleaved_to_half(
        self, head_dim: int, partial: int | None
    ) -> tuple[nn.Module, Callable]:
        if partial is not None:
            raise NotImplementedError(
                "DeepSeek V3 keeps the channels that it does not rotate apart"
            )
        config = DeepseekV3Config(**self.options, qk_rope_head_dim=head_dim)
        module = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(config)
        return module, modeling_deepseek_v3.apply_rotary_pos_emb_interleave

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x`` [batch, heads, tokens, head_dim] to ``positions`` [batch, tokens]."""
        cos, sin = self.rope(x, positions)
        rotated, _ = self.apply_rotary(x, x, cos, sin)
        return rotated

    def reset_parameters(self) -> None:
        """What transformers does for a model that was made on the meta device."""
        PreTrainedModel._init_weights(SimpleNamespace(config=self.rope.config), self.rope)


class RotaryByLayerType(nn.Module):
    """Gemma 3's rotary embedding module: one table for each type of layer."""

    NAMES = ("sliding_attention", "full_attention", "chunked_attention")
    """What transformers calls types of layers; the caller's are given these in their order."""

    def __init__(self, head_dim: int, *, layers: Mapping[str, Mapping[str, Any] | None]) -> None:
        super().__init__()
        tables = {name: table for name, table in layers.items() if table is not None}
        if len(tables) > len(self.NAMES):
            raise NotImplementedError("more types of layers than Gemma 3 can have")
        self.names = dict(zip(tables, self.NAMES))
        rope_parameters, lengths, longest = {}, set(), 0
        for name, table in tables.items():
            if table.get("layout", "half") != "half" or table.get("rotary_dim") not in (
                None,
                head_dim,
            ):
                raise NotImplementedError("Gemma 3 rotates half-split channels, and all of them")
            options = rope_options(head_dim, table.get("theta", 10000.0), table.get("scaling"))
            rope_parameters[self.names[name]] = options["rope_parameters"]
            if options["rope_parameters"]["rope_type"] == "dynamic":
                lengths.add(options["max_position_embeddings"])
            if table.get("scaling") is not None:
                longest = max(longest, options["max_position_embeddings"])
        if len(lengths) > 1:
            raise NotImplementedError("one trained length for every type of layer in Gemma 3")
        config = Gemma3TextConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            num_hidden_layers=len(tables),
            layer_types=list(self.names.values()),
            max_position_embeddings=lengths.pop() if lengths else longest or 2**17,
            rope_parameters=rope_parameters,
        )
        self.rope = modeling_gemma3.Gemma3RotaryEmbedding(config)

    def forward(self, x: Tensor, positions: Tensor, layer_type: str) -> Tensor:
        """Rotate ``x`` as layers of this type do."""
        cos, sin = self.rope(x, positions, self.names[layer_type])
        return modeling_gemma3.apply_rotary_pos_emb(x, x, cos, sin)[0]


def rope_options(head_dim: int, theta: float, scaling: Scaling | None) -> dict[str, Any]:
    """The options of a configuration for heads of this width, this theta and this scaling table."""
    rope_parameters = {"rope_type": "default", **copy.deepcopy(dict(scaling or {}))}
    rope_parameters["rope_theta"] = theta
    trained = rope_parameters.get("original_max_position_embeddings")
    longest = 2**17
    if rope_parameters["rope_type"] == "dynamic":
        # What dynamic scaling was trained for is the model's own length.
        longest = rope_parameters.pop("original_max_position_embeddings")
    elif trained is not None:
        longest = math.ceil(trained * rope_parameters.get("factor", 1))
    return {
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": longest,
        "rope_parameters": rope_parameters,
    }


def share(part: int, whole: int) -> float:
    """A factor that ``int(whole * factor)``, as every model computes it, makes ``part`` again."""
    factor = part / whole
    return factor if int(whole * factor) == part else math.nextafter(factor, 1.0)
