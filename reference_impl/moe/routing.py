"""Which experts a token goes to, and with what weights; the load-balancing loss."""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")


class MoERouter:
    """Routing by scores, a step a method; axes are T tokens, E experts, K chosen, G groups."""

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
        """See :class:`conformance.contracts.MoERouter`; weights are in float32 or wider."""
        check_routing(logits.shape[-1], top_k, score, selection_bias, groups)
        scores_TE = self.expert_scores(logits, score)
        with torch.no_grad():
            ranked_TE = self.selection_scores(scores_TE, selection_bias)
            allowed_TE = self.allowed_experts(ranked_TE, groups, biased=selection_bias is not None)
            indices_TK = self.best(ranked_TE, allowed_TE, top_k)
        weights_TK = self.expert_weights(scores_TE, indices_TK, normalize) * scaling_factor
        if return_balancing_loss:
            return weights_TK, indices_TK, self.balancing_loss(logits, indices_TK)
        return weights_TK, indices_TK

    def expert_scores(self, logits: Tensor, score: str) -> Tensor:
        """Scores [T, E] in float32 at least: a 16-bit softmax cannot tell close experts apart."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.softmax(-1) if score == "softmax" else logits.sigmoid()

    def selection_scores(self, scores_TE: Tensor, bias: Tensor | None) -> Tensor:
        """What experts are chosen by."""
        return scores_TE if bias is None else scores_TE + bias.to(scores_TE)

    def allowed_experts(
        self, ranked_TE: Tensor, groups: tuple[int, int] | None, *, biased: bool
    ) -> Tensor:
        """Which experts may be chosen, bool [T, E]: those of the best groups."""
        if groups is None:
            return torch.ones_like(ranked_TE, dtype=torch.bool)
        number, kept = groups
        ranked_TGM = ranked_TE.unflatten(-1, (number, -1))
        best = min(2, ranked_TGM.shape[-1]) if biased else 1
        worth_TG = ranked_TGM.topk(best, dim=-1).values.sum(-1)
        chosen = self.best(worth_TG, torch.ones_like(worth_TG, dtype=torch.bool), kept)
        allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(-1, chosen, True)
        return allowed_TG[..., None].expand_as(ranked_TGM).flatten(-2)

    def best(self, ranked_TE: Tensor, allowed_TE: Tensor, top_k: int) -> Tensor:
        """The experts [T, K] with the largest scores; of equal ones those with the lowest index.

        A stable sort, because ``torch.topk`` does not say which of equal ones it takes.
        """
        ranked_TE = ranked_TE.masked_fill(~allowed_TE, -torch.inf)
        return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]

    def expert_weights(self, scores_TE: Tensor, indices_TK: Tensor, normalize: bool) -> Tensor:
        """The scores of the chosen experts, without any bias they were chosen by."""
        weights_TK = scores_TE.gather(-1, indices_TK)
        return weights_TK / weights_TK.sum(-1, keepdim=True) if normalize else weights_TK

    def balancing_loss(self, logits: Tensor, indices_TK: Tensor) -> Tensor:
        """experts · Σₑ fₑ Pₑ, both averaged over tokens; zero for no tokens."""
        tokens, experts = logits.shape
        probabilities_TE = self.expert_scores(logits, "softmax")
        slots_E = indices_TK.flatten().bincount(minlength=experts).to(probabilities_TE)
        tokens = max(tokens, 1)
        return experts * (slots_E / tokens * (probabilities_TE.sum(0) / tokens)).sum()


def check_routing(
    experts: int,
    top_k: int,
    score: str,
    selection_bias: Tensor | None,
    groups: tuple[int, int] | None,
) -> None:
    """Raise ValueError for options that do not fit so many experts."""
    if score not in SCORES:
        raise ValueError(f"score is {score!r}, expected one of {', '.join(SCORES)}")
    if selection_bias is not None and selection_bias.shape != (experts,):
        found = list(selection_bias.shape)
        raise ValueError(f"selection_bias has shape {found}, expected [{experts}]")
    open_to = experts
    if groups is not None:
        number, kept = groups
        if number < 1 or experts % number:
            raise ValueError(f"{number} groups do not divide {experts} experts")
        if not 1 <= kept <= number:
            raise ValueError(f"{kept} groups of {number} cannot be kept")
        open_to = kept * experts // number
    if not 1 <= top_k <= open_to:
        raise ValueError(f"top_k is {top_k}, expected 1 to {open_to} (of {experts} experts)")
