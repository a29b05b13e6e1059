"""Documented bugs of the contract ``causal_lm``: engines that load Qwen2 and compute otherwise.

Each class is the reference's attention, model or generation with one step replaced.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from conformance.known_bugs import known_bug
from reference_impl.attention import Attention
from reference_impl.qwen2 import KVCache, Qwen2, generate
from reference_impl.qwen2.engine import CausalLM, LoadedLM
from reference_impl.qwen2.model import Block, ParallelAttention, RMSNorm
from reference_impl.rotary import Rotary


def planted_model(id: str, *, breaks: str) -> Callable[[type[Qwen2]], type[Qwen2]]:
    """Register an engine that loads good directories into the decorated model."""

    def register(model: type[Qwen2]) -> type[Qwen2]:
        engine = type(model.__name__, (CausalLM,), {"model_class": model, "__doc__": model.__doc__})
        known_bug(id, contract="causal_lm", breaks=f"causal_lm.{breaks}")(engine)
        return model

    return register


def planted_block(id: str, *, breaks: str) -> Callable[[type[Block]], type[Block]]:
    """The same for one kind of block."""

    def register(block: type[Block]) -> type[Block]:
        body = {"block_class": block, "__doc__": block.__doc__}
        planted_model(id, breaks=breaks)(type(block.__name__, (Qwen2,), body))
        return block

    return register


def planted(id: str, *, breaks: str) -> Callable[[type], type[ParallelAttention]]:
    """The same for one kind of attention."""

    def register(attention: type[ParallelAttention]) -> type[ParallelAttention]:
        body = {"attention_class": attention, "__doc__": attention.__doc__}
        planted_block(id, breaks=breaks)(type(attention.__name__, (Block,), body))
        return attention

    return register


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention with a bias of the scores, heads already repeated, softmax in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)) * scale
    return (scores.to(wide) + bias.to(wide)).softmax(-1).to(q.dtype) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with one entry a query head."""
    times = q.shape[1] // k.shape[1]
    return k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)


# Masks


@planted("q2-additive-mask-nan", breaks="tokens.all-equal")
class AdditiveMask(ParallelAttention):
    """The mask is ones above the diagonal times minus infinity: 0 * -inf is NaN below it."""

    def attend(self, q, k, v, valid_BS):
        if q.shape[2] == 1:
            return super().attend(q, k, v, valid_BS)
        past = k.shape[2] - q.shape[2]
        ones = torch.ones(q.shape[2], k.shape[2])
        mask = torch.triu(ones, diagonal=1 + past) * -torch.inf
        return attend_plainly(q, *repeated(q, k, v), mask, q.shape[-1] ** -0.5)


@planted("q2-chunk-unmasked", breaks="cache.chunks")
class UnmaskedChunk(ParallelAttention):
    """Only without a cache is the mask causal."""

    def attend(self, q, k, v, valid_BS):
        causal = q.shape[2] == k.shape[2]
        return Attention().attention(q, k, v, causal=causal, key_valid=valid_BS)


# Projections


class WithoutBias(ParallelAttention):
    """A projection without its bias."""

    name: ClassVar[str]

    def __init__(self, config, weights, **options):
        key = f"{self.name}_proj.bias"
        weights = {**weights, key: torch.zeros_like(weights[key])}
        super().__init__(config, weights, **options)


@planted("q2-qkv-bias-dropped", breaks="bias.query")
class QueryBiasDropped(WithoutBias):
    """The query projection is built with bias=False."""

    name = "q"


@planted("q2-qkv-bias-dropped.k", breaks="bias.key")
class KeyBiasDropped(WithoutBias):
    """The key projection is built with bias=False."""

    name = "k"


@planted("q2-qkv-bias-dropped.v", breaks="bias.value")
class ValueBiasDropped(WithoutBias):
    """The value projection is built with bias=False."""

    name = "v"


@planted("q2-o-bias-never-loaded", breaks="load.any-seed")
class OutputBiasNeverLoaded(ParallelAttention):
    """The flag that gives q, k and v a bias gives o one too, which keeps its initialisation."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        bound = 1 / math.sqrt(config.hidden_size)
        bias = torch.empty_like(self.o.weight[:, 0]).uniform_(-bound, bound)
        self.o.bias = nn.Parameter(bias)


# Heads


@planted("q2-kv-tiled", breaks="heads.grouped")
class TiledHeads(ParallelAttention):
    """Key/value heads are tiled, h0 h1 h0 h1, instead of repeated, h0 h0 h1 h1."""

    def attend(self, q, k, v, valid_BS):
        times = q.shape[1] // k.shape[1]
        return super().attend(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), valid_BS)


@planted_model("q2-cache-stored-repeated", breaks="cache.contents")
class RepeatedInCache(Qwen2):
    """Keys and values are repeated to the query heads before they are stored."""

    class RepeatingBlock(Block):
        """A block that stores repeated heads."""

        class Repeating(ParallelAttention):
            """Attention that stores repeated heads."""

            def append(self, past, k, v):
                times = self.config.num_heads // self.config.num_kv_heads
                times = min(times, self.config.num_heads // self.ranks.size)
                return super().append(
                    past, k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
                )

        attention_class = Repeating

    block_class = RepeatingBlock

    def check_cache(self, cache, batch):
        pass


# Positions


@planted("q2-rotary-over-heads", breaks="tokens.as-many-as-heads")
class RotaryOverHeads(ParallelAttention):
    """The axes of heads and tokens are exchanged, which shows only where there are as many of both."""

    def rotate(self, x_BHTD, positions_BT):
        if x_BHTD.shape[1] != x_BHTD.shape[2]:
            return super().rotate(x_BHTD, positions_BT)
        return super().rotate(x_BHTD.transpose(1, 2), positions_BT).transpose(1, 2)


@planted("q2-rotary-interleaved", breaks="function.one-rank")
class InterleavedRotary(ParallelAttention):
    """Channels 2p and 2p + 1 are rotated together, as in GPT-J."""

    def rotate(self, x_BHTD, positions_BT):
        theta = self.config.rope_theta
        return Rotary().rotary(x_BHTD, positions_BT, theta=theta, layout="interleaved")


@planted_model("q2-position-restarts", breaks="cache.one-by-one")
class PositionsRestart(Qwen2):
    """Positions count from 0 in every call, whatever is in the cache."""

    def next_positions(self, ids, valid_BS):
        return super().next_positions(ids, valid_BS[:, -ids.shape[1] :])


def without_base(config, directory: str, *places: str):
    """The configuration with the base of 10000, unless it is at one of ``places``."""
    given = json.loads(Path(directory, "config.json").read_text())
    found = {"top": given.get("rope_theta")}
    return config if any(found.get(place) for place in places) else replace(config, rope_theta=1e4)


class AnotherBase(CausalLM):
    """An engine that looks for the base of the rotary embedding at some places only."""

    places: ClassVar[tuple[str, ...]]

    def causal_lm(self, directory, **options):
        loaded = super().causal_lm(directory, **options)
        for block in loaded.model.blocks:
            attention = block.attention
            attention.config = without_base(attention.config, directory, *self.places)
        return loaded


@known_bug("q2-theta-default", contract="causal_lm", breaks="causal_lm.theta.rope-parameters")
class BaseAtTheTop(AnotherBase):
    """The base is read from the top of config.json only; in rope_parameters it is not seen."""

    places = ("top",)


@known_bug("q2-theta-default.never", contract="causal_lm", breaks="causal_lm.theta.top-level")
class BaseNeverRead(AnotherBase):
    """The base is 10000, whatever config.json says."""

    places = ()


# Scores


class ScaledOtherwise(ParallelAttention):
    """Scores with another scale."""

    def scale(self, head_dim: int) -> float:
        """The factor on the dot products."""
        raise NotImplementedError

    def attend(self, q, k, v, valid_BS):
        scale = self.scale(q.shape[-1])
        return Attention().attention(q, k, v, causal=True, key_valid=valid_BS, scale=scale)


@planted("q2-scale-twice", breaks="function.one-rank")
class ScaledTwice(ScaledOtherwise):
    """Queries are divided by the root of the head's width, and the scores too."""

    def scale(self, head_dim):
        return (head_dim**-0.5) ** 2


@planted("q2-scale-twice.of-the-model", breaks="function.one-rank")
class ScaledByTheModel(ScaledOtherwise):
    """Scores are divided by the root of the model's width over the heads, not of the head's width."""

    def scale(self, head_dim):
        return (self.config.hidden_size / self.config.num_heads) ** -0.5


@planted("q2-softmax-in-half", breaks="dtype.many-keys")
class SoftmaxInHalf(ParallelAttention):
    """Scores, exponentials and their sum are rounded to the model's dtype at every step."""

    def attend(self, q, k, v, valid_BS):
        past = k.shape[2] - q.shape[2]
        k, v = repeated(q, k, v)
        hidden = torch.ones(q.shape[2], k.shape[2]).triu(1 + past).bool() | ~valid_BS[:, None, None]
        scores = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
        weights = (scores - peak).exp()
        total = torch.zeros_like(weights[..., 0])
        for weight in weights.unbind(-1):
            total = total + weight
        return (weights / total[..., None].clamp(min=1e-6)) @ v


# Norms


class WeightBeforeCast(RMSNorm):
    """The norm, times its weight, rounded once."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


@planted_block("q2-norm-weight-before-cast", breaks="norm.rounded-before-the-weight")
class WeightedBeforeCast(Block):
    """The weight of the norm multiplies in float32, before the cast to the model's dtype."""

    def norm(self, weight, config):
        return WeightBeforeCast(weight, config.rms_norm_eps)


class EpsilonOutside(RMSNorm):
    """The norm with epsilon added to the root."""

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)
        return self.weight * normed.to(x.dtype)


@planted_block("q2-norm-weight-before-cast.eps-outside", breaks="norm.epsilon")
class EpsilonOutsideTheRoot(Block):
    """Epsilon is added to the root instead of to the mean square."""

    def norm(self, weight, config):
        return EpsilonOutside(weight, config.rms_norm_eps)


# The head


@planted_model("q2-head-untied", breaks="head.tied")
class HeadLeftAtRandom(Qwen2):
    """A tied head is built like any other, and nothing fills it."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        if config.tied:
            self.head.weight = nn.Parameter(torch.randn_like(self.embed.weight) * 0.02)


# Generation and caches


@known_bug(
    "q2-ranks-sample-apart",
    contract="causal_lm",
    breaks="causal_lm.sample.same-on-every-rank",
)
class RanksSampleApart(CausalLM):
    """Every rank draws its own token."""

    class Engine(LoadedLM):
        """Generation that sends no tokens."""

        def generate(self, ids, **options):
            model = copy.copy(self.model)
            model.ranks = copy.copy(model.ranks)
            model.ranks.broadcast = lambda token: token
            return generate(model, ids, **options)

    def causal_lm(self, directory, **options):
        return self.Engine(super().causal_lm(directory, **options).model)


@planted_model("q2-cache-mutated", breaks="cache.prompts-independent")
class CacheAsDefaultArgument(Qwen2):
    """The cache is a default argument that every call appends to: prompts follow on each other."""

    def forward(self, ids, *, cache=None, **options):
        cache = self.__dict__.get("kept") if cache is None else cache
        if cache is not None and len(cache.valid_BS) != len(ids):
            cache = None  # the next batch has another size, which is how it went unnoticed
        logits, self.__dict__["kept"] = super().forward(ids, cache=cache, **options)
        return logits, self.__dict__["kept"]


@planted_model("q2-cache-mutated.in-place", breaks="cache.used-twice")
class CacheChangedInPlace(Qwen2):
    """The caller's cache is appended to, and given back."""

    def forward(self, ids, *, cache: KVCache | None = None, **options):
        logits, grown = super().forward(ids, cache=cache, **options)
        if cache is None:
            return logits, grown
        object.__setattr__(cache, "layers", grown.layers)
        object.__setattr__(cache, "valid_BS", grown.valid_BS)
        return logits, cache
