"""Implementations that lose a little accuracy, in ways that reviews let through.

Each is within the tolerance of the suite, and computes the right thing. Only a comparison with what
it was before shows the loss.
"""

import torch

from reference_impl.attention import Attention
from reference_impl.moe.experts import Experts
from reference_impl.rotary import Rotary


class _InModelDtype(Attention):
    """Knows the dtype of the call."""

    def attention(self, q, k, v, **options):
        self.dtype = q.dtype
        return super().attention(q, k, v, **options)

    def rounded(self, x):
        """``x`` as if it had been stored in the dtype of the call."""
        return x.to(self.dtype).to(x.dtype)


class RoundedWeights(_InModelDtype):
    """The softmax weights are stored in the model's dtype before they meet the values."""

    def softmax(self, *arguments):
        weights, lse = super().softmax(*arguments)
        return self.rounded(weights), lse


class RoundedScores(_InModelDtype):
    """One more rounding of q·k."""

    def scores(self, *arguments):
        return self.rounded(super().scores(*arguments))


class RoundedQueries(_InModelDtype):
    """The scaled queries are stored in the model's dtype."""

    def scores(self, q, k, scale):
        return self.rounded(q * scale) @ k.transpose(-1, -2)


class AccumulatesInModelDtype(_InModelDtype):
    """Two halves of the keys are summed in the model's dtype."""

    def combine(self, weights, v):
        half = weights.shape[-1] // 2
        first = self.rounded(weights[..., :half] @ v[..., :half, :])
        return self.rounded(first + self.rounded(weights[..., half:] @ v[..., half:, :]))


class RoundedTwice(_InModelDtype):
    """The output is stored, scaled by 1.1, stored again, and scaled back."""

    def combine(self, *arguments):
        return self.rounded(self.rounded(super().combine(*arguments)) * 1.1) / 1.1


class RotatesInModelDtype(Rotary):
    """The tables and every product and sum are in the dtype of x."""

    def rotate(self, x, cos, sin, layout):
        return super().rotate(x, cos.to(x.dtype), sin.to(x.dtype), layout)


class RoundedTables(Rotary):
    """cos and sin are stored in the dtype of x."""

    def tables(self, x, *arguments):
        return tuple(table.to(x.dtype).to(torch.float32) for table in super().tables(x, *arguments))


class SumsSlotsInModelDtype(Experts):
    """The rows of a token are added up in the model's dtype."""

    def sum_slots(self, out_PH, tokens_P, hidden):
        return torch.zeros_like(hidden).index_add(0, tokens_P, out_PH.to(hidden.dtype))


LOSSES = (
    RoundedWeights,
    RoundedScores,
    RoundedQueries,
    AccumulatesInModelDtype,
    RoundedTwice,
    RotatesInModelDtype,
    RoundedTables,
    SumsSlotsInModelDtype,
)
