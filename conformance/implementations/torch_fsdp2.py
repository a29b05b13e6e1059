"""Sharded models by torch's own FSDP2: ``fully_shard``, DTensor, and distributed checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class ShardedByTorch:
    """A model after ``fully_shard``; see :class:`conformance.contracts.ShardedModel`."""

    def __init__(self, model: FSDPModule, optimizer: Mapping[str, Any] | None) -> None:
        self.model = model
        self.optimizer = None
        if optimizer is not None:
            options = dict(optimizer)
            self.optimizer = OPTIMIZERS[options.pop("name")](groups(model), **options)

    def forward(self, x: Tensor) -> Tensor:
        """The model's output."""
        return self.model(x)

    def reshard(self) -> None:
        """Free what was gathered; after a forward pass alone the root's parameters stay whole."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def full_parameters(self) -> dict[str, Tensor]:
        """Every parameter, gathered."""
        self.reshard()
        return {name: whole(parameter) for name, parameter in self.model.named_parameters()}

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter; a strict ``set_model_state_dict``."""
        self.reshard()
        options = StateDictOptions(full_state_dict=True, strict=True)
        tied = tied_names(self.model)
        given = dict(values) | {name: values[stored] for name, stored in tied.items()}
        set_model_state_dict(self.model, given, options=options)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Backward pass; gradients are reduced in it with ``last``."""
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def full_gradients(self) -> dict[str, Tensor]:
        """Every gradient, gathered; zeros where none came."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {
            name: torch.zeros(p.shape) if p.grad is None else whole(p.grad)
            for name, p in trained.items()
        }

    def step(self) -> None:
        """One step of the optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clip_gradients(self, max_norm: float) -> float:
        """``torch.nn.utils.clip_grad_norm_``."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return float(whole(norm))

    def save(self, directory: str) -> None:
        """A distributed checkpoint of model and optimizer."""
        dcp.save(self.state(), checkpoint_id=directory)

    def load(self, directory: str) -> None:
        """Read it, on any number of ranks."""
        state = self.state()
        dcp.load({"model": state["model"]}, checkpoint_id=directory)
        if self.optimizer is None:
            set_model_state_dict(self.model, state["model"])
            return
        # Parameters that were frozen have no state in the checkpoint.
        partial = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"optimizer": state["optimizer"]}, checkpoint_id=directory, planner=partial)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        self.reshard()
        if self.optimizer is None:
            return {"model": get_model_state_dict(self.model)}
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


def whole(x: Tensor) -> Tensor:
    """A copy of a tensor, gathered if it is sharded."""
    full = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
    return full.clone()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train; those of one axis do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of tied parameters, and the first name of each."""
    first: dict[nn.Parameter, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first:
            tied[name] = first[parameter]
        first.setdefault(parameter, name)
    return tied


class TorchFSDP2:
    """torch's ``fully_shard`` on a CPU mesh of all ranks; every module is a unit of its own.

    Modules that share a parameter are one unit, for torch has a parameter belong to one.
    """

    def flat_shards(
        self,
        modules: Sequence[nn.Module],
        *,
        optimizer: Mapping[str, Any] | None = None,
        training: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> ShardedByTorch:
        """See :class:`conformance.contracts.FlatShards`."""
        if not dist.is_initialized():
            raise NotImplementedError("fully_shard needs a process group")
        model = nn.Sequential(*modules)
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        if not training:
            model.requires_grad_(False)
        if any(parameter.ndim == 0 for parameter in model.parameters()):
            raise NotImplementedError("fully_shard does not take scalar parameters")
        policy = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None
        )
        if not tied_names(model):
            for module in model:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return ShardedByTorch(model, optimizer)
