"""Rotary position embedding: its frequencies, scaling rules, channel layouts and the rotation.

Axes in tensor names::

    B batch    H heads    T tokens    D head width
    R channels that are rotated (R <= D)    P pairs of channels, P = R / 2

Angles are computed in float64 and the rotation in float32 (float64 for float64 inputs), rounded
once at the end. Every step is a method of :class:`Rotary`, so that a planted bug replaces one of
them.

Sources: RoFormer (arXiv 2104.09864) for the rotation, GPT-J for interleaved pairs, GPT-NeoX and
Llama for half-split pairs, modded-nanogpt for the half-truncated layout, YaRN (arXiv 2309.00071),
LongRoPE (arXiv 2402.13753) and transformers' ``modeling_rope_utils`` for the scaling rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["half", "interleaved", "interleaved-to-half", "half-truncated"]
LAYOUTS: tuple[Layout, ...] = ("half", "interleaved", "interleaved-to-half", "half-truncated")

Scaling = Mapping[str, Any]
"""A rope_scaling table in Hugging Face's spelling: ``rope_type`` and the keys of that rule."""


class Rotary:
    """The steps of a rotary embedding in the order in which they happen."""

    def rotary(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        theta: float = 10000.0,
        layout: Layout = "half",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
        layers: Mapping[str, Mapping[str, Any] | None] | None = None,
        layer_type: str | None = None,
    ) -> Tensor:
        """Rotate ``x`` [B, H, T, D] by the angles of ``positions`` [B, T] (or [1, T] for all rows).

        The meaning of every option is the contract :class:`conformance.contracts.Rotary`. Returns
        a new tensor with the shape and dtype of ``x``. Raises ValueError for an unknown layout or
        scaling rule, an odd ``rotary_dim``, or positions that do not fit.
        """
        if layers is not None:
            options = self.layer_options(layers, layer_type)
            return x.clone() if options is None else self.rotary(x, positions, **options)
        rotary_dim = x.shape[-1] if rotary_dim is None else rotary_dim
        check_rotation(x, positions, rotary_dim, layout)
        positions = self.positions(x, positions)
        frequencies_P, attention_factor = self.frequencies(
            rotary_dim, theta, layout, scaling, self.length(x, positions)
        )
        cos_B1TP, sin_B1TP = self.tables(x, positions, frequencies_P.to(x.device), attention_factor)
        x_R, x_pass = self.split_rotated(x, rotary_dim)
        y_R = self.rotate(x_R, cos_B1TP, sin_B1TP, layout)
        return torch.cat([y_R, x_pass], dim=-1)

    def layer_options(
        self, layers: Mapping[str, Mapping[str, Any] | None], layer_type: str | None
    ) -> Mapping[str, Any] | None:
        """The options of one type of layer; None for a layer without rotation."""
        if layer_type not in layers:
            raise ValueError(f"layer type {layer_type!r} is not one of {sorted(layers)}")
        return layers[layer_type]

    def positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """The position [B, T] that each token is rotated to."""
        return positions

    def length(self, x: Tensor, positions: Tensor) -> int:
        """The length that dynamic NTK and LongRoPE go by: one more than the largest position."""
        return int(positions.max()) + 1

    def frequencies(
        self,
        rotary_dim: int,
        theta: float,
        layout: Layout,
        scaling: Scaling | None,
        length: int,
    ) -> tuple[Tensor, float]:
        """Radians a position for each pair, float64 [P], and the factor on cos and sin."""
        if layout == "half-truncated":
            if scaling is not None:
                raise ValueError("the half-truncated layout has no scaling rules")
            return half_truncated_frequencies(rotary_dim, theta), 1.0
        rule = "default" if scaling is None else scaling["rope_type"]
        if rule not in SCALING_RULES:
            raise ValueError(f"rope_type {rule!r} is not one of {sorted(SCALING_RULES)}")
        return SCALING_RULES[rule](rotary_dim, theta, scaling or {}, length)

    def tables(
        self, x: Tensor, positions: Tensor, frequencies_P: Tensor, attention_factor: float
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, T, P], scaled, in the dtype that the rotation is computed in."""
        angles_BTP = self.angles(x, positions, frequencies_P)
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        cos_BTP = torch.cos(angles_BTP) * attention_factor
        sin_BTP = torch.sin(angles_BTP) * attention_factor
        return cos_BTP.to(compute_dtype)[:, None], sin_BTP.to(compute_dtype)[:, None]

    def angles(self, x: Tensor, positions: Tensor, frequencies_P: Tensor) -> Tensor:
        """Angles [B, T, P] in float64 radians, whatever the dtype of ``x``."""
        return positions.to(torch.float64)[..., None] * frequencies_P

    def split_rotated(self, x: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
        """The channels that are rotated, [..., R], and those that pass through, [..., D - R]."""
        return x[..., :rotary_dim], x[..., rotary_dim:]

    def rotate(self, x_BHTR: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """Rotate each pair of channels; cos and sin [B, 1, T, P]."""
        first, second = split_pairs(x_BHTR.to(cos.dtype), layout)
        if layout == "half-truncated":  # turns the other way round
            sin = -sin
        turned = first * cos - second * sin, second * cos + first * sin
        return join_pairs(*turned, layout).to(x_BHTR.dtype)


def rotary(x: Tensor, positions: Tensor, **options) -> Tensor:
    """:meth:`Rotary.rotary` as a function."""
    return Rotary().rotary(x, positions, **options)


class RotaryModule(torch.nn.Module):
    """:class:`Rotary` with its options fixed, as a module: ``forward(x, positions)``.

    It holds plain numbers and no tensors, so neither a cast of the model nor a construction on the
    meta device can touch its angles.
    """

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x`` [B, H, T, D] by the angles of ``positions`` [B, T]."""
        return Rotary().rotary(x, positions, **self.options)

    def reset_parameters(self) -> None:
        """Nothing to restore."""


def check_rotation(x: Tensor, positions: Tensor, rotary_dim: int, layout: str) -> None:
    """Raise ValueError, naming what was found, unless the arguments fit together."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {list(LAYOUTS)}")
    if x.ndim != 4:
        raise ValueError(f"x needs four axes [batch, heads, tokens, width], found {list(x.shape)}")
    if positions.ndim != 2 or positions.shape[1] != x.shape[2]:
        raise ValueError(f"positions {list(positions.shape)} do not fit x {list(x.shape)}")
    multiple = 4 if layout == "half-truncated" else 2
    if rotary_dim % multiple or not 0 < rotary_dim <= x.shape[-1]:
        raise ValueError(
            f"rotary_dim {rotary_dim} is not a multiple of {multiple} up to the width {x.shape[-1]}"
        )


def split_pairs(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The first and the second channel of every pair, each [..., P].

    Half-split and half-truncated pair channel p with p + P; interleaved pairs 2p with 2p + 1.
    """
    if layout.startswith("interleaved"):
        return x[..., 0::2], x[..., 1::2]
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def join_pairs(first: Tensor, second: Tensor, layout: Layout) -> Tensor:
    """The inverse of :func:`split_pairs`; "interleaved-to-half" writes the pairs back as halves.

    DeepSeek's code does the latter. Scores between queries and keys are the same either way.
    """
    if layout == "interleaved":
        return torch.stack([first, second], dim=-1).flatten(-2)
    return torch.cat([first, second], dim=-1)


def default_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """theta^(-2p/R) for each pair p, float64 [P] (RoFormer, section 3.2.2)."""
    return theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def half_truncated_frequencies(rotary_dim: int, theta: float) -> Tensor:
    """R/4 frequencies from 1 down to 1/theta, evenly spaced in the exponent, then R/4 zeros.

    Half of the pairs never turn. modded-nanogpt uses theta 1024.
    """
    exponents = torch.linspace(0, 1, rotary_dim // 4, dtype=torch.float64)
    return torch.cat([theta**-exponents, torch.zeros(rotary_dim // 4, dtype=torch.float64)])


def unscaled(rotary_dim: int, theta: float, scaling: Scaling, length: int) -> tuple[Tensor, float]:
    """No scaling."""
    return default_frequencies(rotary_dim, theta), 1.0


def linear(rotary_dim: int, theta: float, scaling: Scaling, length: int) -> tuple[Tensor, float]:
    """Position interpolation (arXiv 2306.15595): position p turns as p / factor did."""
    return default_frequencies(rotary_dim, theta) / scaling["factor"], 1.0


def dynamic_ntk(
    rotary_dim: int, theta: float, scaling: Scaling, length: int
) -> tuple[Tensor, float]:
    """A larger theta as soon as the call is longer than the model was trained for.

    Source: transformers ``_compute_dynamic_ntk_parameters``. The theta depends on the length of
    this call alone; a table kept from a longer call before is a bug (transformers#25306).
    """
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return default_frequencies(rotary_dim, theta * stretch ** (rotary_dim / (rotary_dim - 2))), 1.0


def yarn(rotary_dim: int, theta: float, scaling: Scaling, length: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): fast pairs keep their frequency, slow ones are interpolated.

    Between them a linear ramp over the pair index; its ends are the pairs that make ``beta_fast``
    and ``beta_slow`` turns over the trained length, rounded outwards unless ``truncate`` is False.
    """
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_with_turns(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_with_turns(scaling.get("beta_fast") or 32)
    high = pair_with_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as the paper's code: a step instead of a division by zero
    pair = torch.arange(rotary_dim // 2, dtype=torch.float64)
    interpolated = torch.clamp((pair - low) / (high - low), 0, 1)
    frequencies = default_frequencies(rotary_dim, theta)
    mixed = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return mixed, yarn_attention_factor(scaling)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, or 1 where nothing is stretched (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_attention_factor(scaling: Scaling) -> float:
    """The factor on cos and sin: ``attention_factor`` as given, else from the factor.

    With both ``mscale`` and ``mscale_all_dim`` it is the ratio of their two mscales (DeepSeek).
    """
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        numerator = yarn_mscale(scaling["factor"], scaling["mscale"])
        return numerator / yarn_mscale(scaling["factor"], scaling["mscale_all_dim"])
    return yarn_mscale(scaling["factor"])


def yarn_score_factor(scaling: Scaling | None) -> float:
    """What DeepSeek's attention multiplies its score scale by: mscale(factor, mscale_all_dim)².

    1 without YaRN or without ``mscale_all_dim``. Source: transformers ``DeepseekV3Attention``.
    """
    if scaling is None or scaling["rope_type"] != "yarn" or not scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def llama3(rotary_dim: int, theta: float, scaling: Scaling, length: int) -> tuple[Tensor, float]:
    """Llama 3.1: long waves divided by ``factor``, short ones kept, a linear blend between.

    Wavelengths are compared with the trained length over ``low_freq_factor`` and
    ``high_freq_factor``. Source: transformers ``_compute_llama3_parameters``.
    """
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = default_frequencies(rotary_dim, theta)
    turns = trained * frequencies / (2 * math.pi)
    kept = torch.clamp((turns - low) / (high - low), 0, 1)
    return frequencies * kept + frequencies / scaling["factor"] * (1 - kept), 1.0


def longrope(rotary_dim: int, theta: float, scaling: Scaling, length: int) -> tuple[Tensor, float]:
    """LongRoPE (arXiv 2402.13753): one divisor a pair, another set beyond the trained length.

    The factor on cos and sin is ``attention_factor`` as given, else
    sqrt(1 + ln(factor) / ln(trained length)) where factor > 1.
    """
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    divisors = scaling["long_factor"] if length > trained else scaling["short_factor"]
    if len(divisors) != rotary_dim // 2:
        raise ValueError(f"longrope needs {rotary_dim // 2} factors, found {len(divisors)}")
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        stretched = factor > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained)) if stretched else 1.0
    frequencies = default_frequencies(rotary_dim, theta)
    return frequencies / torch.tensor(divisors, dtype=torch.float64), attention_factor


SCALING_RULES = {
    "default": unscaled,
    "linear": linear,
    "dynamic": dynamic_ntk,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
}
