"""Fine-tuning a checkpoint as a classifier of sequences: the model, its optimizer, the loading hook.

Axes in tensor names::

    B batch    T tokens    C width of the model    K classes
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_impl.gpt.batched import GPTBatched
from reference_impl.gpt.checkpoint import load_pretrained_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What ``args.dtype`` may be called."""


class Classified(NamedTuple):
    """What a classifier returns; unpacks as ``logits, loss = model(ids, valid, labels)``."""

    logits: Tensor
    """[B, K]."""
    loss: Tensor | None
    """Mean cross-entropy, a scalar; None without labels."""


class SequenceClassifier(nn.Module):
    """A two-layer head on the features of each sequence's last real token.

    ``pretrained_model`` may be set after construction, and the whole model is trained. ``batch_size``
    is carried along for the data loader; the model itself takes any number of sequences.
    """

    def __init__(
        self,
        model_dim: int,
        num_classes: int,
        *,
        batch_size: int = 16,
        pretrained_model: GPTBatched | None = None,
    ) -> None:
        super().__init__()
        if model_dim < 2 or num_classes < 2:
            raise ValueError(
                f"model_dim {model_dim} and num_classes {num_classes}: both are at least 2"
            )
        self.batch_size = batch_size
        self.compute_dtype = torch.float32
        """Dtype of the matrix products of the pretrained model (autocast); weights stay float32."""
        self.pretrained_model = pretrained_model
        self.head = nn.Sequential(
            nn.Linear(model_dim, model_dim // 2),
            nn.ReLU(),
            nn.Linear(model_dim // 2, num_classes),
        )

    def forward(
        self, ids_BT: Tensor, valid_BT: Tensor, labels_B: Tensor | None = None
    ) -> Classified:
        """Logits [B, K] of ``ids_BT`` int64 [B, T], and the loss for ``labels_B`` int64 [B].

        ``valid_BT`` bool [B, T] is True for real tokens. Padding may lie on either side and hold any
        id that has an embedding; no id is special. Raises ValueError for a row without a real token,
        a mask of another shape or dtype, and a ``pretrained_model`` that is missing or does not fit.
        """
        self.check_pretrained()
        last_B = last_real_token(valid_BT, ids_BT.shape)
        with self.precision(ids_BT.device):
            features_BTC = self.pretrained_model.features(ids_BT, valid=valid_BT)
        rows_B = torch.arange(len(ids_BT), device=ids_BT.device)
        pooled_BC = features_BTC[rows_B, last_B].to(self.head[0].weight.dtype)
        logits_BK = self.head(pooled_BC)
        loss = None if labels_B is None else F.cross_entropy(logits_BK, labels_B)
        return Classified(logits_BK, loss)

    def check_pretrained(self) -> None:
        """Raise ValueError unless there is a pretrained model of the head's width."""
        if self.pretrained_model is None:
            raise ValueError("pretrained_model is not set; load a checkpoint into it first")
        expected, found = self.head[0].in_features, self.pretrained_model.config.model_dim
        if found != expected:
            raise ValueError(
                f"the classifier was made for a width of {expected} (model_dim), and the pretrained "
                f"model has {found}"
            )

    def precision(self, device: torch.device) -> AbstractContextManager:
        """Matrix products in ``compute_dtype``, everything else in float32.

        Casting the model itself to float16 would square the residual stream in float16, which
        overflows beyond 256.
        """
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)


def last_real_token(valid_BT: Tensor, shape: Iterable[int]) -> Tensor:
    """Index [B] of the last True of each row; ValueError where there is none, naming the row."""
    shape = list(shape)
    if valid_BT.dtype != torch.bool or list(valid_BT.shape) != shape:
        raise ValueError(
            f"valid is {valid_BT.dtype} {list(valid_BT.shape)}, expected torch.bool {shape}"
        )
    empty = (~valid_BT.any(dim=-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0]} of the batch has no real token (valid is False throughout)"
        )
    positions_T = torch.arange(valid_BT.shape[-1], device=valid_BT.device)
    return (positions_T * valid_BT).amax(dim=-1)


def configure_optimizers(
    device_type: str,
    model: nn.Module,
    *,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; matrices decay, biases and scalars do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type == "cuda")


class FineTuningArguments(Protocol):
    """What :func:`load_pretrained_model` reads from the command line's arguments."""

    pretrained_ckpt_path: str | os.PathLike[str]
    device: str
    dtype: str
    """A key of :data:`DTYPES`."""


def load_pretrained_model(
    args: FineTuningArguments,
    model: SequenceClassifier,
    *,
    head_dim: int | None = None,
    **optimizer_options: Any,
) -> tuple[SequenceClassifier, torch.optim.AdamW, torch.amp.GradScaler]:
    """Put a checkpoint into ``model``; returns ``(model, optimizer, scaler)``, on ``args.device``.

    Every weight becomes float32, because an optimizer's small steps vanish in a bfloat16 weight;
    ``args.dtype`` is the dtype of the matrix products. The scaler is enabled for float16 alone.
    ``head_dim`` is for shapes that do not tell it, and ``optimizer_options`` go to
    :func:`configure_optimizers`. Raises ValueError for an unknown dtype or a width that is not the
    classifier's, and :class:`~reference_impl.gpt.files.CheckpointError` for a checkpoint that cannot
    be used.
    """
    if args.dtype not in DTYPES:
        raise ValueError(f"dtype is {args.dtype!r}, expected one of {', '.join(DTYPES)}")
    pretrained, info, _ = load_pretrained_checkpoint(
        args.pretrained_ckpt_path, device=args.device, dtype=torch.float32, head_dim=head_dim
    )
    model.pretrained_model = pretrained
    model.check_pretrained()
    model.compute_dtype = DTYPES[args.dtype]
    model.to(args.device)
    print(
        f"Loaded {args.pretrained_ckpt_path}: {info['checkpoint_format']} format, "
        f"{info['num_layers']} blocks, vocab_size={info['vocab_size']}. "
        f"The data loader makes batches of {model.batch_size}; the model takes any."
    )
    device_type = torch.device(args.device).type
    scaler = torch.amp.GradScaler(device_type, enabled=args.dtype == "float16")
    return model, configure_optimizers(device_type, model, **optimizer_options), scaler
