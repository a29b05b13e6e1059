"""Benchmarks with a bar: each runs as ``python -m conformance.benchmarks.NAME``.

Records of runs that are referred to lie in ``records/``.
"""
