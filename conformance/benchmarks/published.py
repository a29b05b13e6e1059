"""Published figures of kernels on an H100 or H200, to hold the anchors against.

Each was measured on another machine with other versions: it says what such a kernel reaches, not what
this machine must. The tensor cores of both GPUs are the same, so figures that they bound hold for both;
what memory bounds is given as a share of the machine's own copy instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MODELS = re.compile(r"\bH[12]00\b")
"""GPUs that the figures are for, in the name of a device."""

LOW = 0.8
"""A kernel below this share of what was published of itself is worth an explanation."""

FA3 = "FlashAttention-3, arXiv 2407.08608"


@dataclass(frozen=True)
class Figure:
    """Speed of one kernel at one shape."""

    workload: str
    """A glob on names of workloads."""
    kernel: str
    tflops: float
    """10¹² operations in a second."""
    source: str
    backend: str | None = None
    """The backend, as counters name it, that is this kernel in torch; None if torch has it not."""
    backward: bool = False
    """Of the backward pass alone."""


IN_TORCH = {"cuDNN": "cudnn", "FlashAttention-2": "flash"}
"""Backends of torch that are a published kernel."""


def _series(
    case: str, kernel: str, speeds: tuple[float, ...], *, backward: bool = False
) -> list[Figure]:
    kind, lengths = ("train", (4096, 16384)) if backward else ("prefill", (1024, 4096, 16384))
    return [
        Figure(
            f"attention.{kind}.b*.{length}x{length}.{case}.bfloat16",
            kernel,
            speed,
            FA3,
            IN_TORCH.get(kernel),
            backward,
        )
        for length, speed in zip(lengths, speeds, strict=True)
    ]


FIGURES: tuple[Figure, ...] = (
    *_series("h32x32.d64.full", "cuDNN", (373, 408, 413)),
    *_series("h32x32.d64.full", "FlashAttention-3", (392, 476, 497)),
    *_series("h32x32.d64.full", "FlashAttention-2", (306, 321, 324)),
    *_series("h16x16.d128.full", "cuDNN", (574, 609, 595)),
    *_series("h16x16.d128.full", "FlashAttention-3", (565, 638, 648)),
    *_series("h16x16.d128.full", "FlashAttention-2", (350, 368, 370)),
    *_series("h16x16.d128.causal", "cuDNN", (410, 518, 539)),
    *_series("h16x16.d128.causal", "FlashAttention-3", (423, 579, 616)),
    *_series("h16x16.d128.causal", "FlashAttention-2", (260, 319, 335)),
    *_series("h16x16.d128.full", "cuDNN", (499, 516), backward=True),
    *_series("h16x16.d128.full", "FlashAttention-3", (542, 561), backward=True),
    Figure(
        "experts.qwen3-30b-a3b.*.t16384.uniform.bfloat16",
        "torch._grouped_mm (32,768 tokens)",
        242,
        "VeOmni#460",
        "grouped_mm",
    ),
    Figure(
        "experts.qwen3-30b-a3b.*.t16384.uniform.bfloat16",
        "Liger fused_moe (inference)",
        523,
        "Liger-Kernel#1294",
    ),
)

DECODE_SHARE = 0.8
"""Of the machine's copy, that a good decoding kernel reaches where the cache is over 100 MB.

FlashMLA reaches 3,000 of 3,350 GB/s (its README); FlashAttention-3 with small pages 55 %
(flash-attention#1572).
"""

DECODE_BYTES = 100e6
"""Smaller caches are bound by launches."""


def is_published_model(name: str) -> bool:
    """Whether the figures are for a device of this name."""
    return MODELS.search(name) is not None
