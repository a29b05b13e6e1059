"""Other right ways to compute rotary embedding, alone, as a module and with a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from conformance.correct_variants import correct_variant
from reference_impl.cached_attention import CachedAttention
from reference_impl.rotary import Rotary, join_pairs, split_pairs, yarn_score_factor


class _Float32Angles(Rotary):
    """Frequencies and angles in float32, as every model computes them."""

    def angles(self, x: Tensor, positions: Tensor, frequencies_P: Tensor) -> Tensor:
        return positions.float()[..., None] * frequencies_P.float()


class _Float32Frequencies(_Float32Angles):
    """As above, with the powers of theta in float32 as well, rule by rule."""

    def frequencies(self, rotary_dim, theta, layout, scaling, length):
        plain = 1.0 / theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
        rule = "default" if scaling is None else scaling["rope_type"]
        _, factor = super().frequencies(rotary_dim, theta, layout, scaling, length)
        if layout == "half-truncated":
            turning = (1 / theta) ** torch.linspace(0, 1, rotary_dim // 4)
            return torch.cat([turning, torch.zeros_like(turning)]), 1.0
        if rule == "linear":
            return plain / scaling["factor"], factor
        if rule == "llama3":
            return _llama3_in_float32(plain, scaling), factor
        if rule == "yarn":
            return _yarn_in_float32(plain, rotary_dim, theta, scaling), factor
        if rule == "longrope":
            trained = scaling["original_max_position_embeddings"]
            divisors = scaling["long_factor"] if length > trained else scaling["short_factor"]
            powers = theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
            return 1.0 / (torch.tensor(divisors) * powers), factor
        if rule == "dynamic":
            trained = scaling["original_max_position_embeddings"]
            longest = max(length, trained)
            stretch = scaling["factor"] * longest / trained - (scaling["factor"] - 1)
            base = torch.tensor(theta * stretch ** (rotary_dim / (rotary_dim - 2)))
            return 1.0 / base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim), factor
        return plain, factor


def _llama3_in_float32(plain: Tensor, scaling) -> Tensor:
    trained = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    scaled = torch.where(wavelength > trained / low, plain / scaling["factor"], plain)
    medium = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(medium, blended, scaled)


def _yarn_in_float32(plain: Tensor, rotary_dim: int, theta: float, scaling) -> Tensor:
    trained = scaling["original_max_position_embeddings"]

    def pair(turns: float) -> float:
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = torch.clamp((torch.arange(rotary_dim // 2).float() - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return plain / scaling["factor"] * (1 - kept) + plain * kept


@correct_variant("rotary-float32-angles", contract="rotary")
class Float32Angles(_Float32Frequencies):
    """Frequencies, scaling rules and angles all in float32."""


@correct_variant("rotary-tables-in-model-dtype", contract="rotary")
class TablesInModelDtype(_Float32Frequencies):
    """cos and sin computed in float32, rounded to the dtype of x, products in that dtype."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        cos, sin = super().tables(x, positions, frequencies_P, attention_factor)
        return cos.to(x.dtype), sin.to(x.dtype)


@correct_variant("rotary-rotate-half", contract="rotary")
class RotateHalf(TablesInModelDtype):
    """x * cos + rotate_half(x) * sin over the whole width, with tables repeated for both."""

    def rotate(self, x_BHTR, cos, sin, layout):
        if layout == "half-truncated":
            sin = -sin
        first, second = split_pairs(x_BHTR, layout)
        read = "half" if layout == "half-truncated" else layout
        x = join_pairs(first, second, read)
        turned = join_pairs(-second, first, read)
        return x * join_pairs(cos, cos, read) + turned * join_pairs(sin, sin, read)


@correct_variant("rotary-complex", contract="rotary")
class Complex(_Float32Angles):
    """Pairs as complex numbers, multiplied by cos + i sin."""

    def rotate(self, x_BHTR, cos, sin, layout):
        first, second = split_pairs(x_BHTR.to(cos.dtype), layout)
        turns = torch.complex(cos, -sin if layout == "half-truncated" else sin)
        turned = torch.complex(first, second) * turns
        return join_pairs(turned.real, turned.imag, layout).to(x_BHTR.dtype)


@correct_variant("rotary-polar", contract="rotary")
class Polar(_Float32Frequencies):
    """As Llama's own code: torch.polar, and pairs viewed as complex numbers."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        angles = self.angles(x, positions, frequencies_P)
        turns = torch.polar(torch.full_like(angles, attention_factor), angles)[:, None]
        return turns.real, turns.imag

    def rotate(self, x_BHTR, cos, sin, layout):
        pairs = torch.stack(split_pairs(x_BHTR.float(), layout), dim=-1)
        turns = torch.complex(cos, -sin if layout == "half-truncated" else sin)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        return join_pairs(turned[..., 0], turned[..., 1], layout).type_as(x_BHTR)


@correct_variant("rotary-growing-table", contract="rotary")
class GrowingTable(_Float32Frequencies):
    """A table up to the largest position so far, kept for each set of frequencies."""

    def __init__(self) -> None:
        self.kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def tables(self, x, positions, frequencies_P, attention_factor):
        key = (tuple(frequencies_P.tolist()), attention_factor)
        longest = int(positions.max()) + 1
        if longest > 50_000:  # one table of that length a case would only cost time
            return super().tables(x, positions, frequencies_P, attention_factor)
        if key not in self.kept or len(self.kept[key][0]) < longest:
            angles = torch.outer(torch.arange(longest).float(), frequencies_P.float())
            self.kept[key] = angles.cos() * attention_factor, angles.sin() * attention_factor
        cos, sin = self.kept[key]
        return cos[positions][:, None], sin[positions][:, None]


@correct_variant("rotary-two-by-two", contract="rotary")
class TwoByTwo(_Float32Angles):
    """Each pair times its 2 x 2 rotation matrix, as one einsum."""

    def rotate(self, x_BHTR, cos, sin, layout):
        sin = -sin if layout == "half-truncated" else sin
        pairs = torch.stack(split_pairs(x_BHTR.to(cos.dtype), layout), dim=-1)
        matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
        turned = torch.einsum("bhtpi,bxtpoi->bhtpo", pairs, matrices)
        return join_pairs(turned[..., 0], turned[..., 1], layout).to(x_BHTR.dtype)


@correct_variant("rotary-matrix", contract="rotary")
class Matrix(_Float32Angles):
    """The whole head times one block-diagonal matrix a token (RoFormer, equation 15)."""

    def rotate(self, x_BHTR, cos, sin, layout):
        sin = -sin if layout == "half-truncated" else sin
        width = x_BHTR.shape[-1]
        read_first, read_second = split_pairs(torch.arange(width), layout)
        written = "half" if layout == "interleaved-to-half" else layout
        first, second = split_pairs(torch.arange(width), written)
        matrix = torch.zeros(*cos.shape[:3], width, width, dtype=cos.dtype)
        matrix[..., first, read_first] = cos
        matrix[..., second, read_second] = cos
        matrix[..., first, read_second] = -sin
        matrix[..., second, read_first] = sin
        return (matrix @ x_BHTR.to(cos.dtype)[..., None])[..., 0].to(x_BHTR.dtype)


@correct_variant("rotary-in-place", contract="rotary")
class InPlace(Rotary):
    """Written into a private copy of x, channel by channel."""

    def rotate(self, x_BHTR, cos, sin, layout):
        sin = -sin if layout == "half-truncated" else sin
        out = x_BHTR.to(cos.dtype, copy=True)
        first, second = (channel.clone() for channel in split_pairs(out, layout))
        written = "half" if layout == "interleaved-to-half" else layout
        to_first, to_second = split_pairs(out, written)
        to_first.copy_(first).mul_(cos).sub_(second * sin)
        to_second.copy_(second).mul_(cos).add_(first * sin)
        return out.to(x_BHTR.dtype)


@correct_variant("rotary-token-by-token", contract="rotary")
class TokenByToken(_Float32Frequencies):
    """One token after another."""

    def rotate(self, x_BHTR, cos, sin, layout):
        rotate = super().rotate
        steps = [slice(t, t + 1) for t in range(x_BHTR.shape[2])]
        parts = [rotate(x_BHTR[:, :, t], cos[:, :, t], sin[:, :, t], layout) for t in steps]
        return torch.cat(parts, dim=2)


@correct_variant("rotary-strided-output", contract="rotary")
class StridedOutput(_Float32Frequencies):
    """Computed in [batch, tokens, heads, width]; the output is a transposed view of that."""

    def rotary(self, x, positions, **options):
        out = super().rotary(x, positions, **options)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, cos, sin):
        ctx.save_for_backward(cos, sin)
        return first * cos - second * sin, second * cos + first * sin

    @staticmethod
    def backward(ctx, first, second):
        cos, sin = ctx.saved_tensors
        return first * cos + second * sin, second * cos - first * sin, None, None


@correct_variant("rotary-own-backward", contract="rotary")
class OwnBackward(TablesInModelDtype):
    """A hand-written backward pass, in the dtype of x."""

    def rotate(self, x_BHTR, cos, sin, layout):
        first, second = split_pairs(x_BHTR, layout)
        sin = -sin if layout == "half-truncated" else sin
        return join_pairs(*_Function.apply(first, second, cos, sin), layout)


@correct_variant("rotary-factor-on-x", contract="rotary")
class FactorOnInput(_Float32Angles):
    """The attention factor multiplies x in float32 instead of cos and sin."""

    def tables(self, x, positions, frequencies_P, attention_factor):
        self.factor = attention_factor
        return super().tables(x, positions, frequencies_P, 1.0)

    def rotate(self, x_BHTR, cos, sin, layout):
        return super().rotate(x_BHTR.float() * self.factor, cos, sin, layout).to(x_BHTR.dtype)


@correct_variant("rotary-module-float32-buffer", contract="rotary_module")
class Float32BufferModule(nn.Module):
    """Frequencies in a buffer that a cast leaves in float32 and a reset computes again."""

    def __init__(self, head_dim: int | None = None, **options) -> None:
        super().__init__()
        self.head_dim, self.options = head_dim, options
        self.register_buffer("inv_freq", None, persistent=False)
        if head_dim is not None:
            self.reset_parameters()

    def rotary_module(self, head_dim, **options):
        return type(self)(head_dim, **options)

    def compute(self, length: int) -> tuple[Tensor, float]:
        options = {"theta": 10000.0, "layout": "half", "scaling": None, **self.options}
        width = options.pop("rotary_dim", None) or self.head_dim
        return _Float32Frequencies().frequencies(width, **options, length=length)

    def reset_parameters(self) -> None:
        self.inv_freq = self.compute(1)[0].float()

    def _apply(self, fn, recurse=True):
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq is not None and self.inv_freq.dtype != torch.float32:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        frequencies, factor = self.compute(int(positions.max()) + 1)
        rule = (self.options.get("scaling") or {}).get("rope_type")
        if rule not in ("dynamic", "longrope"):
            frequencies = self.inv_freq
        steps = TablesInModelDtype()
        steps.frequencies = lambda *arguments: (frequencies, factor)
        return steps.rotary(x, positions, **self.options)


class _Cache(CachedAttention):
    """An adapter and the caches that it makes in one: without options it is the adapter."""

    def __init__(self, **options) -> None:
        if options:
            super().__init__(**options, rotary_steps=RotateHalf())

    def cached_attention(self, **options):
        return type(self)(**options)


@correct_variant("cached-model-dtype", contract="cached_attention")
class EagerInModelDtype(_Cache):
    """Rotation, scores, probabilities and output are all stored in the dtype of the model."""

    def attend(self, q, positions):
        heads = q.shape[1] // self.k_BGSD.shape[1]
        k, v = (x.repeat_interleave(heads, dim=1) for x in (self.k_BGSD, self.v_BGSE))
        q_at, k_at = positions[:, None, :, None], self.positions_BS[:, None, None, :]
        seen = (k_at >= 0) & (k_at <= q_at)
        if self.window is not None:
            seen = seen & (k_at >= q_at - self.window[0])
        scores = (q @ k.transpose(-1, -2)) * self.score_scale(q)
        scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return weights[..., : k.shape[2]] @ v


@correct_variant("cached-sdpa", contract="cached_attention")
class FusedAttention(_Cache):
    """torch's own attention with a bias; a sink is one more key, of zeros, with the sink as bias."""

    def attend(self, q, positions):
        q_at, k_at = positions[:, None, :, None], self.positions_BS[:, None, None, :]
        seen = (k_at >= 0) & (k_at <= q_at)
        if self.window is not None:
            seen = seen & (k_at >= q_at - self.window[0])
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        bias = bias.expand(-1, q.shape[1], -1, -1)
        k, v = self.k_BGSD, self.v_BGSE
        if self.sinks is not None:
            k, v = (nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
            sinks = self.sinks[None, :, None, None].expand(*bias.shape[:3], 1)
            bias = torch.cat([bias, sinks], dim=-1)
        elif not bool(seen.any(-1).all()):  # padding queries: unspecified, but not NaN
            bias = torch.where(seen.any(-1, keepdim=True), bias, 0)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=self.score_scale(q), enable_gqa=True
        )


@correct_variant("cached-evicting", contract="cached_attention")
class Evicting(_Cache):
    """Keys that no later query can see are dropped; positions keep counting."""

    def attend(self, q, positions):
        out = super().attend(q, positions)
        if self.window is not None and not bool((self.positions_BS < 0).any()):
            kept = self.window[0] + 1
            self.k_BGSD, self.v_BGSE = self.k_BGSD[:, :, -kept:], self.v_BGSE[:, :, -kept:]
            self.positions_BS = self.positions_BS[:, -kept:]
        return out


@correct_variant("cached-unrotated-keys", contract="cached_attention")
class RotatesWhenRead(_Cache):
    """Keys are kept as they came, and rotated again in every step with the scale on the queries."""

    def __call__(self, q, k, v, *, key_valid=None):
        if key_valid is None:
            key_valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
        positions = self.next_positions(key_valid)
        self.append(k, v, torch.where(key_valid, positions, -1))
        self.seen_B1 = self.seen_B1 + key_valid.sum(-1, keepdim=True)
        kept, at = self.k_BGSD, self.positions_BS.clamp(min=0)
        rotate = self.rotary_steps.rotary
        self.k_BGSD = rotate(kept, at, **self.rotary_options)
        q = rotate(q, positions.clamp(min=0), **self.rotary_options)
        out = self.attend(q * self.score_scale(q), positions)
        self.k_BGSD = kept
        return out

    def attend(self, q, positions):
        kept, self.scale = self.scale, 1 / yarn_score_factor(self.rotary_options.get("scaling"))
        out = super().attend(q, positions)
        self.scale = kept
        return out
