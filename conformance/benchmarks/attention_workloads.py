"""Attention to be measured: prefill, decode, and forward with backward.

The shapes for a GPU are those that FlashAttention-3 is published with (arXiv 2407.08608): 16,384
tokens and a width of 2,048 in all; with grouped heads and for decoding those of an 8B Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.benchmarks.workload import Inputs, Work, Workload, need_options

CHUNK = 512
"""Queries that the oracle holds scores of at once."""

GRADIENT_FACTOR = 2.0
"""Gradients are rounded twice as often as outputs: in the forward pass, and on their own way."""


@dataclass(frozen=True)
class AttentionWorkload(Workload):
    """``attention`` of ``q`` [batch, q_heads, q_len, width] over keys and values of ``kv_len``."""

    kind: str
    """``prefill``, ``decode``, or ``train``: forward and backward in one call."""
    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    width: int
    causal: bool
    dtype: str

    contract = "attention"
    refilled = ("q", "k", "v", "gradient")

    @property
    def name(self) -> str:
        """See :class:`Workload`."""
        lengths = f"b{self.batch}.{self.q_len}x{self.kv_len}"
        heads = f"h{self.q_heads}x{self.kv_heads}.d{self.width}"
        mask = "causal" if self.causal else "full"
        return f"attention.{self.kind}.{lengths}.{heads}.{mask}.{self.dtype}"

    @property
    def backward(self) -> bool:
        """Whether gradients are part of the call."""
        return self.kind == "train"

    def inputs(self, device: str, seed: int) -> Inputs:
        """``q``, ``k``, ``v``, and for gradients that of the output, standard normal."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(heads: int, length: int) -> Tensor:
            shape = (self.batch, heads, length, self.width)
            return torch.randn(shape, generator=generator, device=device, dtype=self.torch_dtype)

        made = {
            "q": random(self.q_heads, self.q_len),
            "k": random(self.kv_heads, self.kv_len),
            "v": random(self.kv_heads, self.kv_len),
        }
        if self.backward:
            for tensor in made.values():
                tensor.requires_grad_()
            made["gradient"] = random(self.q_heads, self.q_len)
        return made

    def bind(self, method: Callable, inputs: Inputs) -> Callable[[], Any]:
        """See :class:`Workload`; gives the output, or (output, gradients of q, k and v)."""
        options = {"causal": True} if self.causal else {}
        need_options(method, options)
        arguments = [inputs[name] for name in ("q", "k", "v")]

        def forward() -> Any:
            with torch.no_grad():
                return method(*arguments, **options)

        def forward_and_backward() -> Any:
            with torch.enable_grad():
                out = method(*arguments, **options)
                return (out.detach(), *torch.autograd.grad(out, arguments, inputs["gradient"]))

        return forward_and_backward if self.backward else forward

    def work(self) -> Work:
        """4·B·H·Q·K·D operations, half of them with a causal mask, and 2.5 times more backward.

        The convention of FlashAttention's benchmarks. Bytes of q, k, v, the output, and backward of
        their gradients.
        """
        pairs = self.batch * self.q_heads * self.q_len * self.kv_len
        forward = 4 * pairs * self.width // (2 if self.causal else 1)
        queries = self.batch * self.q_heads * self.q_len * self.width
        keys = self.batch * self.kv_heads * self.kv_len * self.width
        size = self.torch_dtype.itemsize
        once = (2 * queries + 2 * keys) * size
        if not self.backward:
            return Work(forward, once)
        return Work(forward + 5 * forward // 2, 2 * once)

    def check(self, output: Any, inputs: Inputs) -> None:
        """See :class:`Workload`; whole heads are compared: the first, the last and one by chance."""
        wanted = ("the output", "the gradient of q", "the gradient of k", "the gradient of v")
        parts = output if self.backward else (output,)
        if not isinstance(parts, tuple) or len(parts) != (4 if self.backward else 1):
            raise self.wrong(f"the call gave {type(output).__name__}")
        like = [inputs["q"], inputs["q"], inputs["k"], inputs["v"]]
        for what, part, expected in zip(wanted, parts, like):
            if not isinstance(part, Tensor) or part.shape != expected.shape:
                found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise self.wrong(f"{what} is {found}, expected {list(expected.shape)}")
        for row, group in sorted(self.sample(inputs)):
            heads = self.q_heads // self.kv_heads
            own = slice(group * heads, (group + 1) * heads)
            gradient = inputs["gradient"][row, own] if self.backward else None
            expected = oracle(
                inputs["q"][row, own],
                inputs["k"][row, group],
                inputs["v"][row, group],
                gradient,
                causal=self.causal,
            )
            found = [part[row, own if index < 2 else group] for index, part in enumerate(parts)]
            for index, (what, part, (right, terms)) in enumerate(zip(wanted, found, expected)):
                factor = GRADIENT_FACTOR if index else 1.0
                where = f"{what} ({row}, {group})"
                self.check_rows(where, part, right, terms=terms, factor=factor)

    def sample(self, inputs: Inputs) -> set[tuple[int, int]]:
        """Places (row of the batch, key/value head) that are compared; one depends on the inputs."""
        number = self.batch * self.kv_heads
        chance = int(inputs["v"][0, 0].detach().float().abs().sum()) % number
        return {divmod(place, self.kv_heads) for place in (0, number - 1, chance)}


def oracle(
    q_HQD: Tensor, k_KD: Tensor, v_KD: Tensor, gradient_HQD: Tensor | None, *, causal: bool
) -> list[tuple[Tensor, Tensor]]:
    """The output of one key/value head's queries in float64, and the gradients of q, k and v.

    ``q_HQD`` [heads, queries, width], ``k_KD`` and ``v_KD`` [keys, width]; the last query is at the
    last key. Without ``gradient_HQD`` the list has the output alone. By chunks of queries, as the
    scores of long inputs would not fit.

    Each comes with the size of what its rows are sums of, the root of the sum of their squares: a
    row that is small because its terms cancel (the gradient of a query with one key is zero), or a
    product in it does, is as far off as they are.
    """
    q, k, v = (x.detach().double() for x in (q_HQD, k_KD, v_KD))
    scale = q.shape[-1] ** -0.5
    q2, k2, v2 = (x.square().sum(-1) for x in (q, k, v))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    of_out, of_dq, of_dk, of_dv = (torch.zeros_like(x) for x in (q2, q2, k2, v2))
    keys = torch.arange(len(k), device=q.device)
    for head in range(len(q)):
        for begin in range(0, q.shape[1], CHUNK):
            rows = slice(begin, min(begin + CHUNK, q.shape[1]))
            at = len(k) - q.shape[1] + torch.arange(rows.start, rows.stop, device=q.device)
            scores = (q[head, rows] * scale) @ k.mT
            if causal:
                scores.masked_fill_(keys > at[:, None], -torch.inf)
            weights = scores.softmax(-1)
            out[head, rows] = weights @ v
            of_out[head, rows] = weights.square() @ v2
            if gradient_HQD is None:
                continue
            gradient = gradient_HQD[head, rows].double()
            d_weights = gradient @ v.mT
            mean = (gradient * out[head, rows]).sum(-1, keepdim=True)
            d_scores = weights * (d_weights - mean) * scale
            sizes = (d_weights.square() + gradient.square() @ v.square().mT).sqrt()
            products2 = (gradient * out[head, rows]).square().sum(-1, keepdim=True)
            sizes += (mean.square() + products2).sqrt()
            terms2 = (weights * sizes * scale).square()
            dq[head, rows], of_dq[head, rows] = d_scores @ k, terms2 @ k2
            dk += d_scores.mT @ q[head, rows]
            of_dk += terms2.mT @ q2[head, rows]
            dv += weights.mT @ gradient
            of_dv += weights.square().mT @ gradient.square().sum(-1)
    found = [(out, of_out), (dq, of_dq), (dk, of_dk), (dv, of_dv)]
    number = 1 if gradient_HQD is None else 4
    return [(value, squares.sqrt()) for value, squares in found[:number]]


def prefill(
    tokens: int, length: int, heads: tuple[int, int], width: int, causal: bool, dtype: str, **more
) -> AttentionWorkload:
    """A prefill of as many sequences of ``length`` as make ``tokens``."""
    return AttentionWorkload(
        **{"kind": "prefill", **more},
        batch=max(1, tokens // length),
        q_len=length,
        kv_len=length,
        q_heads=heads[0],
        kv_heads=heads[1],
        width=width,
        causal=causal,
        dtype=dtype,
    )


def decode(
    batch: int, cache: int, heads: tuple[int, int], width: int, dtype: str
) -> AttentionWorkload:
    """One new token of each sequence over a cache; every key is visible."""
    return AttentionWorkload("decode", batch, 1, cache, *heads, width, False, dtype)


def attention_workloads(kind: str) -> list[AttentionWorkload]:
    """Those for ``cpu`` or ``cuda``."""
    if kind == "cpu":
        return [
            prefill(512, 512, (8, 8), 64, True, "float32"),
            prefill(512, 512, (8, 2), 128, False, "float32"),
            prefill(256, 256, (8, 2), 64, True, "float32", kind="train"),
            decode(4, 2048, (8, 2), 64, "float32"),
        ]
    many, grouped, bf16 = 16384, (32, 8), "bfloat16"
    heads = {64: (32, 32), 128: (16, 16)}
    lengths = (1024, 4096, 16384)
    return [
        *(
            prefill(many, length, heads[width], width, causal, bf16)
            for width in (64, 128)
            for causal in (False, True)
            for length in lengths
        ),
        *(prefill(many, length, grouped, 128, True, bf16) for length in lengths),
        *(
            prefill(many, length, heads[width], width, causal, bf16, kind="train")
            for width, causal, length in (
                (64, True, 4096),
                (128, False, 4096),
                (128, False, 16384),
                (128, True, 4096),
                (128, True, 16384),
            )
        ),
        prefill(many, 4096, grouped, 128, True, bf16, kind="train"),
        *(
            decode(batch, cache, grouped, 128, bf16)
            for batch, cache in (
                (1, 1024),
                (1, 32768),
                (8, 4096),
                (8, 32768),
                (64, 1024),
                (64, 4096),
                (64, 32768),
            )
        ),
    ]
