"""Other right ways to load the small and medium GPT and to compute their function."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from conformance.correct_variants import correct_variant
from reference_impl.gpt import CheckpointReader, GPTBatched, layers
from reference_impl.gpt.batched import from_state
from reference_impl.gpt.layers import ATTENTION_SCALE, ROTARY_BASE
from reference_impl.stored import StoredTensor


class Reads:
    """An adapter that opens checkpoints with a reader of its own."""

    reader: type[CheckpointReader] = CheckpointReader

    def gpt_checkpoint(self, source, *, head_dim=None, dtype=None, device="cpu"):
        return self.reader(source, head_dim=head_dim, dtype=dtype, device=device)


def computes(id: str):
    """Register a batched model that computes the same in another way."""

    def register(model: type[GPTBatched]) -> type[GPTBatched]:
        reader = type(model.__name__, (CheckpointReader,), {"model_class": model})
        body = {"reader": reader, "__doc__": model.__doc__}
        correct_variant(id, contract="gpt_checkpoint")(type(model.__name__, (Reads,), body))
        return model

    return register


@computes("gpt-sdpa")
class Fused(GPTBatched):
    """torch's scaled_dot_product_attention with the scale of the model."""

    def attend(self, q, k, v, visible_B1TT):
        out = F.scaled_dot_product_attention(q, k, v, visible_B1TT, scale=ATTENTION_SCALE)
        return out.masked_fill(~visible_B1TT.any(-1, keepdim=True), 0)


@computes("gpt-scaled-queries")
class ScaledQueries(GPTBatched):
    """Queries are scaled by 0.12·√D for a kernel whose scale is fixed at 1/√D."""

    def attend(self, q, k, v, visible_B1TT):
        scaled = q * (ATTENTION_SCALE * math.sqrt(q.shape[-1]))
        out = F.scaled_dot_product_attention(scaled, k, v, visible_B1TT)
        return out.masked_fill(~visible_B1TT.any(-1, keepdim=True), 0)


@computes("gpt-online-softmax")
class OnlineSoftmax(GPTBatched):
    """Keys in blocks of four with a running peak and sum."""

    def attend(self, q, k, v, visible_B1TT):
        wide = torch.promote_types(q.dtype, torch.float32)
        peak = q.new_full((*q.shape[:3], 1), -torch.inf, dtype=wide)
        total, out = torch.zeros_like(peak), torch.zeros_like(v, dtype=wide)
        blocks = (t.split(4, dim=2) for t in (k.to(wide), v.to(wide)))
        for keys, values, seen in zip(*blocks, visible_B1TT.split(4, dim=3)):
            scores = ATTENTION_SCALE * (q.to(wide) @ keys.transpose(-1, -2))
            scores = scores.masked_fill(~seen, -torch.inf)
            raised = torch.maximum(peak, scores.amax(-1, keepdim=True))
            base = torch.where(raised.isinf(), 0, raised)
            weights, shrink = torch.exp(scores - base), torch.exp(peak - base)
            total = total * shrink + weights.sum(-1, keepdim=True)
            out = out * shrink + weights @ values
            peak = raised
        return torch.where(total > 0, out / torch.where(total > 0, total, 1), 0).to(q.dtype)


@computes("gpt-rotation-by-complex-numbers")
class ComplexRotation(GPTBatched):
    """Pairs of channels are complex numbers, multiplied by exp(-i·angle)."""

    def rotate(self, x_BHTD):
        width, wide = x_BHTD.shape[-1], torch.promote_types(x_BHTD.dtype, torch.float32)
        exponents = torch.linspace(0, 1, width // 4, dtype=torch.float64)
        turning = ROTARY_BASE**-exponents
        rates = torch.cat([turning, torch.zeros(width // 2 - width // 4, dtype=torch.float64)])
        angles = torch.arange(x_BHTD.shape[2], dtype=torch.float64)[:, None] * rates
        turn = torch.polar(torch.ones_like(angles), -angles)
        kind = torch.complex128 if wide == torch.float64 else torch.complex64
        turn = turn.to(x_BHTD.device, kind)
        first, second = x_BHTD.to(wide).chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn
        return torch.cat([turned.real, turned.imag], dim=-1).to(x_BHTD.dtype)


@computes("gpt-norm-after-rotation")
class NormAfterRotation(GPTBatched):
    """Queries and keys are rotated first and normed then: a rotation keeps the norm."""

    def norm_and_rotate(self, x_BHTD):
        wide = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
        epsilon = torch.finfo(x_BHTD.dtype).eps
        return F.rms_norm(self.rotate(wide), (wide.shape[-1],), eps=epsilon).to(x_BHTD.dtype)


@computes("gpt-medium-normed-input")
class NormedInput(GPTBatched):
    """Attention reads the normed stream in the medium model too: all it gives is normed again.

    A norm without weight scales each token by one number, and the norms of queries, keys and values
    take it out; what is left is the difference of two epsilons.
    """

    def attention_input(self, x_BTC):
        return layers.norm(x_BTC)


@computes("gpt-separate-projections")
class SeparateProjections(GPTBatched):
    """Queries, keys and values by a matrix product each."""

    def queries_keys_values(self, x_BTC, qkv_w):
        heads = (self.config.num_heads, -1)
        return tuple(F.linear(x_BTC, w).unflatten(-1, heads).transpose(1, 2) for w in qkv_w)


@computes("gpt-shifted-tanh")
class ShiftedTanh(GPTBatched):
    """The small soft cap as 15·tanh + 15, the medium one as 15 times the sine of an angle."""

    def soft_cap(self, logits_BTV):
        if self.config.format == "small":
            return 15 * torch.tanh(logits_BTV / (15 * math.sqrt(self.config.model_dim))) + 15
        return 15 * torch.sin(torch.atan(logits_BTV / 15))


@computes("gpt-row-by-row")
class RowByRow(GPTBatched):
    """The rows of a batch are computed one after the other."""

    def features(self, ids_BT, *, valid=None, **masks):
        rows = [
            super(RowByRow, self).features(
                ids_BT[row : row + 1],
                valid=None if valid is None else valid[row : row + 1],
                **masks,
            )
            for row in range(len(ids_BT))
        ]
        return torch.cat(rows)


@computes("gpt-logits-in-chunks")
class LogitsInChunks(GPTBatched):
    """The head is applied to three tokens at a time, in blocks of 50 rows."""

    def logits_of(self, features_BTC):
        head = self.weight(self.lm_head)
        wide = torch.promote_types(features_BTC.dtype, torch.float32)
        chunks = [
            torch.cat([F.linear(part, rows).to(wide) for rows in head.split(50)], dim=-1)
            for part in features_BTC.split(3, dim=1)
        ]
        return self.soft_cap(torch.cat(chunks, dim=1))


@computes("gpt-squared-by-product")
class MaskedSquare(GPTBatched):
    """relu² as x·max(x, 0)."""

    def activation(self, x):
        return x * x.clamp(min=0)


class WholeFile(CheckpointReader):
    """Reads all tensors with ``torch.load`` or safetensors at once."""

    def open(self, source):
        stored = super().open(source)  # refuses what is damaged
        whole = {key: tensor.read() for key, tensor in stored.tensors.items()}
        tensors = {key: StoredTensor(tuple(t.shape), t.dtype, t.clone) for key, t in whole.items()}
        return type(stored)(stored.source, tensors, stored.rest)


@correct_variant("gpt-whole-file", contract="gpt_checkpoint")
class ReadsWholeFile(Reads):
    """The whole file is in memory before the first tensor is converted."""

    reader = WholeFile


class Upcast(CheckpointReader):
    """Holds every weight in float32, and the stored ones for saving."""

    def load(self, *, progress=False):
        model = super().load(progress=progress)
        stored = {key: tensor.clone() for key, tensor in model.state().items()}
        wide = {key: tensor.to(model.compute_dtype) for key, tensor in stored.items()}
        upcast = from_state(model.config, wide, compute_dtype=model.compute_dtype)
        upcast.state = lambda: stored
        upcast.save = model.save
        return upcast


@correct_variant("gpt-float32-weights", contract="gpt_checkpoint")
class HoldsFloat32(Reads):
    """Weights are converted to the dtype of the computation once, at loading."""

    reader = Upcast
