"""Where the experts are in a Qwen3-MoE or Mixtral checkpoint: layers, sizes and names.

Everything is read from ``config.json``. Names are those of files: Qwen3-MoE has ``mlp.experts.{e}``
with ``gate_proj``, ``up_proj`` and ``down_proj``, Mixtral ``block_sparse_moe.experts.{e}`` with ``w1``,
``w3`` and ``w2``. In memory transformers calls both blocks ``mlp`` and fuses gate and up, see
:mod:`reference_impl.shared_core.originals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.stored import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """A mixture-of-experts language model."""

    model_type: str
    num_layers: int
    expert_layers: tuple[int, ...]
    """The layers that have experts; the others are dense."""
    num_experts: int
    top_k: int
    normalize: bool
    """Whether a token's weights are divided by their sum."""
    hidden_size: int
    intermediate_size: int
    """The width inside an expert."""
    block: str
    """What a block is called in files."""
    names: tuple[str, str, str]
    """What gate, up and down are called there."""

    def router_key(self, layer: int) -> str:
        """The name of a router's weight in files."""
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def expert_key(self, layer: int, expert: int, projection: str) -> str:
        """The name of an expert's weight in files."""
        name = self.names[PROJECTIONS.index(projection)]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{name}.weight"

    def shape(self, projection: str) -> tuple[int, int]:
        """(d_out, d_in) of a projection."""
        if projection == "down_proj":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size


def architecture_of(config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of a ``config.json``; ``source`` is its path, for errors.

    Raises :class:`CheckpointError` that names the entry for one that is missing or makes no sense.
    """
    read = Entries(config, source)
    model_type = config.get("model_type")
    if model_type not in ("qwen3_moe", "mixtral"):
        read.refuse("model_type", f"is {model_type!r}, expected 'qwen3_moe' or 'mixtral'")
    if config.get("hidden_act", "silu") != "silu":
        read.refuse("hidden_act", f"is {config['hidden_act']!r}, expected 'silu'")
    qwen = model_type == "qwen3_moe"
    num_layers = read.size("num_hidden_layers")
    # transformers writes num_local_experts for either, files of before it num_experts for Qwen3.
    num_experts = read.size("num_experts", "num_local_experts")
    top_k = read.size("num_experts_per_tok")
    if top_k > num_experts:
        read.refuse("num_experts_per_tok", f"is {top_k} of {num_experts} experts")
    return Architecture(
        model_type=model_type,
        num_layers=num_layers,
        expert_layers=qwen_layers(read, num_layers) if qwen else tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        normalize=bool(config.get("norm_topk_prob", False)) if qwen else True,
        hidden_size=read.size("hidden_size"),
        intermediate_size=read.size("moe_intermediate_size" if qwen else "intermediate_size"),
        block="mlp" if qwen else "block_sparse_moe",
        names=PROJECTIONS if qwen else ("w1", "w3", "w2"),
    )


def qwen_layers(read: Entries, num_layers: int) -> tuple[int, ...]:
    """The layers of Qwen3-MoE that have experts: every so many, but for those that are dense."""
    step = read.size("decoder_sparse_step") if "decoder_sparse_step" in read.config else 1
    dense = read.config.get("mlp_only_layers") or ()
    return tuple(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense)


@dataclass(frozen=True)
class Entries:
    """The entries of a configuration, read so that a wrong one is named."""

    config: Mapping[str, Any]
    source: str

    def size(self, *names: str) -> int:
        """A number of at least one, under any of these names."""
        found = [name for name in names if name in self.config]
        if not found:
            self.refuse(names[0], "is missing")
        value = self.config[found[0]]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(found[0], f"is {value!r}, expected a number of at least 1")
        return value

    def refuse(self, name: str, problem: str) -> None:
        """Raise :class:`CheckpointError` for an entry."""
        raise CheckpointError(self.source, problem, key=name)
