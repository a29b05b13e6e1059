"""One batched model for both formats: any batch, any length, padding, features and logits.

Axes in tensor names::

    B batch    T tokens    C width of the model    H heads    D head width    V rows of the head

Every step is a method of :class:`GPTBatched`, so that a planted bug replaces one of them.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_impl.gpt import layers, masks
from reference_impl.gpt.config import VALUE_EMBEDDINGS, GPTConfig
from reference_impl.gpt.saving import save_state


class Block(nn.Module):
    """The weights of one block, under names that both formats share."""

    def __init__(self, qkv_w: Tensor | None, o_w: Tensor | None, fc_w: Tensor, proj_w: Tensor):
        super().__init__()
        self.qkv_w = as_parameter(qkv_w)
        """[3, C, C], or None for the block without attention."""
        self.o_w = as_parameter(o_w)
        """[C, C], applied as ``F.linear(y, o_w)``."""
        self.fc_w = as_parameter(fc_w)
        self.proj_w = as_parameter(proj_w)


def as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """The tensor itself, without a copy, as a parameter."""
    return None if tensor is None else nn.Parameter(tensor.detach())


class GPTBatched(nn.Module):
    """The function of a small or medium checkpoint, on batches.

    Weights keep the dtype that they are given in; the computation is in ``compute_dtype``, to which
    each weight is converted where it is used.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        embed: Tensor,
        value_embeds: list[Tensor],
        blocks: list[Block],
        lm_head: Tensor,
        scalars: Tensor,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embed = as_parameter(embed)
        self.value_embeds = nn.ParameterList([as_parameter(table) for table in value_embeds])
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = as_parameter(lm_head)
        self.scalars = as_parameter(scalars)

    def forward(self, ids_BT: Tensor, **masks: Tensor | int | None) -> Tensor:
        """The logits; see :meth:`logits`."""
        return self.logits(ids_BT, **masks)

    def logits(self, ids_BT: Tensor, **masks: Tensor | int | None) -> Tensor:
        """Logits [B, T, V] after the soft cap, in float32 at least; options as in :meth:`features`."""
        return self.logits_of(self.features(ids_BT, **masks))

    def logits_of(self, features_BTC: Tensor) -> Tensor:
        """The logits of features."""
        logits_BTV = F.linear(features_BTC, self.weight(self.lm_head))
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return self.soft_cap(logits_BTV)

    def features(
        self,
        ids_BT: Tensor,
        *,
        valid: Tensor | None = None,
        document_start: int | None = None,
        window_blocks: int | None = None,
    ) -> Tensor:
        """Features [B, T, C] after the last norm, in ``compute_dtype``.

        ``ids_BT`` int64 [B, T]. ``valid`` bool [B, T] is False for padding, on either side, which no
        token sees. ``document_start``: the token that starts a new document; None, and all tokens
        are of one. ``window_blocks``: the window of training in blocks of 128 tokens, with
        ``document_start``; None, and every earlier token is seen. Raises ValueError for ids that
        have no embedding, an empty sequence, or masks that do not fit.
        """
        self.check_input(ids_BT, valid, document_start, window_blocks)
        visible = self.visible(ids_BT, valid, document_start, window_blocks)
        skips, lambdas, attention_lambdas = self.split_scalars()
        x0 = x = self.embed_tokens(ids_BT)
        outputs: list[Tensor] = []
        for layer in range(self.config.num_layers):
            x = self.add_skip(layer, x, outputs, skips)
            x = lambdas[layer, 0] * x + lambdas[layer, 1] * x0
            if self.has_attention(layer):
                value = self.value_embedding(layer, ids_BT)
                inputs = self.attention_input(x)
                x = x + self.attention(
                    layer, inputs, value, attention_lambdas[layer], visible[layer]
                )
            x = x + self.mlp(layer, layers.norm(x))
            outputs.append(x)
        return layers.norm(x)

    def state(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint; see :func:`to_state`."""
        return to_state(self)

    def save(self, path: str | os.PathLike[str], *, prefix: str = "", **entries: Any) -> None:
        """Write the checkpoint; see :func:`reference_impl.gpt.save_checkpoint`."""
        save_state(to_state(self), path, prefix=prefix, **entries)

    def check_input(
        self,
        ids_BT: Tensor,
        valid: Tensor | None,
        document_start: int | None,
        window_blocks: int | None,
    ) -> None:
        """Raise ValueError unless the model is defined on these inputs."""
        if ids_BT.ndim != 2 or not ids_BT.numel():
            raise ValueError(f"ids have shape {list(ids_BT.shape)}, expected [batch, tokens >= 1]")
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= len(self.embed):
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} has no embedding: there are {len(self.embed)} rows")
        if valid is not None and (valid.shape != ids_BT.shape or valid.dtype != torch.bool):
            raise ValueError(
                f"valid is {valid.dtype} {list(valid.shape)}, expected bool {list(ids_BT.shape)}"
            )
        if window_blocks is not None and (document_start is None or valid is not None):
            raise ValueError("window_blocks needs document_start, and takes no padding")

    def visible(
        self,
        ids_BT: Tensor,
        valid: Tensor | None,
        document_start: int | None,
        window_blocks: int | None,
    ) -> list[Tensor]:
        """The mask [B, 1, T, T] of each layer."""
        if window_blocks is None:
            mask = masks.visible_keys(ids_BT, valid=valid, document_start=document_start)
            return [mask] * self.config.num_layers
        windows = {
            long: torch.stack(
                [
                    masks.window_mask(ids_T, document_start, window_blocks // (1 if long else 2))
                    for ids_T in ids_BT
                ]
            )[:, None]
            for long in (True, False)
        }
        return [
            windows[masks.has_long_window(layer, self.config.format)]
            for layer in range(self.config.num_layers)
        ]

    def weight(self, parameter: Tensor) -> Tensor:
        """A parameter in the dtype of the computation."""
        return parameter.to(self.compute_dtype)

    def split_scalars(self) -> tuple[Tensor, Tensor, Tensor]:
        """Skip weights [L], block lambdas [L, 2], attention lambdas [L, 2]."""
        return layers.split_scalars(self.weight(self.scalars), self.config.num_layers)

    def embed_tokens(self, ids_BT: Tensor) -> Tensor:
        """The normed embedding of each token, [B, T, C]."""
        return layers.norm(self.weight(F.embedding(ids_BT, self.embed)))

    def value_embedding(self, layer: int, ids_BT: Tensor) -> Tensor | None:
        """What the block mixes into its values, [B, T, C], or None."""
        table = layers.value_embedding_of(layer, self.config.num_layers)
        if table is None:
            return None
        return self.weight(F.embedding(ids_BT, self.value_embeds[table]))

    def skip_of(self, layer: int) -> tuple[int, int] | None:
        """The block whose output is added to this block's input, and the index of its weight."""
        return layers.skip_of(layer, self.config.num_layers, self.config.format)

    def add_skip(self, layer: int, x: Tensor, outputs: list[Tensor], skips: Tensor) -> Tensor:
        """The input of a block with its skip connection, if it has one."""
        skip = self.skip_of(layer)
        return x if skip is None else x + skips[skip[1]] * outputs[skip[0]]

    def has_attention(self, layer: int) -> bool:
        """Whether the block has attention."""
        return self.config.has_attention(layer)

    def attention_input(self, x_BTC: Tensor) -> Tensor:
        """Attention reads the normed stream in the small model, the stream itself in the medium."""
        return layers.norm(x_BTC) if self.config.format == "small" else x_BTC

    def attention(
        self,
        layer: int,
        x_BTC: Tensor,
        value_BTC: Tensor | None,
        lambdas: Tensor,
        visible_B1TT: Tensor,
    ) -> Tensor:
        """Self-attention of one block, [B, T, C]."""
        block = self.blocks[layer]
        q, k, v = self.queries_keys_values(x_BTC, self.weight(block.qkv_w))
        q, k = self.norm_and_rotate(torch.cat([q, k], dim=1)).chunk(2, dim=1)
        v = self.mix_values(self.values(v), value_BTC, lambdas)
        y_BTC = layers.join_heads(self.attend(q, k, v, visible_B1TT))
        return F.linear(y_BTC, self.weight(block.o_w))

    def queries_keys_values(self, x_BTC: Tensor, qkv_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [B, H, T, D]; the rows of the weight are all queries, all keys, all values."""
        projected = F.linear(x_BTC, qkv_w.flatten(0, 1)).chunk(3, dim=-1)
        return tuple(layers.split_heads(each, self.config.num_heads) for each in projected)

    def norm_and_rotate(self, x_BHTD: Tensor) -> Tensor:
        """Queries and keys, normed a head and rotated by position."""
        return self.rotate(layers.norm(x_BHTD))

    def rotate(self, x_BHTD: Tensor) -> Tensor:
        """Rotation by position."""
        return layers.rotate(x_BHTD)

    def values(self, v_BHTD: Tensor) -> Tensor:
        """Values are normed a head in the medium model only."""
        return layers.norm(v_BHTD) if self.config.format == "medium" else v_BHTD

    def mix_values(self, v_BHTD: Tensor, value_BTC: Tensor | None, lambdas: Tensor) -> Tensor:
        """Values scaled by the first attention lambda, plus value embeddings by the second."""
        scaled = lambdas[0] * v_BHTD
        if value_BTC is None:
            return scaled
        return scaled + lambdas[1] * layers.split_heads(value_BTC, self.config.num_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible_B1TT: Tensor) -> Tensor:
        """Softmax attention, [B, H, T, D]."""
        return layers.attend(q, k, v, visible_B1TT)

    def mlp(self, layer: int, x_BTC: Tensor) -> Tensor:
        """The MLP of one block, [B, T, C]."""
        block = self.blocks[layer]
        hidden = self.activation(F.linear(x_BTC, self.weight(block.fc_w)))
        return F.linear(hidden, self.weight(block.proj_w))

    def activation(self, x: Tensor) -> Tensor:
        """Squared relu."""
        return layers.relu_squared(x)

    def soft_cap(self, logits_BTV: Tensor) -> Tensor:
        """The bound on the logits."""
        return layers.soft_cap(logits_BTV, self.config.format, self.config.model_dim)


def from_state(
    config: GPTConfig,
    state: dict[str, Tensor],
    *,
    compute_dtype: torch.dtype = torch.float32,
    model_class: type[GPTBatched] = GPTBatched,
) -> GPTBatched:
    """The batched model of a checkpoint's tensors; they are taken as they are, without a copy.

    Both formats hold the output projection as the weight of ``F.linear``: ``c_proj.weight`` in the
    small one, ``qkvo_w[3]`` in the medium one. Neither is transposed.
    """
    small = config.format == "small"
    blocks = []
    for layer in range(config.num_layers):
        tensor = {
            key.removeprefix(f"blocks.{layer}."): value
            for key, value in state.items()
            if key.startswith(f"blocks.{layer}.")
        }
        qkv_w = o_w = None
        if config.has_attention(layer):
            fused = tensor["attn.qkv_w" if small else "attn.qkvo_w"]
            qkv_w = fused[:3]
            o_w = tensor["attn.c_proj.weight"] if small else fused[3]
        fc_w, proj_w = ("c_fc.weight", "c_proj.weight") if small else ("fc_w", "proj_w")
        blocks.append(Block(qkv_w, o_w, tensor[f"mlp.{fc_w}"], tensor[f"mlp.{proj_w}"]))
    return model_class(
        config,
        embed=state["embed.weight"],
        value_embeds=[state[f"value_embeds.{i}.weight"] for i in range(VALUE_EMBEDDINGS)],
        blocks=blocks,
        lm_head=state["lm_head.weight" if small else "lm_head_w"],
        scalars=state["scalars"],
        compute_dtype=compute_dtype,
    )


def to_state(model: GPTBatched) -> dict[str, Tensor]:
    """The tensors of the checkpoint that the model came from, under its names and in its shapes."""
    small = model.config.format == "small"
    state = {"embed.weight": model.embed}
    for i, table in enumerate(model.value_embeds):
        state[f"value_embeds.{i}.weight"] = table
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}"
        if block.qkv_w is not None and small:
            state[f"{prefix}.attn.qkv_w"] = block.qkv_w
            state[f"{prefix}.attn.c_proj.weight"] = block.o_w
        elif block.qkv_w is not None:
            state[f"{prefix}.attn.qkvo_w"] = torch.cat([block.qkv_w, block.o_w[None]])
        fc_w, proj_w = ("c_fc.weight", "c_proj.weight") if small else ("fc_w", "proj_w")
        state[f"{prefix}.mlp.{fc_w}"] = block.fc_w
        state[f"{prefix}.mlp.{proj_w}"] = block.proj_w
    state["lm_head.weight" if small else "lm_head_w"] = model.lm_head
    state["scalars"] = model.scalars
    return {key: tensor.detach() for key, tensor in state.items()}
