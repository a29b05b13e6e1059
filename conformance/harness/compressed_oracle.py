"""The logits of a compressed model in float64: both architectures written out, experts summed densely.

Every expert sees every token and is weighted, with zero where it is not chosen. The noise is what
moving every weight and every intermediate result at random by a small share of itself does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.harness.compressed_cases import (
    EPS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    THETA,
    CompressedCase,
)
from conformance.harness.compressed_files import experts_of, exported_name
from conformance.harness.tolerance import Expectation, expect

PERTURBATION, PERTURBED = 1e-7, 3
"""How far everything is moved, relatively, and how many times."""

Move = Callable[[Tensor], Tensor]


def logits_of(
    case: CompressedCase, weights: Mapping[str, Tensor], ids: Tensor, move: Move
) -> Tensor:
    """Logits [batch, tokens, vocabulary] of weights under the names of ``parameters()``."""
    experts = experts_of(weights, case)
    w = {name: move(each.double()) for name, each in (weights | experts).items()}
    x_BTH = w["model.embed_tokens.weight"][ids]
    for layer in range(case.layers):
        own = f"model.layers.{layer}"
        normed = move(rms_norm(x_BTH, w[f"{own}.input_layernorm.weight"]))
        x_BTH = move(x_BTH + attention(normed, f"{own}.self_attn", w, move))
        normed = move(rms_norm(x_BTH, w[f"{own}.post_attention_layernorm.weight"]))
        if layer in case.expert_layers:
            added = mixture(case, layer, normed, w, move)
        else:
            names = [f"{own}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
            added = swiglu(normed, *(w[name] for name in names), move)
        x_BTH = move(x_BTH + added)
    x_BTH = move(rms_norm(x_BTH, w["model.norm.weight"]))
    return move(x_BTH @ w["model.embed_tokens.weight" if case.tied else "lm_head.weight"].T)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divided by the root of the mean square."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def attention(x_BTH: Tensor, own: str, w: Mapping[str, Tensor], move: Move) -> Tensor:
    """Causal attention with grouped heads."""
    heads = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    parts = {}
    for name, number in heads.items():
        part = move(x_BTH @ w[f"{own}.{name}_proj.weight"].T)
        part = part.unflatten(-1, (number, HEAD_DIM)).transpose(1, 2)
        if f"{own}.{name}_norm.weight" in w:
            part = move(rms_norm(part, w[f"{own}.{name}_norm.weight"]))
        parts[name] = part if name == "v" else move(rotate(part))
    k, v = (parts[name].repeat_interleave(HEADS // KV_HEADS, 1) for name in "kv")
    scores = move(parts["q"] @ k.mT / HEAD_DIM**0.5)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = move(scores.masked_fill(hidden, -torch.inf).softmax(-1))
    out = move(weights @ v).transpose(1, 2).flatten(2)
    return move(out @ w[f"{own}.o_proj.weight"].T)


def rotate(x_BHTD: Tensor) -> Tensor:
    """Channel i is turned with channel i + half, by the position over theta to the 2 i / width."""
    half = HEAD_DIM // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x_BHTD.shape[2], dtype=torch.float64)[:, None] * frequency
    one, other = x_BHTD[..., :half], x_BHTD[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, move: Move) -> Tensor:
    """down(silu(gate x) ⊙ up x)."""
    return move(move(F.silu(move(x @ gate.T)) * move(x @ up.T)) @ down.T)


def mixture(
    case: CompressedCase, layer: int, x: Tensor, w: Mapping[str, Tensor], move: Move
) -> Tensor:
    """The weighted sum over all experts, of which most have no weight."""
    scores = move(x @ w[f"model.layers.{layer}.{case.block}.gate.weight"].T).softmax(-1)
    least = scores.topk(case.top_k, -1).values[..., -1:]
    chosen = torch.where(scores >= least, scores, 0)
    if case.normalize:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for e in range(case.experts):
        names = [exported_name(case, layer, e, p) for p in ("gate_proj", "up_proj", "down_proj")]
        total = total + chosen[..., e : e + 1] * swiglu(x, *(w[name] for name in names), move)
    return move(total)


def expected_logits(
    case: CompressedCase, weights: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype
) -> Expectation:
    """What logits must be, computed in ``dtype``."""
    generator = torch.Generator().manual_seed(case.seed)

    def moved(x: Tensor) -> Tensor:
        random = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return x * (1 + PERTURBATION * random)

    weights, ids = {n: t.detach().cpu() for n, t in weights.items()}, ids.cpu()
    value = logits_of(case, weights, ids, lambda x: x)
    noise = value.square()
    for _ in range(PERTURBED):
        other = logits_of(case, weights, ids, moved)
        noise = noise + ((other - value) / PERTURBATION).square()
    return expect(value, [], noise.sqrt(), dtype)


def logits_of_transformers(folder: Path, ids: Tensor) -> tuple[Tensor, dict[str, list[str]]]:
    """What transformers makes of an ordinary checkpoint, and the names it misses or does not know."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, dtype=torch.float32
        )
        with torch.no_grad():
            logits = model.eval()(input_ids=ids.cpu(), use_cache=False).logits
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return logits, {kind: sorted(map(str, info.get(kind) or ())) for kind in kinds}
