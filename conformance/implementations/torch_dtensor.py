"""Layers by torch's own tensor parallelism: ``parallelize_module`` and DTensor on a CPU mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class ShardedByTorch:
    """A module whose parameters are DTensors, called with and giving plain local tensors."""

    def __init__(self, module: nn.Module, names: Mapping[str, str]) -> None:
        self.module = module
        self.names = names
        """Names of the contract by those of the parameters."""

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's output."""
        return self.module(*inputs)

    def shards(self) -> dict[str, Tensor]:
        """The local parts of the parameters."""
        return {self.names[name]: local(p.detach()) for name, p in self.module.named_parameters()}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the local parts, placed as the parameters are."""
        return {self.names[name]: local_gradient(p) for name, p in self.module.named_parameters()}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """The gradient of this rank's part; a gradient may be placed otherwise, or be partial sums."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


class GatedMLP(nn.Module):
    """SwiGLU, written for one process."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.gate = linear(weights["gate.weight"])
        self.up = linear(weights["up.weight"])
        self.down = linear(weights["down.weight"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] of ``x`` [..., C]."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class SideBySide(nn.Module):
    """Several projections of one input."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of each."""
        return tuple(layer(x) for layer in self.layers.values())


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with copies of these weights."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


class TorchDTensor:
    """Offers those kinds of layers that torch has a parallel style for."""

    def parallel_linear(
        self,
        kind: str,
        weights: Mapping[str, Tensor],
        *,
        group_size: int | None = None,
        gather_output: bool = False,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
        heads: tuple[int, int] | None = None,
    ) -> ShardedByTorch:
        """See :class:`conformance.contracts.ParallelLinear`.

        DTensor splits unevenly where ranks do not divide a width; what cannot be told from an even
        split afterwards is refused here, as torchtitan's models do by hand.
        """
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if kind in ("norm", "cross_entropy", "gate_up", "embedding", "head"):
            return getattr(self, kind)(weights, ranks, group_size)
        module, plan, names, split = self.plan(
            kind, weights, gather_output, input_is_parallel, heads, ranks
        )
        if not reduce_results:
            raise NotImplementedError("RowwiseParallel has a Partial output only as a DTensor")
        for name, (size, what) in split.items():
            if size % (group_size or ranks):
                groups = group_size or ranks
                raise ValueError(f"{name}: {what} {size} is not divisible by {groups} ranks")
        return self.parallel(module, plan, names, ranks, group_size)

    def plan(self, kind, weights, gather_output, input_is_parallel, heads, ranks):
        """The module, its parallel styles, its names, and the sizes that are split."""
        if kind == "column":
            style = ColwiseParallel(output_layouts=Replicate() if gather_output else Shard(-1))
            module = linear(weights["weight"], weights.get("bias"))
            return module, style, own_names(module), {"column": (len(weights["weight"]), "width")}
        if kind == "row":
            style = RowwiseParallel(input_layouts=Shard(-1) if input_is_parallel else Replicate())
            module = linear(weights["weight"], weights.get("bias"))
            return module, style, own_names(module), {"row": (weights["weight"].shape[1], "width")}
        if kind == "mlp":
            module = GatedMLP(weights)
            styles = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
            return module, styles, own_names(module), {"mlp": (len(weights["up.weight"]), "width")}
        if kind == "qkv":
            if "weight" in weights:
                raise NotImplementedError("no parallel style splits a fused projection by heads")
            if heads[1] % ranks and ranks % heads[1] == 0:
                raise NotImplementedError("DTensor does not repeat key/value heads on ranks")
            parts = {n: linear(weights[f"{n}.weight"], weights.get(f"{n}.bias")) for n in "qkv"}
            width = len(weights["q.weight"]) // heads[0]
            for name in "kv":
                if len(weights[f"{name}.weight"]) != heads[1] * width:
                    raise ValueError(f"{name}.weight has not {heads[1]} heads of {width} rows")
            module = SideBySide(parts)
            styles = {f"layers.{name}": ColwiseParallel() for name in "qkv"}
            names = {k: k.removeprefix("layers.") for k in own_names(module)}
            sizes = {"q": (heads[0], "heads"), "k": (heads[1], "key/value heads")}
            return module, styles, names, sizes
        raise NotImplementedError(f"torch has no parallel style for {kind}")

    def gate_up(self, weights, ranks, group_size):
        """Two column-parallel layers."""
        if "weight" in weights:
            raise NotImplementedError("no parallel style splits a fused projection")
        size, groups = len(weights["gate.weight"]), group_size or ranks
        if size % groups:
            raise ValueError(f"intermediate width {size} is not divisible by {groups} ranks")
        module = SideBySide({n: linear(weights[f"{n}.weight"]) for n in ("gate", "up")})
        styles = {f"layers.{name}": ColwiseParallel() for name in ("gate", "up")}
        names = {k: k.removeprefix("layers.") for k in own_names(module)}
        return self.parallel(module, styles, names, ranks, group_size)

    def embedding(self, weights, ranks, group_size):
        """``RowwiseParallel`` of an embedding: its rows are split."""
        weight = weights["weight"]
        module = nn.Embedding(*weight.shape, dtype=weight.dtype, _weight=weight.clone())
        style = RowwiseParallel(input_layouts=Replicate())
        return self.parallel(module, style, own_names(module), ranks, group_size)

    def head(self, weights, ranks, group_size):
        """``ColwiseParallel`` of a linear layer, gathered."""
        module = linear(weights["weight"])
        style = ColwiseParallel(output_layouts=Replicate())
        return self.parallel(module, style, own_names(module), ranks, group_size)

    def norm(self, weights, ranks, group_size):
        """Not offered."""
        raise NotImplementedError("SequenceParallel splits tokens, not the axis that is normed")

    def cross_entropy(self, weights, ranks, group_size):
        """Not offered."""
        raise NotImplementedError("loss_parallel takes whole DTensors, not a rank's logits")

    def parallel(self, module, plan, names, ranks, group_size) -> ShardedByTorch:
        """The module on the rank's group."""
        if ranks == 1:
            return ShardedByTorch(module, names)
        size = group_size or ranks
        device = next(module.parameters()).device.type
        mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("groups", "ranks"))
        return ShardedByTorch(parallelize_module(module, mesh["ranks"], plan), names)


def own_names(module: nn.Module) -> dict[str, str]:
    """Every parameter under its own name."""
    return {name: name for name, _ in module.named_parameters()}
