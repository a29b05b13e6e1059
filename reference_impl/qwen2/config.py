"""The sizes of a Qwen2 model, from the ``config.json`` of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reference_impl.hf_directory import HEAD, read_json
from reference_impl.qwen2.sharding import check_heads, even_range
from reference_impl.stored import CheckpointError


@dataclass(frozen=True)
class Qwen2Config:
    """What the weights do not tell. Raises ValueError for sizes that do not fit each other."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768
    tied: bool = False
    """Whether the LM head is the embedding."""
    scaling: tuple[tuple[str, Any], ...] | None = None
    """The rule of :mod:`reference_impl.rotary` by which frequencies are scaled."""
    dtype: torch.dtype | None = None
    """Of the checkpoint, as the configuration says."""
    eos: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "head_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: channels are rotated in pairs")
        check_heads(self.num_heads, self.num_kv_heads, 1)

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError, naming the sizes, unless the model can be split over ``ranks``."""
        check_heads(self.num_heads, self.num_kv_heads, ranks)
        even_range(self.intermediate_size, 0, ranks, "intermediate_size")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a checkpoint by name; the head is left out where it is tied."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            at = f"model.layers.{layer}."
            shapes |= {
                f"{at}input_layernorm.weight": (hidden,),
                f"{at}self_attn.q_proj.weight": (q, hidden),
                f"{at}self_attn.q_proj.bias": (q,),
                f"{at}self_attn.k_proj.weight": (kv, hidden),
                f"{at}self_attn.k_proj.bias": (kv,),
                f"{at}self_attn.v_proj.weight": (kv, hidden),
                f"{at}self_attn.v_proj.bias": (kv,),
                f"{at}self_attn.o_proj.weight": (hidden, q),
                f"{at}post_attention_layernorm.weight": (hidden,),
                f"{at}mlp.gate_proj.weight": (inner, hidden),
                f"{at}mlp.up_proj.weight": (inner, hidden),
                f"{at}mlp.down_proj.weight": (hidden, inner),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes[HEAD] = (self.vocab_size, hidden)
        return shapes


def read_config(directory: Path) -> Qwen2Config:
    """The configuration of a directory.

    ``head_dim`` defaults to the width of the model divided by the heads; ``rope_theta`` stands at the
    top or, since transformers 5, in ``rope_parameters``. Raises :class:`CheckpointError` that names
    the file and the key.
    """
    path = directory / "config.json"
    given = read_json(path)

    def needed(key: str) -> Any:
        if given.get(key) is None:
            raise CheckpointError(str(path), "is missing", key=key)
        return given[key]

    if given.get("model_type", "qwen2") != "qwen2":
        problem = f"is {given['model_type']!r}, expected 'qwen2'"
        raise CheckpointError(str(path), problem, key="model_type")
    if given.get("use_sliding_window"):
        raise CheckpointError(str(path), "is not supported", key="use_sliding_window")
    if given.get("hidden_act", "silu") != "silu":
        problem = f"is {given['hidden_act']!r}, expected 'silu'"
        raise CheckpointError(str(path), problem, key="hidden_act")
    rope = given.get("rope_parameters") or {}
    theta = rope.get("rope_theta", given.get("rope_theta"))
    if theta is None:
        raise CheckpointError(str(path), "is missing", key="rope_theta")
    hidden, heads = needed("hidden_size"), needed("num_attention_heads")
    head_dim = given.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            problem = f"is missing, and {heads} heads do not divide hidden_size {hidden}"
            raise CheckpointError(str(path), problem, key="head_dim")
        head_dim = hidden // heads
    try:
        return Qwen2Config(
            vocab_size=needed("vocab_size"),
            hidden_size=hidden,
            intermediate_size=needed("intermediate_size"),
            num_layers=needed("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=given.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rope_theta=float(theta),
            rms_norm_eps=needed("rms_norm_eps"),
            max_positions=given.get("max_position_embeddings", 32768),
            tied=bool(given.get("tie_word_embeddings", False)),
            scaling=scaling_of(given.get("rope_scaling") or rope),
            dtype=dtype_of(given, path),
            eos=eos_of(directory, given),
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(path), str(error)) from error


def scaling_of(rope: Mapping[str, Any]) -> tuple[tuple[str, Any], ...] | None:
    """The scaling rule among the rotary parameters, hashable; None for plain frequencies."""
    rule = rope.get("rope_type", rope.get("type", "default"))
    if rule == "default":
        return None
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    return tuple(sorted((rest | {"rope_type": rule}).items()))


def dtype_of(given: Mapping[str, Any], path: Path) -> torch.dtype | None:
    """The dtype that the configuration names, under its new or its old key."""
    name = given.get("dtype", given.get("torch_dtype"))
    if name is None:
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(str(path), f"is {name!r}, expected a floating dtype", key="dtype")
    return dtype


def eos_of(directory: Path, given: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: of ``generation_config.json``, else of ``config.json``."""
    path = directory / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    found = given.get("eos_token_id") if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
