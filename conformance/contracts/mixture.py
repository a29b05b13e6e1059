"""Mixtures of experts: routing, experts, blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class MoERouter(Protocol):
    """Which experts a token goes to, and with what weights."""

    def moe_router(
        self,
        logits: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
        return_balancing_loss: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Weights [tokens, top_k] and experts int64 [tokens, top_k], of ``logits`` [tokens, experts].

        The scores are the softmax over all experts, or the sigmoid, in float32 at least; a token
        goes to the ``top_k`` experts with the largest scores, each once, in any order. Its weights
        are their scores. Of experts with equal scores those with the lowest index are chosen.
        Weights are in float32 or in the dtype of ``logits``; gradients reach ``logits`` through them.

        ``score``
            ``"softmax"`` or ``"sigmoid"``.
        ``normalize``
            a token's weights are divided by their sum (``norm_topk_prob``).
        ``selection_bias`` [experts]
            added to the scores to choose, and not part of the weights (DeepSeek-V3).
        ``groups`` (number, kept)
            experts are in so many groups of neighbours; experts of other groups than the ``kept``
            best are not chosen, whatever the sign of scores. A group is as good as its best expert;
            with a ``selection_bias`` as the sum of its best two, with the bias.
        ``scaling_factor``
            on the weights, at the end.
        ``return_balancing_loss``
            also return the load-balancing loss, a scalar: experts · Σₑ fₑ Pₑ, where fₑ is how many
            of its ``top_k`` slots a token gives to expert e and Pₑ the softmax of e over all experts,
            both averaged over the tokens. Gradients reach ``logits`` through P.

        NaN among a token's logits raises an exception or gives NaN among its weights. An exception
        for a ``top_k`` that is below 1 or above the number of experts that may be chosen, groups that
        do not divide the experts, a bias of another length, and a ``score`` that there is not.

        Sources: Switch Transformer (arXiv 2101.03961), Mixtral (arXiv 2401.04088), Qwen3-MoE,
        DeepSeek-V3 (arXiv 2412.19437, and ``inference/model.py`` for the groups).
        """


class Experts(Protocol):
    """The experts of a mixture, on tokens that have been routed."""

    def experts(
        self,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        layout: str = "concatenated",
        transposed: bool = False,
        activation: str = "silu",
        weight_on_input: bool = False,
    ) -> Tensor:
        """Σ over a token's slots of weight · down(activation(gate x) ⊙ up x), [tokens, hidden].

        ``hidden`` [tokens, hidden], ``indices`` int64 [tokens, slots], ``weights`` [tokens, slots]
        in the dtype of ``hidden`` or float32, ``gate_up_proj`` [experts, 2 · intermediate, hidden],
        ``down_proj`` [experts, hidden, intermediate]; the result is in the dtype of ``hidden``. There
        may be no tokens; an expert may have none, all, or several slots of a token, which all count.

        An index that is the number of experts is a slot without an expert (of another rank, or
        padding). It adds nothing, whatever its weight, and whatever its token holds, NaN included:
        not to outputs, nor to any gradient. A token with no other slots gives zeros.

        ``layout``
            of the rows of ``gate_up_proj``: ``"concatenated"`` has those of the gate and then those of
            up (transformers); ``"interleaved"`` g₀, u₀, g₁, u₁ … (gpt-oss).
        ``transposed``
            the last two axes of both weights are exchanged: [experts, hidden, 2 · intermediate] and
            [experts, intermediate, hidden] (gpt-oss, Llama 4). Shapes do not tell which it is.
        ``activation``
            ``"silu"``, or ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"relu"``.
        ``weight_on_input``
            Σ down(activation(gate (weight · x)) ⊙ up (weight · x)), as in Llama 4.

        Gradients reach ``hidden``, ``weights`` and both projections; that of an expert without tokens
        is zero. An exception for an index below 0 or beyond the number of experts, and for shapes
        that do not belong together.

        Sources: GLU variants (arXiv 2002.05202); Mixtral (arXiv 2401.04088); transformers
        ``integrations/moe.py``.
        """


class MoEBlock(Protocol):
    """A whole mixture-of-experts block: router, experts, and experts that every token goes to."""

    def moe_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        score: str = "softmax",
        normalize: bool = False,
        selection_bias: Tensor | None = None,
        groups: tuple[int, int] | None = None,
        scaling_factor: float = 1.0,
        shared: tuple[Tensor, Tensor] | None = None,
        shared_gate: Tensor | None = None,
        return_logits: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output [batch, tokens, hidden] of ``hidden`` [batch, tokens, hidden], in its dtype.

        ``router`` is [experts, hidden]: the logits are ``hidden @ router.T``. ``gate_up_proj`` and
        ``down_proj`` are those of :class:`Experts`, concatenated, with SiLU. Tokens do not depend on
        each other, and none is dropped.

        ``top_k``, ``score``, ``normalize``, ``selection_bias``, ``groups``, ``scaling_factor``
            of the routing, as in :class:`MoERouter`.
        ``shared`` (gate_up_proj [2 · width, hidden], down_proj [hidden, width])
            a further expert that every token goes to with weight 1; its width may differ.
        ``shared_gate`` [1, hidden]
            the shared expert's output is multiplied by ``sigmoid(hidden @ shared_gate.T)``
            (Qwen2-MoE).
        ``return_logits``
            return (output, logits [batch · tokens, experts]) as blocks of earlier transformers did; a
            decoder that unpacks two values takes a bare tensor of two rows apart without an error.

        Sources: transformers ``modeling_qwen3_moe``, ``modeling_mixtral``, ``modeling_qwen2_moe``.
        """


class ExpertParallelBlock(Protocol):
    """A mixture-of-experts block whose experts are dealt out to the ranks of a group."""

    def expert_parallel_block(
        self,
        hidden: Tensor,
        router: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        top_k: int,
        normalize: bool = False,
    ) -> Tensor:
        """What :class:`MoEBlock` computes for ``top_k`` and ``normalize``, whole on every rank.

        Called on every rank of torch.distributed's default group; one rank calls it without a group.
        ``hidden`` and ``router`` are the same on all of them; ``gate_up_proj`` and ``down_proj`` are
        the experts of this rank, as many on each: rank r has those from ``r * len(down_proj)`` on.

        A backward pass is made on every rank, with the same gradient of the output. It gives each the
        complete gradients of ``hidden`` and ``router``, the same bits, and those of its own experts. A
        rank whose experts have no token takes part in everything. Experts that do not add up to those
        of the router raise an exception on every rank.

        Source: transformers' expert parallelism (huggingface/transformers#48205).
        """
