"""The reference's distillation loss against numpy in float64, transformers' loss and torch's kl_div."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reference_impl.shared_core.distillation_loss import DistillationLoss, top_k_logits

LOSS = DistillationLoss().distillation_loss
BATCH, TOKENS, VOCABULARY = 3, 6, 17


def drawn(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, TOKENS, VOCABULARY)
    student = (2 * torch.randn(shape, generator=generator)).to(dtype)
    teacher = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    labels[0, :3], labels[1, 4:], labels[2, 2] = -100, -100, -100
    return student, teacher, labels


def numpy_log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def numpy_kl(log_p, log_r):
    return float((np.exp(log_p) * (log_p - log_r)).sum())


def numpy_divergence(log_q, log_s, kind, beta):
    if kind == "jsd" and 0 < beta < 1:
        log_m = np.log(beta * np.exp(log_q) + (1 - beta) * np.exp(log_s))
        return beta * numpy_kl(log_q, log_m) + (1 - beta) * numpy_kl(log_s, log_m)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return numpy_kl(log_s, log_q)
    return numpy_kl(log_q, log_s)


def numpy_loss(student, teacher, labels, alpha, temperature, kind, beta):
    """One token after the other."""
    losses = []
    for row in range(BATCH):
        for at in range(TOKENS - 1):
            target = int(labels[row, at + 1])
            if target == -100:
                continue
            logits, soft = student[row, at].numpy(), teacher[row, at].numpy()
            log_q, log_s = (numpy_log_softmax(x / temperature) for x in (soft, logits))
            divergence = numpy_divergence(log_q, log_s, kind, beta)
            hard = -numpy_log_softmax(logits)[target]
            losses.append(alpha * temperature**2 * divergence + (1 - alpha) * hard)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("kind", "beta"),
    [("forward_kl", 0.5), ("reverse_kl", 0.5)] + [("jsd", b) for b in (0.0, 0.1, 0.5, 0.9, 1.0)],
)
def test_values_are_those_of_numpy(kind, beta, temperature, alpha):
    student, teacher, labels = drawn()
    options = {"alpha": alpha, "temperature": temperature, "divergence": kind, "beta": beta}
    expected = numpy_loss(student, teacher, labels, alpha, temperature, kind, beta)
    assert float(LOSS(student, teacher, labels, **options)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradient_passes_gradcheck(kind):
    student, teacher, labels = drawn(seed=1)

    def loss(student):
        return LOSS(student, teacher, labels, divergence=kind, beta=0.3, temperature=2.0, alpha=0.6)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@pytest.mark.parametrize("items", [None, 29])
def test_cross_entropy_is_that_of_transformers(items):
    from transformers.loss.loss_utils import ForCausalLMLoss

    student, teacher, labels = drawn(seed=2, dtype=torch.float32)
    expected = ForCausalLMLoss(student, labels, VOCABULARY, num_items_in_batch=items)
    found = LOSS(student, teacher, labels, alpha=0.0, num_items_in_batch=items)
    torch.testing.assert_close(found, expected)


def test_forward_kl_is_that_of_torch():
    student, teacher, labels = drawn(seed=3)
    valid = labels[:, 1:] != -100
    log_s, log_q = (F.log_softmax(x[:, :-1][valid] / 3, -1) for x in (student, teacher))
    expected = 9 * F.kl_div(log_s, log_q, reduction="batchmean", log_target=True)
    torch.testing.assert_close(LOSS(student, teacher, labels, alpha=1.0, temperature=3.0), expected)


def test_gradient_at_large_temperatures_is_the_difference_of_centred_logits():
    student, teacher, labels = drawn(seed=4)
    student.requires_grad_()
    valid = labels[:, 1:] != -100
    centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
    limit = torch.zeros_like(teacher)
    limit[:, :-1][valid] = (centred[0] - centred[1])[:, :-1][valid] / VOCABULARY / valid.sum()
    errors = []
    for temperature in (1e3, 1e4):
        loss = LOSS(student, teacher, labels, alpha=1.0, temperature=temperature)
        (gradient,) = torch.autograd.grad(loss, student)
        errors.append(float((gradient - limit).abs().max()))
    assert errors[1] < errors[0] / 8


# A teacher's likeliest columns


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_more_columns_tell_more_until_all_are_given(kind, temperature):
    student, teacher, labels = drawn(seed=5)
    options = {"alpha": 1.0, "temperature": temperature, "divergence": kind}
    whole = float(LOSS(student, teacher, labels, **options))
    found = []
    for k in range(1, VOCABULARY + 1):
        values, indices, logsumexp = top_k_logits(teacher, k, temperature=temperature)
        top_k = {"teacher_indices": indices, "teacher_logsumexp": logsumexp}
        found.append(float(LOSS(student, values, labels, **options, **top_k)))
    assert all(fewer <= more * (1 + 1e-9) for fewer, more in pairwise(found))
    assert found[0] < 0.9 * whole
    assert found[-1] == pytest.approx(whole, rel=1e-12)


def test_top_k_of_a_cache_is_in_the_dtype_of_the_logits():
    _, teacher, _ = drawn(dtype=torch.bfloat16)
    values, indices, logsumexp = top_k_logits(teacher, 4, temperature=2.0)
    assert (values.dtype, indices.dtype, logsumexp.dtype) == (
        torch.bfloat16,
        torch.int64,
        torch.float32,
    )
    assert values.shape == indices.shape == (BATCH, TOKENS, 4)
    torch.testing.assert_close(logsumexp, torch.logsumexp(teacher.float() / 2, -1))
    assert torch.equal(teacher.gather(-1, indices), values)


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_top_k_of_nothing_is_refused(k):
    with pytest.raises(ValueError, match=str(k)):
        top_k_logits(drawn()[1], k)


def test_columns_named_twice_are_refused():
    student, teacher, labels = drawn()
    values, indices, logsumexp = top_k_logits(teacher, 3)
    top_k = {"teacher_indices": indices.clamp(max=0), "teacher_logsumexp": logsumexp}
    with pytest.raises(ValueError, match="twice"):
        LOSS(student, values, labels, **top_k)


# Modules


class Broken(nn.Module):
    """Raises when it is run."""

    def forward(self, ids):
        raise RuntimeError("out of order")


def test_modes_are_restored_when_the_teacher_raises():
    _, _, labels = drawn()
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Dropout(), nn.Linear(4, VOCABULARY))
    teacher = nn.Sequential(Broken(), nn.Dropout().eval())
    modes = [module.training for module in teacher.modules()]
    with pytest.raises(RuntimeError, match="out of order"):
        LOSS(model, teacher, labels, ids=labels.clamp(min=0))
    assert [module.training for module in teacher.modules()] == modes


def test_messages_name_what_is_wrong():
    student, teacher, labels = drawn()
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"beta": -0.5}, "beta is -0.5"),
        ({"divergence": "kl"}, "'kl'"),
        ({"num_items_in_batch": 0}, "num_items_in_batch is 0"),
        ({"vocab_size": 5}, "label"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSS(student, teacher, labels, **options)
