"""Models whose parameters lie in flat shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class LaidOut(Protocol):
    """What :meth:`FlatLayout.flat_layout` gives. Positions are counted in elements.

    ``rank`` is a data-parallel rank, ``tensor_rank`` a tensor-parallel one. ``range_of_parameter``,
    ``cut``, ``join`` and ``reshard`` may be missing; the requirements about them are then declined.
    """

    @property
    def shard_size(self) -> int:
        """Elements of every rank's shard, padding included."""

    def table(self) -> Mapping[str, tuple[int, int]]:
        """Where each parameter begins and ends in the buffer, in the order of the buffer."""

    def shard_pad(self, rank: int) -> int:
        """Elements of padding at the end of a rank's shard."""

    def range_in_shard(self, name: str, rank: int) -> tuple[int, int]:
        """Where a parameter begins and ends in a rank's shard; alike where it is not there."""

    def range_of_parameter(self, name: str, rank: int) -> tuple[int, int]:
        """Which elements of a parameter, in C order, are in a rank's shard."""

    def cut(self, values: Mapping[str, Tensor], rank: int, tensor_rank: int = 0) -> Tensor:
        """A rank's shard [shard_size] of whole parameters, in their dtype; padding is zero."""

    def join(self, shards: Mapping[tuple[int, int], Tensor]) -> Mapping[str, Tensor]:
        """Whole parameters of the shards of all ranks, which are given by (rank, tensor_rank)."""

    def reshard(
        self, shards: Mapping[tuple[int, int], Tensor], to: LaidOut
    ) -> Mapping[tuple[int, int], Tensor]:
        """The shards of another layout of the same parameters, from those of this one."""


class FlatLayout(Protocol):
    """Where the elements of parameters lie in flat shards: arithmetic, without ranks or weights."""

    def flat_layout(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        *,
        ranks: int = 1,
        tensor_ranks: int = 1,
        tensor_dims: Mapping[str, int] | None = None,
        weight_decay: Mapping[str, bool] | None = None,
        sequence_parallel: Sequence[str] = (),
    ) -> LaidOut:
        """The layout of parameters, names and whole shapes, over ``ranks`` shards.

        The buffer holds the parameters one behind the other, flattened in C order, without gaps, and
        padding at its end, to a multiple of 32 elements a rank: shards of one size, of which rank r
        has elements ``r * shard_size`` to ``(r + 1) * shard_size``. Padding can fill several shards.

        ``tensor_dims``: the axis along which each of ``tensor_ranks`` has an even part of a
        parameter; others are whole on all of them. Each tensor-parallel rank has a buffer of its
        own, with its parts.

        Parameters are in the order of the buffer, unless ``weight_decay`` is given (for each of
        them): then they are sorted, those that are alike in the order given, by ``(decays, decays ==
        split, decays != sequence parallel)``, False before True, where a parameter is split if it
        is one of ``tensor_dims``, and sequence parallel if it is one of ``sequence_parallel`` and
        is not split.

        What ``cut``, ``join`` and ``reshard`` give shares no memory with what they are given.

        Raises an exception that names it for an axis that ``tensor_ranks`` do not divide, a number
        of ranks below 1, a rank beyond the last, values that are missing, unknown or of another
        shape, even with as many elements, and shards that are missing or of another length.

        Source: ServiceNow/Fast-LLM, ``engine/multi_stage/fsdp.py``.
        """


class ShardedModel(Protocol):
    """What :meth:`FlatShards.flat_shards` gives: a model whose parameters are sharded over ranks.

    Every rank of the group makes the same calls. Names are those of ``nn.Sequential(*modules)``; a
    tied parameter has the first. Methods from :meth:`clip_gradients` on may be missing; the
    requirements about them are then declined.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last module, for this rank's ``x``; whatever that needs is restored."""

    def full_parameters(self) -> Mapping[str, Tensor]:
        """Every parameter, whole, in the precision that it is trained in, the same on every rank.

        They are those of now, whatever buffers hold; and copies.
        """

    def load_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Set every parameter from whole tensors.

        Raises an exception that names it for one that is missing, unknown or of another shape, even
        with as many elements, and for values that are not finite; the model is then as it was.
        """

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradients of a scalar to this rank's; with ``last``, gradients are complete then.

        Complete gradients are the mean over the ranks of what each of them added since the last
        step, any number of times, complete before or not.
        """

    def full_gradients(self) -> Mapping[str, Tensor]:
        """The complete gradient of every parameter that trains, whole; zeros where none came."""

    def step(self) -> None:
        """Let the optimizer update the parameters, and forget the gradients."""

    def clip_gradients(self, max_norm: float) -> float:
        """Scale complete gradients to a norm of at most ``max_norm``; gives the norm before.

        The norm is that of all of them together, as in ``torch.nn.utils.clip_grad_norm_``.
        """

    def save(self, directory: str) -> None:
        """Write parameters and the state of the optimizer.

        What ``directory`` held before can be loaded until the new checkpoint can, whenever the
        process ends.
        """

    def load(self, directory: str) -> None:
        """Read what :meth:`save` wrote, on any number of ranks, with other parameters frozen.

        Gradients are forgotten. The optimizer's moments of a parameter that was frozen are zero; a
        model without an optimizer takes the parameters alone. Raises an exception, on every rank,
        that names file and parameter for anything missing, unknown, truncated or of another shape;
        the model is then as it was, or refuses to be used.
        """

    def restore(self) -> None:
        """Gather all parameters, where that has not been done."""

    def invalidate(self) -> None:
        """Say that what was gathered is stale."""

    def parameter(self, name: str) -> Tensor:
        """The parameter that the module computes with, whole. It is the current one, or an error."""

    def buffers(self) -> Sequence[Tensor]:
        """What gathered parameters are views of; whoever fills it with NaN has lost nothing."""

    def forward_stage(self, index: int, x: Tensor) -> Tensor:
        """The output of one module; raises an exception unless it is restored."""

    def restore_stage(self, index: int) -> None:
        """Gather the parameters of one module."""

    def get_shard(self, name: str) -> Tensor:
        """This rank's flat part of the model, itself: ``"weights"``, ``"grads"``, and what it names.

        Of each module in turn: what trains, then what is frozen; of frozen parameters weights only.
        KeyError for a name that there is not, RuntimeError or AssertionError before it is there.
        """

    def split_shard(self, name: str) -> Mapping[str, Tensor]:
        """What this rank's flat part holds of each parameter, in the order in which it does: views."""


class FlatShards(Protocol):
    """A model sharded over data-parallel ranks: parameters, gradients, optimizer, checkpoints."""

    def flat_shards(
        self,
        modules: Sequence[nn.Module],
        *,
        optimizer: Mapping[str, Any] | None = None,
        training: bool = True,
        compute_dtype: torch.dtype | None = None,
        buffers: int | None = None,
        allow_no_grad: bool = True,
    ) -> ShardedModel:
        """The sharded model. Called on every rank of torch.distributed's default group.

        One rank calls it without a group. ``modules`` are applied one after another; each is a stage
        with parameters of its own, save those that are tied (the same object in several places). The
        values that they hold, the same on every rank, are the initial ones. Parameters that do not
        require a gradient are frozen. The modules are the model's from then on.

        ``optimizer``: ``{"name": "sgd", "lr", "momentum", "weight_decay"}`` or ``{"name": "adamw",
        "lr", "weight_decay"}``, as in ``torch.optim``; parameters of one axis do not decay. Without
        one there is no ``step``. ``training``: without, there are no gradients. ``compute_dtype`` is
        that of forward and backward pass (default: float32); parameters, gradients and state are
        float32. ``buffers``: how many buffers the modules share in turn, for gathered parameters;
        default: each its own.
        ``allow_no_grad``: whether a parameter that trains may end without a gradient, which is then
        zero; otherwise completing gradients raises an exception, on every rank, that names it.

        Sources: ServiceNow/Fast-LLM, ``engine/multi_stage``; ZeRO (arXiv 1910.02054).
        """
