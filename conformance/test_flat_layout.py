"""The requirements of the contract ``flat_layout``: where each element lies in flat shards.

The oracle writes the number of every element down, pads, and cuts. Nothing is within a tolerance.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.layout_cases import FEW, TAILS, layout_cases, sorted_cases, split_cases
from conformance.harness.layout_checks import (
    GARBAGE,
    assert_absent,
    assert_adjacent,
    assert_contiguous,
    assert_cut,
    assert_joined,
    assert_large,
    assert_not_made,
    assert_order,
    assert_own_memory,
    assert_pads,
    assert_pads_in_total,
    assert_ranges,
    assert_ranges_of_parameters,
    assert_rank_refused,
    assert_reshard_keeps_source,
    assert_resharded,
    assert_shard_size,
    assert_shards_refused,
    assert_sums,
    assert_table,
    assert_tensor_rank_refused,
    assert_there_and_back,
    assert_values_refused,
)
from conformance.harness.requirement import requirement

FSDP = "ServiceNow/Fast-LLM, engine/multi_stage/fsdp.py"
STAGE = "ServiceNow/Fast-LLM, engine/multi_stage/stage_base.py"
RESHARDING = "ServiceNow/Fast-LLM, engine/checkpoint/distributed.py"

ANY_TAIL = st.sampled_from(TAILS)
PADDED = st.sampled_from(["any", "one more", "one less"])
TO = st.tuples(st.integers(1, 6), st.just(1))
EVERY = layout_cases(tail=ANY_TAIL)
SPREAD = layout_cases(least=3, tail=ANY_TAIL)
SMALL = layout_cases(FEW, world=st.integers(4, 12))
"""So few elements that the last ranks have nothing but padding."""
SPLIT = split_cases()
SORTED = sorted_cases()
RESHARDED = layout_cases(tail=ANY_TAIL, world=st.integers(1, 5), to=TO)
SPLIT_RESHARDED = st.one_of(
    split_cases(before, to=st.tuples(st.integers(1, 4), st.just(after)))
    for before, after in ((1, 2), (2, 3), (3, 2), (2, 1), (3, 3))
)
REFUSED = layout_cases(least=3, to=TO)


# The buffer


@requirement("flat_layout.buffer.order-given", source=FSDP)
@given(case=SPREAD)
def test_parameters_lie_in_the_order_given(flat_layout, case):
    """Without ``weight_decay`` the buffer has the parameters in the order in which they are given."""
    assert_order(flat_layout, case)


@requirement("flat_layout.buffer.contiguous", source=FSDP)
@given(case=EVERY)
def test_parameters_lie_one_behind_the_other(flat_layout, case):
    """The first parameter begins at 0 and every other where the one before it ends: no gaps."""
    assert_contiguous(flat_layout, case)


@requirement("flat_layout.buffer.positions", source=FSDP)
@given(case=EVERY)
def test_table_has_begin_and_end_of_every_parameter(flat_layout, case):
    """A parameter of n elements occupies n elements of the buffer."""
    assert_table(flat_layout, case)


@requirement("flat_layout.buffer.scalars-and-empty", source=FSDP)
@given(case=layout_cases(shapes=st.permutations([(), (0, 3), (2, 5), (7,), (4, 0, 2)]).map(tuple)))
def test_scalars_have_one_element_and_empty_parameters_none(flat_layout, case):
    """A parameter without axes is one element; one with an axis of size 0 is an empty range."""
    assert_table(flat_layout, case)


# Shards


@requirement("flat_layout.shard.size", source=FSDP, smoke=True)
@given(case=EVERY)
def test_shards_are_the_smallest_multiple_of_32_that_holds_all(flat_layout, case):
    """All shards have one size: the smallest multiple of 32 elements with which they hold all."""
    assert_shard_size(flat_layout, case)


@requirement("flat_layout.shard.whole-multiple", source=FSDP, confusable={"no padding"})
@given(case=layout_cases(tail="whole"))
def test_a_whole_multiple_has_no_padding(flat_layout, case):
    """Where the ranks hold a whole number of 32 elements each, there is no padding."""
    assert_pads(flat_layout, case)
    assert_shard_size(flat_layout, case)


@requirement("flat_layout.shard.padding-at-the-end", source=FSDP)
@given(case=layout_cases(least=3, tail=PADDED))
def test_padding_is_at_the_end_of_the_buffer(flat_layout, case):
    """A rank's padding is that part of its shard that lies behind the last parameter."""
    assert_pads(flat_layout, case)


@requirement("flat_layout.shard.padding-spans-ranks", source=FSDP)
@given(case=SMALL)
def test_padding_fills_several_shards(flat_layout, case):
    """With few elements padding fills the shards of several of the last ranks."""
    assert_pads(flat_layout, case)


@requirement("flat_layout.shard.padding-total", source=FSDP)
@given(case=st.one_of(EVERY, SMALL))
def test_padding_in_total_fills_up_the_shards(flat_layout, case):
    """The padding of all ranks and the parameters fill the shards, with less than 32 a rank."""
    assert_pads_in_total(flat_layout, case)


@requirement(
    "flat_layout.shard.no-elements",
    source=FSDP,
    confusable={"no padding", "one parameter", "one rank"},
)
@given(case=layout_cases(shapes=st.sampled_from([(), ((0, 5),), ((3, 0), (0,))])))
def test_shards_of_nothing_are_empty(flat_layout, case):
    """Without elements the shards are empty, and nothing is divided by zero."""
    assert_shard_size(flat_layout, case)
    assert_pads(flat_layout, case)
    assert_table(flat_layout, case)


@requirement("flat_layout.shard.one-rank", source=FSDP, confusable={"one rank", "no padding"})
@given(case=layout_cases(world=1, tail=ANY_TAIL))
def test_one_rank_has_everything(flat_layout, case):
    """One rank's shard is the whole buffer, padded to a multiple of 32."""
    assert_pads(flat_layout, case)
    assert_ranges(flat_layout, case)


@requirement("flat_layout.shard.many-ranks", source=FSDP)
@given(case=layout_cases(most=4, tail=PADDED, world=st.integers(16, 64)))
def test_tens_of_ranks_are_laid_out_alike(flat_layout, case):
    """Over 16 to 64 ranks every rank has the padding and the parameters that it must have."""
    assert_pads(flat_layout, case)
    assert_ranges(flat_layout, case)


# Ranges


@requirement("flat_layout.ranges.in-shard", source=FSDP)
@given(case=EVERY)
def test_parameters_are_in_shards_where_the_buffer_is_cut(flat_layout, case):
    """A parameter is in a shard from where both begin to where either ends."""
    assert_ranges(flat_layout, case)


@requirement("flat_layout.ranges.of-every-rank", source=FSDP)
@given(case=SMALL)
def test_ranges_end_at_the_padding_of_their_own_rank(flat_layout, case):
    """The range in a shard ends at that rank's padding, whatever padding another rank has."""
    assert_ranges(flat_layout, case)


@requirement("flat_layout.ranges.adjacent", source=FSDP)
@given(case=SPREAD)
def test_ranges_in_a_shard_follow_each_other(flat_layout, case):
    """The parameters in a shard follow each other without a gap, from 0 to its padding."""
    assert_adjacent(flat_layout, case)


@requirement("flat_layout.ranges.sum-to-parameter", source=FSDP)
@given(case=EVERY)
def test_ranks_together_hold_each_parameter_once(flat_layout, case):
    """What all ranks hold of a parameter is as many elements as it has."""
    assert_sums(flat_layout, case)


@requirement("flat_layout.ranges.absent", source=FSDP)
@given(case=st.one_of(SPREAD, SMALL))
def test_a_parameter_that_is_not_in_a_shard_has_an_empty_range(flat_layout, case):
    """Where a shard has nothing of a parameter, the range begins where it ends, in the shard."""
    assert_absent(flat_layout, case)


@requirement("flat_layout.ranges.of-parameter", source=FSDP)
@given(case=EVERY)
def test_ranges_of_parameters_say_which_elements(flat_layout, case):
    """``range_of_parameter`` counts the elements in the shards of the ranks before."""
    assert_ranges_of_parameters(flat_layout, case)


@requirement("flat_layout.ranges.billions", source=FSDP, level="extended")
@given(
    case=layout_cases(
        st.tuples(st.integers(30_001, 60_000), st.integers(20_001, 50_000)),
        least=3,
        most=5,
        world=st.integers(2, 64),
    )
)
def test_billions_of_elements_have_exact_positions(flat_layout, case):
    """Layouts of more than 2³¹ elements are exact to the element, and allocate nothing."""
    assert_large(flat_layout, case)


# Shards of values


@requirement("flat_layout.cut.elements", source=FSDP, smoke=True)
@given(case=EVERY)
def test_cut_puts_every_element_in_its_place(flat_layout, case):
    """A rank's shard has the elements of the buffer that it owns, in C order."""
    assert_cut(flat_layout, case, padding=False)


@requirement("flat_layout.cut.padding-zero", source=FSDP)
@given(case=st.one_of(layout_cases(tail=PADDED), SMALL))
def test_padding_that_is_cut_is_zero(flat_layout, case):
    """The padding of every rank's shard is zero."""
    assert_cut(flat_layout, case)


@requirement("flat_layout.cut.dtype", source=FSDP)
@given(case=layout_cases(dtype=st.sampled_from(["bfloat16", "float16", "float64"])))
def test_shards_are_in_the_dtype_of_the_values(flat_layout, case):
    """Shards have the dtype of the parameters, and their bits."""
    assert_cut(flat_layout, case, *case.random())


@requirement("flat_layout.cut.any-strides", source=FSDP)
@given(case=layout_cases(least=3))
def test_values_are_flattened_by_index_whatever_their_strides(flat_layout, case):
    """A transposed value is flattened in C order of its axes, not in that of its memory."""
    reverse = "permute(tuple(range(v.ndim))[::-1])"
    strided = f"values = {{k: v.{reverse}.contiguous().{reverse} for k, v in values.items()}}"
    assert_cut(flat_layout, case, *case.numbered(), strided)


@requirement("flat_layout.cut.order-of-values", source=FSDP)
@given(case=SPREAD)
def test_values_are_taken_by_name(flat_layout, case):
    """In which order the values are given makes no difference."""
    reverse = "values = dict(reversed(values.items()))"
    assert_cut(flat_layout, case, *case.numbered(), reverse)


@requirement("flat_layout.join.inverse", source=FSDP)
@given(case=st.one_of(EVERY, SMALL))
def test_join_gives_the_values_that_were_cut(flat_layout, case):
    """The shards of all ranks give every parameter in its shape, bit for bit."""
    assert_joined(flat_layout, case)


@requirement("flat_layout.join.padding-ignored", source=FSDP)
@given(case=st.one_of(layout_cases(tail=PADDED), SMALL))
def test_padding_is_in_no_parameter(flat_layout, case):
    """What stands in padding, even NaN, is in none of the parameters that are joined."""
    assert_joined(flat_layout, case, GARBAGE)


@requirement(
    "flat_layout.join.own-memory",
    source=FSDP,
    confusable={"one rank", "one parameter", "no padding"},
)
@given(case=layout_cases(world=st.sampled_from([1, 2, 3]), tail=ANY_TAIL, least=1))
def test_what_is_cut_or_joined_has_its_own_memory(flat_layout, case):
    """Shards share no memory with the values that they are cut from, nor values with shards."""
    assert_own_memory(flat_layout, case)


# Tensor-parallel ranks


@requirement(
    "flat_layout.tensor-parallel.positions",
    source=FSDP,
    level="extended",
    confusable={"one rank"},
)
@given(case=SPLIT)
def test_each_tensor_rank_lays_out_its_parts(flat_layout, case):
    """Positions and padding are those of what one tensor-parallel rank holds."""
    assert_table(flat_layout, case)
    assert_shard_size(flat_layout, case)
    assert_pads(flat_layout, case)
    assert_ranges(flat_layout, case)


@requirement(
    "flat_layout.tensor-parallel.parts",
    source=FSDP,
    level="extended",
    confusable={"one rank"},
)
@given(case=SPLIT)
def test_split_parameters_are_cut_along_their_axis(flat_layout, case):
    """Of a split parameter a tensor rank has an even part of the axis; others it has whole."""
    assert_cut(flat_layout, case)


@requirement(
    "flat_layout.tensor-parallel.join",
    source=FSDP,
    level="extended",
    confusable={"one rank"},
)
@given(case=SPLIT)
def test_parts_are_joined_along_their_axis(flat_layout, case):
    """Parts are put together along their axis, and what every tensor rank has is there once."""
    assert_joined(flat_layout, case)


# Shards of shards


@requirement("flat_layout.reshard.any-to-any", source=RESHARDING, confusable={"one rank"})
@given(case=RESHARDED)
def test_shards_of_any_number_of_ranks_give_those_of_any_other(flat_layout, case):
    """Every element of every shard comes from where it is in the shards of the other layout."""
    assert_resharded(flat_layout, case)


@requirement("flat_layout.reshard.many-ranks", source=RESHARDING, confusable={"one rank"})
@given(
    case=layout_cases(
        world=st.sampled_from([1, 3, 8, 13]), to=st.tuples(st.sampled_from([2, 9, 16]), st.just(1))
    )
)
def test_shards_that_are_only_padding_give_and_take_nothing(flat_layout, case):
    """Ranks beyond the elements hold nothing, in the old layout and in the new one."""
    assert_resharded(flat_layout, case)


@requirement("flat_layout.reshard.padding-zero", source=RESHARDING, confusable={"one rank"})
@given(case=layout_cases(tail=PADDED, world=st.integers(1, 5), to=TO))
def test_padding_is_zero_whatever_padding_was(flat_layout, case):
    """Padding of the new shards is zero where that of the old ones is NaN."""
    assert_resharded(flat_layout, case, GARBAGE)


@requirement("flat_layout.reshard.back-again", source=RESHARDING, confusable={"one rank"})
@given(case=RESHARDED)
def test_there_and_back_is_where_it_began(flat_layout, case):
    """Shards of shards of shards are the first ones, if their ranks are."""
    assert_there_and_back(flat_layout, case)


@requirement("flat_layout.reshard.bits", source=RESHARDING, confusable={"one rank"})
@given(
    case=layout_cases(
        world=st.integers(1, 4),
        to=TO,
        dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    )
)
def test_elements_are_moved_and_nothing_else(flat_layout, case):
    """Dtype and bits are kept: NaN, infinity and negative zero are values like others."""
    special = (
        "special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])",
        "values = {name: torch.where(torch.rand(v.shape, generator=g) < 0.3, special[i % 4].to("
        "v.dtype), v) for i, (name, v) in enumerate(values.items())}",
    )
    assert_resharded(flat_layout, case, values=(*case.random(), *special))


@requirement("flat_layout.reshard.keeps-source", source=RESHARDING, confusable={"one rank"})
@given(case=layout_cases(world=st.integers(1, 3), to=st.tuples(st.integers(1, 3), st.just(1))))
def test_shards_that_are_read_stay_as_they_are(flat_layout, case):
    """The shards that are read are not changed, and new ones share no memory with them."""
    assert_reshard_keeps_source(flat_layout, case)


@requirement(
    "flat_layout.reshard.tensor-parallel",
    source=RESHARDING,
    level="extended",
    confusable={"one rank", "as many ranks"},
)
@given(case=SPLIT_RESHARDED)
def test_both_numbers_of_ranks_are_changed(flat_layout, case):
    """Shards of other data-parallel and tensor-parallel ranks; what these all hold, they all get."""
    assert_resharded(flat_layout, case)


# Order


@requirement(
    "flat_layout.order.weight-decay-first",
    source=STAGE,
    level="extended",
    confusable={"one rank"},
)
@given(case=sorted_cases(splits=False))
def test_parameters_without_weight_decay_come_first(flat_layout, case):
    """With ``weight_decay`` parameters that do not decay come first, each kind in the order given."""
    assert_order(flat_layout, case)


@requirement(
    "flat_layout.order.split-parameters", source=STAGE, level="extended", confusable={"one rank"}
)
@given(case=SORTED)
def test_split_parameters_are_outside_and_sequence_parallel_ones_in_the_middle(flat_layout, case):
    """By ``(decays, decays == split, decays != sequence parallel)``, alike in the order given."""
    assert_order(flat_layout, case)


@requirement("flat_layout.order.positions", source=STAGE, level="extended", confusable={"one rank"})
@given(case=SORTED)
def test_sorted_parameters_are_where_the_order_puts_them(flat_layout, case):
    """Positions, shards and values are those of the sorted buffer."""
    assert_table(flat_layout, case)
    assert_cut(flat_layout, case)


# Bad input


@requirement("flat_layout.refuses.ranks-below-one", source=FSDP)
@given(case=REFUSED)
def test_fewer_than_one_rank_is_refused(flat_layout, case):
    """A layout over no ranks, or fewer, is refused; the error names the number."""
    for number in (0, -case.world):
        assert_not_made(flat_layout, case.call(ranks=str(number)), str(number))


@requirement("flat_layout.refuses.tensor-ranks-below-one", source=FSDP, level="extended")
@given(case=split_cases(world=st.sampled_from([2, 3])))
def test_fewer_than_one_tensor_rank_is_refused(flat_layout, case):
    """A layout over no tensor-parallel ranks, or fewer, is refused; the error names the number."""
    for number in (0, -case.tensor_world):
        assert_not_made(flat_layout, case.call(tensor_ranks=str(number)), str(number))


@requirement("flat_layout.refuses.rank-beyond-last", source=FSDP)
@given(case=REFUSED)
def test_a_rank_beyond_the_last_is_refused(flat_layout, case):
    """Padding, ranges and shards of a rank that there is not are refused; the error names it."""
    for rank in (case.world, case.world + 3):
        assert_rank_refused(flat_layout, case, rank)


@requirement("flat_layout.refuses.tensor-rank-beyond-last", source=FSDP, level="extended")
@given(case=split_cases(world=st.sampled_from([2, 3])))
def test_a_tensor_rank_beyond_the_last_is_refused(flat_layout, case):
    """Shards of a tensor-parallel rank that there is not are refused; the error names it."""
    for rank in (case.tensor_world, case.tensor_world + 3):
        assert_tensor_rank_refused(flat_layout, case, rank)


@requirement(
    "flat_layout.refuses.indivisible-axis",
    source=FSDP,
    level="extended",
    confusable={"no padding"},
)
@given(
    case=split_cases(tensor_world=st.sampled_from([4, 5, 7]), world=st.sampled_from([2, 3])).filter(
        lambda case: case.indivisible
    )
)
def test_an_axis_that_tensor_ranks_do_not_divide_is_refused(flat_layout, case):
    """A parameter whose axis the tensor-parallel ranks do not divide is refused, and named."""
    assert_not_made(flat_layout, case.call(), *case.indivisible)


@requirement("flat_layout.refuses.missing-values", source=FSDP)
@given(case=REFUSED)
def test_values_that_are_missing_are_refused(flat_layout, case):
    """Cutting without the value of a parameter is refused, on every rank, and names it."""
    name = case.chosen
    assert_values_refused(flat_layout, case, f"del values[{name!r}]", names=[name])


@requirement("flat_layout.refuses.unknown-values", source=FSDP)
@given(case=REFUSED)
def test_values_that_are_unknown_are_refused(flat_layout, case):
    """A value of a name that is no parameter is refused, and named."""
    more = f"values['unknown.weight'] = values[{case.chosen!r}].clone()"
    assert_values_refused(flat_layout, case, more, names=["unknown.weight"])


@requirement("flat_layout.refuses.values-under-another-name", source=FSDP)
@given(case=REFUSED)
def test_as_many_values_under_another_name_are_refused(flat_layout, case):
    """A value under another name is refused though there are as many values and elements."""
    name = case.chosen
    renamed = (
        "values = {('unknown.weight' if name == " + repr(name) + " else name): value"
        " for name, value in values.items()}"
    )
    assert_values_refused(flat_layout, case, renamed, names=[name, "unknown.weight"])


@requirement("flat_layout.refuses.other-shapes", source=FSDP)
@given(case=layout_cases(st.tuples(st.integers(2, 9), st.integers(3, 13)), least=3))
def test_values_with_another_number_of_elements_are_refused(flat_layout, case):
    """A value with a row too many or too few is refused, and its parameter is named."""
    name = case.chosen
    for changed in (f"values[{name!r}][1:]", f"torch.cat([values[{name!r}]] * 2)"):
        edit = f"values[{name!r}] = {changed}"
        assert_values_refused(flat_layout, case, edit, names=[name])


@requirement("flat_layout.refuses.equal-count-shapes", source=FSDP)
@given(case=layout_cases(st.tuples(st.integers(2, 9), st.integers(10, 13)), least=3))
def test_values_of_another_shape_with_as_many_elements_are_refused(flat_layout, case):
    """A value that is transposed, flattened or has one axis more is refused, and named."""
    name = case.chosen
    for changed in ("t().contiguous()", "flatten()", "unsqueeze(0)"):
        edit = f"values[{name!r}] = values[{name!r}].{changed}"
        assert_values_refused(flat_layout, case, edit, names=[name])


@requirement("flat_layout.refuses.missing-shard", source=RESHARDING)
@given(case=REFUSED)
def test_a_missing_shard_is_refused(flat_layout, case):
    """Joining or resharding without the shard of a rank is refused, and names the rank."""
    rank = case.seed % case.world
    for edit in (
        f"del shards[{rank}, 0]",
        f"shards[{case.world}, 0] = shards.pop(({rank}, 0))",
    ):
        assert_shards_refused(flat_layout, case, edit, words=[str(rank)])


@requirement("flat_layout.refuses.shard-length", source=RESHARDING)
@given(case=REFUSED)
def test_a_shard_of_another_length_is_refused(flat_layout, case):
    """Joining or resharding a shard that is too short or too long is refused, and names the rank."""
    rank = case.seed % case.world
    shard = f"shards[{rank}, 0]"
    for changed in (f"{shard}[:-1]", f"{shard}.repeat(2)"):
        assert_shards_refused(flat_layout, case, f"{shard} = {changed}", words=[str(rank)])
