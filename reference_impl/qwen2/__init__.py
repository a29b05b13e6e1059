"""Qwen2 over several ranks: parallel layers, the model, its weights, generation.

``sharding``    which part of each weight a rank holds
``layers``      column-, row-, QKV- and vocabulary-parallel layers, the parallel MLP
``config``      a model's sizes, read from ``config.json``
``model``       prefill, chunks and decoding with a key/value cache
``directory``   the tensors of a Hugging Face directory, read a part at a time
``loading``     every weight loaded once, every tensor used, in the dtype that is asked for
``generation``  greedy and sampled, the same tokens on every rank

Sources: transformers ``models/qwen2``; Qwen2 (arXiv 2407.10671).
"""

from reference_impl.qwen2.config import Qwen2Config
from reference_impl.qwen2.generation import generate
from reference_impl.qwen2.loading import load_model, load_shards
from reference_impl.qwen2.model import KVCache, Qwen2

__all__ = ["KVCache", "Qwen2", "Qwen2Config", "generate", "load_model", "load_shards"]
