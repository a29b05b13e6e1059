"""Layers whose weights are split over ranks.

Every layer is made of the parts that its rank holds (:mod:`reference_impl.qwen2.sharding` says which)
and is called on every rank. Gradients are those of the loss on the full weights: equal on ranks that
hold the same.

Axes in tensor names::

    B batch    T tokens    C width of the model    I, O input and output width
    V vocabulary    H query heads    G key/value heads    D head width    N targets

Sources: Megatron-LM (arXiv 1909.08053); its bias of a row-parallel layer is added once, after the sum.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference_impl.ranks import (
    OneRank,
    Ranks,
    copy_to_ranks,
    gather_from_ranks,
    reduce_from_ranks,
)


class ShardedLayer(nn.Module):
    """A layer that can tell which parts of which weights it holds."""

    NAMES: ClassVar[dict[str, str]] = {}
    """Name of the weight for each parameter; default: the parameter's own name."""

    def hold(self, **parts: Tensor | None) -> None:
        """Register the parts as parameters; None is a bias that the layer does not have."""
        for name, part in parts.items():
            self.register_parameter(name, None if part is None else nn.Parameter(part))

    def shards(self) -> dict[str, Tensor]:
        """What this rank holds, by the weights' names."""
        return {self.NAMES.get(name, name): p.detach() for name, p in self.named_parameters()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight in full, normal with deviation 0.02, and keep this rank's part.

        After the same ``torch.manual_seed`` on every rank the parts are those of one full weight.
        """
        for name, parameter in self.named_parameters():
            index, count = self.place(name)
            parameter.copy_(0.02 * torch.randn(count, *parameter.shape)[index])

    def place(self, name: str) -> tuple[int, int]:
        """Which of how many different parts of a parameter this rank holds."""
        return self.ranks.rank, self.ranks.size

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of :meth:`shards`, zeros where nothing reached them."""
        return {
            self.NAMES.get(name, name): torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in self.named_parameters()
        }


class ColumnParallelLinear(ShardedLayer):
    """``x Wᵀ + b`` where each rank computes a part of the output.

    ``weight`` [O / ranks, I], ``bias`` [O / ranks].
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        ranks: Ranks | None = None,
        gather_output: bool = False,
    ) -> None:
        super().__init__()
        self.ranks = ranks or OneRank()
        self.gather_output = gather_output
        self.hold(weight=weight, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., O / ranks], or [..., O] if the output is gathered, of ``x`` [..., I]."""
        y = F.linear(self.copy(x), self.weight, self.bias)
        return gather_from_ranks(y, self.ranks) if self.gather_output else y

    def copy(self, x: Tensor) -> Tensor:
        """The input, whose gradient is summed over the ranks."""
        return copy_to_ranks(x, self.ranks)


class RowParallelLinear(ShardedLayer):
    """``x Wᵀ + b`` where each rank multiplies a part of the input; the parts are summed.

    ``weight`` [O, I / ranks], ``bias`` [O] in full.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        ranks: Ranks | None = None,
        input_is_parallel: bool = True,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        self.ranks = ranks or OneRank()
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        self.hold(weight=weight, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] of ``x`` [..., I / ranks], or of all of it [..., I] if it is not parallel.

        Without ``reduce_results`` what the ranks return has the output as its sum.
        """
        if not self.input_is_parallel:
            width = self.weight.shape[1]
            x = copy_to_ranks(x, self.ranks).narrow(-1, self.ranks.rank * width, width)
        partial = F.linear(x, self.weight)
        if self.reduce_results:
            return self.add_bias(self.reduce(partial))
        return self.add_bias(partial) if self.ranks.rank == 0 else partial

    def place(self, name: str) -> tuple[int, int]:
        """The bias is held in full."""
        return (0, 1) if name == "bias" else super().place(name)

    def reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks."""
        return reduce_from_ranks(partial, self.ranks)

    def add_bias(self, y: Tensor) -> Tensor:
        """The output with the bias, if there is one."""
        return y if self.bias is None else y + self.bias


class QKVParallelLinear(ShardedLayer):
    """Queries, keys and values of the heads of a rank.

    ``q_weight`` [H D / ranks, I]; ``k_weight`` and ``v_weight`` [G D / ranks, I], or [D, I] where
    several ranks hold one head: then the gradients of these are summed over ``replicas``.
    """

    NAMES: ClassVar[dict[str, str]] = {
        f"{part}_{what}": f"{part}.{what}" for part in "qkv" for what in ("weight", "bias")
    }

    def __init__(
        self, parts: dict[str, Tensor], *, ranks: Ranks | None = None, replicas: Ranks | None = None
    ) -> None:
        super().__init__()
        self.ranks, self.replicas = ranks or OneRank(), replicas or OneRank()
        self.hold(**{name: parts.get(full) for name, full in self.NAMES.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., H D / ranks], and twice [..., heads held x D], of ``x`` [..., I]."""
        x = copy_to_ranks(x, self.ranks)
        q = F.linear(x, self.q_weight, self.q_bias)
        k = F.linear(x, self.shared(self.k_weight), self.shared(self.k_bias))
        v = F.linear(x, self.shared(self.v_weight), self.shared(self.v_bias))
        return q, k, v

    def place(self, name: str) -> tuple[int, int]:
        """Replicas hold the same keys and values."""
        if name.startswith("q"):
            return super().place(name)
        return self.ranks.rank // self.replicas.size, self.ranks.size // self.replicas.size

    def shared(self, weight: Tensor | None) -> Tensor | None:
        """A weight that the replicas have in common, whose gradients are summed."""
        return None if weight is None else copy_to_ranks(weight, self.replicas)


class GateUpParallelLinear(ShardedLayer):
    """The two projections of a gated MLP, side by side; ``gate`` and ``up`` [width / ranks, I]."""

    NAMES: ClassVar[dict[str, str]] = {
        f"{part}_{what}": f"{part}.{what}" for part in ("gate", "up") for what in ("weight", "bias")
    }

    def __init__(self, parts: dict[str, Tensor], *, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks or OneRank()
        self.hold(**{name: parts.get(full) for name, full in self.NAMES.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up, each [..., width / ranks], of ``x`` [..., I]."""
        x = copy_to_ranks(x, self.ranks)
        return F.linear(x, self.gate_weight, self.gate_bias), F.linear(
            x, self.up_weight, self.up_bias
        )


class ParallelMLP(ShardedLayer):
    """``down(silu(gate(x)) * up(x))`` with one sum over the ranks and no bias.

    ``gate`` and ``up`` [width / ranks, C], ``down`` [C, width / ranks].
    """

    NAMES: ClassVar[dict[str, str]] = {
        f"{part}_weight": f"{part}.weight" for part in ("gate", "up", "down")
    }

    def __init__(self, parts: dict[str, Tensor], *, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks = ranks or OneRank()
        self.hold(**{name: parts[full] for name, full in self.NAMES.items()})

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] of ``x`` [..., C]."""
        x = copy_to_ranks(x, self.ranks)
        hidden = self.activate(F.linear(x, self.gate_weight), F.linear(x, self.up_weight))
        return self.reduce(F.linear(hidden, self.down_weight))

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """SwiGLU without its projections: silu of the gate, times up."""
        return F.silu(gate) * up

    def reduce(self, partial: Tensor) -> Tensor:
        """The sum over the ranks."""
        return reduce_from_ranks(partial, self.ranks)


class VocabParallelEmbedding(ShardedLayer):
    """An embedding whose rows are split; ``weight`` [rows of a rank, C], zeros behind the last."""

    def __init__(self, weight: Tensor, *, vocab_size: int, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks, self.vocab_size = ranks or OneRank(), vocab_size
        self.hold(weight=weight)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., C] of ``ids`` int64 [...]; ValueError for an id that is not of the vocabulary."""
        check_ids(ids, self.vocab_size)
        local = ids - self.ranks.rank * len(self.weight)
        held = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(torch.where(held, local, 0), self.weight)
        return reduce_from_ranks(torch.where(held[..., None], rows, 0), self.ranks)


class VocabParallelHead(ShardedLayer):
    """The LM head, split like the embedding; logits are gathered and padding is cut off."""

    def __init__(self, weight: Tensor, *, vocab_size: int, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks, self.vocab_size = ranks or OneRank(), vocab_size
        self.hold(weight=weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V] of ``x`` [..., C], the same on every rank."""
        logits = F.linear(copy_to_ranks(x, self.ranks), self.weight)
        return self.unpadded(gather_from_ranks(logits, self.ranks))

    def unpadded(self, logits: Tensor) -> Tensor:
        """The logits of tokens, without those of padding."""
        return logits[..., : self.vocab_size]


class ParallelRMSNorm(ShardedLayer):
    """RMS norm over an axis that is split: the mean square is that of all ranks.

    ``weight`` [width / ranks].
    """

    def __init__(self, weight: Tensor, *, eps: float, ranks: Ranks | None = None) -> None:
        super().__init__()
        self.ranks, self.eps = ranks or OneRank(), eps
        self.hold(weight=weight)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of ``x`` [..., width / ranks]; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = self.sum_over_ranks(wide.square().sum(-1, keepdim=True))
        normed = wide * torch.rsqrt(mean_square / (x.shape[-1] * self.ranks.size) + self.eps)
        return normed.to(x.dtype) * self.weight

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum, which is used on every rank, so that its gradients are summed too."""
        return copy_to_ranks(reduce_from_ranks(x, self.ranks), self.ranks)


class VocabParallelCrossEntropy(ShardedLayer):
    """Cross entropy of logits whose vocabulary is split; every statistic is of all ranks."""

    def __init__(
        self,
        *,
        vocab_size: int,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks, self.vocab_size = ranks or OneRank(), vocab_size
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index

    def forward(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """The loss of each target [N], 0 where it is ignored; ``logits`` [N, rows of a rank].

        The target's probability is ``1 - label_smoothing``; the rest is spread over the vocabulary.
        """
        ranks, rows = self.ranks, logits_NV.shape[-1]
        index = torch.arange(rows, device=logits_NV.device) + ranks.rank * rows
        logits_NV = torch.where(
            index < self.vocab_size,
            logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)),
            -torch.inf,
        )
        largest_N = torch.stack(ranks.gather(logits_NV.detach().amax(-1))).amax(0)
        exps_NV = torch.exp(logits_NV - largest_N[:, None])
        log_sum_N = self.total(exps_NV.sum(-1)).log() + largest_N
        kept = targets_N != self.ignore_index
        hit_NV = index == torch.where(kept, targets_N, -1)[:, None]
        finite_NV = torch.where(index < self.vocab_size, logits_NV, 0)
        target_N = self.target_logits((finite_NV * hit_NV).sum(-1))
        mean_N = self.total(finite_NV.sum(-1)) / self.width(rows)
        smoothing = self.label_smoothing
        loss_N = log_sum_N - (1 - smoothing) * target_N - smoothing * mean_N
        return torch.where(kept, loss_N, 0)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return reduce_from_ranks(x, self.ranks)

    def target_logits(self, own_N: Tensor) -> Tensor:
        """The targets' logits, each of which one rank has, and the others zeros."""
        return self.total(own_N)

    def width(self, rows: int) -> int:
        """Over how many tokens the smoothing is spread."""
        return self.vocab_size


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids that are not of the vocabulary."""
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is not of the vocabulary of {vocab_size} tokens")
