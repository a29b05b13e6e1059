"""What an implementation can offer: one Protocol a contract, one method a Protocol.

An adapter is any object (a module, an instance) with some of these methods. Nothing is inherited
or registered. A method that is missing is *not offered*. A case is *declined* when the method does
not take an option that the case needs, or raises ``NotImplementedError("why")``; so an adapter
names in its signature the options that it supports, and only those. Both are counted in the report.

Tensors are on one device. Inputs must not be changed, outputs must not share memory with them, and
a value is NaN or infinite only where the mathematics says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from conformance.contracts.attention import Attention, CachedAttention, Rotary, RotaryModule
from conformance.contracts.compression import (
    CompressedCheckpoint,
    CompressionStatistics,
    FittedCore,
    LoadedCompressed,
    SharedCore,
    SharedCoreBlock,
    SharedCoreFit,
    SharedCoreLayer,
    Statistics,
)
from conformance.contracts.distillation import (
    CheckpointWatcher,
    DistillationLoss,
    LogLikelihood,
    Score,
    Watcher,
)
from conformance.contracts.flat_shards import FlatLayout, FlatShards, LaidOut, ShardedModel
from conformance.contracts.gpt import CheckpointReader, GPTCheckpoint, LoadedGPT
from conformance.contracts.mixture import ExpertParallelBlock, Experts, MoEBlock, MoERouter
from conformance.contracts.qwen2 import (
    CausalLM,
    LoadedLM,
    ParallelLayer,
    ParallelLinear,
    WeightLoader,
)

__all__ = [
    "CONTRACTS",
    "Attention",
    "CachedAttention",
    "CausalLM",
    "CheckpointReader",
    "CheckpointWatcher",
    "CompressedCheckpoint",
    "CompressionStatistics",
    "Contract",
    "DistillationLoss",
    "ExpertParallelBlock",
    "Experts",
    "FittedCore",
    "FlatLayout",
    "FlatShards",
    "GPTCheckpoint",
    "LaidOut",
    "LoadedCompressed",
    "LoadedGPT",
    "LoadedLM",
    "LogLikelihood",
    "MoEBlock",
    "MoERouter",
    "ParallelLayer",
    "ParallelLinear",
    "Rotary",
    "RotaryModule",
    "Score",
    "ShardedModel",
    "SharedCore",
    "SharedCoreBlock",
    "SharedCoreFit",
    "SharedCoreLayer",
    "Statistics",
    "Watcher",
    "WeightLoader",
]


@dataclass(frozen=True)
class Contract:
    """A contract by name: the name of its method, and what the method takes."""

    name: str
    protocol: type
    on_device: bool = True
    """Whether it computes on a device; arithmetic about files and offsets has no part on a GPU."""

    @property
    def summary(self) -> str:
        """The first line of the Protocol's docstring."""
        return inspect.getdoc(self.protocol).splitlines()[0]

    @cached_property
    def positional(self) -> tuple[str, ...]:
        """Names of the positional arguments."""
        return tuple(
            name
            for name, parameter in self._parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
        )

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Every option with its default; ``inspect.Parameter.empty`` where it is always given."""
        return {
            name: parameter.default
            for name, parameter in self._parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(getattr(self.protocol, self.name)).parameters

    def signature_problem(self, method: Callable) -> str | None:
        """Why ``method`` cannot be called as this contract is, in one line; None if it can."""
        try:
            parameters = inspect.signature(method).parameters.values()
        except (TypeError, ValueError):
            return None  # a builtin: nothing to read
        expected = ", ".join((*self.positional, "*options"))
        takes = f"{self.name}{inspect.signature(method)}"
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if len(places) < len(self.positional) and not variadic:
            return f"{takes} takes too few positional arguments: expected {self.name}({expected})"
        named = [
            *places[len(self.positional) :],
            *(p for p in parameters if p.kind is p.KEYWORD_ONLY),
        ]
        options = self.defaults
        unknown = [p.name for p in named if p.default is p.empty and p.name not in options]
        if unknown:
            return (
                f"{takes} requires {', '.join(map(repr, unknown))}, which the contract does not "
                f"have: expected {self.name}({expected}) with options {', '.join(options)}"
            )
        return None


CONTRACTS: dict[str, Contract] = {
    contract.name: contract
    for contract in (
        Contract("attention", Attention),
        Contract("rotary", Rotary),
        Contract("rotary_module", RotaryModule),
        Contract("cached_attention", CachedAttention),
        Contract("gpt_checkpoint", GPTCheckpoint),
        Contract("parallel_linear", ParallelLinear),
        Contract("weight_loader", WeightLoader),
        Contract("causal_lm", CausalLM),
        Contract("flat_layout", FlatLayout, on_device=False),
        Contract("flat_shards", FlatShards),
        Contract("moe_router", MoERouter),
        Contract("experts", Experts),
        Contract("moe_block", MoEBlock),
        Contract("expert_parallel_block", ExpertParallelBlock),
        Contract("shared_core", SharedCore),
        Contract("shared_core_fit", SharedCoreFit),
        Contract("shared_core_block", SharedCoreBlock),
        Contract("compression_statistics", CompressionStatistics, on_device=False),
        Contract("compressed_checkpoint", CompressedCheckpoint),
        Contract("distillation_loss", DistillationLoss),
        Contract("loglikelihood", LogLikelihood),
        Contract("checkpoint_watcher", CheckpointWatcher, on_device=False),
    )
}
