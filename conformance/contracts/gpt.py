"""Checkpoints of the small and the medium GPT training scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoadedGPT(Protocol):
    """What :meth:`CheckpointReader.load` gives: the function of a checkpoint, on batches.

    ``state`` and ``save`` may be missing; the requirements about them are then declined.
    """

    def features(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        document_start: int | None = None,
        window_blocks: int | None = None,
    ) -> Tensor:
        """The residual stream after the last norm, [batch, tokens, model_dim].

        In the dtype that the model computes in.

        ``ids`` int64 [batch, tokens], of any length. Attention is causal.

        ``valid`` bool [batch, tokens]
            False for padding, on either side, which no token sees; the outputs at padding are
            unspecified.
        ``document_start``
            the token that starts a new document; tokens see their own document only.
        ``window_blocks``
            the training scripts' window in blocks of 128 tokens; comes with ``document_start``.

        An id without an embedding row raises an error. Nothing depends on earlier calls.
        """

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits after the soft cap, [batch, tokens, rows of the LM head]; options as above.

        In float32; in float64 where the model computes in that.
        """

    def state(self) -> Mapping[str, Tensor]:
        """The tensors of the checkpoint, in its own format, with the stored values and dtypes.

        Names are bare (no ``_orig_mod.``, ``module.``). With a ``dtype`` they are in that dtype.
        """

    def save(self, path: str) -> None:
        """Write a checkpoint in the format it came from; the old file stays until that is whole."""


class CheckpointReader(Protocol):
    """What :meth:`GPTCheckpoint.gpt_checkpoint` gives: one checkpoint, opened."""

    def inspect(self) -> Mapping[str, Any]:
        """What the checkpoint holds, from the names and shapes of its tensors alone.

        ``checkpoint_format`` (``"small"`` or ``"medium"``), ``vocab_size`` (rows of the embeddings),
        ``padded_vocab_size`` (rows of the LM head), ``model_dim``, ``num_layers``, ``num_heads``,
        ``head_dim``, ``scalars_size`` (stored scalars) and ``scalars_padding`` (those that mean
        nothing). Other entries are ignored.
        """

    def load(self) -> LoadedGPT:
        """The model. It does not change when the file or the dictionary changes afterwards."""


class GPTCheckpoint(Protocol):
    """Reading checkpoints of the small and the medium GPT training scripts."""

    def gpt_checkpoint(
        self,
        source: str | Mapping[str, Any],
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> CheckpointReader:
        """One checkpoint, opened: ``inspect()`` says what it holds, ``load()`` gives its model.

        ``source`` is the path of a file of ``torch.save`` (a training dictionary with an entry
        ``model``, or a bare state dictionary) or of safetensors; or such a dictionary in memory.
        Parts of names that torch.compile, DistributedDataParallel and Lightning add (``_orig_mod.``
        and ``module.`` at any depth, ``model.`` in front) are taken off; the order of names is free.

        ``head_dim``
            width of the heads, for shapes that do not tell it. Default: 128, as both scripts have;
            18 heads of 64 for 24 blocks of width 1152, 20 of 64 for 36 blocks of width 1280. For
            any other medium checkpoint that has not 16 blocks the width has to be given.
        ``dtype``
            to hold the weights and compute in. Default: weights as they are stored, bit for bit,
            and float32 arithmetic.
        ``device``
            of the model.

        The model computes what was trained. Both: RMS norm without weight, half-truncated rotary
        embedding of base 1024 on normed queries and keys, scores times 0.12, values ``a·v + b·ve``
        in the first and last three blocks and ``a·v`` in the others, squared relu, no attention in
        the eighth block, ``x = c·x + d·x0`` at the start of each block. Small: attention reads the
        normed stream; the second half of the blocks adds the outputs of the first, latest first,
        times ``scalars[0]``, ``scalars[1]`` …; logits ``30·sigmoid(z / (7.5·√model_dim))``. Medium:
        attention reads the stream itself; values are normed; blocks 9, 10 and 11 add the outputs of
        blocks 6, 4 and 2 times the scalar of the *source*; logits ``15·z / √(z² + 225)``. Scalars
        are skip weights [L], pairs (c, d) [L, 2], pairs (a, b) [L, 2], and padding.

        A checkpoint that is not whole and consistent raises an exception, here or in ``inspect`` or
        ``load``, that names the file and the tensor: nothing is loaded in part, nothing is written,
        and no pickle is executed. Optimizer state that rides along is ignored.

        Sources: ``train_gpt_small.py`` and ``train_gpt_medium.py`` of modded-ipagpt-training, after
        KellerJordan/modded-nanogpt.
        """
