"""The requirements of the contract ``parallel_linear``: many ranks compute what one would.

The oracle is one process with the full weights, in float64. Layers run on real process groups of two,
three and four ranks.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.parallel_cases import KINDS, layer_cases
from conformance.harness.parallel_checks import (
    assert_communicates,
    assert_drawn,
    assert_gradients,
    assert_held,
    assert_layer,
    assert_own_part,
    assert_partial_results,
    assert_ranks_identical,
    assert_refused,
    assert_twice,
)
from conformance.harness.requirement import requirement

MEGATRON = "Megatron-LM, arXiv 1909.08053, section 3"
VLLM = "vLLM, QKVParallelLinear"
REPLICAS = ((8, 2, 6), (4, 1, 6), (4, 2, 5))
"""Shapes with fewer key/value heads than four ranks."""
WHOLE_HEADS = ((8, 4, 3), (12, 4, 4), (6, 2, 8), (4, 2, 6))
"""Shapes whose key/value heads two ranks divide."""
ANY_KIND = st.sampled_from(KINDS)
LINEAR = st.sampled_from(["column", "row", "qkv", "gate_up", "mlp", "head"])
FUSED = st.sampled_from(["concatenated", "interleaved"])


def shaped(shapes: tuple[tuple[int, int, int], ...], **fixed):
    """Cases of ``qkv`` with one of these numbers of heads and widths."""

    def of(shape):
        heads, kv_heads, head_dim = shape
        given = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return layer_cases("qkv", **given, **fixed)

    return st.sampled_from(shapes).flatmap(of)


# One rank


@requirement(
    "parallel_linear.one-rank.any-kind",
    source=MEGATRON,
    smoke=True,
    confusable={"one rank"},
)
@given(case=layer_cases(ANY_KIND, ranks=1))
def test_one_rank_is_the_layer_itself(parallel_linear, case):
    """On one rank every kind of layer is the ordinary layer, without a process group."""
    assert_layer(parallel_linear, case)


# Column and row


@requirement("parallel_linear.column.own-part", source=MEGATRON)
@given(case=layer_cases("column"))
def test_column_gives_its_part_of_the_output(parallel_linear, case):
    """Rank r has part r of the last axis of ``x Wᵀ + b``."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.column.gathered", source=MEGATRON)
@given(case=layer_cases("column", gather_output=True))
def test_gathered_output_is_in_rank_order(parallel_linear, case):
    """With ``gather_output`` every rank has the whole output, in the order of the ranks."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.row.sum", source=MEGATRON, smoke=True)
@given(case=layer_cases("row", bias=st.booleans()))
def test_row_sums_over_the_ranks(parallel_linear, case):
    """Every rank has the sum of all ranks' products."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.row.bias-once", source="Wenyueh/MinivLLM#80")
@given(case=layer_cases("row"))
def test_row_bias_is_added_once(parallel_linear, case):
    """A bias ten times as large as the products is in the output once, not once a rank."""
    assert_layer(parallel_linear, case, "weights['bias'] *= 10")


@requirement("parallel_linear.row.partial-results", source=MEGATRON)
@given(case=layer_cases("row"))
def test_partial_results_sum_to_the_output(parallel_linear, case):
    """Without ``reduce_results`` the ranks' outputs add up to the output, bias once."""
    assert_partial_results(parallel_linear, case)


@requirement("parallel_linear.row.whole-input", source=MEGATRON)
@given(case=layer_cases("row", input_is_parallel=False))
def test_row_takes_its_part_of_a_whole_input(parallel_linear, case):
    """Without ``input_is_parallel`` every rank is given all of x and multiplies its part."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.row.ranks-identical", source=MEGATRON, several_ranks=True)
@given(case=layer_cases(st.sampled_from(["row", "mlp", "embedding"])))
def test_ranks_have_the_same_sum(parallel_linear, case):
    """The ranks of a group have the same bits, or they drift apart."""
    assert_ranks_identical(parallel_linear, case)


# Queries, keys and values


@requirement("parallel_linear.qkv.whole-heads", source=VLLM, smoke=True)
@given(case=shaped(WHOLE_HEADS, ranks=2))
def test_query_and_key_value_heads_are_split_by_heads(parallel_linear, case):
    """A rank has whole query heads and the key/value heads that these read."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.qkv.one-each", source=VLLM)
@given(case=shaped(((6, 3, 5), (3, 3, 7)), ranks=3))
def test_three_ranks_have_a_key_value_head_each(parallel_linear, case):
    """With as many ranks as key/value heads each rank has one."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.qkv.replicas", source="vllm-project/tpu-inference#1429")
@given(case=shaped(REPLICAS, ranks=4))
def test_key_value_heads_are_repeated_on_consecutive_ranks(parallel_linear, case):
    """With more ranks than key/value heads, ``ranks / kv_heads`` consecutive ranks have each."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.qkv.without-bias", source=VLLM, confusable={"no bias"})
@given(case=layer_cases("qkv", bias=False))
def test_projections_without_bias_have_none(parallel_linear, case):
    """Projections without a bias are products alone."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.qkv.concatenated", source="deepspeedai/DeepSpeed#3844")
@given(case=layer_cases("qkv", layout="concatenated"))
def test_concatenated_projections_are_cut_before_they_are_split(parallel_linear, case):
    """Of a fused weight [Q; K; V] each part is split, not the whole."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.qkv.interleaved", source="JieShibo/MoLE#9")
@given(case=layer_cases("qkv", layout="interleaved"))
def test_interleaved_projections_are_told_apart(parallel_linear, case):
    """Of a fused weight with the heads of each group side by side every head finds its place."""
    assert_layer(parallel_linear, case)


# Gated MLP


@requirement("parallel_linear.gate-up.separate", source=MEGATRON)
@given(case=layer_cases("gate_up"))
def test_gate_and_up_are_split_alike(parallel_linear, case):
    """A rank has the same rows of gate and of up."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.gate-up.concatenated", source="vllm-project/vllm#22951")
@given(case=layer_cases("gate_up", layout="concatenated"))
def test_concatenated_gate_and_up_are_cut_in_halves(parallel_linear, case):
    """Of a fused weight [gate; up] each half is split."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.gate-up.interleaved", source="ROCm/ATOM#845")
@given(case=layer_cases("gate_up", layout="interleaved"))
def test_interleaved_gate_and_up_are_told_apart(parallel_linear, case):
    """Of a fused weight g0, u0, g1, u1 … even rows are gate and odd rows are up."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.mlp.swiglu", source="GLU variants, arXiv 2002.05202")
@given(case=layer_cases("mlp"))
def test_mlp_gates_by_silu_of_gate(parallel_linear, case):
    """``down(silu(gate(x)) * up(x))``, summed over the ranks once."""
    assert_layer(parallel_linear, case)


# Vocabulary


@requirement("parallel_linear.embedding.rows", source=MEGATRON)
@given(case=layer_cases("embedding"))
def test_embedding_gives_the_rows_of_ids(parallel_linear, case):
    """Each id's row comes from the rank that holds it; ranks need not divide the vocabulary."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.head.order", source=MEGATRON)
@given(case=layer_cases("head"))
def test_logits_are_in_the_order_of_the_vocabulary(parallel_linear, case):
    """Gathered logits are those of tokens 0, 1, 2 … and of nothing else."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.head.no-padding", source="mirage-project/mirage#751")
@given(case=layer_cases("head", ranks=st.sampled_from([3, 4]), width_out=st.sampled_from([29, 31])))
def test_padding_of_the_vocabulary_has_no_logit(parallel_linear, case):
    """Where the ranks do not divide the vocabulary no logit of 0 stands for padding."""
    assert_layer(parallel_linear, case, "weights['weight'] -= 3")


# Statistics over a split axis


@requirement(
    "parallel_linear.norm.all-ranks", source="turboderp-org/exllamav3#141", level="extended"
)
@given(case=layer_cases("norm", spread=True))
def test_norm_takes_the_mean_square_of_all_ranks(parallel_linear, case):
    """RMS norm over a split axis divides by the root of the mean square of the whole axis."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.norm.epsilon", source="transformers, Qwen2RMSNorm", level="extended")
@given(case=layer_cases("norm", scale=1e-3))
def test_epsilon_is_under_the_root(parallel_linear, case):
    """Inputs of the size of the root of epsilon tell epsilon under the root from epsilon beside it."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.cross-entropy.value", source=MEGATRON, level="extended")
@given(case=layer_cases("cross_entropy"))
def test_cross_entropy_is_over_the_whole_vocabulary(parallel_linear, case):
    """The maximum, the sum of exponentials and the target's logit are those of all ranks."""
    assert_layer(parallel_linear, case)


@requirement(
    "parallel_linear.cross-entropy.label-smoothing",
    source="NVIDIA/Megatron-LM#737",
    level="extended",
)
@given(case=layer_cases("cross_entropy", label_smoothing=st.sampled_from([0.1, 0.3])))
def test_labels_are_smoothed_over_the_whole_vocabulary(parallel_linear, case):
    """The smoothed part is spread over all tokens, not over those of a rank."""
    assert_layer(parallel_linear, case)


@requirement(
    "parallel_linear.cross-entropy.large-logits", source="NVIDIA/Megatron-LM#7464", level="extended"
)
@given(case=layer_cases("cross_entropy", scale=1000.0))
def test_large_logits_have_a_finite_loss(parallel_linear, case):
    """Logits in the thousands overflow nowhere."""
    assert_layer(parallel_linear, case)


# Gradients


@requirement("parallel_linear.column.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases("column", gather_output=st.booleans()))
def test_column_gradients_are_those_of_the_full_layer(parallel_linear, case):
    """The input's gradient is summed over the ranks; each rank's rows have theirs."""
    assert_gradients(parallel_linear, case)


@requirement("parallel_linear.row.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases("row", input_is_parallel=st.booleans()))
def test_row_gradients_are_those_of_the_full_layer(parallel_linear, case):
    """The gradient of the sum reaches every rank's part as it is."""
    assert_gradients(parallel_linear, case)


@requirement(
    "parallel_linear.row.bias-gradient", source="pytorch/torchtitan#4332", level="extended"
)
@given(case=layer_cases("row"))
def test_row_bias_gradient_is_whole(parallel_linear, case):
    """The bias's gradient is that of one process on every rank, not a share of it."""
    assert_gradients(parallel_linear, case, of=("bias",))


@requirement("parallel_linear.qkv.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases("qkv", layout=st.sampled_from(["separate", "concatenated", "interleaved"])))
def test_qkv_gradients_are_those_of_the_full_layer(parallel_linear, case):
    """Gradients of the input and of each rank's heads."""
    assert_gradients(parallel_linear, case)


@requirement("parallel_linear.qkv.replica-gradients", source=VLLM, level="extended")
@given(case=shaped(REPLICAS, ranks=4))
def test_gradients_of_replicas_are_summed(parallel_linear, case):
    """Ranks that hold one key/value head have the gradient of all their query heads."""
    assert_gradients(parallel_linear, case, of=("k.weight", "v.weight", "k.bias", "v.bias"))


@requirement("parallel_linear.mlp.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases(st.sampled_from(["mlp", "gate_up"])))
def test_mlp_gradients_are_those_of_the_full_layer(parallel_linear, case):
    """Gradients of the input, of gate, of up and of down."""
    assert_gradients(parallel_linear, case)


@requirement("parallel_linear.embedding.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases("embedding"))
def test_embedding_gradients_reach_the_rank_that_holds_the_row(parallel_linear, case):
    """A row's gradient is the sum over its ids, on the rank that holds it."""
    assert_gradients(parallel_linear, case)


@requirement("parallel_linear.head.gradients", source=MEGATRON, level="extended")
@given(case=layer_cases("head"))
def test_head_gradients_are_those_of_the_full_layer(parallel_linear, case):
    """Gradients of the input and of each rank's rows."""
    assert_gradients(parallel_linear, case)


@requirement(
    "parallel_linear.norm.gradients", source="turboderp-org/exllamav3#141", level="extended"
)
@given(case=layer_cases("norm"))
def test_norm_gradients_go_through_the_statistics(parallel_linear, case):
    """The gradient through the mean square is that of all ranks."""
    assert_gradients(parallel_linear, case)


@requirement(
    "parallel_linear.cross-entropy.gradients", source="modelscope/ms-swift#9947", level="extended"
)
@given(case=layer_cases("cross_entropy", label_smoothing=st.sampled_from([0.0, 0.1])))
def test_cross_entropy_gradients_reach_every_shard(parallel_linear, case):
    """Targets on another rank's shard have their gradient too; padding has none."""
    assert_gradients(parallel_linear, case)


# What is held


@requirement("parallel_linear.shards.rows", source=MEGATRON, level="extended")
@given(case=layer_cases(st.sampled_from(["column", "gate_up", "norm"])))
def test_column_holds_its_rows(parallel_linear, case):
    """Rank r holds rows r·n to (r + 1)·n of the weight, and those elements of the bias."""
    assert_held(parallel_linear, case)


@requirement("parallel_linear.shards.columns", source=MEGATRON, level="extended")
@given(case=layer_cases(st.sampled_from(["row", "mlp"])))
def test_row_holds_its_columns(parallel_linear, case):
    """Rank r holds columns r·n to (r + 1)·n of the weight, and the whole bias."""
    assert_held(parallel_linear, case)


@requirement("parallel_linear.shards.heads", source=VLLM, level="extended")
@given(case=layer_cases("qkv"))
def test_qkv_holds_whole_heads(parallel_linear, case):
    """Rank r holds the rows of its query heads and of the key/value heads that these read."""
    assert_held(parallel_linear, case)


@requirement("parallel_linear.shards.fused", source="NVIDIA/Megatron-LM#7161", level="extended")
@given(case=layer_cases(st.sampled_from(["qkv", "gate_up"]), layout=FUSED))
def test_fused_weights_are_told_apart(parallel_linear, case):
    """Of fused weights a rank holds the rows of each part, in either layout."""
    assert_held(parallel_linear, case)


@requirement("parallel_linear.shards.vocabulary", source=MEGATRON, level="extended")
@given(case=layer_cases(st.sampled_from(["embedding", "head"])))
def test_vocabulary_is_held_once(parallel_linear, case):
    """Rank r holds its share of the vocabulary, and zeros behind the last token."""
    assert_held(parallel_linear, case)


@requirement("parallel_linear.shards.own", source=MEGATRON)
@given(case=layer_cases(LINEAR))
def test_layer_keeps_its_own_part(parallel_linear, case):
    """The layer does not change when the caller's weights do."""
    assert_own_part(parallel_linear, case)


@requirement(
    "parallel_linear.init.own-numbers",
    source="modelscope/ms-swift#7944",
    level="extended",
    several_ranks=True,
)
@given(case=layer_cases(LINEAR))
def test_ranks_draw_the_parts_of_one_weight(parallel_linear, case):
    """After one seed no two ranks draw the same block, and all draw the same for what all hold."""
    assert_drawn(parallel_linear, case)


# Communication


@requirement(
    "parallel_linear.communication.one-reduction",
    source=MEGATRON,
    level="extended",
    several_ranks=True,
)
@given(case=layer_cases(st.sampled_from(["row", "mlp", "embedding"])))
def test_a_sum_is_one_reduction(parallel_linear, case):
    """A row-parallel layer, an MLP and an embedding make one all-reduce and nothing else."""
    assert_communicates(parallel_linear, case, all_reduce=1)


@requirement(
    "parallel_linear.communication.none", source=MEGATRON, level="extended", several_ranks=True
)
@given(case=layer_cases(st.sampled_from(["column", "qkv", "gate_up"])))
def test_parts_are_not_communicated(parallel_linear, case):
    """A column-parallel layer that keeps its part communicates nothing."""
    assert_communicates(parallel_linear, case)


# Groups


@requirement(
    "parallel_linear.groups.independent",
    source="torch.distributed.new_group",
    level="extended",
    several_ranks=True,
)
@given(case=layer_cases(ANY_KIND, ranks=4, group_size=2))
def test_groups_have_nothing_to_do_with_each_other(parallel_linear, case):
    """Two groups of two ranks with different data each compute their own."""
    assert_layer(parallel_linear, case)


@requirement(
    "parallel_linear.groups.of-one",
    source="torch.distributed.new_group",
    level="extended",
    confusable={"groups of one"},
    several_ranks=True,
)
@given(case=layer_cases(ANY_KIND, ranks=st.sampled_from([2, 3]), group_size=1))
def test_a_group_of_one_is_a_rank_alone(parallel_linear, case):
    """With groups of one rank every rank computes the whole layer for its own data."""
    assert_layer(parallel_linear, case)


# Dtypes, shapes, calls


@requirement("parallel_linear.dtype.float64", source=MEGATRON, level="extended")
@given(case=layer_cases(ANY_KIND, dtype=torch.float64))
def test_float64_is_computed_throughout(parallel_linear, case):
    """In float64 no step, and no collective, rounds to float32."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.dtype.bfloat16", source=MEGATRON, level="extended")
@given(case=layer_cases(ANY_KIND, dtype=torch.bfloat16))
def test_bfloat16_is_as_close_as_it_can_be(parallel_linear, case):
    """In bfloat16 the outputs are as near the oracle as rounding allows."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.dtype.float16", source=MEGATRON, level="extended")
@given(case=layer_cases(ANY_KIND, dtype=torch.float16))
def test_float16_is_as_close_as_it_can_be(parallel_linear, case):
    """In float16 the outputs are as near the oracle as rounding allows."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.input.any-axes", source=MEGATRON)
@given(case=layer_cases(LINEAR, leading=st.sampled_from([(), (7,), (1, 1), (2, 3, 4)])))
def test_any_leading_axes_are_taken(parallel_linear, case):
    """One token, a row of tokens, batches of batches."""
    assert_layer(parallel_linear, case)


@requirement("parallel_linear.calls.repeated", source=MEGATRON)
@given(case=layer_cases(ANY_KIND))
def test_calls_do_not_change_the_layer(parallel_linear, case):
    """A second call with the same input gives the same bits."""
    assert_twice(parallel_linear, case)


# Bad input


@requirement("parallel_linear.refuses.column-width", source=MEGATRON, several_ranks=True)
@given(case=layer_cases("column", width_out=st.sampled_from([23, 29, 31])))
def test_an_output_width_that_ranks_do_not_divide_is_refused(parallel_linear, case):
    """A column-parallel layer whose rows the ranks do not divide is refused; the sizes are named."""
    assert_refused(parallel_linear, case, sizes=(case.width_out, case.ranks))


@requirement("parallel_linear.refuses.row-width", source=MEGATRON, several_ranks=True)
@given(case=layer_cases("row", width_in=st.sampled_from([23, 29, 31])))
def test_an_input_width_that_ranks_do_not_divide_is_refused(parallel_linear, case):
    """A row-parallel layer whose columns the ranks do not divide is refused; the sizes are named."""
    assert_refused(parallel_linear, case, sizes=(case.width_in, case.ranks))


@requirement("parallel_linear.refuses.heads", source=VLLM, several_ranks=True)
@given(case=layer_cases("qkv", heads=14, kv_heads=2, head_dim=4, ranks=st.sampled_from([3, 4])))
def test_query_heads_that_ranks_do_not_divide_are_refused(parallel_linear, case):
    """Fourteen query heads on three or four ranks are refused; the sizes are named."""
    assert_refused(parallel_linear, case, sizes=(14, case.ranks))


@requirement(
    "parallel_linear.refuses.kv-heads", source="huggingface/transformers#48307", several_ranks=True
)
@given(
    case=st.sampled_from([(12, 2, 3), (12, 3, 4), (6, 3, 2)]).flatmap(
        lambda sizes: layer_cases(
            "qkv", heads=sizes[0], kv_heads=sizes[1], head_dim=4, ranks=sizes[2]
        )
    )
)
def test_key_value_heads_that_fit_no_rank_are_refused(parallel_linear, case):
    """Key/value heads that ranks neither divide nor repeat evenly are refused; the sizes are named."""
    assert_refused(parallel_linear, case, sizes=(case.kv_heads, case.ranks))


@requirement("parallel_linear.refuses.mlp-width", source=MEGATRON, several_ranks=True)
@given(case=layer_cases(st.sampled_from(["mlp", "gate_up"]), width_out=st.sampled_from([23, 29])))
def test_an_intermediate_width_that_ranks_do_not_divide_is_refused(parallel_linear, case):
    """A gated MLP whose width the ranks do not divide is refused; the sizes are named."""
    assert_refused(parallel_linear, case, sizes=(case.width_out, case.ranks))


@requirement("parallel_linear.refuses.weights-of-other-shapes", source=VLLM)
@given(case=layer_cases("qkv"))
def test_weights_that_do_not_fit_each_other_are_refused(parallel_linear, case):
    """A key projection with more rows than its heads have is refused."""
    more = "weights['k.weight'] = torch.cat([weights['k.weight']] * 2)"
    assert_refused(parallel_linear, case, more)
