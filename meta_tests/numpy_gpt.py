"""The small and the medium GPT once more, in numpy's float64, head by head and query by query.

Written from the specification of the two training scripts alone: it shares no line with the
reference, and takes the slow way wherever that is the plain one. One sequence at a time.

Axes: ``ids`` [T], the stream [T, C], one head [T, D], logits [T, rows of the head].
"""

from __future__ import annotations

import math

import numpy as np

FLOAT64_EPS = float(np.finfo(np.float64).eps)
FLOAT32_EPS = float(np.finfo(np.float32).eps)
"""What the scripts' norm adds to the mean square when they compute in float32."""

BLOCK = 128
LONG_WINDOWS = {"small": (0, 4, 7, 11), "medium": (0, 4, 11, 15)}
LAYERS = {"small": 12, "medium": 16}


def forward(
    state,
    ids,
    *,
    format,
    head_dim,
    valid=None,
    document_start=None,
    window_blocks=None,
    eps=FLOAT64_EPS,
):
    """Features [T, C] after the last norm, and logits after the soft cap.

    ``state`` maps the names of the checkpoint to arrays. ``valid`` bool [T] is False for padding;
    ``window_blocks`` is the scripts' window; without it every earlier token is seen.
    """
    weights = {key: np.asarray(value, dtype=np.float64) for key, value in state.items()}
    num_layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    seen = [
        keys_seen(ids, layer, format, valid, document_start, window_blocks)
        for layer in range(num_layers)
    ]
    model = {"small": small, "medium": medium}[format]
    return model(weights, ids, num_layers, head_dim, seen, eps)


def mean_loss(logits, targets):
    """Cross-entropy, averaged over the tokens."""
    total = 0.0
    for row, target in zip(logits, targets):
        shifted = row - row.max()
        total += math.log(np.exp(shifted).sum()) - shifted[target]
    return total / len(targets)


# The two models, each from its own column of the specification


def small(w, ids, num_layers, head_dim, seen, eps):
    """Pre-normed attention, plain values, a U-net of skips, a sigmoid at the end."""
    scalars, half = w["scalars"], num_layers // 2
    x = x0 = norm(w["embed.weight"][ids], eps)
    width, outputs = x.shape[1], []
    for i in range(num_layers):
        if i >= half:
            x = x + scalars[i - half] * outputs[num_layers - 1 - i]
        x = scalars[num_layers + 2 * i] * x + scalars[num_layers + 2 * i + 1] * x0
        if i != 7:
            read = norm(x, eps)
            q, k, v = (read @ w[f"blocks.{i}.attn.qkv_w"][part].T for part in range(3))
            v = scalars[3 * num_layers + 2 * i] * v
            table = table_of(i, num_layers)
            if table is not None:
                second = scalars[3 * num_layers + 2 * i + 1]
                v = v + second * w[f"value_embeds.{table}.weight"][ids]
            y = attention(q, k, v, seen[i], head_dim, eps)
            x = x + y @ w[f"blocks.{i}.attn.c_proj.weight"].T
        hidden = norm(x, eps) @ w[f"blocks.{i}.mlp.c_fc.weight"].T
        x = x + np.maximum(hidden, 0) ** 2 @ w[f"blocks.{i}.mlp.c_proj.weight"].T
        outputs.append(x)
    x = norm(x, eps)
    z = x @ w["lm_head.weight"].T
    return x, 30 / (1 + np.exp(-z / (7.5 * math.sqrt(width))))


def medium(w, ids, num_layers, head_dim, seen, eps):
    """Attention of the stream itself, normed values, three skips, an algebraic soft cap."""
    scalars = w["scalars"]
    x = x0 = norm(w["embed.weight"][ids], eps)
    outputs = []
    for i in range(num_layers):
        for target, source in ((9, 6), (10, 4), (11, 2)):
            if i == target:
                x = x + scalars[source] * outputs[source]
        x = scalars[num_layers + 2 * i] * x + scalars[num_layers + 2 * i + 1] * x0
        if i != 7:
            qkvo = w[f"blocks.{i}.attn.qkvo_w"]
            q, k, v = (x @ qkvo[part].T for part in range(3))
            for begin in range(0, v.shape[1], head_dim):
                v[:, begin : begin + head_dim] = norm(v[:, begin : begin + head_dim], eps)
            v = scalars[3 * num_layers + 2 * i] * v
            table = table_of(i, num_layers)
            if table is not None:
                second = scalars[3 * num_layers + 2 * i + 1]
                v = v + second * w[f"value_embeds.{table}.weight"][ids]
            x = x + attention(q, k, v, seen[i], head_dim, eps) @ qkvo[3].T
        hidden = norm(x, eps) @ w[f"blocks.{i}.mlp.fc_w"].T
        x = x + np.maximum(hidden, 0) ** 2 @ w[f"blocks.{i}.mlp.proj_w"].T
        outputs.append(x)
    x = norm(x, eps)
    z = x @ w["lm_head_w"].T
    return x, 15 * z / np.sqrt(z**2 + 225)


def table_of(layer, num_layers):
    """The value embedding of a block: 0 1 2, then none, then 0 1 2."""
    return ([0, 1, 2] + [None] * (num_layers - 6) + [0, 1, 2])[layer]


# Their parts


def norm(x, eps):
    """Each row divided by the root of its mean square."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def attention(q, k, v, seen, head_dim, eps):
    """Softmax attention [T, C], one head and one query at a time; queries and keys are normed."""
    out = np.zeros_like(v)
    for begin in range(0, q.shape[1], head_dim):
        head = slice(begin, begin + head_dim)
        queries, keys = turned(norm(q[:, head], eps)), turned(norm(k[:, head], eps))
        for t, visible in enumerate(seen):
            if not len(visible):
                continue
            scores = 0.12 * (keys[visible] @ queries[t])
            weights = np.exp(scores - scores.max())
            out[t, head] = (weights / weights.sum()) @ v[visible, head]
    return out


def turned(x):
    """Rows turned by their index: pairs (c, c + D/2) as complex numbers, clockwise.

    The first half of the pairs turns by 1 … 1/1024 radians a token, evenly spaced in the exponent;
    the other half never turns.
    """
    pairs = x.shape[1] // 2
    turning = pairs // 2
    rate = [(1 / 1024) ** (j / max(turning - 1, 1)) for j in range(turning)] + [0.0] * turning
    angle = np.arange(len(x))[:, None] * np.array(rate)
    z = (x[:, :pairs] + 1j * x[:, pairs:]) * np.exp(-1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


# What each query sees


def keys_seen(ids, layer, format, valid=None, document_start=None, window_blocks=None):
    """For every query the indices of the keys that it sees in this block."""
    documents = [0] * len(ids) if document_start is None else documents_of(ids, document_start)
    real = [True] * len(ids) if valid is None else valid
    window = window_blocks
    if window is not None and layer % LAYERS[format] not in LONG_WINDOWS[format]:
        window //= 2
    seen = []
    for query in range(len(ids)):
        blocks = None if window is None else blocks_seen(documents, query // BLOCK, window)
        seen.append(
            [
                key
                for key in range(query + 1)
                if documents[key] == documents[query]
                and real[key]
                and (blocks is None or key // BLOCK in blocks)
            ]
        )
    return seen


def documents_of(ids, document_start):
    """The number of each token's document, which begins with the token ``document_start``."""
    numbers, number = [], 0
    for token in ids:
        number += int(token == document_start)
        numbers.append(number)
    return numbers


def blocks_seen(documents, query_block, window):
    """The blocks of keys that a block of queries sees, by the scripts' rule.

    Walking back from the block itself: earlier blocks that are one document with it count as full,
    any other that shares a document with it as partial. Of the full ones ``window - 1`` are kept;
    of the partial ones as many as the full ones leave of the window, and one at least.
    """
    within = lambda block: set(documents[block * BLOCK : (block + 1) * BLOCK])
    full, partial = [], []
    for block in range(query_block, -1, -1):
        together = within(block) | within(query_block)
        if block < query_block and len(together) == 1:
            full.append(block)
        elif within(block) & within(query_block):
            partial.append(block)
    return {*full[: max(window - 1, 0)], *partial[: max(window - len(full), 1)]}
