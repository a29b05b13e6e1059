"""The reference's experts against numpy in float64, and against transformers' models."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from transformers import Llama4TextConfig, Qwen3MoeConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from reference_impl.moe.experts import BatchedExperts, Experts, GroupedExperts, grouped_product

FORMS = (Experts, BatchedExperts, GroupedExperts)
NUMPY_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def made(tokens=7, experts=5, slots=3, hidden=10, intermediate=6, dtype=torch.float64, seed=0):
    """Hidden, indices (with repeats and sentinels), weights, and both projections."""
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    indices = torch.randint(experts + 1, (tokens, slots), generator=g)
    floating = (
        r(tokens, hidden),
        r(tokens, slots),
        r(experts, 2 * intermediate, hidden),
        r(experts, hidden, intermediate),
    )
    x, weights, gate_up, down = (t.to(dtype) for t in floating)
    return x, indices, weights, gate_up, down


def one_token(x_H, gate_up, down, layout, transposed, activation):
    """What one expert makes of one token, row by row in numpy."""
    rows = gate_up.T if transposed else gate_up
    inner = len(rows) // 2
    values = []
    for i in range(inner):
        gate = rows[2 * i] if layout == "interleaved" else rows[i]
        up = rows[2 * i + 1] if layout == "interleaved" else rows[inner + i]
        values.append(NUMPY_ACTIVATIONS[activation](np.dot(gate, x_H)) * np.dot(up, x_H))
    columns = down if transposed else down.T
    return sum(value * column for value, column in zip(values, columns))


def in_numpy(x, indices, weights, gate_up, down, layout, transposed, activation, weight_on_input):
    """The contract, a token and a slot at a time."""
    x, indices, weights, gate_up, down = (t.numpy() for t in (x, indices, weights, gate_up, down))
    out = np.zeros_like(x)
    for token, slot in np.ndindex(indices.shape):
        expert, weight = indices[token, slot], weights[token, slot]
        if expert == len(down):
            continue
        given = x[token] * (weight if weight_on_input else 1)
        y = one_token(given, gate_up[expert], down[expert], layout, transposed, activation)
        out[token] += y * (1 if weight_on_input else weight)
    return out


@pytest.mark.parametrize("form", [Experts, BatchedExperts])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", NUMPY_ACTIVATIONS)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_experts_are_those_of_numpy(form, layout, transposed, activation, weight_on_input):
    tensors = made()
    if transposed:
        tensors = (*tensors[:3], tensors[3].mT.contiguous(), tensors[4].mT.contiguous())
    options = {
        "layout": layout,
        "transposed": transposed,
        "activation": activation,
        "weight_on_input": weight_on_input,
    }
    found = form().experts(*tensors, **options)
    np.testing.assert_allclose(found.numpy(), in_numpy(*tensors, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(10, 6), (16, 8), (7, 5)])
def test_grouped_products_are_those_of_the_loop(dtype, widths):
    hidden, intermediate = widths
    tensors = made(hidden=hidden, intermediate=intermediate, dtype=dtype)
    expected, found = (form().experts(*tensors) for form in (Experts, GroupedExperts))
    rounding = torch.finfo(dtype).eps
    # Values inside reach some tens, and either form rounds them a few times.
    torch.testing.assert_close(found, expected, rtol=4 * rounding, atol=16 * rounding)


def test_grouped_product_is_a_product_for_each_group():
    x, weight = torch.randn(6, 7), torch.randn(4, 5, 7)
    found = grouped_product(x, weight, torch.tensor([2, 2, 5, 6], dtype=torch.int32))
    groups = [x[:2] @ weight[0].T, x[2:5] @ weight[2].T, x[5:] @ weight[3].T]
    torch.testing.assert_close(found, torch.cat(groups))


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_gradients_are_finite_differences(weight_on_input):
    hidden, indices, *rest = made(tokens=4, hidden=5, intermediate=3)
    leaves = [x.requires_grad_() for x in (hidden, *rest)]
    run = lambda hidden, *rest: Experts().experts(
        hidden, indices, *rest, weight_on_input=weight_on_input
    )
    assert gradcheck(run, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_those_of_qwen3_moe(form):
    hidden, indices, weights, gate_up, down = made(hidden=16, intermediate=8, dtype=torch.float32)
    indices = indices.clamp(max=4)
    config = Qwen3MoeConfig(num_experts=5, hidden_size=16, moe_intermediate_size=8)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up)
        module.down_proj.copy_(down)
        expected = module(hidden, indices, weights)
    found = form().experts(hidden, indices, weights, gate_up, down)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_experts_with_weights_on_the_input_are_those_of_llama4(form):
    hidden, _, weights, gate_up, down = made(slots=5, dtype=torch.float32)
    gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    module = Llama4TextExperts(
        Llama4TextConfig(num_local_experts=5, hidden_size=10, intermediate_size=6)
    )
    with torch.no_grad():
        module.gate_up_proj.copy_(gate_up)
        module.down_proj.copy_(down)
        routed = module(hidden.repeat(5, 1) * weights.T.reshape(-1, 1))
    expected = routed.view(5, 7, 10).sum(0)
    indices = torch.arange(5).expand(7, 5)
    options = {"transposed": True, "weight_on_input": True}
    found = form().experts(hidden, indices, weights, gate_up, down, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_worked_out_by_hand(form):
    # Expert 0: relu(1·2) · (3·2) = 12, down 0.5: 6. Expert 1: relu(-1·2) = 0. Weights 2 and 9.
    hidden = torch.tensor([[2.0]])
    gate_up, down = (
        torch.tensor([[[1.0], [3.0]], [[-1.0], [5.0]]]),
        torch.tensor([[[0.5]], [[7.0]]]),
    )
    indices, weights = torch.tensor([[0, 1, 2]]), torch.tensor([[2.0, 9.0, torch.nan]])
    found = form().experts(hidden, indices, weights, gate_up, down, activation="relu")
    assert found.tolist() == [[12.0]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_any_expert_gradients_are_zeros(form, tokens):
    hidden, _, weights, gate_up, down = made(tokens=tokens, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weights, gate_up, down)]
    out = form().experts(hidden, torch.full((tokens, 3), 5), weights, gate_up, down)
    assert out.shape == hidden.shape
    assert not out.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("indices", lambda x: x.index_fill(0, torch.tensor([0]), -1)),
        ("indices", lambda x: x.index_fill(0, torch.tensor([0]), 6)),
        ("indices", lambda x: x[:, :-1]),
        ("weights", lambda x: x[:-1]),
        ("hidden", lambda x: x[:, :-1]),
        ("hidden", lambda x: x[0]),
        ("gate_up_proj", lambda x: x[:, :-1]),
        ("gate_up_proj", lambda x: x[:-1]),
        ("down_proj", lambda x: x.mT),
        ("down_proj", lambda x: x[0]),
    ],
)
def test_what_does_not_belong_together_is_refused(name, wrong):
    names = ("hidden", "indices", "weights", "gate_up_proj", "down_proj")
    given = dict(zip(names, made()))
    given[name] = wrong(given[name])
    with pytest.raises((ValueError, IndexError)):
        Experts().experts(**given)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="swish"):
        Experts().experts(*made(), activation="swish")
    with pytest.raises(ValueError, match="up_gate"):
        Experts().experts(*made(), layout="up_gate")
