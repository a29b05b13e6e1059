"""The executable specification: clear reference implementations in plain torch.

Nothing here caches or fuses, every formula stands where a reader looks for it, and every function
computes in the dtype of its inputs, float64 included. In float64 these functions are the oracle of
the conformance suite; the suite's own tests hold them against torch, transformers and numpy.

This package never imports :mod:`conformance`.
"""
