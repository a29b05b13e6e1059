"""Small causal language models that are scored: not under test, so that a call may import them.

Both are called as those of transformers are, honour ``attention_mask`` and ``position_ids``, have
dropout, and note down how they were called. ``"attention"`` is a layer of attention over learned
absolute positions. ``"states"`` looks its logits up by a running sum of integers over all that is
attended to: they are the same bits in whatever company a request is run, in every dtype.
Axes are B rows, T tokens, H heads, W width, V vocabulary, P positions and S states.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, STATES = 16, 2, 509
DROPOUT = 0.3
SPREAD = 3.0
"""About the standard deviation of the logits of a position."""


@dataclass(frozen=True)
class Seen:
    """How a model was called once."""

    rows: int
    columns: int
    gradients: bool
    training: bool


class TinyLM(nn.Module):
    """What both models have in common."""

    looked_up = False
    """Whether logits are looked up and not computed."""

    def __init__(self, vocab: int, positions: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            vocab_size=vocab, max_position_embeddings=positions, model_type="gpt2"
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.seen: list[Seen] = []
        self.fails_at: int | None = None
        """The number of the call that raises, counted from the first that is noted."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> SimpleNamespace:
        """``logits`` [B, T, V] of ids [B, T]; raises for ids and positions that it has not."""
        if self.fails_at == len(self.seen):
            raise RuntimeError("the model ran out of memory")
        rows, columns = input_ids.shape
        gradients, training = torch.is_grad_enabled(), self.dropout.training
        self.seen.append(Seen(rows, columns, gradients, training))
        if position_ids is None:
            position_ids = torch.arange(columns, device=input_ids.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        position_ids = position_ids.expand(rows, columns)
        for given, below in (
            (input_ids, self.config.vocab_size),
            (position_ids, self.config.max_position_embeddings),
        ):
            # Not left to the look-up: on a GPU that would end the whole process.
            if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < below:
                raise IndexError(f"index out of range: {int(given.min())} … {int(given.max())}")
        logits = self.logits(input_ids, attention_mask.expand(rows, columns) != 0, position_ids)
        return SimpleNamespace(logits=logits)

    def logits(self, ids_BT: Tensor, attended_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The logits [B, T, V]."""
        raise NotImplementedError


class AttentionLM(TinyLM):
    """One layer of causal attention between embeddings of tokens and positions and a head."""

    def __init__(self, vocab: int, positions: int, generator: torch.Generator) -> None:
        super().__init__(vocab, positions)
        random = lambda *shape, scale: nn.Parameter(scale * torch.randn(shape, generator=generator))
        self.tokens_VW = random(vocab, WIDTH, scale=1.0)
        self.positions_PW = random(positions, WIDTH, scale=1.0)
        self.qkv_WX = random(WIDTH, 3 * WIDTH, scale=WIDTH**-0.5)
        self.out_WW = random(WIDTH, WIDTH, scale=2 * WIDTH**-0.5)
        self.head_WV = random(WIDTH, vocab, scale=SPREAD * (3.5 * WIDTH) ** -0.5)

    def logits(self, ids_BT: Tensor, attended_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The logits [B, T, V]."""
        rows, tokens = ids_BT.shape
        hidden_BTW = self.dropout(self.tokens_VW[ids_BT] + self.positions_PW[positions_BT])
        heads = (hidden_BTW @ self.qkv_WX).view(rows, tokens, 3, HEADS, -1)
        q_BHTD, k_BHTD, v_BHTD = heads.permute(2, 0, 3, 1, 4)
        scores_BHTT = q_BHTD @ k_BHTD.mT * k_BHTD.shape[-1] ** -0.5
        causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=ids_BT.device).tril()
        visible_BTT = causal_TT & attended_BT[:, None]
        # The lowest number and not -inf: padding in front sees nothing, and must not become NaN.
        lowest = torch.finfo(scores_BHTT.dtype).min
        weights_BHTT = scores_BHTT.masked_fill(~visible_BTT[:, None], lowest).softmax(-1)
        mixed_BTW = (weights_BHTT @ v_BHTD).transpose(1, 2).reshape(rows, tokens, WIDTH)
        return (hidden_BTW + mixed_BTW @ self.out_WW) @ self.head_WV


class StatesLM(TinyLM):
    """Logits looked up by a state: the sum of a number for each token at its position, so far."""

    looked_up = True

    def __init__(self, vocab: int, positions: int, generator: torch.Generator) -> None:
        super().__init__(vocab, positions)
        self.logits_SV = nn.Parameter(SPREAD * torch.randn(STATES, vocab, generator=generator))
        numbers_PV = torch.randint(STATES, (positions, vocab), generator=generator)
        self.register_buffer("numbers_PV", numbers_PV)

    def logits(self, ids_BT: Tensor, attended_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The logits [B, T, V]."""
        numbers_BT = self.numbers_PV[positions_BT, ids_BT]
        states_BT = (attended_BT * numbers_BT).cumsum(1) % STATES
        return self.dropout(F.embedding(states_BT, self.logits_SV))


KINDS = {"attention": AttentionLM, "states": StatesLM}


def tiny_lm(
    kind: str,
    *,
    seed: int,
    vocab: int,
    positions: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> TinyLM:
    """A model with random weights, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](vocab, positions, generator).to(device, dtype).eval()
