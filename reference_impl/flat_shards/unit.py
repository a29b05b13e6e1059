"""One flat unit: a shard that holds the truth, and a buffer that parameters are views of.

The buffer holds nothing until :meth:`FlatUnit.restore_parameters` gathers the shards of all ranks
into it, and what is written to it never reaches the shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from reference_impl.flat_shards.config import (
    BACKWARD_MODES,
    FLOAT32,
    FORWARD_MODES,
    Precision,
    ShardName,
    StageMode,
    check_mode,
)
from reference_impl.flat_shards.layout import FlatLayout
from reference_impl.flat_shards.resharding import part_in_shard, split_buffer
from reference_impl.ranks import OneRank, Ranks, agree


class FlatUnit:
    """The trainable or the frozen parameters of a stage, sharded over ``ranks``.

    ``tensor`` are the ranks that hold other slices of the same parameters. Shards and buffers are
    one-dimensional; see :class:`FlatLayout` for what lies where.
    """

    def __init__(
        self,
        name: str,
        layout: FlatLayout,
        *,
        trainable: bool,
        precision: Precision = FLOAT32,
        ranks: Ranks | None = None,
        tensor: Ranks | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self.trainable = trainable
        self.precision = precision
        self.ranks = ranks or OneRank()
        self.tensor = tensor or OneRank()
        self.mode: StageMode | None = None
        self.shards: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.weight_buffer: Tensor | None = None
        self.grad_buffer: Tensor | None = None
        self.restored = False
        self._without_gradient: set[str] = set()

    # Setting up

    @property
    def shard_dtype(self) -> torch.dtype:
        """The dtype of every shard of the unit."""
        return self.precision.shard_dtype(self.trainable)

    @property
    def shard_pad(self) -> int:
        """Elements of padding at the end of this rank's shard."""
        return self.layout.shard_pad(self.ranks.rank)

    def shard_length(self, shard_name: str) -> int:
        """Elements of a shard: frozen parameters have weights only."""
        has_it = self.trainable or shard_name == ShardName.weights
        return self.layout.shard_size if has_it else 0

    def setup(
        self,
        mode: StageMode,
        shards: Mapping[str, Tensor],
        weight_buffer: Tensor | None = None,
        grad_buffer: Tensor | None = None,
    ) -> None:
        """Take shards and buffers, and make the parameters; once only.

        ``shards``: every shard that the mode has, by name, [shard_length]. Buffers of at least
        ``layout.buffer_size`` elements may be shared with units that are not needed at the same
        time; default: new ones, of zeros. Zeros are a promise of this implementation: Fast-LLM
        leaves the memory as it is.
        """
        if self.mode is not None:
            raise RuntimeError(f"{self.name} is set up already")
        for shard_name, shard in shards.items():
            self._check_tensor(shard_name, shard, self.shard_length(shard_name), self.shard_dtype)
        if not mode.support_forward and (weight_buffer is not None or grad_buffer is not None):
            raise ValueError(f"{self.name} has no buffers in mode {mode}")
        self.mode = mode
        self.shards = dict(shards)
        if mode.support_forward:
            dtype = self.precision.compute_dtype
            self.weight_buffer = self._buffer("weight buffer", weight_buffer, dtype)
            self._make_parameters()
        if mode.support_backward and self.trainable:
            dtype = self.precision.gradient_dtype
            self.grad_buffer = self._buffer("gradient buffer", grad_buffer, dtype)
            for name, parameter in self.parameters.items():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._accumulator(name))
            self.reset_gradients()

    def _buffer(self, what: str, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        size = self.layout.buffer_size
        if given is None:
            device = next((shard.device for shard in self.shards.values()), None)
            return torch.zeros(size, dtype=dtype, device=device)
        self._check_tensor(what, given[:size], size, dtype)
        return given[:size]

    def _check_tensor(self, what: str, tensor: Tensor, size: int, dtype: torch.dtype) -> None:
        if tuple(tensor.shape) != (size,) or tensor.dtype != dtype:
            raise ValueError(
                f"{what} of {self.name} has shape {list(tensor.shape)} and dtype {tensor.dtype}, "
                f"expected [{size}] and {dtype}"
            )

    def _make_parameters(self) -> None:
        trains = self.trainable and self.mode.support_backward
        for name, view in self.split_buffer(self.weight_buffer).items():
            requires_grad = trains and self.layout.meta(name).requires_grad
            self.parameters[name] = nn.Parameter(view, requires_grad=requires_grad)

    # The buffer

    def restore_parameters(self) -> None:
        """Gather the shards of all ranks into the buffer, unless that has been done. Collective."""
        check_mode(self.name, self.mode, "parameters", FORWARD_MODES)
        if self.restored:
            return
        # A tensor without the buffer's version counter: a backward pass that needs the weights has
        # them restored before it, and autograd must not object to that.
        buffer = self.weight_buffer.data
        begin = self.layout.shard_begin(self.ranks.rank)
        own = buffer[begin : begin + self.layout.shard_size]
        own.copy_(self.shards[ShardName.weights])
        self.ranks.gather_into(buffer, own)
        self.restored = True

    def invalidate_buffer(self) -> None:
        """Restore anew next time. The buffer keeps what it holds, which may be stale from now on."""
        self.restored = False

    def split_buffer(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer: every parameter in its shape on this tensor-parallel rank."""
        return split_buffer(self.layout, buffer)

    # Shards

    def split_shard(self, shard: Tensor) -> dict[str, Tensor]:
        """Views of this rank's shard: what it holds of every parameter, flat, possibly nothing."""
        ranges = ((name, self.range_in_shard(name)) for name in self.layout.names)
        return {name: shard[begin:end] for name, (begin, end) in ranges}

    def range_in_shard(self, name: str) -> tuple[int, int]:
        """Where a parameter begins and ends in this rank's shard."""
        return self.layout.range_in_shard(name, self.ranks.rank)

    def get_parameter_size_in_shard(self, name: str, shard_name: str = ShardName.weights) -> int:
        """How many elements of a parameter this rank's shard holds; frozen ones have weights only."""
        if not self.shard_length(shard_name):
            return 0
        begin, end = self.range_in_shard(name)
        return end - begin

    def reset_shard_pad(self, shard: Tensor, shard_name: str) -> int:
        """Zero the padding of a shard, and say how many elements it has; an empty shard has none."""
        dtype = shard.dtype if shard_name not in self.shards else self.shard_dtype
        self._check_tensor(shard_name, shard, self.shard_length(shard_name), dtype)
        if not shard.numel():
            return 0
        pad = self.shard_pad
        shard[shard.numel() - pad :].zero_()
        return pad

    def reconstruct_from_shard(self, shard: Tensor) -> Tensor:
        """The whole flat buffer of which every rank has its shard, a new tensor. Collective."""
        whole = shard.new_empty(self.layout.buffer_size)
        self.ranks.gather_into(whole, shard)
        return whole

    def parameter_global_to_shard(self, tensor: Tensor, name: str) -> Tensor:
        """This rank's elements of a whole parameter; see :func:`part_in_shard`."""
        return part_in_shard(self.layout, name, tensor, self.ranks.rank, self.tensor.rank)

    def import_state_tensor(self, name: str, shard: Tensor, tensor: Tensor) -> int:
        """Write a whole parameter, or state of its shape, to a shard; the count of what it took.

        Raises ValueError for another shape, also one of as many elements, and nothing is written.
        """
        own = self.parameter_global_to_shard(tensor, name)
        self._check_tensor("shard", shard, self.layout.shard_size, shard.dtype)
        begin, end = self.range_in_shard(name)
        shard[begin:end] = own
        return end - begin

    def export_shard(
        self, shard: Tensor, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, or its state, whole and in buffer order, of a shard. Collective."""
        whole = self.reconstruct_from_shard(shard if dtype is None else shard.to(dtype))
        for name, local in self.split_buffer(whole).items():
            dim = self.layout.meta(name).tensor_parallel_dim
            split = dim is not None and self.tensor.size > 1
            yield name, self.tensor.all_gather(local, dim) if split else local

    # Gradients

    def reset_gradients(self) -> None:
        """Forget what was accumulated. The buffer is not touched: the next gradient replaces it."""
        check_mode(self.name, self.mode, "gradients", BACKWARD_MODES)
        if self.trainable:
            names = self.parameters.items()
            self._without_gradient = {name for name, p in names if p.requires_grad}

    def _accumulator(self, name: str):
        """The hook that takes the gradient of a parameter to the buffer."""
        begin, end = self.layout.begin(name), self.layout.end(name)

        def accumulate(parameter: nn.Parameter) -> None:
            own = self.grad_buffer[begin:end].view(parameter.shape)
            if name in self._without_gradient:
                own.copy_(parameter.grad)
                self._without_gradient.discard(name)
            else:
                own.add_(parameter.grad)
            parameter.grad = None

        return accumulate

    def reduce_gradients(self, *, accumulate: bool = False, allow_no_grad: bool = False) -> None:
        """Make the gradient shard: the mean over the ranks of what each accumulated. Collective.

        With ``accumulate`` the mean is added to the shard. Raises RuntimeError, on every rank, that
        names a parameter without a gradient, unless it may have none, which is then zero.
        """
        check_mode(self.name, self.mode, "gradients", BACKWARD_MODES)
        if not self.restored:
            raise RuntimeError(f"{self.name} is not restored")
        if not self.trainable:
            return
        self._agree_on_missing_gradients(allow_no_grad)
        self._fill_missing_gradients()
        self.grad_buffer[self.layout.parameter_count :].zero_()
        self._sum_over_sequence_parallel_ranks()
        begin = self.layout.shard_begin(self.ranks.rank)
        total = self.ranks.all_reduce(self.grad_buffer)
        mean = total[begin : begin + self.layout.shard_size] / self.ranks.size
        shard = self.shards[ShardName.grads]
        if accumulate:
            shard.add_(mean)
        else:
            shard.copy_(mean)
        self.reset_gradients()

    def _agree_on_missing_gradients(self, allow_no_grad: bool) -> None:
        """Raise on every rank if one lacks a gradient: none may wait for another's."""
        if allow_no_grad:
            return
        missing = [
            name
            for name in self.layout.names
            if name in self._without_gradient and not self.layout.meta(name).allow_no_grad
        ]
        agree(self.ranks, RuntimeError(f"{missing[0]} has no gradient") if missing else None)

    def _fill_missing_gradients(self) -> None:
        """Gradients that never came are zero, whatever the buffer holds from before."""
        for name, gradient in self.split_buffer(self.grad_buffer).items():
            if name in self._without_gradient:
                gradient.zero_()

    def _sum_over_sequence_parallel_ranks(self) -> None:
        if self.tensor.size == 1:
            return
        for name, gradient in self.split_buffer(self.grad_buffer).items():
            if self.layout.meta(name).sequence_parallel:
                gradient.copy_(self.tensor.all_reduce(gradient))
