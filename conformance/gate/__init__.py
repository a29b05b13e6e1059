"""The regression gate: is the head slower than the base? Paired, interleaved, with a stated error rate.

``samples``     what is measured: logarithms of ratios, by process pair and round
``statistics``  the Hodges–Lehmann estimate and its exact bounds
``rule``        from samples to REGRESSED, OK, INCONCLUSIVE, IMPROVED or VOID
"""
