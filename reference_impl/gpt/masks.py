"""Which keys a token sees: causality, padding, documents, and the block-sparse window of training.

Masks are dense, bool [B, 1, T, T] or [T, T], True where query (row) sees key (column).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference_impl.gpt.config import Format

BLOCK = 128
"""Tokens of one block of the window."""

_PATTERNS = {
    "small": "LSSSLSSLSSSL",
    "medium": "LSSSLSSSSSSLSSSL",
}


def has_long_window(layer: int, format: Format) -> bool:
    """Whether a block has the whole window, or half of it.

    The scripts fix the pattern for 12 and 16 blocks; the large variant of the medium script repeats
    it for deeper models, and so does this for both.
    """
    pattern = _PATTERNS[format]
    return pattern[layer % len(pattern)] == "L"


def causal(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Keys up to the token itself, [T, T]."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def document_ids(ids: Tensor, document_start: int) -> Tensor:
    """The number of the document of each token; a document starts *at* ``document_start``."""
    return (ids == document_start).cumsum(-1)


def same_document(ids: Tensor, document_start: int) -> Tensor:
    """Pairs of tokens of one document, [..., T, T]."""
    documents = document_ids(ids, document_start)
    return documents[..., :, None] == documents[..., None, :]


def visible_keys(
    ids: Tensor, *, valid: Tensor | None = None, document_start: int | None = None
) -> Tensor:
    """Causal mask [B, 1, T, T] of ``ids`` [B, T].

    ``valid`` bool [B, T] hides the keys where it is False; ``document_start`` is the token that
    starts a document, which hides the keys of other documents.
    """
    visible = causal(ids.shape[-1], ids.device)[None].expand(len(ids), -1, -1)
    if valid is not None:
        visible = visible & valid[:, None, :]
    if document_start is not None:
        visible = visible & same_document(ids, document_start)
    return visible[:, None]


def window_mask(ids_T: Tensor, document_start: int, blocks: int) -> Tensor:
    """The mask of one layer in training, [T, T]: causal, one document, and a window of blocks.

    A block of 128 queries sees whole blocks of keys. *Full* key blocks lie before it, and both
    blocks are in one same document; *partial* ones hold at least one visible key and are not full.
    With a window of ``blocks``, the nearest ``blocks - 1`` full blocks are kept, and of the partial
    ones the nearest ``max(blocks - number of full blocks, 1)``, counting full ones before any was
    dropped. Source: ``create_blockmasks`` of the training scripts.
    """
    length = len(ids_T)
    visible_TT = causal(length, ids_T.device) & same_document(ids_T, document_start)
    documents = document_ids(ids_T, document_start)
    starts = torch.arange(0, length, BLOCK, device=ids_T.device)
    low, high = documents[starts], documents[(starts + BLOCK - 1).clamp_max(length - 1)]
    overlap = (low[:, None] <= high) & (high[:, None] >= low)
    alone = (low[:, None] == high) & (high[:, None] == low)
    order = torch.arange(len(starts), device=ids_T.device)
    full = (order[:, None] > order) & alone
    partial = (order[:, None] >= order) & overlap & ~full
    full_count = full.sum(-1, keepdim=True)
    kept = nearest(full, (full_count.clamp_max(blocks - 1)).clamp_min(0))
    kept |= nearest(partial, (blocks - full_count).clamp_min(1))
    of_token = torch.arange(length, device=ids_T.device) // BLOCK
    return visible_TT & kept[of_token[:, None], of_token]


def nearest(candidates: Tensor, count: Tensor) -> Tensor:
    """The last ``count`` [N, 1] of the candidates in each row of [N, N]."""
    rank_from_end = candidates.flip(-1).cumsum(-1).flip(-1)
    return candidates & (rank_from_end <= count)
