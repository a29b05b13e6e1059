"""Checkpoints of the small and the medium GPT: what they hold, loading them, and saving them back.

Everything is detected from the names and shapes of the tensors. A checkpoint is taken whole or not at
all: a tensor that is missing, left over, misshapen, not finite or named twice is a
:class:`~reference_impl.stored.CheckpointError` that names the file and the tensor.

The steps are methods of :class:`CheckpointReader`, so that a planted bug replaces one of them.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reference_impl.gpt.batched import GPTBatched, from_state
from reference_impl.gpt.config import (
    BLOCK_WITHOUT_ATTENTION,
    FEWEST_LAYERS,
    FORMATS,
    Format,
    GPTConfig,
    attention_shapes,
    head_key,
    mlp_shapes,
    scalars_needed,
    state_shapes,
)
from reference_impl.gpt.files import open_checkpoint
from reference_impl.stored import (
    CheckpointError,
    LazyState,
    StoredCheckpoint,
    StoredTensor,
    all_finite,
)

Source = str | os.PathLike[str] | Mapping[str, Any]
"""The path of a checkpoint, or the dictionary itself."""

WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
"""Parts of a name that torch.compile, DistributedDataParallel and FSDP add, at any depth."""
OUTER_WRAPPERS = frozenset({"model"})
"""Parts that a trainer (Lightning) adds, in front only."""

TRAINED_HEAD_DIM = 128
"""Head width that ``train_gpt_small.py`` and ``train_gpt_medium.py`` fix."""
MEDIUM_LAYERS = 16
"""Blocks that ``train_gpt_medium.py`` fixes; other depths come from variants with other heads."""
KNOWN_HEADS = {(12, 768): 6, (16, 1024): 8, (24, 1152): 18, (36, 1280): 20}
"""Heads of published shapes, by (layers, width). The last two have heads of 64."""

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class CheckpointReader:
    """One checkpoint, opened: :meth:`inspect` and :meth:`load`."""

    model_class: type[GPTBatched] = GPTBatched

    def __init__(
        self,
        source: Source,
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """``head_dim`` where the shapes alone do not tell; ``dtype`` to hold and compute in."""
        if dtype is not None and dtype not in FLOATING:
            raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, FLOATING))}")
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = torch.device(device)
        self.stored = self.open(source)
        self.tensors = self.strip_prefixes(self.stored.tensors)

    def open(self, source: Source) -> StoredCheckpoint:
        """The index of the file."""
        return open_checkpoint(source)

    def error(self, problem: str, key: str | None = None) -> CheckpointError:
        """An error about this checkpoint."""
        return CheckpointError(self.stored.source, problem, key=key)

    # Names

    def strip_prefixes(self, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors by their bare names; no two may have the same."""
        bare: dict[str, StoredTensor] = {}
        stored_as: dict[str, str] = {}
        for key, tensor in tensors.items():
            name = self.bare_name(key)
            if name in bare:
                raise self.error(f"is stored twice, as {stored_as[name]} and as {key}", name)
            bare[name], stored_as[name] = tensor, key
        return bare

    def bare_name(self, key: str) -> str:
        """A name without the parts that wrappers add."""
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        while parts and parts[0] in OUTER_WRAPPERS:
            parts = parts[1:]
        return ".".join(parts)

    # Detection

    def detect_format(self) -> Format:
        """The format, from the names of blocks and head."""
        seen: dict[Format, str] = {}
        for format in FORMATS:
            own = {*attention_shapes(format, 1), *mlp_shapes(format, 1), head_key(format)}
            names = [key for key in self.tensors if re.sub(r"^blocks\.\d+\.", "", key) in own]
            if names:
                seen[format] = names[0]
        if len(seen) > 1:
            raise self.error(
                f"is of the small format, and {seen['medium']} of the medium", seen["small"]
            )
        if not seen or not any(key.startswith("blocks.") for key in self.tensors):
            raise self.error("has no block of the small or the medium format (blocks.0…)")
        return next(iter(seen))

    def count_layers(self) -> int:
        """The number of blocks, which are numbered from 0 without a gap."""
        numbers = {
            int(match[1])
            for key in self.tensors
            if (match := re.match(r"blocks\.(\d{1,9})\.", key))
        }
        count = len(numbers)
        if not count:
            raise self.error("is missing: blocks are numbered from 0", "blocks.0")
        missing = next((layer for layer in range(count) if layer not in numbers), None)
        if missing is not None:
            problem = f"is missing, and there are blocks up to {max(numbers)}"
            raise self.error(problem, f"blocks.{missing}")
        if count < FEWEST_LAYERS or count % 2:
            raise self.error(
                f"has {count} blocks, expected an even number of at least {FEWEST_LAYERS}", "blocks"
            )
        return count

    def rows_and_width(self, key: str) -> tuple[int, int]:
        """The shape of a matrix."""
        if key not in self.tensors:
            raise self.error("is missing", key)
        shape = self.tensors[key].shape
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"has shape {list(shape)}, expected [rows, width]", key)
        return shape

    def attention_width(self, format: Format, model_dim: int) -> int:
        """The width of all heads, which has to be that of the model."""
        name = next(iter(attention_shapes(format, model_dim)))
        key = f"blocks.0.{name}"
        if key not in self.tensors:
            raise self.error("is missing", key)
        shape = self.tensors[key].shape
        expected = attention_shapes(format, model_dim)[name]
        if len(shape) == 3 and shape[0] == expected[0] and shape[1] != shape[2] == model_dim:
            raise self.error(
                f"has heads of {shape[1]} channels in a model of width {model_dim}; value embeddings "
                "need both to be the same",
                key,
            )
        if shape != expected:
            raise self.error(f"has shape {list(shape)}, expected {list(expected)}", key)
        return shape[1]

    def heads(self, format: Format, num_layers: int, width: int) -> tuple[int, int]:
        """Number and width of the heads. No tensor tells it, so a shape that is not known is asked."""
        head_dim = self.head_dim
        if head_dim is None and (num_layers, width) in KNOWN_HEADS:
            head_dim = width // KNOWN_HEADS[num_layers, width]
        if head_dim is None and format == "medium" and num_layers != MEDIUM_LAYERS:
            raise self.error(
                f"{num_layers} blocks of width {width} do not tell the head width; pass head_dim"
            )
        head_dim = TRAINED_HEAD_DIM if head_dim is None else head_dim
        if head_dim < 4 or head_dim % 4 or width % head_dim:
            raise self.error(
                f"a width of {width} is not a number of heads of {head_dim} channels "
                "(a multiple of 4); pass head_dim"
            )
        return width // head_dim, head_dim

    def scalars_size(self, num_layers: int) -> int:
        """The number of stored scalars; those beyond five a layer are padding."""
        if "scalars" not in self.tensors:
            raise self.error("is missing", "scalars")
        shape, needed = self.tensors["scalars"].shape, scalars_needed(num_layers)
        if len(shape) != 1 or shape[0] < needed:
            raise self.error(
                f"has shape {list(shape)}, expected [{needed}] or longer for {num_layers} blocks",
                "scalars",
            )
        return shape[0]

    def config(self) -> GPTConfig:
        """The sizes of the model; the layout is checked against them."""
        vocab_size, width = self.rows_and_width("embed.weight")
        format = self.detect_format()
        num_layers = self.count_layers()
        padded_vocab_size, _ = self.rows_and_width(head_key(format))
        num_heads, head_dim = self.heads(format, num_layers, self.attention_width(format, width))
        config = GPTConfig(
            format=format,
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            vocab_size=vocab_size,
            padded_vocab_size=padded_vocab_size,
            scalars_size=self.scalars_size(num_layers),
        )
        self.check_layout(config)
        return config

    def check_layout(self, config: GPTConfig) -> None:
        """Raise unless the checkpoint has exactly the tensors of ``config``."""
        expected = state_shapes(config)
        for key, shape in expected.items():
            if key not in self.tensors:
                raise self.error("is missing", key)
            if self.tensors[key].shape != shape:
                found = list(self.tensors[key].shape)
                raise self.error(f"has shape {found}, expected {list(shape)}", key)
        for key in self.tensors:
            if key not in expected:
                eighth = key.startswith(f"blocks.{BLOCK_WITHOUT_ATTENTION}.attn.")
                why = "the eighth block has no attention" if eighth else "no part of the model"
                raise self.error(f"is left over: {why}", key)
        for key, tensor in self.tensors.items():
            if tensor.dtype not in FLOATING:
                raise self.error(f"has dtype {tensor.dtype}, expected a floating one", key)
        if config.padded_vocab_size < config.vocab_size:
            raise self.error(
                f"has {config.padded_vocab_size} rows, fewer than the {config.vocab_size} of "
                "embed.weight",
                head_key(config.format),
            )

    def inspect(self) -> dict[str, Any]:
        """What the checkpoint holds, from names and shapes alone: no tensor is read."""
        config = self.config()
        return {
            "checkpoint_format": config.format,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.padded_vocab_size,
            "model_dim": config.model_dim,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "head_dim": config.head_dim,
            "scalars_size": config.scalars_size,
            "scalars_padding": config.scalars_padding,
        }

    # Loading

    def load(self, *, progress: bool = False) -> GPTBatched:
        """The batched model, whose function is that of the checkpoint.

        Without a ``dtype`` every weight keeps the dtype that it is stored in, and the model computes
        in float32; float64 weights are computed with in float64.
        """
        config = self.config()
        state = {key: self.read(key) for key in self.with_progress(state_shapes(config), progress)}
        self.check_padding(state["scalars"], config)
        return from_state(
            config, state, compute_dtype=self.compute_dtype(state), model_class=self.model_class
        )

    def with_progress(self, keys: Mapping[str, Any], progress: bool) -> Any:
        """The keys, with a bar that counts them."""
        if not progress:
            return keys
        from tqdm import tqdm

        return tqdm(keys, desc=f"loading {self.stored.source}", unit="tensor")

    def read(self, key: str) -> Tensor:
        """One tensor in the dtype that the model holds it in, on its device."""
        tensor = self.tensors[key].read()
        self.check_finite(tensor, key, "that are not finite")
        converted = tensor.to(device=self.device, dtype=self.dtype)
        if converted.dtype != tensor.dtype:
            self.check_finite(converted, key, f"beyond the range of {converted.dtype}")
        return converted

    def check_finite(self, tensor: Tensor, key: str, what: str) -> None:
        """Raise unless every value is finite."""
        if not all_finite(tensor):
            wrong = ~tensor.isfinite()
            first = wrong.nonzero()[0].tolist()
            raise self.error(f"holds {int(wrong.sum())} values {what}, the first at {first}", key)

    def check_padding(self, scalars: Tensor, config: GPTConfig) -> None:
        """Warn of padding that is not what the script writes; it has no influence either way."""
        tail = scalars[scalars_needed(config.num_layers) :]
        if bool((tail != 1).any()):
            warnings.warn(
                f"{self.stored.source}: scalars: the {len(tail)} values of padding are not all 1",
                stacklevel=3,
            )

    def compute_dtype(self, state: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype that the model computes in."""
        if self.dtype is not None:
            return self.dtype
        stored = {tensor.dtype for tensor in state.values()}
        return torch.float64 if torch.float64 in stored else torch.float32


def inspect_checkpoint(
    path: Source, *, head_dim: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds, and its dictionary with the model's tensors read when looked up.

    The first result has ``checkpoint_format`` (``"small"`` or ``"medium"``), ``vocab_size`` (rows of
    the embeddings), ``padded_vocab_size`` (rows of the LM head), ``model_dim``, ``num_layers``,
    ``num_heads``, ``head_dim``, ``scalars_size`` and ``scalars_padding``. Raises
    :class:`CheckpointError`.
    """
    reader = CheckpointReader(path, head_dim=head_dim)
    return reader.inspect(), dictionary_of(reader)


def load_pretrained_checkpoint(
    path: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    head_dim: int | None = None,
    progress: bool = False,
) -> tuple[GPTBatched, dict[str, Any], dict[str, Any]]:
    """The batched model of a checkpoint, and what :func:`inspect_checkpoint` says of it.

    ``dtype`` converts the weights and is computed in; without it they stay as stored, and float32
    is computed in. Raises :class:`CheckpointError`; then nothing is left half loaded.
    """
    reader = CheckpointReader(path, head_dim=head_dim, dtype=dtype, device=device)
    return reader.load(progress=progress), reader.inspect(), dictionary_of(reader)


def dictionary_of(reader: CheckpointReader) -> dict[str, Any]:
    """The training dictionary: the state under the names of the file, and the other entries."""
    return {"model": LazyState(reader.stored.tensors), **reader.stored.rest}


def save_checkpoint(
    model: GPTBatched, path: str | os.PathLike[str], *, prefix: str = "", **entries: Any
) -> None:
    """Write the checkpoint that the model came from, in its own format and bit for bit.

    A path that ends in ``.safetensors`` holds the tensors alone; any other is a training dictionary
    with ``model`` and ``entries`` (``step``, ``val_loss`` …). ``prefix`` goes in front of every name
    (``"_orig_mod."``). The old file stays until the new one is whole.
    """
    model.save(path, prefix=prefix, **entries)
