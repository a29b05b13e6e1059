"""Experts under pytest-benchmark.

pytest conformance/benchmarks/bench_experts.py --impl NAME
"""

CONTRACTS = ("experts", "shared_core_block")


def test_experts(kernel, workload):
    """Dense and compressed experts, by uniform and by skewed routing."""
    kernel(workload)
