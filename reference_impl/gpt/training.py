"""The small and the medium GPT exactly as their scripts train them: batch 1, dense masks, the loss.

Parameters have the names and shapes of the checkpoints. These two modules repeat what they share,
so that each reads as its script does; :mod:`reference_impl.gpt.batched` is the model to use.

Sources: ``train_gpt_small.py`` and ``train_gpt_medium.py`` of modded-ipagpt-training, which are
modded-nanogpt's of June and May 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_impl.gpt import layers, masks
from reference_impl.gpt.config import GPTConfig, head_key, state_shapes


class TrainedGPT(nn.Module):
    """What both scripts have in common: parameters by the names of the checkpoint, and the loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tensors = {
            key: nn.Parameter(torch.full(shape, torch.nan))
            for key, shape in state_shapes(config).items()
        }
        for key, parameter in self.tensors.items():
            self.register_parameter(key.replace(".", "/"), parameter)

    def load(self, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> TrainedGPT:
        """Copy every tensor of a checkpoint, converted to ``dtype``; none may be missing or extra."""
        if state.keys() != self.tensors.keys():
            raise KeyError(f"not the tensors of {self.config}")
        for key, parameter in self.tensors.items():
            parameter.data = state[key].detach().to(dtype, copy=True)
        return self

    def forward(
        self, ids_T: Tensor, *, document_start: int, window_blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Features [T, C] after the last norm, and logits [T, V] after the soft cap."""
        config = self.config
        windows = {
            long: masks.window_mask(ids_T, document_start, window_blocks // (1 if long else 2))
            for long in (True, False)
        }
        visible = [
            windows[masks.has_long_window(layer, config.format)]
            for layer in range(config.num_layers)
        ]
        features_TC = self.features(ids_T, visible)
        logits_TV = F.linear(features_TC, self.tensors[head_key(config.format)])
        return features_TC, layers.soft_cap(logits_TV, config.format, config.model_dim)

    def loss(self, ids_T: Tensor, targets_T: Tensor, **window: int) -> Tensor:
        """Mean cross-entropy over the tokens, every row of the padded head included."""
        return F.cross_entropy(self(ids_T, **window)[1], targets_T)

    def features(self, ids_T: Tensor, visible: list[Tensor]) -> Tensor:
        """Features [T, C] under one mask [T, T] a layer."""
        raise NotImplementedError

    def weight(self, layer: int, name: str) -> Tensor:
        """A weight of one block."""
        return self.tensors[f"blocks.{layer}.{name}"]

    def heads(self, x_TC: Tensor) -> Tensor:
        """[T, H * D] as [1, H, T, D]."""
        return layers.split_heads(x_TC[None], self.config.num_heads)


class SmallGPT(TrainedGPT):
    """``train_gpt_small.py``: attention of the normed input, plain values, U-net skips."""

    def features(self, ids_T, visible):
        """See :meth:`TrainedGPT.features`."""
        config, tensors = self.config, self.tensors
        tables = [tensors[f"value_embeds.{i}.weight"][ids_T] for i in range(3)]
        ve = [*tables, *[None] * (config.num_layers - 6), *tables]
        skip_weights, lambdas, sa_lambdas = layers.split_scalars(
            tensors["scalars"], config.num_layers
        )
        half = config.num_layers // 2
        x = x0 = layers.norm(tensors["embed.weight"][ids_T])
        stack: list[Tensor] = []
        for i in range(config.num_layers):
            if i >= half:
                x = x + skip_weights[i - half] * stack.pop()
            x = lambdas[i, 0] * x + lambdas[i, 1] * x0
            if config.has_attention(i):
                x = x + self.attention(i, layers.norm(x), ve[i], sa_lambdas[i], visible[i])
            x = x + self.mlp(i, layers.norm(x))
            if i < half:
                stack.append(x)
        return layers.norm(x)

    def attention(self, i, x_TC, ve_TC, lambdas, visible_TT):
        """Self-attention of block ``i``."""
        q, k, v = (
            self.heads(y)
            for y in F.linear(x_TC, self.weight(i, "attn.qkv_w").flatten(0, 1)).chunk(3, -1)
        )
        q, k = layers.rotate(layers.norm(q)), layers.rotate(layers.norm(k))
        v = lambdas[0] * v if ve_TC is None else lambdas[0] * v + lambdas[1] * self.heads(ve_TC)
        y = layers.join_heads(layers.attend(q, k, v, visible_TT))[0]
        return F.linear(y, self.weight(i, "attn.c_proj.weight"))

    def mlp(self, i, x_TC):
        """The MLP of block ``i``."""
        hidden = layers.relu_squared(F.linear(x_TC, self.weight(i, "mlp.c_fc.weight")))
        return F.linear(hidden, self.weight(i, "mlp.c_proj.weight"))


class MediumGPT(TrainedGPT):
    """``train_gpt_medium.py``: attention of the input itself, normed values, three skips."""

    def features(self, ids_T, visible):
        """See :meth:`TrainedGPT.features`."""
        config, tensors = self.config, self.tensors
        tables = [tensors[f"value_embeds.{i}.weight"][ids_T] for i in range(3)]
        ve = [*tables, *[None] * (config.num_layers - 6), *tables]
        skip_weights, lambdas, sa_lambdas = layers.split_scalars(
            tensors["scalars"], config.num_layers
        )
        skip_map = {9: 6, 10: 4, 11: 2}
        x = x0 = layers.norm(tensors["embed.weight"][ids_T])
        outputs: list[Tensor] = []
        for i in range(config.num_layers):
            if i in skip_map:
                x = x + skip_weights[skip_map[i]] * outputs[skip_map[i]]
            x = lambdas[i, 0] * x + lambdas[i, 1] * x0
            if config.has_attention(i):
                x = x + self.attention(i, x, ve[i], sa_lambdas[i], visible[i])
            x = x + self.mlp(i, layers.norm(x))
            outputs.append(x)
        return layers.norm(x)

    def attention(self, i, x_TC, ve_TC, lambdas, visible_TT):
        """Self-attention of block ``i``."""
        qkvo = self.weight(i, "attn.qkvo_w")
        q, k, v = (self.heads(y) for y in F.linear(x_TC, qkvo[:3].flatten(0, 1)).chunk(3, -1))
        q, k = layers.rotate(layers.norm(q)), layers.rotate(layers.norm(k))
        v = layers.norm(v)
        v = lambdas[0] * v if ve_TC is None else lambdas[0] * v + lambdas[1] * self.heads(ve_TC)
        y = layers.join_heads(layers.attend(q, k, v, visible_TT))[0]
        return F.linear(y, qkvo[3])

    def mlp(self, i, x_TC):
        """The MLP of block ``i``."""
        hidden = layers.relu_squared(F.linear(x_TC, self.weight(i, "mlp.fc_w")))
        return F.linear(hidden, self.weight(i, "mlp.proj_w"))


TRAINED = {"small": SmallGPT, "medium": MediumGPT}
