"""Other right ways to offer the contract ``causal_lm``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conformance.correct_variants import correct_variant
from reference_impl.qwen2 import KVCache, Qwen2
from reference_impl.qwen2.engine import CausalLM, LoadedLM
from reference_impl.qwen2.generation import last_logits, pick
from reference_impl.qwen2.layers import check_ids
from reference_impl.qwen2.model import Block, ParallelAttention


def computes(id: str) -> Callable[[type[Qwen2]], type[Qwen2]]:
    """Register a model that computes the same in another way."""

    def register(model: type[Qwen2]) -> type[Qwen2]:
        engine = type(model.__name__, (CausalLM,), {"model_class": model, "__doc__": model.__doc__})
        correct_variant(id, contract="causal_lm")(engine)
        return model

    return register


def of_blocks(id: str) -> Callable[[type[Block]], type[Block]]:
    """The same for one kind of block."""

    def register(block: type[Block]) -> type[Block]:
        body = {"block_class": block, "__doc__": block.__doc__}
        computes(id)(type(block.__name__, (Qwen2,), body))
        return block

    return register


def attends(id: str) -> Callable[[type], type[ParallelAttention]]:
    """The same for one kind of attention."""

    def register(attention: type[ParallelAttention]) -> type[ParallelAttention]:
        body = {"attention_class": attention, "__doc__": attention.__doc__}
        of_blocks(id)(type(attention.__name__, (Block,), body))
        return attention

    return register


def visible_keys(q: Tensor, k: Tensor, valid_BS: Tensor) -> Tensor:
    """Bool [B, 1, T, S]: real keys up to the query's own slot."""
    past = k.shape[2] - q.shape[2]
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
    return causal & valid_BS[:, None, None]


# Attention


@attends("lm-sdpa")
class Fused(ParallelAttention):
    """torch's scaled_dot_product_attention with grouped heads and a boolean mask."""

    def attend(self, q, k, v, valid_BS):
        visible = visible_keys(q, k, valid_BS)
        visible |= ~visible.any(-1, keepdim=True)  # the output at padding is not specified
        return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)


@attends("lm-eager")
class Eager(ParallelAttention):
    """Repeated heads, a mask of the lowest number added in the model's dtype, softmax in float32."""

    def attend(self, q, k, v, valid_BS):
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
        mask = torch.zeros(1, dtype=q.dtype).where(
            visible_keys(q, k, valid_BS), torch.finfo(q.dtype).min
        )
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + mask
        wide = torch.promote_types(q.dtype, torch.float32)
        return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


@attends("lm-softmax-backwards")
class SoftmaxBackwards(ParallelAttention):
    """Keys from the last to the first with a running peak and sum, queries scaled beforehand."""

    def attend(self, q, k, v, valid_BS):
        wide = torch.promote_types(q.dtype, torch.float32)
        groups = q.unflatten(1, (k.shape[1], -1)).to(wide) / math.sqrt(q.shape[-1])
        visible = visible_keys(q, k, valid_BS)[:, None]
        scores = torch.einsum("bghtd,bgsd->bghts", groups, k.to(wide))
        scores = scores.masked_fill(~visible, -torch.inf)
        peak = torch.full_like(scores[..., :1], -torch.inf)
        total, out = torch.zeros_like(peak), torch.zeros_like(groups)
        for first in reversed(range(0, k.shape[2], 5)):
            part = scores[..., first : first + 5]
            raised = torch.maximum(peak, part.amax(-1, keepdim=True))
            base = torch.where(raised.isinf(), 0, raised)
            weights, shrink = (part - base).exp(), (peak - base).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            values = v[:, :, first : first + 5].to(wide)
            out = out * shrink + torch.einsum("bghts,bgsd->bghtd", weights, values)
            peak = raised
        out = out / torch.where(total > 0, total, 1)
        return out.flatten(1, 2).to(q.dtype)


@attends("lm-tables-in-the-model-dtype")
class TablesInModelDtype(ParallelAttention):
    """Cosines and sines of float32 angles, rounded to the model's dtype, as transformers has it."""

    def rotate(self, x_BHTD, positions_BT):
        width = x_BHTD.shape[-1]
        wide = torch.promote_types(x_BHTD.dtype, torch.float32)
        exponents = torch.arange(0, width, 2, dtype=wide) / width
        angles = positions_BT[..., None].to(wide) * (1.0 / self.config.rope_theta**exponents)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        cos, sin = angles.cos().to(x_BHTD.dtype), angles.sin().to(x_BHTD.dtype)
        first, second = x_BHTD.chunk(2, dim=-1)
        return x_BHTD * cos + torch.cat([-second, first], dim=-1) * sin


@attends("lm-complex-rotation")
class ComplexRotation(ParallelAttention):
    """Pairs of channels are complex numbers."""

    def rotate(self, x_BHTD, positions_BT):
        wide = torch.promote_types(x_BHTD.dtype, torch.float32)
        first, second = x_BHTD.to(wide).chunk(2, dim=-1)
        pairs = torch.arange(first.shape[-1], dtype=torch.float64)
        angles = positions_BT[..., None] * self.config.rope_theta ** (-pairs / len(pairs))
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        turned = torch.complex(first, second) * turn.to(torch.complex(first, second).dtype)
        return torch.cat([turned.real, turned.imag], dim=-1).to(x_BHTD.dtype)


@attends("lm-fused-qkv")
class FusedQKV(ParallelAttention):
    """One matrix for queries, keys and values."""

    def project(self, x_BTC):
        parts = [self.qkv.q_weight, self.qkv.k_weight, self.qkv.v_weight]
        biases = [self.qkv.q_bias, self.qkv.k_bias, self.qkv.v_bias]
        fused = F.linear(x_BTC, torch.cat(parts), torch.cat(biases))
        return fused.split([len(part) for part in parts], dim=-1)


@attends("lm-preallocated-cache")
class Preallocated(ParallelAttention):
    """Keys and values are written into memory for more tokens than there are, which only grows.

    A continuation that finds the next slots taken, by another one, moves to memory of its own.
    """

    def append(self, past, k, v):
        return tuple(self.grown(past and past[number], new) for number, new in enumerate((k, v)))

    def grown(self, past: Tensor | None, new: Tensor) -> Tensor:
        """The tokens so far and the new ones, a view of the memory."""
        length = 0 if past is None else past.shape[2]
        total = length + new.shape[2]
        memory = getattr(past, "memory", None)
        if memory is None or memory.filled != length or memory.shape[2] < total:
            shape = list(new.shape)
            shape[2] = 2 * total + 8
            memory = new.new_full(shape, torch.nan)
            if past is not None:
                memory[:, :, :length] = past
        memory[:, :, length:total] = new
        memory.filled = total
        view = memory[:, :, :total]
        view.memory = memory
        return view


# Blocks


class UnweightedFirst(nn.Module):
    """torch's rms_norm in float32 without a weight, rounded, then weighted."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        """The shape and dtype of ``x``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


@of_blocks("lm-torch-rms-norm")
class TorchNorm(Block):
    """Norms by torch.nn.functional.rms_norm."""

    def norm(self, weight, config):
        return UnweightedFirst(weight, config.rms_norm_eps)


class SumsInFloat32(Block):
    """Blocks whose partial sums are added in float32 and rounded once."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for layer in (self.attention.o, self.mlp):
            layer.reduce = wide_sum(layer.reduce)


def wide_sum(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The sum over the ranks in float32 at least."""
    wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
    return lambda partial: reduce(wide(partial)).to(partial.dtype)


of_blocks("lm-sums-in-float32")(SumsInFloat32)


# The vocabulary


@computes("lm-replicated-head")
class ReplicatedHead(Qwen2):
    """Every rank has the whole embedding and the whole head; neither communicates."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        whole = lambda part: torch.cat(self.ranks.gather(part.detach()))[: config.vocab_size]
        self.table, self.rows = whole(self.embed.weight), whole(self.head.weight)
        self.embed, self.head = self.look_up, lambda x: F.linear(x, self.rows)

    def look_up(self, ids: Tensor) -> Tensor:
        """The rows of the ids."""
        check_ids(ids, self.config.vocab_size)
        return self.table[ids]

    def __setattr__(self, name, value):
        if name in ("embed", "head") and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
            self.__dict__[name] = value
            return
        super().__setattr__(name, value)


# Caches and generation


class CacheBySlots(Qwen2):
    """The cache keeps tokens in front of heads; it is turned around where it is used."""

    def forward(self, ids, *, cache=None, **options):
        logits, grown = super().forward(ids, cache=cache and turned(cache), **options)
        return logits, turned(grown)


def turned(cache: KVCache) -> KVCache:
    """The cache with the axes of heads and tokens exchanged."""
    layers = tuple(tuple(t.transpose(1, 2).contiguous() for t in pair) for pair in cache.layers)
    return replace(cache, layers=layers)


class TurningLM(LoadedLM):
    """A model that shows its cache as the contract has it."""

    def cached(self, cache):
        return list(turned(cache).layers)


class TurningEngine(CausalLM):
    """The cache keeps tokens in front of heads; it is turned around where it is used."""

    model_class = CacheBySlots

    def causal_lm(self, directory, **options):
        return TurningLM(super().causal_lm(directory, **options).model)


correct_variant("lm-cache-of-other-order", contract="causal_lm")(TurningEngine)


class RecomputingLM(LoadedLM):
    """Generation that computes the whole text again for every token."""

    def generate(
        self,
        ids,
        *,
        max_new_tokens,
        do_sample=False,
        temperature=1.0,
        eos=None,
        valid=None,
    ):
        if do_sample and not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected above 0")
        ends = self.model.config.eos if eos is None else [eos] if isinstance(eos, int) else eos
        ended = torch.zeros(len(ids), dtype=torch.bool)
        mask = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        # Alike on all ranks, so that nothing needs to be sent.
        generator = torch.Generator().manual_seed(int(self.agreed(torch.randint(2**31, (1,)))))
        for _ in range(max_new_tokens):
            logits, _ = self.model(ids, valid=mask)
            token = pick(last_logits(logits, mask), do_sample, temperature, generator)
            ids = torch.cat([ids, token[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            ended |= torch.isin(token, torch.tensor(ends, dtype=torch.int64))
            if bool(ended.all()):
                break
        return ids

    def agreed(self, number: Tensor) -> Tensor:
        """The number of the first rank."""
        return self.model.ranks.broadcast(number)


@correct_variant("lm-recomputed", contract="causal_lm")
class Recomputing(CausalLM):
    """Generation without a cache, which goes on with rows that have ended until all have."""

    def causal_lm(self, directory, **options):
        return RecomputingLM(super().causal_lm(directory, **options).model)


@correct_variant("lm-last-rank-draws", contract="causal_lm")
class LastRankDraws(CausalLM):
    """Tokens are drawn on the last rank, which sends them."""

    class Engine(LoadedLM):
        """Generation by the last rank's tokens."""

        def generate(self, ids, **options):
            model = copy.copy(self.model)
            model.ranks = copy.copy(model.ranks)
            send, last = model.ranks.broadcast, model.ranks.size - 1
            model.ranks.broadcast = lambda token: send(token, last)
            return LoadedLM(model).generate(ids, **options)

    def causal_lm(self, directory, **options):
        return self.Engine(super().causal_lm(directory, **options).model)
