"""The parts that both models are made of, as pure functions.

Axes in tensor names::

    B batch    T tokens    C width of the model    H heads    D head width    V vocabulary
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from reference_impl.gpt.config import VALUE_EMBEDDINGS, Format
from reference_impl.rotary import Rotary, half_truncated_frequencies

ATTENTION_SCALE = 0.12
"""Factor on the dot products of queries and keys, whatever the head width."""
ROTARY_BASE = 1024.0


def norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last axis, without a weight.

    ``x / sqrt(mean(x²) + eps)``, where eps is the machine epsilon of the dtype of ``x``.
    """
    mean_square = x.square().mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(mean_square + torch.finfo(x.dtype).eps)


def rotate(x_BHTD: Tensor) -> Tensor:
    """Half-truncated rotary embedding, where a token's position is its index."""
    length, head_dim = x_BHTD.shape[2:]
    cos_11TP, sin_11TP = rotation_tables(length, head_dim, x_BHTD.dtype, x_BHTD.device)
    return Rotary().rotate(x_BHTD, cos_11TP, sin_11TP, "half-truncated")


@lru_cache(maxsize=4)
def rotation_tables(
    length: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [1, 1, T, P] of the first positions; kept, since all blocks of a model need them."""
    with torch.inference_mode(False):  # so that a call that records gradients can use them too
        positions_1T = torch.arange(length, device=device)[None]
        frequencies_P = half_truncated_frequencies(head_dim, ROTARY_BASE).to(device)
        x = torch.empty(0, dtype=dtype, device=device)
        return Rotary().tables(x, positions_1T, frequencies_P, 1.0)


def relu_squared(x: Tensor) -> Tensor:
    """``max(x, 0)²`` (arXiv 2109.08668)."""
    return F.relu(x).square()


def soft_cap(logits: Tensor, format: Format, width: int) -> Tensor:
    """The bound on logits: in (0, 30) for the small model, in (-15, 15) for the medium one."""
    if format == "small":
        scaled = logits / (7.5 * math.sqrt(width))
        if scaled.requires_grad:
            return 30 * torch.sigmoid(scaled)
        return scaled.sigmoid_().mul_(30)  # the same, and logits are large: one copy fewer
    return 15 * logits * torch.rsqrt(logits.square() + 225)


def value_embedding_of(layer: int, num_layers: int) -> int | None:
    """Which of the three value embeddings a block mixes into its values, if any.

    Tables 0, 1, 2 serve the first three blocks, and in the same order the last three.
    """
    if layer < VALUE_EMBEDDINGS:
        return layer
    from_end = layer - (num_layers - VALUE_EMBEDDINGS)
    return from_end if from_end >= 0 else None


MEDIUM_SKIPS = {9: 6, 10: 4, 11: 2}
"""Block whose input is added to, and the block whose output is added."""


def skip_of(layer: int, num_layers: int, format: Format) -> tuple[int, int] | None:
    """The block whose output is added to this block's input, and the index of its skip weight.

    Small: the second half takes the outputs of the first half from a stack, the latest first, with
    weights 0, 1, 2 … Medium: three fixed pairs, and the weight has the number of the *source*.
    """
    if format == "medium":
        source = MEDIUM_SKIPS.get(layer)
        return None if source is None else (source, source)
    half = num_layers // 2
    return None if layer < half else (num_layers - 1 - layer, layer - half)


def split_scalars(scalars: Tensor, num_layers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Skip weights [L], block lambdas [L, 2] and attention lambdas [L, 2]; padding is dropped."""
    skips, blocks, attention = scalars[: 5 * num_layers].split(
        [num_layers, 2 * num_layers, 2 * num_layers]
    )
    return skips, blocks.view(-1, 2), attention.view(-1, 2)


def attend(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, visible_B1TT: Tensor) -> Tensor:
    """Softmax attention over the visible keys, zeros where none is visible; [B, H, T, D].

    Softmax is computed in float32 at least.
    """
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    scores_BHTT = ATTENTION_SCALE * (q_BHTD.to(dtype) @ k_BHTD.to(dtype).transpose(-1, -2))
    hidden = ~visible_B1TT
    weights_BHTT = scores_BHTT.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    weights_BHTT = weights_BHTT.masked_fill(~visible_B1TT.any(-1, keepdim=True), 0)
    return (weights_BHTT @ v_BHTD.to(dtype)).to(q_BHTD.dtype)


def split_heads(x_BTC: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * D] as [B, H, T, D]."""
    return x_BTC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x_BHTD: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H * D]."""
    return x_BHTD.transpose(1, 2).flatten(2)
