"""The models of :mod:`conformance.harness.likelihood_model` as lines that stand alone.

They are printed where a failure is to be reproduced without the suite. A test holds them to the same
bits and the same notes as the models that were scored.
"""

from __future__ import annotations

_MADE = {
    "states": """\
        self.logits_SV = torch.nn.Parameter(3.0 * torch.randn(509, vocab, generator=g))
        self.numbers_PV = torch.nn.Buffer(torch.randint(509, (positions, vocab), generator=g))
    def logits(self, ids, on, at):
        return self.dropout(self.logits_SV[(on * self.numbers_PV[at, ids]).cumsum(1) % 509])""",
    "attention": """\
        random = lambda scale, *shape: torch.nn.Parameter(scale * torch.randn(shape, generator=g))
        self.tokens_VW, self.positions_PW = random(1.0, vocab, 16), random(1.0, positions, 16)
        self.qkv_WX, self.out_WW = random(0.25, 16, 48), random(0.5, 16, 16)
        self.head_WV = random(3.0 * 56.0**-0.5, 16, vocab)
    def logits(self, ids, on, at):
        B, T = ids.shape
        x = self.dropout(self.tokens_VW[ids] + self.positions_PW[at])
        q, k, v = (x @ self.qkv_WX).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * 8**-0.5
        seen = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril() & on[:, None]
        lowest = torch.finfo(scores.dtype).min
        mixed = scores.masked_fill(~seen[:, None], lowest).softmax(-1) @ v
        return (x + mixed.transpose(1, 2).reshape(B, T, 16) @ self.out_WW) @ self.head_WV""",
}

_LINES = """\
from types import SimpleNamespace as N
class LM(torch.nn.Module):
    device = property(lambda self: next(self.parameters()).device)
    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        if self.fails_at == len(self.seen):
            raise RuntimeError('the model ran out of memory')
        B, T = input_ids.shape
        grad, train = torch.is_grad_enabled(), self.dropout.training
        self.seen.append(N(rows=B, columns=T, gradients=grad, training=train))
        at = torch.arange(T, device=self.device) if position_ids is None else position_ids
        on = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for x, n in (input_ids, self.config.vocab_size), (at, self.config.max_position_embeddings):
            if x.numel() and not 0 <= x.min() <= x.max() < n:
                raise IndexError('index out of range')
        return N(logits=self.logits(input_ids, on.expand(B, T) != 0, at.expand(B, T)))
    def __init__(self, vocab, positions, g):
        super().__init__()
        self.config = N(vocab_size=vocab, max_position_embeddings=positions, model_type='gpt2')
        self.dropout, self.seen, self.fails_at = torch.nn.Dropout(0.3), [], None
{made}
def tiny_lm(kind, *, seed, vocab, positions, dtype=torch.float32, device='cpu'):
    return LM(vocab, positions, torch.Generator().manual_seed(seed)).to(device, dtype).eval()"""


def stand_alone(kind: str) -> tuple[str, ...]:
    """Lines that define ``tiny_lm`` for one kind of model, after ``import torch``."""
    return tuple(_LINES.format(made=_MADE[kind]).splitlines())
