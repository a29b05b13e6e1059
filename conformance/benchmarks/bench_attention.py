"""Attention under pytest-benchmark.

pytest conformance/benchmarks/bench_attention.py --impl NAME
"""

CONTRACTS = ("attention",)


def test_attention(kernel, workload):
    """Prefill, decode, and forward with backward."""
    kernel(workload)
