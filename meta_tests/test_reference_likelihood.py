"""The reference's log likelihoods against transformers' own loss, generation and models."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from conformance.implementations.reference import Reference

VOCAB, POSITIONS = 61, 32
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        num_key_value_heads=2,
        intermediate_size=48,
        **SIZES,
    ),
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        num_key_value_heads=2,
        intermediate_size=48,
        **SIZES,
    ),
}
LENGTHS = [(5, 3), (1, 1), (12, 1), (2, 9), (20, 12), (30, 3), (3, 5)]
"""Of contexts and continuations; up to one token above what a model is given at once."""
BATCHES = [(1, "right"), (3, "right"), (3, "left"), (16, "left")]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # logits that are far from even
    return model


@pytest.fixture(scope="module")
def requests():
    generator = torch.Generator().manual_seed(5)
    ids = lambda length: torch.randint(VOCAB, (length,), generator=generator).tolist()
    return [(ids(a), ids(b)) for a, b in LENGTHS]


def loss_in_sum(model, context, continuation):
    """transformers' loss of one text, of which the continuation alone is learnt, times its length."""
    ids = torch.tensor([context + continuation])
    labels = ids.clone()
    labels[:, : len(context)] = -100
    model.eval()
    with torch.no_grad():
        # The last token predicts nothing; with it some texts would be longer than the model.
        logits = model(ids[:, :-1]).logits
        padded = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
        return model.loss_function(padded, labels, vocab_size=VOCAB) * len(continuation)


@pytest.mark.parametrize(("batch_size", "padding_side"), BATCHES)
def test_scores_are_the_loss_of_transformers(model, requests, batch_size, padding_side):
    found = Reference().loglikelihood(
        model, requests, batch_size=batch_size, padding_side=padding_side, pad_id=7
    )
    assert [score.logprobs.shape for score in found] == [(b,) for _, b in LENGTHS]
    for score, request in zip(found, requests):
        expected = -loss_in_sum(model, *request)
        torch.testing.assert_close(score.logprobs.sum(), expected, rtol=2e-5, atol=2e-5)


def test_loss_of_the_whole_model_is_the_same(model, requests):
    """``model(input_ids, labels=…).loss`` where the model can be given every token."""
    for context, continuation in (r for r in requests if sum(map(len, r)) <= POSITIONS):
        ids = torch.tensor([context + continuation])
        labels = torch.tensor([[-100] * len(context) + continuation])
        model.eval()
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        (score,) = Reference().loglikelihood(model, [(context, continuation)])
        torch.testing.assert_close(-score.logprobs.mean(), loss, rtol=2e-5, atol=2e-5)


def test_too_long_requests_are_scored_by_their_last_tokens(model):
    context, continuation = list(range(1, 51)), [3, 1, 4, 1, 5]
    (whole,) = Reference().loglikelihood(model, [(context, continuation)])
    shown = (context + continuation)[-POSITIONS - 1 :]
    (cut,) = Reference().loglikelihood(model, [(shown[:-5], continuation)])
    assert torch.equal(whole.logprobs, cut.logprobs)
    (shorter,) = Reference().loglikelihood(model, [(context, continuation)], max_length=9)
    (cut,) = Reference().loglikelihood(model, [(context[-5:], continuation)])
    torch.testing.assert_close(shorter.logprobs, cut.logprobs)


def test_what_transformers_generates_is_greedy(model):
    context = [5, 9, 2]
    model.eval()
    with torch.no_grad():
        text = model.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, 3, dtype=torch.int64),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    generated = text[0, 3:].tolist()
    other = [*generated[:-1], (generated[-1] + 1) % VOCAB]
    found = Reference().loglikelihood(model, [(context, generated), (context, other)], batch_size=2)
    assert [score.is_greedy for score in found] == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_sixteen_bits_are_wide(model, requests, dtype):
    narrow = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    (score, *_) = Reference().loglikelihood(narrow, requests, batch_size=2)
    assert score.logprobs.dtype == torch.float32


def test_batch_size_below_one_is_refused(model):
    with pytest.raises(ValueError, match="batch_size"):
        Reference().loglikelihood(model, [([1], [2])], batch_size=0)
