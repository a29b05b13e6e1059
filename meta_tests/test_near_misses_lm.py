"""Subtle mistakes in engines of Qwen2 that no catalogue lists, one or more a requirement.

All are planted over the reference: in its attention (:func:`near_attention`), its blocks, its model
(:func:`near_model`), or in what loads and generates (:func:`near_engine`).
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutants import Broken

from reference_impl.attention import Attention
from reference_impl.qwen2 import Qwen2
from reference_impl.qwen2.engine import CausalLM, LoadedLM
from reference_impl.qwen2.generation import last_logits, pick
from reference_impl.qwen2.model import Block, ParallelAttention, RMSNorm
from reference_impl.rotary import Rotary

NEAR_LM: dict[str, Broken] = {}


def near_engine(breaks: str):
    """Register an engine, whose docstring says what is wrong with it."""

    def decorate(engine: type) -> type:
        wrong, slug = " ".join(engine.__doc__.split()), f"causal_lm.{breaks}"
        NEAR_LM[engine.__name__] = Broken(engine.__name__, slug, wrong, engine)
        return engine

    return decorate


def near_model(breaks: str):
    """Register a model, which the reference's engine loads into."""

    def decorate(model: type) -> type:
        body = {"model_class": model, "__doc__": model.__doc__}
        near_engine(breaks)(type(model.__name__, (CausalLM,), body))
        return model

    return decorate


def near_block(breaks: str):
    """Register a kind of block."""

    def decorate(block: type) -> type:
        body = {"block_class": block, "__doc__": block.__doc__}
        near_model(breaks)(type(block.__name__, (Qwen2,), body))
        return block

    return decorate


def near_attention(breaks: str):
    """Register a kind of attention."""

    def decorate(attention: type) -> type:
        body = {"attention_class": attention, "__doc__": attention.__doc__}
        near_block(breaks)(type(attention.__name__, (Block,), body))
        return attention

    return decorate


def near_generation(breaks: str):
    """Register a loaded model that generates otherwise."""

    def decorate(loaded: type) -> type:
        def causal_lm(self, directory, *, dtype=None, device="cpu"):
            engine = CausalLM()
            return loaded(engine.causal_lm(directory, dtype=dtype, device=device).model)

        body = {"causal_lm": causal_lm, "__doc__": loaded.__doc__}
        near_engine(breaks)(type(loaded.__name__, (), body))
        return loaded

    return decorate


# Ranks


@near_attention("function.two-ranks")
class MeanOfRanks(ParallelAttention):
    """The partial outputs of attention are averaged instead of summed."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        total = self.o.reduce
        self.o.reduce = lambda partial: total(partial) / self.ranks.size


@near_model("function.three-ranks")
class LastOfThePadding(Qwen2):
    """Padding of the vocabulary is cut off at the front of the logits."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        self.head.unpadded = lambda logits: logits[..., -config.vocab_size :]


@near_block("function.four-ranks")
class SumOfPairs(Block):
    """The MLP's outputs are summed over pairs of ranks only."""

    def __init__(self, config, weights, *, ranks, replicas):
        super().__init__(config, weights, ranks=ranks, replicas=replicas)
        if ranks.size == 4:
            self.mlp.reduce = lambda partial: sum(
                part for rank, part in enumerate(ranks.gather(partial)) if rank < 2
            )


@near_attention("function.replicated-heads")
class ReplicasInTurn(ParallelAttention):
    """Replicated key/value heads are dealt in turn, rank % heads, not to neighbours."""

    def append(self, past, k, v):
        heads, size = self.config.num_kv_heads, self.ranks.size
        if heads < size:
            source = (self.ranks.rank % heads) * (size // heads)
            k, v = self.ranks.gather(k)[source], self.ranks.gather(v)[source]
        return super().append(past, k, v)


@near_model("function.same-on-every-rank")
class OtherRoundingBehindTheFirst(Qwen2):
    """Ranks behind the first have the logits in another rounding."""

    def forward(self, ids, **options):
        logits, cache = super().forward(ids, **options)
        return logits * (1 + 2e-7 * self.ranks.rank) + 1e-7 * self.ranks.rank, cache


@near_block("communication.two-reductions")
class InputSentToAll(Block):
    """The first rank sends the input of each block to the others."""

    def forward(self, x, positions, valid, past):
        ranks = self.attention.ranks
        return super().forward(ranks.broadcast(x), positions, valid, past)


@near_attention("communication.two-reductions")
class ChecksEveryStep(ParallelAttention):
    """Attention sums a flag over the ranks when there is a cache."""

    def forward(self, x_BTC, positions_BT, valid_BS, past):
        if past is not None:
            self.ranks.all_reduce(torch.zeros(1))
        return super().forward(x_BTC, positions_BT, valid_BS, past)


# Heads


@near_attention("heads.explicit-width")
class FrequenciesOfTheModel(ParallelAttention):
    """Frequencies of the rotary embedding are those of heads as wide as the model over their number."""

    def rotate(self, x_BHTD, positions_BT):
        config = self.config
        power = config.head_dim * config.num_heads / config.hidden_size
        theta = config.rope_theta**power
        return Rotary().rotary(x_BHTD, positions_BT, theta=theta)


def given_config(directory) -> dict:
    """What config.json holds."""
    return json.loads(Path(directory, "config.json").read_text())


@near_engine("heads.default-width")
class ScaledForHeadsOf64(CausalLM):
    """Without head_dim in the configuration the scores are scaled for heads of 64."""

    def causal_lm(self, directory, **options):
        loaded = super().causal_lm(directory, **options)
        if "head_dim" not in given_config(directory):
            for block in loaded.model.blocks:
                block.attention.attend = lambda q, k, v, valid: Attention().attention(
                    q, k, v, causal=True, key_valid=valid, scale=64**-0.5
                )
        return loaded


@near_model("head.untied")
class AlwaysTied(Qwen2):
    """The head is the embedding, whatever the file has."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        self.head.weight = self.embed.weight


# Dtypes


@near_model("dtype.bfloat16")
class LogitsUpcast(Qwen2):
    """Logits of 16 bits are given in float32."""

    def forward(self, ids, **options):
        logits, cache = super().forward(ids, **options)
        return (logits.float() if logits.dtype == torch.bfloat16 else logits), cache


@near_engine("dtype.float16")
class BfloatForHalf(CausalLM):
    """float16 is computed in bfloat16."""

    def causal_lm(self, directory, *, dtype=None, device="cpu"):
        if dtype != torch.float16:
            return super().causal_lm(directory, dtype=dtype)
        loaded = super().causal_lm(directory, dtype=torch.bfloat16)
        return SimpleNamespace(
            forward=lambda ids, **options: (loaded.forward(ids, **options)[0].half(), None)
        )


@near_attention("dtype.float64")
class TablesInFloat32(ParallelAttention):
    """Queries and keys of float64 are rotated in float32."""

    def rotate(self, x_BHTD, positions_BT):
        return super().rotate(x_BHTD.float(), positions_BT).to(x_BHTD.dtype)


@near_engine("dtype.of-the-configuration")
class DtypeOfTheFile(CausalLM):
    """Without a dtype being asked for, that of the configuration's newer key alone is taken."""

    def causal_lm(self, directory, *, dtype=None, device="cpu"):
        given = given_config(directory)
        if dtype is None and "dtype" not in given:
            dtype = torch.float32
        return super().causal_lm(directory, dtype=dtype)


@near_engine("dtype.asked-for")
class DtypeIgnored(CausalLM):
    """The model has the dtype of the configuration, whatever was asked for."""

    def causal_lm(self, directory, *, dtype=None, device="cpu"):
        return super().causal_lm(directory)


@near_engine("dtype.asked-for")
class RoundedFirst(CausalLM):
    """The logits go through the stored dtype before the one that was asked for."""

    def causal_lm(self, directory, *, dtype=None, device="cpu"):
        loaded = super().causal_lm(directory, dtype=dtype)
        stored = getattr(torch, given_config(directory)["dtype"])

        def forward(ids, **options):
            logits, cache = loaded.forward(ids, **options)
            return logits.to(stored).to(logits.dtype), cache

        return SimpleNamespace(forward=forward)


# Norms and biases


@near_block("norm.weights")
class NormsExchanged(Block):
    """The norm of attention has the weight of the MLP's, and the other way round."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.input_norm, self.attention_norm = self.attention_norm, self.input_norm


@near_model("norm.weights")
class FinalNormPositive(Qwen2):
    """The final norm's weight is clamped to be positive."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        self.norm = RMSNorm(self.norm.weight.detach().clamp(min=0), config.rms_norm_eps)


@near_block("norm.epsilon")
class UsualEpsilon(Block):
    """Epsilon is 1e-6, whatever the configuration says."""

    def norm(self, weight, config):
        return RMSNorm(weight, 1e-6)


@near_attention("bias.key")
class KeyBiasBehindTheRotation(ParallelAttention):
    """The bias of the keys is added behind their rotation."""

    def project(self, x_BTC):
        q, k, v = super().project(x_BTC)
        return q, k - self.qkv.k_bias, v

    def append(self, past, k, v):
        bias = self.qkv.k_bias.unflatten(0, (-1, self.config.head_dim))[:, None]
        return super().append(past, k + bias, v)


# Caches and outputs


@near_attention("cache.chunks")
class ChunkMaskShort(ParallelAttention):
    """With a cache, tokens inside a chunk do not see themselves: the mask is one token short."""

    def attend(self, q, k, v, valid_BS):
        past = k.shape[2] - q.shape[2]
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
        if past:
            mask[1:-1] = mask[1:-1].tril(past)
        return Attention().attention(q, k, v, mask=mask & valid_BS[:, None, None])


@near_engine("cache.contents")
class ValuesOfTheLastBlock(CausalLM):
    """The values of the last layer are shown for those of every layer."""

    class Engine(LoadedLM):
        def cached(self, cache):
            return [(k, cache.layers[-1][1]) for k, _ in cache.layers]

    def causal_lm(self, directory, **options):
        return self.Engine(super().causal_lm(directory, **options).model)


@near_attention("cache.used-twice")
class SharedBuffer(ParallelAttention):
    """Caches are views of one buffer: a second continuation overwrites the first."""

    def append(self, past, k, v):
        return tuple(self.grown(past and past[number], new) for number, new in enumerate((k, v)))

    def grown(self, past, new):
        length = 0 if past is None else past.shape[2]
        total = length + new.shape[2]
        made = new.new_zeros(*new.shape[:2], 64, new.shape[3])
        buffer = made if past is None else past.buffer
        buffer[:, :, length:total] = new
        seen = buffer[:, :, :total]
        seen.buffer = buffer
        return seen


@near_model("output.kept")
class LogitsInOneBuffer(Qwen2):
    """Logits of one shape are always in the same memory."""

    def forward(self, ids, **options):
        logits, cache = super().forward(ids, **options)
        buffers = self.__dict__.setdefault("buffers", {})
        buffer = buffers.setdefault(logits.shape, torch.empty_like(logits))
        return buffer.copy_(logits), cache


@near_model("cache.prompts-independent")
class MaskOfTheFirstPrompt(Qwen2):
    """Positions are made once, for the first prompt, and cut to the length of the others."""

    def next_positions(self, ids, valid_BS):
        made = self.__dict__.setdefault("made", super().next_positions(ids, valid_BS))
        if made.shape[0] != ids.shape[0] or made.shape[1] < ids.shape[1]:
            return super().next_positions(ids, valid_BS)
        return (
            made[:, -ids.shape[1] :]
            if valid_BS.shape[1] > ids.shape[1]
            else made[:, : ids.shape[1]]
        )


# What influences a token


class Rescaled(Qwen2):
    """The stream is divided by its largest value before the head, and multiplied again."""

    over: tuple[int, ...]

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        head = self.head

        def scaled(x):
            largest = x.abs().amax(self.over, keepdim=True)
            return head(x / largest) * largest.amax(-1, keepdim=True)

        self._modules.pop("head")
        self.__dict__["head"] = scaled


@near_model("causal.later-tokens")
class ScaledByAllTokens(Rescaled):
    """One scale for all tokens of a row, taken from the largest value of them."""

    over = (1, 2)


@near_model("batch.rows-independent")
class ScaledByAllRows(Rescaled):
    """One scale for all rows, taken from the largest value of them."""

    over = (0, 2)


@near_attention("batch.one")
class OneRowIsAStep(ParallelAttention):
    """A batch of one row is taken for a step of decoding, which needs no causal mask."""

    def attend(self, q, k, v, valid_BS):
        return Attention().attention(q, k, v, causal=len(q) > 1, key_valid=valid_BS)


@near_model("tokens.one")
class TokensSqueezed(Qwen2):
    """An axis of one token is dropped."""

    def forward(self, ids, **options):
        logits, cache = super().forward(ids, **options)
        return logits.squeeze(1), cache


class PositionsThrough(ParallelAttention):
    """Attention whose positions go through a table."""

    def table(self, positions):
        """The positions as the table has them."""
        raise NotImplementedError

    def rotate(self, x_BHTD, positions_BT):
        return super().rotate(x_BHTD, self.table(positions_BT))


@near_attention("tokens.many")
class TableOf256(PositionsThrough):
    """The table of angles has 256 rows; further positions take the last."""

    def table(self, positions):
        return positions.clamp(max=255)


@near_attention("tokens.up-to-the-limit")
class TableOneShort(PositionsThrough):
    """The table of angles is one row short; the last position takes the row before."""

    def table(self, positions):
        return positions.clamp(max=self.config.max_positions - 2)


@near_attention("positions.offset")
class TableGoesRound(PositionsThrough):
    """The table of angles has 128 rows and is gone round."""

    def table(self, positions):
        return positions % 128


@near_attention("positions.gaps")
class PositionsOfTheFirstRow(PositionsThrough):
    """The positions of the first row are taken for all."""

    def table(self, positions):
        return positions[:1].expand_as(positions)


@near_model("positions.default")
class PositionsAdded(Qwen2):
    """Positions that are given are added to those that are counted."""

    def forward(self, ids, *, cache=None, positions=None, **options):
        if positions is not None:
            past = 0 if cache is None else cache.length
            positions = positions + past + torch.arange(ids.shape[1])
        return super().forward(ids, cache=cache, positions=positions, **options)


@near_model("positions.gaps")
class PositionsIgnoredInSteps(Qwen2):
    """With a cache, positions are counted although others are given."""

    def forward(self, ids, *, cache=None, positions=None, **options):
        positions = positions if cache is None else None
        return super().forward(ids, cache=cache, positions=positions, **options)


# Padding


@near_attention("padding.left")
class LastOfThePaddingSeen(ParallelAttention):
    """The mask of padding is one slot short on the left."""

    def attend(self, q, k, v, valid_BS):
        valid_BS = valid_BS.clone()
        valid_BS[:, :-1] |= valid_BS[:, 1:]
        return super().attend(q, k, v, valid_BS)


@near_model("padding.right")
class TakenForLeftPadding(Qwen2):
    """The number of real tokens is taken from the mask, and padding taken to be on the left."""

    def forward(self, ids, *, valid=None, **options):
        if valid is not None:
            slots = torch.arange(ids.shape[1])
            valid = slots >= ids.shape[1] - valid.sum(-1, keepdim=True)
        return super().forward(ids, valid=valid, **options)


@near_model("padding.mixed")
class PositionsCountSlots(Qwen2):
    """Positions count slots, padding included: only padding inside a row changes distances."""

    def next_positions(self, ids, valid_BS):
        return super().next_positions(ids, torch.ones_like(valid_BS))


@near_attention("padding.any-ids")
class FaintMask(ParallelAttention):
    """Padding is hidden by subtracting 25 from its scores."""

    def attend(self, q, k, v, valid_BS):
        mask = torch.where(valid_BS, 0.0, -25.0)[:, None, None].to(q.dtype)
        return Attention().attention(q, k, v, causal=True, mask=mask)


@near_model("padding.left-then-decoding")
class PaddingForgotten(Qwen2):
    """The mask of padding holds for the call that it is given to, not for later ones."""

    def forward(self, ids, *, cache=None, **options):
        logits, cache = super().forward(ids, cache=cache, **options)
        return logits, replace(cache, valid_BS=torch.ones_like(cache.valid_BS))


@near_model("padding.right-then-decoding")
class PositionsBehindThePadding(Qwen2):
    """With a cache positions go on from the number of its slots."""

    def next_positions(self, ids, valid_BS):
        if valid_BS.shape[1] > ids.shape[1]:
            valid_BS = torch.ones_like(valid_BS)
        return super().next_positions(ids, valid_BS)


@near_attention("padding.whole-steps")
class RowsWithoutKeysAreNaN(ParallelAttention):
    """A query that sees no key gets the softmax of nothing, which is NaN, and passes it on."""

    def attend(self, q, k, v, valid_BS):
        out = super().attend(q, k, v, valid_BS)
        nothing = ~valid_BS.cumsum(-1).bool()[:, -q.shape[2] :]
        out = out.masked_fill(nothing[:, None, :, None], torch.nan)
        return torch.where(valid_BS.any(-1)[:, None, None, None], out, torch.nan)

    def append(self, past, k, v):
        k, v = super().append(past, k, v)
        # 0 * NaN is NaN: what the layer before gave for padding reaches the sums.
        lost = v.isnan().any(-1).any(-1)[:, :, None, None]
        return k.nan_to_num(), torch.where(lost, torch.nan, v)


# What is refused


class IdsChanged(Qwen2):
    """Ids go through a change before they are looked up."""

    def change(self, ids):
        """The ids that are looked up."""
        raise NotImplementedError

    def forward(self, ids, **options):
        return super().forward(self.change(ids), **options)


@near_model("refuses.id-beyond-the-vocabulary")
class IdsClamped(IdsChanged):
    """Ids beyond the vocabulary are taken for its last."""

    def change(self, ids):
        return ids.clamp(max=self.config.vocab_size - 1)


@near_model("refuses.id-beyond-the-vocabulary")
class PaddedIdsAccepted(IdsChanged):
    """Ids up to the padded size of the vocabulary are accepted."""

    def change(self, ids):
        limit = self.config.vocab_size
        padded = -(-limit // 4) * 4
        return torch.where((ids >= limit) & (ids < padded), 0, ids)


@near_model("refuses.negative-id")
class IdsFromTheEnd(IdsChanged):
    """Negative ids count from the end of the vocabulary, as indices do."""

    def change(self, ids):
        return torch.where(ids < 0, ids + self.config.vocab_size, ids)


@near_model("refuses.empty")
class EmptyLogits(Qwen2):
    """No tokens give no logits."""

    def forward(self, ids, *, cache=None, **options):
        if ids.shape[1] == 0:
            return torch.zeros(len(ids), 0, self.config.vocab_size), cache
        return super().forward(ids, cache=cache, **options)


@near_model("refuses.far-position")
class AnyPosition(Qwen2):
    """Positions are not checked."""

    def check_positions(self, positions):
        pass


@near_model("refuses.far-position")
class OneTooMany(Qwen2):
    """The position just beyond the limit is accepted."""

    def check_positions(self, positions):
        super().check_positions(positions.where(positions != self.config.max_positions, 0))


@near_model("refuses.mask-shape")
class MaskCut(Qwen2):
    """A mask of another shape is cut, or filled up with True."""

    def forward(self, ids, *, valid=None, **options):
        if valid is not None:
            whole = torch.ones_like(ids, dtype=torch.bool)
            part = valid[: ids.shape[0], : ids.shape[1]]
            whole[: part.shape[0], : part.shape[1]] = part
            valid = whole
        return super().forward(ids, valid=valid, **options)


class Unnamed(CausalLM):
    """Refuses without saying what."""

    def causal_lm(self, directory, **options):
        try:
            return super().causal_lm(directory, **options)
        except (ValueError, RuntimeError):
            raise RuntimeError("the model cannot be loaded") from None


for number, rule in enumerate(("heads-and-ranks", "width-and-ranks", "missing-tensor")):
    near_engine(f"refuses.{rule}")(
        type(f"Unnamed{number}", (Unnamed,), {"__doc__": Unnamed.__doc__})
    )


class Overlooks(CausalLM):
    """Takes a directory that it cannot load, and says nothing."""

    fault: str

    def causal_lm(self, directory, **options):
        try:
            return super().causal_lm(directory, **options)
        except (ValueError, RuntimeError) as error:
            if self.fault not in str(error):
                raise
            return SimpleNamespace(forward=lambda ids: None)


@near_engine("refuses.fault-of-one-rank")
class NotFiniteAccepted(Overlooks):
    """Values that are not finite are loaded."""

    fault = "not finite"


@near_engine("refuses.output-bias")
class OutputBiasDropped(Overlooks):
    """A bias of the output projection is not looked at."""

    fault = "o_proj.bias"


# Loading


@near_engine("load.directory-unchanged")
class WritesAnIndex(CausalLM):
    """Loading leaves a file of its own in the directory."""

    def causal_lm(self, directory, **options):
        loaded = super().causal_lm(directory, **options)
        Path(directory, "loaded.txt").write_text("yes")
        return loaded


@near_model("load.any-seed")
class RandomDigits(Qwen2):
    """The final norm's weight has random digits behind those that count."""

    def __init__(self, config, weights, **options):
        super().__init__(config, weights, **options)
        with torch.no_grad():
            self.norm.weight += 1e-6 * torch.rand_like(self.norm.weight).mean()


# Generation


class Generates(LoadedLM):
    """Greedy and sampled generation in steps that can be replaced."""

    def generate(
        self, ids, *, max_new_tokens, do_sample=False, temperature=1.0, eos=None, valid=None
    ):
        if do_sample and not temperature > 0:
            return self.without_temperature(ids, max_new_tokens, eos, valid)
        ends, cache, step = torch.tensor(self.ends(eos)), None, ids
        ended = torch.zeros(len(ids), dtype=torch.bool)
        valid = self.padding(valid)
        for _ in range(self.steps(max_new_tokens)):
            logits, cache = self.model(step, cache=cache, valid=valid)
            logits = self.adjusted(last_logits(logits, valid), ids)
            token = self.pick(logits, do_sample, temperature)
            ids = torch.cat([ids, self.model.ranks.broadcast(token)[:, None]], dim=1)
            step, valid = ids[:, -1:], None
            ended |= torch.isin(ids[:, -1], ends.long())
            if bool(ended.all()):
                break
        return ids

    def without_temperature(self, ids, max_new_tokens, eos, valid):
        """What a temperature of 0 gives."""
        raise ValueError("the temperature is not above 0")

    def ends(self, eos):
        """The tokens that end a row."""
        if eos is None:
            return list(self.model.config.eos)
        return [eos] if isinstance(eos, int) else list(eos)

    def padding(self, valid):
        """The mask of the prompts."""
        return valid

    def steps(self, max_new_tokens):
        """How many tokens are generated."""
        return max_new_tokens

    def adjusted(self, logits, ids):
        """The logits before a token is taken."""
        return logits

    def pick(self, logits, do_sample, temperature):
        """The next token."""
        return pick(logits, do_sample, temperature, None)


@near_generation("generate.greedy")
class RepetitionPenalty(Generates):
    """Tokens that the text has are made less likely, by a default that nobody asked for."""

    def adjusted(self, logits, ids):
        seen = logits.gather(1, ids)
        return logits.scatter(1, ids, torch.where(seen > 0, seen / 1.3, seen * 1.3))


@near_generation("generate.left-padding")
class PaddingOfPromptsIgnored(Generates):
    """Prompts are taken as they are, padding included."""

    def padding(self, valid):
        return None


@near_generation("generate.no-tokens")
class OneAtLeast(Generates):
    """At least one token is generated."""

    def steps(self, max_new_tokens):
        return max(1, max_new_tokens)


@near_generation("generate.nothing-left-behind")
class NormChangedByGenerating(Generates):
    """Generation scales the weight of the final norm a little, in place."""

    def generate(self, ids, **options):
        out = super().generate(ids, **options)
        with torch.no_grad():
            self.model.norm.weight *= 1 + 1e-5
        return out


@near_generation("eos.number")
class EndTokenDropped(Generates):
    """The end token is cut off."""

    def generate(self, ids, *, eos=None, **options):
        out = super().generate(ids, eos=eos, **options)
        ends = torch.tensor(self.ends(eos)).long()
        return out[:, :-1] if bool(torch.isin(out[:, -1], ends).all()) else out


@near_generation("eos.number")
class AnyRowEndsAll(Generates):
    """Generation stops with the first row that ends."""

    def generate(self, ids, *, eos=None, **options):
        out = super().generate(ids, eos=eos, **options)
        ends = torch.isin(out[:, ids.shape[1] :], torch.tensor(self.ends(eos)).long()).any(0)
        first = int(ends.long().argmax()) if bool(ends.any()) else ends.numel()
        return out[:, : ids.shape[1] + first + 1]


@near_generation("eos.list")
class FirstEndOnly(Generates):
    """Only the first of several end tokens ends a row."""

    def ends(self, eos):
        return super().ends(eos)[:1]


@near_generation("eos.of-config")
class EndsOfTheCallOnly(Generates):
    """Without end tokens in the call no row ends."""

    def ends(self, eos):
        return [] if eos is None else super().ends(eos)


@near_engine("eos.of-generation-config")
class ConfigFirst(CausalLM):
    """End tokens of config.json are taken before those of generation_config.json."""

    def causal_lm(self, directory, **options):
        loaded = super().causal_lm(directory, **options)
        eos = given_config(directory).get("eos_token_id")
        if eos is not None:
            eos = tuple(eos) if isinstance(eos, list) else (eos,)
            loaded.model.config = replace(loaded.model.config, eos=eos)
        return loaded


@near_generation("eos.of-the-call")
class AllEndsCount(Generates):
    """End tokens of the call are added to those of the configuration."""

    def ends(self, eos):
        return super().ends(eos) + list(self.model.config.eos)


@near_generation("sample.temperature")
class TemperatureIgnored(Generates):
    """Tokens are drawn by the softmax of the logits, whatever the temperature."""

    def pick(self, logits, do_sample, temperature):
        return super().pick(logits, do_sample, 1.0 if temperature > 0.01 else temperature)


@near_generation("sample.temperature")
class TemperatureMultiplied(Generates):
    """Logits are multiplied by the temperature."""

    def pick(self, logits, do_sample, temperature):
        return super().pick(logits, do_sample, 1 / temperature)


@near_generation("sample.temperature")
class AlwaysGreedy(Generates):
    """Sampling takes the most likely token."""

    def pick(self, logits, do_sample, temperature):
        return super().pick(logits, False, temperature)


@near_generation("sample.cold")
class NeverCold(Generates):
    """The temperature is at least 0.3."""

    def pick(self, logits, do_sample, temperature):
        return super().pick(logits, do_sample, max(temperature, 0.3))


@near_generation("sample.in-vocabulary")
class FiftyMostLikely(Generates):
    """Tokens are drawn from the fifty most likely, by a default that nobody asked for."""

    def adjusted(self, logits, ids):
        return logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)


@near_engine("sample.in-vocabulary")
class PaddingDrawn(CausalLM):
    """Tokens are drawn from the padded vocabulary, whose further logits are 0."""

    class Engine(Generates):
        def adjusted(self, logits, ids):
            rows = len(self.model.head.weight) * self.model.ranks.size
            return torch.nn.functional.pad(logits, (0, rows - logits.shape[-1]))

    def causal_lm(self, directory, **options):
        return self.Engine(super().causal_lm(directory, **options).model)


@near_generation("sample.refuses-temperature")
class ZeroIsGreedy(Generates):
    """A temperature of 0 is greedy decoding."""

    def without_temperature(self, ids, max_new_tokens, eos, valid):
        return self.generate(ids, max_new_tokens=max_new_tokens, eos=eos, valid=valid)


@near_engine("sample.same-on-every-rank")
class RanksDrawTheSecondApart(CausalLM):
    """The first token is sent to all ranks; the others are drawn on each."""

    class Engine(Generates):
        def generate(self, ids, *, max_new_tokens, **options):
            first = super().generate(ids, max_new_tokens=1, **options)
            model = copy.copy(self.model)
            model.ranks = copy.copy(model.ranks)
            model.ranks.broadcast = lambda token: token
            return Generates(model).generate(first, max_new_tokens=max_new_tokens - 1, **options)

    def causal_lm(self, directory, **options):
        return self.Engine(super().causal_lm(directory, **options).model)


# All of them


@pytest.mark.parametrize("name", NEAR_LM)
def test_near_miss_is_caught(name):
    NEAR_LM[name].assert_caught()
