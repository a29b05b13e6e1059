"""The small and the medium GPT of the modded-nanogpt family, and their checkpoints.

``training``     both models exactly as their scripts train them
``batched``      one model for both, on batches with padding: features and logits
``checkpoint``   inspect, load and save checkpoints of either format
``finetune``     a sequence classifier on the batched model

Source: modded-ipagpt-training (``train_gpt_small.py``, ``train_gpt_medium.py``), which follows
KellerJordan/modded-nanogpt of May and June 2025. What its own loader gets wrong is in
docs/gpt_checkpoints.md.
"""

from reference_impl.gpt.batched import GPTBatched
from reference_impl.gpt.checkpoint import (
    CheckpointReader,
    inspect_checkpoint,
    load_pretrained_checkpoint,
    save_checkpoint,
)
from reference_impl.gpt.config import GPTConfig
from reference_impl.stored import CheckpointError

__all__ = [
    "CheckpointError",
    "CheckpointReader",
    "GPTBatched",
    "GPTConfig",
    "inspect_checkpoint",
    "load_pretrained_checkpoint",
    "save_checkpoint",
]
