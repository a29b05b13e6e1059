"""Cached decoding by transformers' own decoder attention layers, masks and caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    DynamicCache,
    GlmConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    masking_utils,
)
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3

from conformance.implementations.transformers_rotary import rope_options, share
from reference_impl.attention import Window


class TransformersCached:
    """One attention layer of Llama, Mistral, Phi 3, Cohere, GLM or gpt-oss, with its cache.

    Native: rotary embedding, cache, eviction, masks and attention, as ``generate`` drives them.
    Glue: the projections pass on what the caller projected, position ids count the real tokens as
    ``generate`` does, and values narrower than keys are padded with zeros.
    """

    kind: ClassVar[str]

    def cached_attention(
        self,
        *,
        rotary: Mapping[str, Any],
        window: Window | None = None,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """See :class:`conformance.contracts.CachedAttention`."""
        return CachedLayer(self.kind, rotary, window, scale, sinks)


class CachedLayer:
    """The layer and its cache, made for the heads of the first step."""

    def __init__(
        self,
        kind: str,
        rotary: Mapping[str, Any],
        window: Window | None,
        scale: float | None,
        sinks: Tensor | None,
    ) -> None:
        left, right = (None, None) if window is None else window
        if right is not None and right < 0:
            raise NotImplementedError("a window that ends before the query")
        self.kind, self.rotary, self.scale, self.sinks = kind, rotary, scale, sinks
        self.window = None if left is None else left + 1
        self.modeling, self.prefix, self.config_type = self.model()
        self.layer: nn.Module | None = None
        self.key_valid: Tensor | None = None

    def model(self) -> tuple[Any, str, type]:
        """The model that has these features: its module, the prefix of its classes, its config."""
        scaling = self.rotary.get("scaling") or {}
        rule, layout = scaling.get("rope_type"), self.rotary.get("layout", "half")
        partial = self.rotary.get("rotary_dim") is not None
        if "layers" in self.rotary or layout not in ("half", "interleaved"):
            raise NotImplementedError("a rotary embedding that no layer of this kind has")
        if scaling.get("mscale_all_dim"):
            raise NotImplementedError("mscale_all_dim scales the scores of DeepSeek's layers alone")
        if self.sinks is not None and self.kind == "sdpa":
            raise NotImplementedError("gpt-oss has no SDPA")
        if layout == "half" and (rule == "longrope" or (partial and rule is None)):
            found = modeling_phi3, "Phi3", Phi3Config
        elif layout == "half" and not partial:
            if self.sinks is not None:
                return modeling_gpt_oss, "GptOss", GptOssConfig
            if self.window is not None:
                return modeling_mistral, "Mistral", MistralConfig
            return modeling_llama, "Llama", LlamaConfig
        elif layout == "interleaved":
            found = (modeling_glm, "Glm", GlmConfig) if partial else None
            found = found or (modeling_cohere, "Cohere", CohereConfig)
            if self.window is not None:
                raise NotImplementedError("no layer with interleaved channels has a window")
        else:
            raise NotImplementedError("partial rotation with a scaling rule")
        if self.sinks is not None:
            raise NotImplementedError("gpt-oss rotates half-split channels, and all of them")
        return found

    def build(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The layer for this many heads of this width, with projections that pass everything on."""
        heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
        options = rope_options(
            head_dim, self.rotary.get("theta", 10000.0), self.rotary.get("scaling")
        )
        rotary_dim = self.rotary.get("rotary_dim") or head_dim
        if rotary_dim != head_dim:
            options["rope_parameters"]["partial_rotary_factor"] = share(rotary_dim, head_dim)
        options |= {
            "hidden_size": heads * head_dim,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "num_hidden_layers": 1,
            "attn_implementation": self.kind,
        }
        if self.config_type is Phi3Config:
            trained = options["rope_parameters"].get("original_max_position_embeddings", 4096)
            options["original_max_position_embeddings"] = trained
        else:
            options["head_dim"] = head_dim
        if self.config_type is GptOssConfig:
            kind = "full_attention" if self.window is None else "sliding_attention"
            options["layer_types"] = [kind]
        if self.window is not None or self.config_type is MistralConfig:
            options["sliding_window"] = self.window
        self.config = self.config_type(**options)
        self.rope = getattr(self.modeling, f"{self.prefix}RotaryEmbedding")(self.config)
        self.layer = getattr(self.modeling, f"{self.prefix}Attention")(self.config, 0).eval()
        self.layer.o_proj = nn.Identity()
        if hasattr(self.layer, "qkv_proj"):
            self.layer.qkv_proj = nn.Identity()
        else:
            widths = [x.shape[1] * head_dim for x in (q, k, v)]
            ends = [sum(widths[: n + 1]) for n in range(3)]
            for name, end, width in zip("qkv", ends, widths):
                setattr(self.layer, f"{name}_proj", Channels(end - width, end))
        if self.scale is not None:
            self.layer.scaling = self.scale
        if self.sinks is not None:
            del self.layer.sinks
            self.layer.sinks = self.sinks
        self.cache = DynamicCache(config=self.config)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, key_valid: Tensor | None = None
    ) -> Tensor:
        """The output of the next tokens, as in the contract."""
        if self.sinks is not None and self.kind == "flex_attention" and q.device.type == "cpu":
            raise NotImplementedError("transformers has sinks in FlexAttention on CUDA alone")
        value_dim, head_dim = v.shape[-1], q.shape[-1]
        if value_dim > head_dim:
            raise NotImplementedError("values are as wide as keys in these layers")
        v = nn.functional.pad(v, (0, head_dim - value_dim))
        if self.layer is None:
            self.build(q, k, v)
        hidden = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
        attention_mask = self.whole_mask(q, key_valid)
        position_ids = attention_mask.cumsum(-1) - 1
        position_ids = position_ids.masked_fill(~attention_mask, 0)[:, -q.shape[2] :]
        make_mask = masking_utils.create_causal_mask
        if self.window is not None:
            make_mask = masking_utils.create_sliding_window_causal_mask
        # Uncompiled on the CPU, for inductor would build a new kernel for almost every step.
        eager = self.kind == "flex_attention" and q.device.type == "cpu"
        with (
            torch.compiler.set_stance("force_eager") if eager else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # that it is not compiled
            out, _ = self.layer(
                hidden,
                position_embeddings=self.rope(hidden, position_ids),
                attention_mask=make_mask(
                    self.config,
                    inputs_embeds=hidden,
                    attention_mask=attention_mask,
                    past_key_values=self.cache,
                    position_ids=position_ids,
                ),
                past_key_values=self.cache,
            )
        return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)[..., :value_dim]

    def whole_mask(self, q: Tensor, key_valid: Tensor | None) -> Tensor:
        """Which tokens so far are real, the new ones included, bool [batch, tokens so far]."""
        if key_valid is None:
            key_valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
        if self.key_valid is not None:
            key_valid = torch.cat([self.key_valid, key_valid], dim=1)
        self.key_valid = key_valid
        return key_valid


class Channels(nn.Module):
    """A projection to some of the channels."""

    def __init__(self, first: int, end: int) -> None:
        super().__init__()
        self.first, self.end = first, end

    def forward(self, hidden: Tensor) -> Tensor:
        """Channels ``first`` to ``end``."""
        return hidden[..., self.first : self.end]
