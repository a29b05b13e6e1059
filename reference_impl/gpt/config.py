"""What a checkpoint of the small or the medium GPT holds: sizes, names of tensors, and their shapes.

The two formats come from two training scripts of the modded-nanogpt family. They differ in the
names and shapes of their tensors *and* in the function that is trained; the format is therefore part
of the configuration, and no conversion turns one into the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["small", "medium"]
FORMATS: tuple[Format, ...] = ("small", "medium")

BLOCK_WITHOUT_ATTENTION = 7
VALUE_EMBEDDINGS = 3
FEWEST_LAYERS = 2 * VALUE_EMBEDDINGS
"""Each value embedding serves one of the first and one of the last three blocks."""

HEAD_ROWS_MULTIPLE = 128


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of one model."""

    format: Format
    num_layers: int
    num_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embeddings. The small script pads them to a multiple of 128, the medium does not."""
    padded_vocab_size: int
    """Rows of the LM head, and so the width of the logits."""
    scalars_size: int
    """Stored scalars: 5 a layer, and padding that depends on the number of training ranks."""

    @property
    def model_dim(self) -> int:
        """Width of the residual stream; value embeddings make it equal to that of all heads."""
        return self.num_heads * self.head_dim

    @property
    def scalars_padding(self) -> int:
        """Stored scalars that mean nothing."""
        return self.scalars_size - scalars_needed(self.num_layers)

    def has_attention(self, layer: int) -> bool:
        """Every block but the eighth has attention."""
        return layer != BLOCK_WITHOUT_ATTENTION


def scalars_needed(num_layers: int) -> int:
    """One skip weight, two block lambdas and two attention lambdas a layer."""
    return 5 * num_layers


def scalars_padding(num_layers: int, world_size: int) -> int:
    """Ones that the small script appends so that the scalars split evenly over its ranks."""
    return -scalars_needed(num_layers) % world_size


def next_multiple(value: float, multiple: int) -> int:
    """The smallest positive multiple that is not less than ``value``."""
    return max(1, -int(-value // multiple)) * multiple


def head_key(format: Format) -> str:
    """Name of the LM head's weight."""
    return {"small": "lm_head.weight", "medium": "lm_head_w"}[format]


def attention_shapes(format: Format, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's attention weights by their names within the block."""
    if format == "small":
        return {"attn.qkv_w": (3, width, width), "attn.c_proj.weight": (width, width)}
    return {"attn.qkvo_w": (4, width, width)}


def mlp_shapes(format: Format, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's MLP weights by their names within the block; 4 x width hidden units."""
    names = {"small": ("c_fc.weight", "c_proj.weight"), "medium": ("fc_w", "proj_w")}[format]
    return {f"mlp.{names[0]}": (4 * width, width), f"mlp.{names[1]}": (width, 4 * width)}


def state_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by its name, in the order of the script."""
    width = config.model_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (config.vocab_size, width),
        **{f"value_embeds.{i}.weight": (config.vocab_size, width) for i in range(VALUE_EMBEDDINGS)},
    }
    for layer in range(config.num_layers):
        attention = attention_shapes(config.format, width) if config.has_attention(layer) else {}
        for name, shape in (attention | mlp_shapes(config.format, width)).items():
            shapes[f"blocks.{layer}.{name}"] = shape
    shapes[head_key(config.format)] = (config.padded_vocab_size, width)
    shapes["scalars"] = (config.scalars_size,)
    return shapes


def parameter_count(config: GPTConfig) -> int:
    """Elements of a checkpoint, the scalars' padding included."""
    width, layers = config.model_dim, config.num_layers
    with_attention = sum(config.has_attention(layer) for layer in range(layers))
    tables = (1 + VALUE_EMBEDDINGS) * config.vocab_size * width
    blocks = with_attention * 4 * width**2 + layers * 8 * width**2
    return tables + blocks + config.padded_vocab_size * width + config.scalars_size
