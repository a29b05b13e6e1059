"""Checkpoints read as plain torch tooling reads them, into modules written with ``torch.nn``.

``torch.load(weights_only=True)`` or ``safetensors.torch.load_file``, prefixes taken off by torch's
own helper, a strict ``load_state_dict`` into modules that have the checkpoint's names. No code of the
reference is used: the function is written a second time, in torch's operators.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

WRAPPERS = ("_orig_mod", "module")
HEADS_OF_64 = ((24, 1152), (36, 1280))
WINDOW_BLOCK = 128
LONG_WINDOWS = {"small": (0, 4, 7, 11), "medium": (0, 4, 11, 15)}


class TorchCheckpoint:
    """``torch.load``, ``safetensors.torch.load_file`` and ``load_state_dict(strict=True)``.

    Native: the containers, strict names and shapes, embeddings, linear layers, ``F.rms_norm``,
    ``F.scaled_dot_product_attention``. Glue: names of wrappers within a name, what shapes tell,
    rotary embedding, soft caps and masks, ranges of ids. Values are taken as torch gives them.
    """

    def gpt_checkpoint(
        self,
        source: str | Mapping[str, Any],
        *,
        head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> TorchReader:
        """See :class:`conformance.contracts.GPTCheckpoint`."""
        return TorchReader(source, head_dim, dtype, device)


class TorchReader:
    """The state dictionary of a checkpoint, in memory."""

    def __init__(
        self,
        source: str | Mapping[str, Any],
        head_dim: int | None,
        dtype: torch.dtype | None,
        device: str,
    ) -> None:
        self.dtype, self.device, self.head_dim = dtype, device, head_dim
        content = opened(source)
        self.container = container_of(source)
        state = content.get("model", content) if isinstance(content, Mapping) else content
        if not isinstance(state, Mapping):
            raise ValueError(f"model is a {type(state).__name__}, expected a dictionary")
        self.state = bare_names(state)
        self.facts = facts_of(self.state, head_dim)

    def inspect(self) -> dict[str, Any]:
        """See :class:`conformance.contracts.CheckpointReader`."""
        return dict(self.facts)

    def load(self) -> TorchGPT:
        """See :class:`conformance.contracts.CheckpointReader`."""
        with torch.device("meta"):
            model = TorchGPT(self.facts)
        model.load_state_dict(
            {
                key: tensor.detach().to(self.device, self.dtype, copy=True).contiguous()
                for key, tensor in self.state.items()
            },
            strict=True,
            assign=True,
        )
        model.compute_dtype = self.dtype or torch.float32
        model.container = self.container
        return model


def opened(source: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """What a file or a dictionary holds."""
    if isinstance(source, Mapping):
        return source
    if container_of(source) == "safetensors":
        return load_file(source)
    return torch.load(source, map_location="cpu", weights_only=True)


def container_of(source: str | Mapping[str, Any]) -> str:
    """``safetensors`` by the suffix, anything else is torch's."""
    return "safetensors" if str(source).endswith(".safetensors") else "torch"


def bare_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the names of wrappers: torch's helper in front, an expression within."""
    state = dict(state)
    size = None
    while size != sorted(state):
        size = sorted(state)
        for prefix in (*(f"{wrapper}." for wrapper in WRAPPERS), "model."):
            consume_prefix_in_state_dict_if_present(state, prefix)
    within = re.compile(rf"(?<=\.)(?:{'|'.join(WRAPPERS)})\.")
    return {within.sub("", key): tensor for key, tensor in state.items()}


def facts_of(state: Mapping[str, Tensor], head_dim: int | None) -> dict[str, Any]:
    """What names and shapes tell."""
    small = "lm_head.weight" in state
    head = "lm_head.weight" if small else "lm_head_w"
    for key in ("embed.weight", head, "scalars"):
        if not isinstance(state.get(key), Tensor) or state[key].ndim != (key != "scalars") + 1:
            raise ValueError(f"{key} is missing, or not a tensor of the right dimensions")
    rows, width = state["embed.weight"].shape
    layers = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    if layers < 6 or layers % 2:
        raise ValueError(f"{layers} blocks, expected an even number of at least 6")
    if head_dim is None:
        head_dim = 64 if (layers, width) in HEADS_OF_64 else 128
        if not small and head_dim == 128 and layers != 16:
            raise ValueError("the head width is not known: pass head_dim")
    if head_dim < 4 or head_dim % 4 or width % head_dim:
        raise ValueError(f"a width of {width} is no number of heads of {head_dim}")
    size = state["scalars"].numel()
    if size < 5 * layers:
        raise ValueError(f"{size} scalars, expected at least {5 * layers}")
    head_rows = state[head].shape[0]
    if head_rows < rows:
        raise ValueError(f"the head has {head_rows} rows, the embeddings have {rows}")
    return {
        "checkpoint_format": "small" if small else "medium",
        "vocab_size": rows,
        "padded_vocab_size": head_rows,
        "model_dim": width,
        "num_layers": layers,
        "num_heads": width // head_dim,
        "head_dim": head_dim,
        "scalars_size": size,
        "scalars_padding": size - 5 * layers,
    }


def unfilled(*shape: int) -> nn.Parameter:
    """A parameter that ``load_state_dict`` has to fill."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, with torch's default epsilon."""
    return F.rms_norm(x, x.shape[-1:])


def turned(x_BTHD: Tensor) -> Tensor:
    """Half-truncated rotary embedding, by complex numbers: the second half of the pairs is left."""
    tokens, pairs = x_BTHD.shape[1], x_BTHD.shape[-1] // 2
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    turning = (1 / 1024) ** torch.linspace(0, 1, pairs // 2, dtype=torch.float64)
    frequencies = torch.cat([turning, torch.zeros(pairs - pairs // 2, dtype=torch.float64)])
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), -frequencies)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None].to(wide.to_complex())
    first, second = x_BTHD.to(wide).chunk(2, dim=-1)
    out = torch.complex(first, second) * rotation.to(x_BTHD.device)
    return torch.cat([out.real, out.imag], dim=-1).to(x_BTHD.dtype)


class Attention(nn.Module):
    """Attention of either format; the weights have the names of the checkpoint."""

    def __init__(self, small: bool, width: int, heads: int) -> None:
        super().__init__()
        self.small, self.heads = small, heads
        if small:
            self.qkv_w = unfilled(3, width, width)
            self.c_proj = nn.Linear(width, width, bias=False)
        else:
            self.qkvo_w = unfilled(4, width, width)

    def forward(
        self, x: Tensor, value: Tensor | None, lambdas: Tensor, visible: Tensor | None
    ) -> Tensor:
        """[B, T, C], computed in the dtype of ``x``."""
        weights = (self.qkv_w if self.small else self.qkvo_w[:3]).to(x.dtype)
        out_weight = (self.c_proj.weight if self.small else self.qkvo_w[3]).to(x.dtype)
        q, k, v = torch.einsum("btc,sdc->sbtd", x, weights).unflatten(-1, (self.heads, -1)).unbind()
        q, k = turned(norm(q)), turned(norm(k))
        v = (v if self.small else norm(v)) * lambdas[0]
        if value is not None:
            v = v + lambdas[1] * value.unflatten(-1, (self.heads, -1))
        y = F.scaled_dot_product_attention(
            *(each.transpose(1, 2) for each in (q, k, v)),
            attn_mask=visible,
            is_causal=visible is None,
            scale=0.12,
        )
        return F.linear(y.transpose(1, 2).flatten(2), out_weight)


class MLP(nn.Module):
    """Squared relu between two matrices."""

    def __init__(self, small: bool, width: int) -> None:
        super().__init__()
        self.small = small
        if small:
            self.c_fc = nn.Linear(width, 4 * width, bias=False)
            self.c_proj = nn.Linear(4 * width, width, bias=False)
        else:
            self.fc_w, self.proj_w = unfilled(4 * width, width), unfilled(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C]."""
        up, down = (
            (self.c_fc.weight, self.c_proj.weight) if self.small else (self.fc_w, self.proj_w)
        )
        return F.linear(F.linear(x, up.to(x.dtype)).relu().pow(2), down.to(x.dtype))


class Block(nn.Module):
    """One block; the eighth has no attention."""

    def __init__(self, index: int, small: bool, width: int, heads: int) -> None:
        super().__init__()
        self.small = small
        if index != 7:
            self.attn = Attention(small, width, heads)
        self.mlp = MLP(small, width)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        value: Tensor | None,
        mixing: Tensor,
        lambdas: Tensor,
        visible: Tensor | None,
    ) -> Tensor:
        """The residual stream behind the block."""
        x = mixing[0] * x + mixing[1] * x0
        if hasattr(self, "attn"):
            x = x + self.attn(norm(x) if self.small else x, value, lambdas, visible)
        return x + self.mlp(norm(x))


class TorchGPT(nn.Module):
    """The model of either format, with the names of its checkpoint."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.small = facts["checkpoint_format"] == "small"
        self.layers = facts["num_layers"]
        self.compute_dtype, self.container = torch.float32, "torch"
        rows, width = facts["vocab_size"], facts["model_dim"]
        self.embed = nn.Embedding(rows, width)
        self.value_embeds = nn.ModuleList(nn.Embedding(rows, width) for _ in range(3))
        self.blocks = nn.ModuleList(
            Block(i, self.small, width, facts["num_heads"]) for i in range(self.layers)
        )
        if self.small:
            self.lm_head = nn.Linear(width, facts["padded_vocab_size"], bias=False)
        else:
            self.lm_head_w = unfilled(facts["padded_vocab_size"], width)
        self.scalars = unfilled(facts["scalars_size"])

    def features(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        document_start: int | None = None,
        window_blocks: int | None = None,
    ) -> Tensor:
        """See :class:`conformance.contracts.LoadedGPT`."""
        if int(ids.min()) < 0 or int(ids.max()) >= self.embed.num_embeddings:
            raise IndexError(f"ids must be within 0 and {self.embed.num_embeddings - 1}")
        layers, dtype = self.layers, self.compute_dtype
        skips, mixing, lambdas = self.scalars.to(dtype)[: 5 * layers].split(
            [layers, 2 * layers, 2 * layers]
        )
        values = [table(ids).to(dtype) for table in self.value_embeds]
        values = [*values, *[None] * (layers - 6), *values]
        visible = self.masks(ids, valid, document_start, window_blocks)
        x = x0 = norm(self.embed(ids).to(dtype))
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.small and i >= layers // 2:
                x = x + skips[i - layers // 2] * outputs[layers - 1 - i]
            elif not self.small and i in (9, 10, 11):
                source = {9: 6, 10: 4, 11: 2}[i]
                x = x + skips[source] * outputs[source]
            pair = slice(2 * i, 2 * i + 2)
            x = block(x, x0, values[i], mixing[pair], lambdas[pair], visible[i])
            outputs.append(x)
        return norm(x)

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """See :class:`conformance.contracts.LoadedGPT`."""
        x = self.features(ids, **options)
        z = F.linear(x, (self.lm_head.weight if self.small else self.lm_head_w).to(x.dtype))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.small:
            return 30 * torch.sigmoid(z / (7.5 * math.sqrt(x.shape[-1])))
        return 15 * z / torch.sqrt(z**2 + 15**2)

    def masks(
        self,
        ids: Tensor,
        valid: Tensor | None,
        document_start: int | None,
        window_blocks: int | None,
    ) -> list[Tensor | None]:
        """The mask of each layer, None where SDPA's own causal one does."""
        if valid is None and document_start is None:
            return [None] * self.layers
        token = torch.arange(ids.shape[1], device=ids.device)
        visible = (token[:, None] >= token).expand(len(ids), 1, -1, -1)
        if document_start is not None:
            document = (ids == document_start).cumsum(-1)
            visible = visible & (document[:, None, :, None] == document[:, None, None])
        if valid is not None:
            visible = visible & valid[:, None, None]
        if window_blocks is None:
            return [visible] * self.layers
        if self.layers != (12 if self.small else 16):
            raise NotImplementedError("the scripts fix the windows of 12 small or 16 medium blocks")
        kept = {
            long: torch.stack([kept_blocks(row, window_blocks // (2 - long)) for row in document])
            for long in (True, False)
        }
        long = LONG_WINDOWS["small" if self.small else "medium"]
        return [visible & kept[i in long][:, None] for i in range(self.layers)]

    def state(self) -> dict[str, Tensor]:
        """See :class:`conformance.contracts.LoadedGPT`."""
        return self.state_dict()

    def save(self, path: str) -> None:
        """See :class:`conformance.contracts.LoadedGPT`."""
        partial = f"{path}.partial"
        try:
            if self.container == "safetensors":
                save_file(self.state_dict(), partial)
            else:
                torch.save({"model": self.state_dict()}, partial)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)


def kept_blocks(document_T: Tensor, window: int) -> Tensor:
    """Keys [T, T] within the window of blocks, by loops over blocks as the script's comments say."""
    blocks = document_T.split(WINDOW_BLOCK)
    kept = torch.zeros(len(document_T), len(document_T), dtype=torch.bool)
    for q, queries in enumerate(blocks):
        first, last = int(queries[0]), int(queries[-1])
        full, partial = [], []
        for k in range(q, -1, -1):  # the nearest first
            low, high = int(blocks[k][0]), int(blocks[k][-1])
            if k < q and low == high == first == last:
                full.append(k)
            elif low <= last and high >= first:
                partial.append(k)
        near = [*full[: max(window - 1, 0)], *partial[: max(window - len(full), 1)]]
        rows = slice(q * WINDOW_BLOCK, (q + 1) * WINDOW_BLOCK)
        for k in near:
            kept[rows, k * WINDOW_BLOCK : (k + 1) * WINDOW_BLOCK] = True
    return kept.to(document_T.device)
