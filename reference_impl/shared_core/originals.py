"""The weights of an original model, by their names in files, whatever form they come in.

Experts come one by one (``experts.3.gate_proj.weight``, Mixtral's ``experts.3.w1.weight``), or fused as
transformers holds them: ``experts.gate_up_proj`` [E, 2I, H], rows of the gate first, and
``experts.down_proj`` [E, H, I]. Which form it is is told by the names, never by shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reference_impl.hf_directory import open_directory
from reference_impl.shared_core.architecture import Architecture
from reference_impl.shared_core.block import PROJECTIONS
from reference_impl.stored import CheckpointError


@dataclass(frozen=True)
class Lazy:
    """A tensor, or a part of it, that is read when it is asked for."""

    source: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    read_part: Callable[[int, Sequence[range]], Tensor]


class Original:
    """The weights of a model with experts."""

    def __init__(
        self, tensors: Mapping[str, Lazy], architecture: Architecture, source: str
    ) -> None:
        self.architecture = architecture
        self.source = source
        self.tensors = {file_name(name, architecture): each for name, each in tensors.items()}
        self.check()

    @classmethod
    def of_directory(cls, directory: Path, architecture: Architecture) -> Original:
        """Those of a Hugging Face directory; nothing is read but headers."""
        weights = open_directory(directory).items()
        lazy = {name: Lazy(w.file, w.shape, w.read, w.read_part) for name, w in weights}
        return cls(lazy, architecture, str(directory))

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], architecture: Architecture) -> Original:
        """Those of a state dictionary in memory."""
        return cls({name: in_memory(t) for name, t in state.items()}, architecture, "the model")

    def experts(self, layer: int, projection: str) -> Tensor:
        """The weights of all experts [E, d_out, d_in] of a projection, in new memory."""
        fused = self.fused(layer)
        if projection == "down_proj" and "down_proj" in fused:
            return self.tensors[fused["down_proj"]].read()
        if projection != "down_proj" and "gate_up_proj" in fused:
            width = self.architecture.intermediate_size
            rows = range(width) if projection == "gate_proj" else range(width, 2 * width)
            return self.tensors[fused["gate_up_proj"]].read_part(1, [rows])
        keys = self.expert_keys(layer, projection)
        return torch.stack([self.tensors[key].read() for key in keys])

    def others(self) -> Iterator[tuple[str, Lazy]]:
        """Every weight that is not of an expert."""
        experts = set(self.keys_of_experts())
        return ((name, each) for name, each in self.tensors.items() if name not in experts)

    def fused(self, layer: int) -> dict[str, str]:
        """The fused tensors of a layer: what they hold, and their names."""
        block = f"model.layers.{layer}.{self.architecture.block}.experts"
        names = {name: f"{block}.{name}" for name in ("gate_up_proj", "down_proj")}
        return {name: key for name, key in names.items() if key in self.tensors}

    def expert_keys(self, layer: int, projection: str) -> list[str]:
        """The names of the experts' weights of a projection, in the order of the experts."""
        numbers = range(self.architecture.num_experts)
        return [self.architecture.expert_key(layer, expert, projection) for expert in numbers]

    def keys_of_experts(self) -> Iterator[str]:
        """The names of all tensors that hold experts."""
        for layer in self.architecture.expert_layers:
            fused = self.fused(layer)
            yield from fused.values()
            for projection in PROJECTIONS:
                if holder(projection) not in fused:
                    yield from self.expert_keys(layer, projection)

    def check(self) -> None:
        """Raise :class:`CheckpointError` for experts that are missing, surplus or of another shape."""
        expected = {}
        for layer in self.architecture.expert_layers:
            fused = self.fused(layer)
            for projection in PROJECTIONS:
                number, shape = self.architecture.num_experts, self.architecture.shape(projection)
                if projection == "down_proj" and "down_proj" in fused:
                    expected[fused["down_proj"]] = (number, *shape)
                elif holder(projection) in fused:
                    expected[fused["gate_up_proj"]] = (number, 2 * shape[0], shape[1])
                else:
                    expected |= dict.fromkeys(self.expert_keys(layer, projection), shape)
        for key, shape in expected.items():
            if key not in self.tensors:
                raise CheckpointError(self.source, "is missing", key=key)
            found = self.tensors[key]
            if found.shape != shape:
                problem = f"has shape {list(found.shape)}, expected {list(shape)}"
                raise CheckpointError(found.source, problem, key=key)
        for key, found in self.tensors.items():
            if ".experts." in key and key not in expected:
                raise CheckpointError(found.source, "is not of this model", key=key)


def holder(projection: str) -> str:
    """The fused tensor that a projection is in."""
    return "down_proj" if projection == "down_proj" else "gate_up_proj"


def file_name(name: str, architecture: Architecture) -> str:
    """The name in files of a weight that may have its name in memory."""
    if architecture.block == "mlp":
        return name
    return name.replace(".mlp.", f".{architecture.block}.")


def in_memory(tensor: Tensor) -> Lazy:
    """A tensor that is there already."""

    def part(dim: int, ranges: Sequence[range]) -> Tensor:
        return torch.cat([tensor.detach().narrow(dim, r.start, len(r)) for r in ranges], dim)

    return Lazy("the model", tuple(tensor.shape), lambda: tensor.detach().clone(), part)
