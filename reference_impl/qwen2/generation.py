"""Generating text: greedy and sampled, with the same tokens on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference_impl.qwen2.model import Qwen2


@torch.no_grad()
def generate(
    model: Qwen2,
    ids: Tensor,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
) -> Tensor:
    """The prompts ``ids`` int64 [B, T] and what follows, [B, T + at most max_new_tokens].

    ``valid`` bool [B, T] is False for padding of the prompts. ``eos``: the tokens that end a row;
    default: those of the configuration. A row that has ended is filled up with ``pad`` (default: the
    token that ended it), and generation stops when all have. Sampled tokens are drawn on the first
    rank, by ``generator``, and sent to the others. Raises ValueError for a negative number of tokens
    and for sampling with a temperature that is not above 0.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    if do_sample and not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected above 0")
    ends = model.config.eos if eos is None else [eos] if isinstance(eos, int) else eos
    ends_E = torch.tensor(list(ends), dtype=ids.dtype, device=ids.device)
    ended_B = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    fill_B = torch.full_like(ids[:, 0], -1 if pad is None else pad) if len(ids) else ids[:, 0]
    step, cache, step_valid = ids, None, valid
    for _ in range(max_new_tokens):
        logits_BTV, cache = model(step, cache=cache, valid=step_valid)
        logits_BV = last_logits(logits_BTV, step_valid)
        next_B = pick(logits_BV, do_sample, temperature, generator)
        next_B = model.ranks.broadcast(next_B)
        next_B = torch.where(ended_B, fill_B, next_B)
        ids = torch.cat([ids, next_B[:, None]], dim=1)
        newly_B = ~ended_B & torch.isin(next_B, ends_E)
        if pad is None:
            fill_B = torch.where(newly_B, next_B, fill_B)
        ended_B = ended_B | newly_B
        if bool(ended_B.all()):
            break
        step, step_valid = next_B[:, None], None
    return ids


def last_logits(logits_BTV: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The logits [B, V] at the last token of each row that is not padding."""
    if valid_BT is None:
        return logits_BTV[:, -1]
    slots = torch.arange(valid_BT.shape[1], device=valid_BT.device)
    last_B = torch.where(valid_BT, slots, -1).amax(-1).clamp(min=0)
    return logits_BTV[torch.arange(len(logits_BTV), device=logits_BTV.device), last_B]


def pick(
    logits_BV: Tensor, do_sample: bool, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """The next token [B]: the most likely one, or one drawn by its probability."""
    if not do_sample:
        return logits_BV.argmax(-1)
    probabilities = (logits_BV.to(torch.float64) / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
