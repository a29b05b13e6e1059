"""The project's own goldens of the small and the medium GPT, computed in numpy's float64.

    python -m meta_tests.gpt_goldens

writes ``fixtures/goldens/gpt`` anew, a ``.json`` and a ``.safetensors`` for each case. The outputs are
those of :mod:`meta_tests.numpy_gpt`, never of the reference; norms add the epsilon of float32, as the
training scripts do. Read the diff afterwards: a golden changes only when the specification does.

A ``.json`` has the sizes, ``input_ids``, the mean cross-entropy ``loss`` against the ids rolled left by
one, and the shape of every entry of the state dictionary. ``window_blocks`` and ``eos`` (the token that
starts a document) are null where every earlier token is seen. A ``.safetensors`` has float64
``features`` at ``feature_positions`` and ``logits`` at ``logit_positions``.

Weights are not stored: :func:`entry` computes each from its name and the index of the element.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from meta_tests import numpy_gpt

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "goldens" / "gpt"
EVERY = 16
"""Positions between two that are stored."""

# Weights


def uniform(key, count):
    """``count`` numbers in [0, 1) of 24 bits: splitmix64 of the index, started from the name."""
    index = np.arange(1, count + 1, dtype=np.uint64)
    x = index * np.uint64(0x9E3779B97F4A7C15)
    start = zlib.crc32(key.encode()) * 0xBF58476D1CE4E5B9 % 2**64
    x += np.uint64(start)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float64) / 2**24


def scale_of(key):
    """The largest magnitude of an entry."""
    if key == "scalars":
        return 0.3
    if "embed" in key:
        return 1.0
    return {"lm_head.weight": 4.0, "lm_head_w": 0.5}.get(key, 0.08)


def entry(key, shape):
    """One entry of a state dictionary, float32."""
    values = ((2 * uniform(key, int(np.prod(shape))) - 1) * scale_of(key)).astype(np.float32)
    return (values + np.float32(0.8 if key == "scalars" else 0)).reshape(shape)


def weights(golden):
    """The state dictionary of a golden."""
    return {key: entry(key, shape) for key, shape in golden["state_dict_shapes"].items()}


# Cases


@dataclass(frozen=True)
class Case:
    """What one golden is computed from."""

    name: str
    format: str
    num_heads: int
    world_size: int
    seq_len: int
    window_blocks: int | None = None
    starts: tuple[int, ...] = ()
    """Where documents start; the first begins at 0 without a token that says so."""
    head_dim: int = 16
    vocab_size: int = 40


CASES = (
    Case("small-plain", "small", num_heads=3, world_size=8, seq_len=256),
    Case(
        "small-window2",
        "small",
        num_heads=2,
        world_size=7,
        seq_len=384,
        window_blocks=2,
        starts=(0, 330, 349),
    ),
    Case("medium-plain", "medium", num_heads=3, world_size=1, seq_len=256),
    Case(
        "medium-window3",
        "medium",
        num_heads=2,
        world_size=8,
        seq_len=384,
        window_blocks=3,
        starts=(70, 71, 200),
    ),
)


def shapes(format, num_layers, width, vocab_size, world_size):
    """The shape of every entry of a checkpoint, as the specification lists them."""
    rows = -(-vocab_size // 128) * 128
    result = {"embed.weight": [vocab_size, width]}
    for i in range(3):
        result[f"value_embeds.{i}.weight"] = [vocab_size, width]
    for i in range(num_layers):
        if i != 7 and format == "small":
            result[f"blocks.{i}.attn.qkv_w"] = [3, width, width]
            result[f"blocks.{i}.attn.c_proj.weight"] = [width, width]
        elif i != 7:
            result[f"blocks.{i}.attn.qkvo_w"] = [4, width, width]
        fc, proj = ("c_fc.weight", "c_proj.weight") if format == "small" else ("fc_w", "proj_w")
        result[f"blocks.{i}.mlp.{fc}"] = [4 * width, width]
        result[f"blocks.{i}.mlp.{proj}"] = [width, 4 * width]
    result["lm_head.weight" if format == "small" else "lm_head_w"] = [rows, width]
    padding = -5 * num_layers % world_size if format == "small" else 0
    result["scalars"] = [5 * num_layers + padding]
    return result


def generate(case):
    """The description of a golden, and its arrays."""
    num_layers = numpy_gpt.LAYERS[case.format]
    width, eos = case.num_heads * case.head_dim, case.vocab_size - 1
    ids = (uniform(f"ids of {case.name}", case.seq_len) * eos).astype(np.int64)
    ids[list(case.starts)] = eos
    positions = [*range(0, case.seq_len, EVERY), case.seq_len - 1]
    golden = {
        "format": case.format,
        "world_size": case.world_size,
        "num_layers": num_layers,
        "num_heads": case.num_heads,
        "model_dim": width,
        "vocab_size": case.vocab_size,
        "seq_len": case.seq_len,
        "window_blocks": case.window_blocks,
        "eos": None if case.window_blocks is None else eos,
        "input_ids": ids.tolist(),
        "state_dict_shapes": shapes(
            case.format, num_layers, width, case.vocab_size, case.world_size
        ),
        "feature_positions": positions,
        "logit_positions": positions,
    }
    features, logits = computed(golden)
    golden["loss"] = numpy_gpt.mean_loss(logits, np.roll(ids, -1))
    return golden, {"features": features[positions], "logits": logits[positions]}


def computed(golden):
    """Features and logits of a golden at every position, in numpy."""
    return numpy_gpt.forward(
        weights(golden),
        np.array(golden["input_ids"]),
        format=golden["format"],
        head_dim=golden["model_dim"] // golden["num_heads"],
        document_start=golden["eos"],
        window_blocks=golden["window_blocks"],
        eps=numpy_gpt.FLOAT32_EPS,
    )


def read(path):
    """A golden by the path of its description: that, and its arrays."""
    golden = json.loads(path.read_text())
    golden.setdefault("feature_positions", list(range(golden["seq_len"])))
    return golden, load_file(path.with_suffix(".safetensors"))


def main():
    """Write every golden."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        golden, arrays = generate(case)
        (FOLDER / f"{case.name}.json").write_text(json.dumps(golden) + "\n")
        (FOLDER / f"{case.name}.safetensors").write_bytes(save(arrays))
        print(f"{case.name}: loss {golden['loss']:.6f}")


if __name__ == "__main__":
    main()
