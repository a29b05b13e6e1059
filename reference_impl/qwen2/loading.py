"""Loading a Hugging Face directory: every weight once, every tensor used, each rank its part.

A rank reads the parts that it holds and nothing else. There is no parameter that could stay at
random: the model is made of what was loaded. Errors are :class:`CheckpointError`, and they name the
file, the key, what was expected and what was found.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from reference_impl.hf_directory import EMBEDDING, HEAD, Weight, open_directory
from reference_impl.qwen2 import sharding
from reference_impl.qwen2.config import Qwen2Config, read_config
from reference_impl.qwen2.model import Qwen2
from reference_impl.qwen2.sharding import Shard
from reference_impl.ranks import OneRank, Ranks, agree
from reference_impl.stored import CheckpointError, all_finite


def load_model(
    path: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    model_class: type[Qwen2] = Qwen2,
) -> Qwen2:
    """The model of a directory, in evaluation mode; called on every rank of the group.

    ``dtype``: default that of the configuration, else that of the embedding. Where one rank cannot
    load, every rank raises.
    """
    ranks, error, loaded = ranks or OneRank(), None, None
    try:
        config = read_config(Path(path))
        config.check_ranks(ranks.size)
        weights = load_shards(path, rank=ranks.rank, ranks=ranks.size, dtype=dtype, device=device)
        loaded = (config, weights)
    except (ValueError, OSError) as problem:  # CheckpointError is a ValueError
        error = problem
    agree(ranks, error)
    check_same(ranks, loaded[0], path)
    return model_class(*loaded, ranks=ranks).eval()


def check_same(ranks: Ranks, config: Qwen2Config, path: str | os.PathLike[str]) -> None:
    """Raise unless all ranks read the same configuration."""
    for rank, other in enumerate(ranks.exchange(repr(config))):
        if other != repr(config):
            problem = f"rank {rank} reads another configuration than rank {ranks.rank}"
            raise CheckpointError(str(path), problem)


def load_shards(
    path: str | os.PathLike[str],
    *,
    rank: int = 0,
    ranks: int = 1,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """The parts of all weights that a rank holds, under their names in the checkpoint.

    A tied head is left out. Vocabulary rows are split too, with rows of zeros behind the last where
    the ranks do not divide them. Raises ValueError for a number of ranks that does not fit the model.
    """
    directory = Path(path)
    config = read_config(directory)
    config.check_ranks(ranks)
    sharding.check_ranks(rank, ranks)
    stored = open_directory(directory)
    check_tensors(stored, config, directory)
    dtype = dtype or config.dtype or stored[EMBEDDING].dtype
    rules = shard_rules(config, rank, ranks)
    parts = {key: read(weight, rules[key]) for key, weight in stored.items()}
    if config.tied and HEAD in parts:
        if torch.equal(parts[HEAD], parts[EMBEDDING]):
            del parts[HEAD]
        else:
            warnings.warn(
                f"{stored[HEAD].file}: {HEAD}: differs from the embedding although config.json ties "
                "them; the head of the file is used",
                stacklevel=2,
            )
    return {
        key: sharding.pad(part.to(device=device, dtype=dtype), rules[key] or Shard(0, ()))
        for key, part in parts.items()
    }


def shard_rules(config: Qwen2Config, rank: int, ranks: int) -> dict[str, Shard | None]:
    """The part of each tensor that a rank holds, by name; None for a whole tensor."""
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
    query = sharding.query_shard(heads, width, rank, ranks)
    key_value = sharding.key_value_shard(heads, kv_heads, width, rank, ranks)
    column = sharding.column_shard(config.intermediate_size, rank, ranks)
    of_layer = {
        "input_layernorm.weight": None,
        "self_attn.q_proj.weight": query,
        "self_attn.q_proj.bias": query,
        "self_attn.k_proj.weight": key_value,
        "self_attn.k_proj.bias": key_value,
        "self_attn.v_proj.weight": key_value,
        "self_attn.v_proj.bias": key_value,
        "self_attn.o_proj.weight": sharding.row_shard(heads * width, rank, ranks),
        "post_attention_layernorm.weight": None,
        "mlp.gate_proj.weight": column,
        "mlp.up_proj.weight": column,
        "mlp.down_proj.weight": sharding.row_shard(config.intermediate_size, rank, ranks),
    }
    vocabulary = sharding.vocabulary_shard(config.vocab_size, rank, ranks)
    rules = {EMBEDDING: vocabulary, "model.norm.weight": None, HEAD: vocabulary}
    for layer in range(config.num_layers):
        rules |= {f"model.layers.{layer}.{name}": shard for name, shard in of_layer.items()}
    return rules


def check_tensors(stored: Mapping[str, Weight], config: Qwen2Config, directory: Path) -> None:
    """Raise unless the names and shapes are those of the configuration, and all dtypes floating."""
    shapes = config.shapes()
    for key, shape in shapes.items():
        if key not in stored:
            raise CheckpointError(str(directory), f"is missing, expected {list(shape)}", key=key)
    if config.tied:
        shapes[HEAD] = shapes[EMBEDDING]
    for key, weight in stored.items():
        if key not in shapes:
            raise CheckpointError(weight.file, "is not a tensor of the model", key=weight.key)
        if weight.shape != shapes[key]:
            problem = f"has shape {list(weight.shape)}, expected {list(shapes[key])}"
            raise CheckpointError(weight.file, problem, key=weight.key)
        if not weight.dtype.is_floating_point:
            problem = f"has dtype {weight.dtype}, expected a floating one"
            raise CheckpointError(weight.file, problem, key=weight.key)


def read(weight: Weight, shard: Shard | None) -> Tensor:
    """A part of a stored tensor, without padding; raises where it is not finite."""
    part = weight.read() if shard is None else weight.read_part(shard.dim, shard.ranges)
    if not all_finite(part):
        raise CheckpointError(weight.file, "holds values that are not finite", key=weight.key)
    return part
