"""A stage: a module whose parameters are views of flat buffers, and its two units.

The parameters of a stage that train are one unit, those that are frozen another. A parameter that
several modules share is stored once, by the first stage that has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reference_impl.flat_shards.config import FORWARD_MODES, StageMode, check_mode
from reference_impl.flat_shards.layout import ParameterMeta
from reference_impl.flat_shards.unit import FlatUnit


class Stage:
    """One module of a model, and the units that hold its parameters.

    ``borrowed`` maps names of this module's parameters to the stage that stores them and their name
    there: ``owner.unit_of(name)``.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        units: list[FlatUnit],
        borrowed: dict[str, tuple[Stage, str]],
    ) -> None:
        self.index = index
        self.module = module
        self.units = units
        self.borrowed = borrowed
        self.mode: StageMode | None = None
        self.sharing: list[Stage] = []
        """Stages that share a weight buffer with this one."""
        self.poison: float | None = None
        """What invalidated buffers are filled with, to find who reads them; None: nothing."""

    # Parameters

    @property
    def owners(self) -> list[Stage]:
        """The stages that store parameters which this one borrows."""
        return list(dict.fromkeys(owner for owner, _ in self.borrowed.values()))

    def unit_of(self, name: str) -> FlatUnit:
        """The unit that stores a parameter of this stage, by its whole name."""
        return next(unit for unit in self.units if name in unit.layout.names)

    def bind(self) -> None:
        """Replace the module's parameters by those of the units, tied ones by their owner's."""
        for unit in self.units:
            for name, parameter in unit.parameters.items():
                self._replace(name, parameter)
        for name, (owner, stored) in self.borrowed.items():
            self._replace(name, owner.unit_of(stored).parameters[stored])

    def _replace(self, name: str, parameter: nn.Parameter) -> None:
        """Every place of the module that holds what ``name`` names gets ``parameter``."""
        path = name.removeprefix(f"{self.index}.")
        old = self.module.get_parameter(path)
        for module in self.module.modules():
            for attribute, value in module._parameters.items():
                if value is old:
                    module._parameters[attribute] = parameter

    # Restoring

    @property
    def restored(self) -> bool:
        """Whether the buffers hold what the shards do, those of borrowed parameters included."""
        own = all(unit.restored for unit in self.units)
        return own and all(unit.restored for owner in self.owners for unit in owner.units)

    def restore_parameters(self) -> None:
        """Gather the parameters of the stage; stages that share its buffers lose theirs. Collective."""
        check_mode(f"stage {self.index}", self.mode, "parameters", FORWARD_MODES)
        for stage in (*self.owners, self):
            fresh = [unit for unit in stage.units if not unit.restored]
            for unit in fresh:
                unit.restore_parameters()
            if fresh:
                for other in stage.sharing:
                    other.lose_buffer()

    def invalidate_buffer(self) -> None:
        """Restore anew next time."""
        for unit in self.units:
            unit.invalidate_buffer()
            if self.poison is not None and unit.weight_buffer is not None:
                unit.weight_buffer.data.fill_(self.poison)

    def lose_buffer(self) -> None:
        """Another stage has taken the buffer: what it holds is not this stage's any more."""
        for unit in self.units:
            unit.invalidate_buffer()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """The module's output; raises RuntimeError unless the stage is restored."""
        check_mode(f"stage {self.index}", self.mode, "forward pass", FORWARD_MODES)
        if not self.restored:
            raise RuntimeError(
                f"stage {self.index} is not restored: its parameters are not in the buffer; "
                "call restore_parameters() first"
            )
        return self.module(x, **options)

    # Gradients

    def reset_gradients(self) -> None:
        """See :meth:`FlatUnit.reset_gradients`."""
        for unit in self.units:
            unit.reset_gradients()

    def reduce_gradients(self, *, accumulate: bool = False, allow_no_grad: bool = False) -> None:
        """See :meth:`FlatUnit.reduce_gradients`."""
        for unit in self.units:
            unit.reduce_gradients(accumulate=accumulate, allow_no_grad=allow_no_grad)


def parameter_metas(
    index: int, module: nn.Module, tensor_ranks: int = 1
) -> dict[str, tuple[ParameterMeta, nn.Parameter]]:
    """What is known of each parameter of a module, by its whole name ``{index}.{name}``.

    Attributes of a parameter say more than can be seen: ``tensor_parallel_dim`` (it is the slice of
    a tensor-parallel rank), ``weight_decay`` (default: it has two axes or more),
    ``sequence_parallel``, ``allow_no_grad``. A parameter that the module has under several names has
    the first.
    """
    metas = {}
    for name, parameter in module.named_parameters():
        dim = getattr(parameter, "tensor_parallel_dim", None)
        shape = list(parameter.shape)
        if dim is not None:
            shape[dim] *= tensor_ranks
        metas[f"{index}.{name}"] = (
            ParameterMeta(
                f"{index}.{name}",
                tuple(shape),
                dim,
                requires_grad=parameter.requires_grad,
                weight_decay=getattr(parameter, "weight_decay", parameter.ndim > 1),
                sequence_parallel=getattr(parameter, "sequence_parallel", False),
                allow_no_grad=getattr(parameter, "allow_no_grad", False),
            ),
            parameter,
        )
    return metas


class StageCall(torch.autograd.Function):
    """A stage as one step of the graph, whose backward pass restores the stage first.

    Called with a tensor that requires a gradient, so that the step is recorded even where its input
    is token ids.
    """

    @staticmethod
    def forward(context, x, stage, options, _recorded):
        """The stage's output, outside of the graph of what came before."""
        with torch.enable_grad():
            inner = x.detach()
            if x.is_floating_point():
                inner.requires_grad_()
            out = stage.forward(inner, **options)
        context.stage, context.inner, context.out = stage, inner, out
        return out.detach()

    @staticmethod
    def backward(context, gradient):
        """Gradients of the stage's parameters are accumulated, that of its input is returned."""
        if not context.out.requires_grad:
            return None, None, None, None
        context.stage.restore_parameters()
        with torch.enable_grad():
            torch.autograd.backward(context.out, gradient)
        return context.inner.grad, None, None, None
