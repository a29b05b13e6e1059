"""Routing that benchmarks of experts are given: uniform or skewed, and how many experts it reaches."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Skew = Literal["uniform", "skewed"]

EXPONENT = 1.0
"""Of Zipf's law, by which skewed routing prefers experts: the r-th most popular has weight 1 / r."""

SAMPLE = 1 << 14
"""Tokens of the simulation that says how often a skewed router chooses each expert."""


def routing(
    tokens: int, experts: int, slots: int, skew: Skew, device: str, seed: int
) -> tuple[Tensor, Tensor]:
    """Experts int64 [tokens, slots], each once a token, and weights float32 that add up to 1.

    A token draws without replacement, from all experts alike or by Zipf's law (by the Gumbel trick:
    the largest of log weights plus Gumbel noise); which experts are popular depends on the seed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    uniform = torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    scores = -(-uniform.clamp(1e-300).log()).clamp(1e-300).log()
    if skew == "skewed":
        order = torch.randperm(experts, generator=generator)
        scores = scores + torch.from_numpy(log_popularity(experts))[order]
    indices = scores.topk(slots, dim=-1).indices
    weights = torch.rand(tokens, slots, generator=generator) + 0.5
    weights = weights / weights.sum(-1, keepdim=True)
    return indices.to(device), weights.to(device)


def log_popularity(experts: int) -> np.ndarray:
    """Logarithms of Zipf's weights, the most popular expert first, float64 [experts]."""
    return -EXPONENT * np.log(np.arange(1, experts + 1))


@lru_cache
def chosen(experts: int, slots: int, skew: Skew) -> np.ndarray:
    """The probability that a token goes to each expert, the most popular first, float64 [experts].

    Uniform: slots / experts. Skewed: counted in a simulation with a fixed seed.
    """
    if skew == "uniform":
        return np.full(experts, slots / experts)
    noise = np.random.default_rng(0).gumbel(size=(SAMPLE, experts))
    scores = noise + log_popularity(experts)
    best = np.argpartition(-scores, slots - 1, axis=1)[:, :slots]
    return np.bincount(best.ravel(), minlength=experts) / SAMPLE


def experts_reached(tokens: int, experts: int, slots: int, skew: Skew) -> float:
    """How many experts have a token, in expectation: Σ 1 − (1 − p)^tokens."""
    return float((1 - (1 - chosen(experts, slots, skew)) ** tokens).sum())
