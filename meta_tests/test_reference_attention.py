"""The reference attention is held against torch, transformers, numpy and numbers worked by hand."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from transformers import masking_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from reference_impl.attention import attention, merge_attention, visible_keys

F64 = torch.float64
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
FLOAT32_SOFTMAX = {"rtol": 1e-5, "atol": 1e-6}
"""For authorities that compute their softmax in float32 whatever the inputs are."""


def drawn(batch=2, heads=6, groups=2, queries=5, keys=7, width=4, values=3, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, width), (batch, groups, keys, width))
    q, k, v = (
        torch.randn(s, generator=g, dtype=F64).to(dtype)
        for s in (*shapes, (batch, groups, keys, values))
    )
    return q, k, v


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(tolerance or ROUNDING))


# torch: scaled_dot_product_attention


SDPA_CASES = {
    "full": {},
    "scale": {"scale": 0.12},
    "many kv heads": {"groups": 6},
    "three kv heads": {"groups": 3},
    "one kv head": {"groups": 1},
    "wide values": {"values": 11},
    "one query": {"queries": 1},
    "more queries than keys": {"queries": 9, "keys": 4},
    "odd width": {"width": 5, "keys": 16},
    "large": {"heads": 12, "groups": 4, "queries": 70, "keys": 128, "width": 131, "values": 128},
}


@pytest.mark.parametrize("name", SDPA_CASES)
def test_full_attention_is_that_of_torch(name):
    sizes = dict(SDPA_CASES[name])
    scale = sizes.pop("scale", None)
    q, k, v = drawn(**sizes)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    same(attention(q, k, v, scale=scale), expected)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_causal_self_attention_is_that_of_torch(groups):
    q, k, v = drawn(queries=7, keys=7, groups=groups)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same(attention(q, k, v, causal=True), expected)


def test_mask_of_queries_and_keys_alone_is_that_of_torch():
    q, k, v = drawn()
    mask = torch.arange(35).view(5, 7) % 3 != 1
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    same(attention(q, k, v, mask=mask), expected)


def rows_seen(length, **options):
    """What each query of one head sees, as a string of 0 and 1, read off one-hot values."""
    zeros, one_hot = torch.zeros(1, 1, length, 2, dtype=F64), torch.eye(length, dtype=F64)
    return rows_of(attention(zeros, zeros, one_hot[None, None], **options) > 0)


def test_numbers_beyond_other_types_are_compared_exactly():
    """Documents 0 and 256 differ, and so do positions 100000 and 100001, 17 tokens and 24."""
    far = torch.tensor([[100000, 100001, 100017, 100018]])
    found = rows_seen(4, causal=True, window=(17, 0), q_positions=far, k_positions=far)
    assert found == ["1000", "1100", "1110", "0111"]
    documents = torch.tensor([[0, 256, 2**32, 2**32 + 256]])
    found = rows_seen(4, q_segments=documents, k_segments=documents)
    assert found == ["1000", "0100", "0010", "0001"]


def test_output_shares_no_memory_and_inputs_stay():
    for keys, groups in ((1, 6), (1, 1), (7, 2)):
        inputs = drawn(keys=keys, groups=groups, values=4)
        before = [x.clone() for x in inputs]
        out = attention(*inputs)
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        assert out.untyped_storage().data_ptr() not in storages
        assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_scores_far_apart_are_those_of_torch():
    q, k, v = drawn()
    expected = F.scaled_dot_product_attention(2000 * q, k, v, enable_gqa=True)
    same(attention(2000 * q, k, v), expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (3, 7), (6, 7), (7, 7), (70, 130)])
def test_causal_query_block_is_aligned_as_causal_lower_right(queries, keys):
    q, k, v = drawn(queries=queries, keys=keys, groups=6, values=4)
    bias = causal_lower_right(queries, keys)
    same(attention(q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7), (2, 1, 5, 7), (1, 1, 5, 7), (2, 6, 1, 7), (1, 1, 1, 7)]
)
@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
def test_masks_are_those_of_torch(shape, kind):
    q, k, v = drawn()
    g = torch.Generator().manual_seed(1)
    visible = torch.rand(shape, generator=g) < 0.5
    visible[..., 3] = True
    mask = {
        "boolean": visible,
        "additive": torch.randn(shape, generator=g, dtype=F64),
        "infinite": torch.zeros(shape, dtype=F64).masked_fill(~visible, -torch.inf),
    }[kind]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    same(attention(q, k, v, mask=mask), expected)


GRADIENT_MASK = torch.arange(35).view(5, 7) % 3 != 1


@pytest.mark.parametrize(
    ("ours", "torchs", "queries"),
    [
        ({"causal": True}, {"is_causal": True}, 7),
        ({"mask": GRADIENT_MASK[None, None]}, {"attn_mask": GRADIENT_MASK}, 5),
        ({"key_valid": GRADIENT_MASK[:2]}, {"attn_mask": GRADIENT_MASK[:2, None, None]}, 5),
    ],
)
def test_gradients_are_those_of_torch(ours, torchs, queries):
    leaves = [x.requires_grad_() for x in drawn(queries=queries)]
    g = torch.Generator().manual_seed(2)
    upstream = torch.randn(2, 6, queries, 3, generator=g, dtype=F64)
    found = torch.autograd.grad(attention(*leaves, **ours), leaves, upstream)
    theirs = F.scaled_dot_product_attention(*leaves, enable_gqa=True, **torchs)
    for gradient, expected in zip(found, torch.autograd.grad(theirs, leaves, upstream)):
        same(gradient, expected)


# torch: FlexAttention, uncompiled


FLEX_CASES = {
    "softcap": ({"softcap": 0.7}, lambda b, h, q, k: q >= 0),
    "causal with softcap": ({"softcap": 2.0, "causal": True}, lambda b, h, q, k: k <= q + 2),
    "window": ({"window": (2, 0), "causal": True}, lambda b, h, q, k: (k <= q + 2) & (k >= q)),
    "two-sided window": ({"window": (1, 2)}, lambda b, h, q, k: (k >= q + 1) & (k <= q + 4)),
    "left window": ({"window": (1, None)}, lambda b, h, q, k: k >= q + 1),
    "right window": ({"window": (None, 0)}, lambda b, h, q, k: k <= q + 2),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX_CASES)
def test_softcaps_windows_and_lse_are_those_of_flex_attention(name):
    options, rule = FLEX_CASES[name]
    q, k, v = drawn()  # 5 queries, 7 keys: query i is at position i + 2
    cap = options.get("softcap")
    score_mod = None if cap is None else lambda score, b, h, i, j: cap * torch.tanh(score / cap)
    block_mask = create_block_mask(rule, None, None, 5, 7, device="cpu")
    expected, aux = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    out, lse = attention(q, k, v, return_lse=True, **options)
    same(out, expected)
    same(lse, aux.lse)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_documents_are_those_of_flex_attention(causal):
    document = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    q, k, v = drawn(batch=1, queries=9, keys=9)
    rule = lambda b, h, i, j: (document[0, i] == document[0, j]) & ((j <= i) | (not causal))
    block_mask = create_block_mask(rule, None, None, 9, 9, device="cpu")
    expected = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    packed = {"q_segments": document, "k_segments": document}
    same(attention(q, k, v, causal=causal, **packed), expected)
    cumulative = torch.tensor([0, 3, 5, 9])
    packed = {"cu_seqlens_q": cumulative, "cu_seqlens_k": cumulative}
    same(attention(q, k, v, causal=causal, **packed), expected)


# transformers: eager attention and masks


def eager(function, q, k, v, additive, **more):
    module = SimpleNamespace(
        num_key_value_groups=q.shape[1] // k.shape[1],
        head_dim=q.shape[-1],
        training=False,
        sinks=more.pop("sinks", None),
    )
    out, _ = function(module, q, k, v, additive, **{"scaling": 0.3, **more})
    return out.transpose(1, 2)


def additive_mask(visible):
    return torch.zeros(visible.shape, dtype=F64).masked_fill(~visible, torch.finfo(F64).min)


CAUSAL_5_OF_7 = torch.ones(5, 7, dtype=torch.bool).tril(2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_llama(causal):
    q, k, v = drawn()
    mask = additive_mask(CAUSAL_5_OF_7) if causal else None
    expected = eager(modeling_llama.eager_attention_forward, q, k, v, mask)
    same(attention(q, k, v, causal=causal, scale=0.3), expected, **FLOAT32_SOFTMAX)


@pytest.mark.parametrize("softcap", [0.3, 1.5, 50.0])
@pytest.mark.parametrize("causal", [False, True])
def test_softcap_is_that_of_gemma2(softcap, causal):
    q, k, v = drawn()
    mask = additive_mask(CAUSAL_5_OF_7) if causal else None
    function = modeling_gemma2.eager_attention_forward
    expected = eager(function, 3 * q, k, v, mask, softcap=softcap)
    found = attention(3 * q, k, v, causal=causal, scale=0.3, softcap=softcap)
    same(found, expected, **FLOAT32_SOFTMAX)


@pytest.mark.parametrize("causal", [False, True])
def test_sinks_are_those_of_gpt_oss(causal):
    q, k, v = drawn()
    sinks = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0, 9.0], dtype=F64)
    mask = additive_mask(CAUSAL_5_OF_7) if causal else None
    function = modeling_gpt_oss.eager_attention_forward
    expected = eager(function, q, k, v, mask, sinks=sinks)
    same(attention(q, k, v, causal=causal, scale=0.3, sinks=sinks), expected)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 20])
@pytest.mark.parametrize("queries", [1, 4, 7])
def test_window_of_transformers_is_one_more_than_left(width, queries):
    rule = masking_utils.sliding_window_causal_mask_function(width)
    mask = masking_utils.sdpa_mask(
        batch_size=1,
        q_length=queries,
        kv_length=7,
        q_offset=7 - queries,
        mask_function=rule,
        allow_is_causal_skip=False,
        device="cpu",
    )
    found = visible_keys(queries, 7, causal=True, window=(width - 1, 0))
    assert torch.equal(found, mask.expand_as(found))


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_that_of_transformers(left):
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    valid = valid if left else valid.flip(1)
    mask = masking_utils.sdpa_mask(
        batch_size=2,
        q_length=5,
        kv_length=5,
        mask_function=masking_utils.causal_mask_function,
        attention_mask=valid,
        allow_is_causal_skip=False,
        device="cpu",
    )
    found = visible_keys(5, 5, causal=True, key_valid=valid)
    # transformers lets a padded query that sees nothing see everything; we let it see nothing.
    rows = found.any(-1, keepdim=True)
    assert torch.equal(found, mask & rows)


# numpy: the contract's words once more, key by key


def position_of_query(options, row, query, q_len, k_len):
    """Where query ``query`` is."""
    if "q_positions" in options:
        return int(options["q_positions"][row, query])
    if "cu_seqlens_q" in options:
        begin, end = bounds_of(options["cu_seqlens_q"], query)
        key_begin, key_end = options["cu_seqlens_k"][document_of(options["cu_seqlens_q"], query)]
        return (key_end - key_begin) - (end - begin) + (query - begin)
    last = int(options["key_lengths"][row]) - 1 if "key_lengths" in options else k_len - 1
    return last - (q_len - 1 - query)


def document_of(spans, token):
    """The number of the document that a token is in, None behind the last."""
    for number, (begin, end) in enumerate(spans):
        if begin <= token < end:
            return number
    return None


def bounds_of(spans, token):
    """The first token of the document that a token is in, and the first behind it."""
    return spans[document_of(spans, token)]


def keys_seen(options, row, head, query, q_len, k_len):
    """The keys that one query of one head sees."""
    if "cu_seqlens_q" in options and document_of(options["cu_seqlens_q"], query) is None:
        return []
    at = position_of_query(options, row, query, q_len, k_len)
    seen = []
    for key in range(k_len):
        where = key
        if "k_positions" in options:
            where = int(options["k_positions"][row, key])
            if where < 0:
                continue  # never written
        if "cu_seqlens_q" in options:
            number = document_of(options["cu_seqlens_k"], key)
            if number != document_of(options["cu_seqlens_q"], query):
                continue
            where = key - options["cu_seqlens_k"][number][0]
        if "key_lengths" in options and key >= options["key_lengths"][row]:
            continue
        if options.get("causal") and where > at:
            continue
        left, right = options.get("window") or (None, None)
        if left is not None and at - where > left:
            continue
        if right is not None and where - at > right:
            continue
        if "key_valid" in options and not options["key_valid"][row, key]:
            continue
        if "q_segments" in options:  # noqa: SIM102 one condition an option
            if options["q_segments"][row, query] != options["k_segments"][row, key]:
                continue
        mask = options.get("mask")
        if mask is not None and mask.dtype == bool and not entry(mask, row, head, query, key):
            continue
        seen.append(key)
    return seen


def entry(mask, row, head, query, key):
    """One entry of a mask whose axes may be of size 1."""
    at = [i if size > 1 else 0 for i, size in zip((row, head, query, key), mask.shape)]
    return mask[tuple(at)]


def numpy_attention(q, k, v, **options):
    """Output and log-sum-exp, one query at a time."""
    batch, heads, q_len, width = q.shape
    groups, k_len = k.shape[1], k.shape[2]
    scale = options.get("scale") or 1 / math.sqrt(width)
    out = np.zeros((batch, heads, q_len, v.shape[3]))
    lse = np.full((batch, heads, q_len), -np.inf)
    for row, head, query in itertools.product(range(batch), range(heads), range(q_len)):
        group = head * groups // heads
        logits, rows = [], []
        for key in keys_seen(options, row, head, query, q_len, k_len):
            score = scale * sum(a * b for a, b in zip(q[row, head, query], k[row, group, key]))
            if options.get("softcap"):
                score = options["softcap"] * math.tanh(score / options["softcap"])
            mask = options.get("mask")
            if mask is not None and mask.dtype != bool:
                score += entry(mask, row, head, query, key)
            logits.append(score)
            rows.append(v[row, group, key])
        if "sinks" in options:
            logits.append(options["sinks"][head])
            rows.append(np.zeros(v.shape[3]))
        weights = [math.exp(score) for score in logits]
        if sum(weights) > 0:
            out[row, head, query] = sum(w * r for w, r in zip(weights, rows)) / sum(weights)
            lse[row, head, query] = math.log(sum(weights))
    return out, lse


def drawn_options(seed):
    """Sizes and a combination of options, as numpy arrays and plain numbers."""
    pick, numbers = random.Random(seed), np.random.default_rng(seed)
    addressing = pick.choice(["plain", "cache", "positions", "packed", "positions and cache"])
    heads, groups = pick.choice([(4, 2), (6, 3), (6, 2), (3, 1), (2, 2)])
    batch = 1 if addressing == "packed" else pick.choice([1, 2, 3])
    q_len, k_len = pick.randint(1, 5), pick.randint(1, 8)
    q = numbers.normal(size=(batch, heads, q_len, 4))
    k = numbers.normal(size=(batch, groups, k_len, 4))
    v = numbers.normal(size=(batch, groups, k_len, 3))
    options = {"causal": pick.random() < 0.6}
    if pick.random() < 0.5:
        options["window"] = pick.choice([(0, 0), (2, 0), (1, 1), (None, 1), (3, None), (0, 2)])
    if pick.random() < 0.4:
        options["scale"] = pick.choice([0.12, 1.0])
    if pick.random() < 0.4:
        options["softcap"] = pick.choice([0.5, 3.0])
    if pick.random() < 0.4:
        options["sinks"] = numbers.normal(size=heads)
    if pick.random() < 0.3:
        options["key_valid"] = numbers.random((batch, k_len)) < 0.7
    shape = (
        *(pick.choice([1, size]) for size in (batch, heads, q_len)),
        k_len,
    )
    kind = pick.choice([None, None, "boolean", "bias", "infinite"])
    if kind == "boolean":
        options["mask"] = numbers.random(shape) < 0.6
    elif kind is not None:
        options["mask"] = numbers.normal(size=shape)
        if kind == "infinite":
            options["mask"][numbers.random(shape) < 0.4] = -np.inf
    if "cache" in addressing:
        options["key_lengths"] = numbers.integers(0, k_len + 1, size=batch)
        for row, length in enumerate(options["key_lengths"]):
            k[row, :, length:] = np.nan
            v[row, :, length:] = np.nan
    if "positions" in addressing:
        options["q_positions"] = numbers.integers(0, 10, size=(batch, q_len))
        options["k_positions"] = numbers.integers(-3, 10, size=(batch, k_len))
        empty = (options["k_positions"] < 0)[:, None, :, None]
        k, v = np.where(empty, np.nan, k), np.where(empty, np.nan, v)
    if addressing == "packed":
        count = pick.choice([1, 2, 3])
        for name, length in (("cu_seqlens_q", q_len), ("cu_seqlens_k", k_len)):
            cuts = sorted(pick.randint(0, length) for _ in range(count))
            options[name] = list(zip([0, *cuts], cuts))
    elif pick.random() < 0.3:
        options["q_segments"] = numbers.integers(0, 2, size=(batch, q_len))
        options["k_segments"] = numbers.integers(0, 2, size=(batch, k_len))
    return (q, k, v), options


def as_torch(options):
    """The options as the contract has them."""
    found = {}
    for name, value in options.items():
        if name.startswith("cu_seqlens"):
            value = torch.tensor([0, *(end for _, end in value)])
        found[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return found


COMBINATIONS = range(120)


@pytest.mark.parametrize("seed", COMBINATIONS)
def test_any_combination_is_that_of_the_loop_in_numpy(seed):
    arrays, options = drawn_options(seed)
    expected, expected_lse = numpy_attention(*arrays, **options)
    tensors = [torch.from_numpy(x) for x in arrays]
    out, lse = attention(*tensors, return_lse=True, **as_torch(options))
    same(out, torch.from_numpy(expected))
    same(lse, torch.from_numpy(expected_lse))


def test_combinations_reach_every_option_and_empty_rows():
    seen, empty = set(), 0
    for seed in COMBINATIONS:
        arrays, options = drawn_options(seed)
        seen |= {name for name, value in options.items() if value is not False}
        empty += bool(np.isneginf(numpy_attention(*arrays, **options)[1]).any())
    assert empty > len(COMBINATIONS) // 10
    assert seen == {
        *("causal", "window", "scale", "softcap", "mask", "key_valid", "key_lengths", "sinks"),
        *("q_segments", "k_segments", "cu_seqlens_q", "cu_seqlens_k"),
        *("q_positions", "k_positions"),
    }


# Numbers that anyone can check on paper


def column(*numbers):
    """[1, 1, numbers, 1]."""
    return torch.tensor(numbers, dtype=F64).view(1, 1, -1, 1)


def test_scores_0_and_ln_3_weigh_a_quarter_and_three_quarters():
    out, lse = attention(column(1), column(0, math.log(3)), column(4, 8), return_lse=True)
    same(out, column(7))  # 4 / 4 + 8 * 3 / 4
    same(lse, torch.tensor([[[math.log(4)]]], dtype=F64))  # ln(1 + 3)


def test_scale_is_the_inverse_square_root_of_the_width():
    q = torch.tensor([2 * math.log(3), 0.0, 0.0, 0.0], dtype=F64).view(1, 1, 1, 4)
    k = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0]], dtype=F64).view(1, 1, 2, 4)
    same(attention(q, k, column(4, 8)), column(7))  # 2 ln 3 / sqrt(4) = ln 3
    same(attention(q / 2, k, column(4, 8), scale=1.0), column(7))


def test_scale_of_zero_weighs_every_key_the_same():
    same(attention(column(1), column(0, 50), column(4, 8), scale=0.0), column(6))


def test_sink_as_large_as_the_only_score_halves_the_output():
    sinks = torch.tensor([math.log(4)], dtype=F64)
    out, lse = attention(column(1), column(math.log(4)), column(10), sinks=sinks, return_lse=True)
    same(out, column(5))
    same(lse, torch.tensor([[[math.log(8)]]], dtype=F64))


def test_sink_alone_gives_zero_and_its_own_log():
    mask = torch.tensor([[[[False]]]])
    sinks = torch.tensor([2.5], dtype=F64)
    out, lse = attention(column(1), column(3), column(10), sinks=sinks, mask=mask, return_lse=True)
    assert out.item() == 0
    same(lse, torch.tensor([[[2.5]]], dtype=F64))


def test_softcap_squeezes_before_the_bias():
    # 2 tanh(s / 2) = 1 where s = ln 3, since tanh(ln(3) / 2) = (3 - 1) / (3 + 1).
    bias = torch.tensor([[[[0.0, math.log(3) - 1]]]], dtype=F64)
    capped = attention(column(1), column(0, math.log(3)), column(4, 8), softcap=2.0, mask=bias)
    same(capped, column(7))


def test_query_heads_read_their_groups():
    v = torch.tensor([5.0, 7.0], dtype=F64).view(1, 2, 1, 1)
    out = attention(torch.ones(1, 6, 1, 1, dtype=F64), v, v)
    assert out.flatten().tolist() == [5, 5, 5, 7, 7, 7]


def rows_of(visible):
    """The rows of a mask as strings of 0 and 1."""
    return ["".join(str(int(x)) for x in row) for row in visible[0, 0]]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, ["11111"] * 3),
        ({"causal": True}, ["11100", "11110", "11111"]),
        ({"causal": True, "window": (1, 0)}, ["01100", "00110", "00011"]),
        ({"causal": True, "window": (0, 0)}, ["00100", "00010", "00001"]),
        ({"causal": True, "window": (1, 2)}, ["01100", "00110", "00011"]),
        ({"window": (1, 0)}, ["01100", "00110", "00011"]),
        ({"window": (0, 1)}, ["00110", "00011", "00001"]),
        ({"window": (None, 1)}, ["11110", "11111", "11111"]),
        ({"window": (1, None)}, ["01111", "00111", "00011"]),
        ({"key_lengths": torch.tensor([4])}, ["11110"] * 3),
        ({"causal": True, "key_lengths": torch.tensor([4])}, ["11000", "11100", "11110"]),
        ({"causal": True, "key_lengths": torch.tensor([2])}, ["00000", "10000", "11000"]),
        ({"key_valid": torch.tensor([[False, False, True, True, True]])}, ["00111"] * 3),
        (
            {"causal": True, "key_valid": torch.tensor([[False, False, False, True, True]])},
            ["00000", "00010", "00011"],
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 2, 5])},
            ["11000", "00111", "00111"],
        ),
        (
            {
                "causal": True,
                "cu_seqlens_q": torch.tensor([0, 1, 3]),
                "cu_seqlens_k": torch.tensor([0, 2, 5]),
            },
            ["11000", "00110", "00111"],
        ),
        (
            {
                "causal": True,
                "q_segments": torch.tensor([[0, 1, 1]]),
                "k_segments": torch.tensor([[0, 0, 0, 1, 1]]),
            },
            ["11100", "00010", "00011"],
        ),
        (  # a ring of five slots after seven tokens: slots 0 and 1 hold tokens 5 and 6
            {
                "causal": True,
                "window": (2, 0),
                "q_positions": torch.tensor([[4, 5, 6]]),
                "k_positions": torch.tensor([[5, 6, 2, 3, 4]]),
            },
            ["00111", "10011", "11001"],
        ),
        (
            {
                "causal": True,
                "q_positions": torch.tensor([[0, 1, 2]]),
                "k_positions": torch.tensor([[0, 1, 2, -1, -1]]),
            },
            ["10000", "11000", "11100"],
        ),
    ],
)
def test_visible_keys_written_out(options, rows):
    assert rows_of(visible_keys(3, 5, **options)) == rows


def test_more_queries_than_keys_written_out():
    assert rows_of(visible_keys(4, 2, causal=True)) == ["00", "00", "10", "11"]


def test_two_parts_merge_by_their_denominators():
    # Denominators 1 and 3: a quarter of 4 and three quarters of 8.
    lse = [torch.tensor([[[math.log(n)]]], dtype=F64) for n in (1, 3)]
    out, merged = merge_attention(column(4), lse[0], column(8), lse[1])
    same(out, column(7))
    same(merged, torch.tensor([[[math.log(4)]]], dtype=F64))


def test_an_empty_part_merges_as_nothing_even_if_it_is_nan():
    nothing = torch.tensor([[[-math.inf]]], dtype=F64)
    some = torch.tensor([[[0.3]]], dtype=F64)
    for parts in (
        (column(math.nan), nothing, column(8), some),
        (column(8), some, column(math.nan), nothing),
    ):
        out, lse = merge_attention(*parts)
        assert out.item() == 8
        assert lse.item() == some.item()
    out, lse = merge_attention(column(math.nan), nothing, column(math.nan), nothing)
    assert out.item() == 0
    assert lse.item() == -math.inf


def test_merged_halves_are_the_whole():
    q, k, v = drawn(seed=4)
    halves = [
        attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(3), slice(3, 7))
    ]
    out, lse = merge_attention(*halves[0], *halves[1])
    whole, whole_lse = attention(q, k, v, return_lse=True)
    same(out, whole)
    same(lse, whole_lse)


def test_a_row_that_sees_nothing_gives_zeros_and_minus_infinity():
    q, k, v = drawn()
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[:, :, 2] = False
    out, lse = attention(q, k, v, mask=mask, return_lse=True)
    assert bool((out[:, :, 2] == 0).all())
    assert bool(torch.isneginf(lse[:, :, 2]).all())
    others = [0, 1, 3, 4]
    same(out[:, :, others], attention(q, k, v)[:, :, others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded_once(dtype):
    q, k, v = drawn(dtype=dtype)
    out, lse = attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = attention(
        q.float(), k.float(), v.float(), causal=True, return_lse=True
    )
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    assert lse.dtype == torch.float32
    assert torch.equal(lse, expected_lse)


# Gradients against finite differences


GRADIENT_CASES = {
    "full": {},
    "causal with more queries than keys": {"causal": True, "queries": 4, "keys": 2},
    "softcap, window and scale": {"softcap": 1.5, "window": (1, 0), "causal": True, "scale": 0.7},
    "empty row": {"mask": torch.tensor([[True] * 3, [False] * 3]).view(1, 1, 2, 3)},
    "additive mask": {"mask": torch.tensor([[0.3, -torch.inf, 1.0]], dtype=F64).view(1, 1, 1, 3)},
    "unused slots": {"key_lengths": torch.tensor([2]), "causal": True},
    "sinks": {"sinks": True},
    "sinks and an empty row": {
        "sinks": True,
        "mask": torch.tensor([[True] * 3, [False] * 3]).view(1, 1, 2, 3),
    },
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_are_finite_differences(name):
    options = dict(GRADIENT_CASES[name])
    sizes = {"queries": options.pop("queries", 2), "keys": options.pop("keys", 3)}
    leaves = [x.requires_grad_() for x in drawn(1, 4, 2, width=2, values=3, seed=5, **sizes)]
    if options.pop("sinks", False):
        leaves.append(torch.tensor([0.1, -1.0, 2.0, 0.5], dtype=F64, requires_grad=True))

    def both(q, k, v, sinks=None):
        out, lse = attention(q, k, v, sinks=sinks, return_lse=True, **options)
        # Finite differences of minus infinity are NaN: the row that has it is left out.
        return out, torch.where(torch.isneginf(lse), 0, lse)

    assert torch.autograd.gradcheck(both, leaves)


def test_nan_in_unused_slots_reaches_no_gradient():
    q, k, v = drawn(batch=1)
    k[:, :, 4:] = torch.nan
    v[:, :, 4:] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(*leaves, key_lengths=torch.tensor([4]), causal=True).sum().backward()
    for leaf in leaves:
        assert bool(torch.isfinite(leaf.grad).all())
    assert bool((leaves[1].grad[:, :, 4:] == 0).all())


# Errors


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), "four axes"),
        (((2, 4, 3, 8), (3, 2, 5, 8), (3, 2, 5, 8)), "do not fit"),
        (((2, 4, 3, 8), (2, 2, 5, 8), (2, 2, 6, 8)), "do not fit"),
        (((2, 4, 3, 8), (2, 2, 5, 9), (2, 2, 5, 9)), "do not fit"),
        (((2, 4, 3, 8), (2, 2, 5, 8), (2, 4, 5, 8)), "do not fit"),
        (((2, 4, 3, 8), (2, 3, 5, 8), (2, 3, 5, 8)), "not a multiple"),
        (((2, 2, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)), "not a multiple"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    with pytest.raises(ValueError, match=message) as raised:
        attention(*(torch.zeros(shape) for shape in shapes))
    for shape in shapes:
        assert str(list(shape)) in str(raised.value)
