"""torch's own kernels together: attention and experts in one adapter, for benchmarks of both."""

from __future__ import annotations

from conformance.implementations.grouped_experts import TorchGroupedExperts
from conformance.implementations.torch_sdpa import TorchSDPA


class TorchKernels(TorchSDPA, TorchGroupedExperts):
    """Attention by ``scaled_dot_product_attention``, experts by ``grouped_mm``."""
