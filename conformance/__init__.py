"""model-conformance: a pytest suite that holds LLM model code against a reference implementation.

``pytest conformance --impl NAME`` runs it; ``python -m conformance`` lists what it knows.
"""

__version__ = "0.1.0"
