"""The requirements of the contract ``compression_statistics``: what compressing experts saves.

Counts are compared exactly, quotients to the last bits of a float. The oracle counts tensors.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.requirement import requirement
from conformance.harness.statistics_cases import (
    LARGE,
    MIXTRAL,
    SINGLE,
    StatisticsCase,
    published_cases,
    statistics_cases,
)
from conformance.harness.statistics_checks import (
    assert_again,
    assert_entries,
    assert_fields,
    assert_file,
    assert_file_replaced,
    assert_order_is_free,
    assert_published,
    assert_refused,
)
from conformance.harness.statistics_verifier_checks import (
    assert_contradicted,
    assert_damage_told,
    assert_duplicates_contradicted,
    assert_no_code_is_run,
    assert_no_contradictions,
    assert_other_file,
    edited_entries,
    edited_totals,
    entries_left_out,
    impossible,
    missing,
    printed,
    rounded,
)

FORMULA = "LawrenceRLiu/MoE_Factorize_Compress, src/compression_stats.py"
FIGURES = "the formula of src/compression_stats.py at published shapes; ARCHITECTURE.md, corrected"
FILES = "LawrenceRLiu/MoE_Factorize_Compress, src/compression_stats.py, save"
COMPUTE = "each active expert applies the core between its wrappers (src/shared_core.py)"

ANY = statistics_cases()
FEW = statistics_cases(least=2, most=3)
"""For rules that read a file many times."""
DENSE = statistics_cases(active="all")
LONE = statistics_cases(experts=st.just(1), active="all")
HUGE = statistics_cases(width=LARGE, rank=st.integers(10**6, 10**7))
"""Counts beyond 2⁵³, which floats do not hold."""
LARGE_RANK = statistics_cases(experts=st.integers(2, 3), width=st.integers(5, 9))
"""Wrappers larger than what they save."""
ALL_ACTIVE = {"all experts are active"}


# Entries


@requirement("compression_statistics.entry.original", source=FORMULA)
@given(case=ANY)
def test_original_counts_of_an_entry(compression_statistics, case):
    """The originals are E · d_in · d_out in total, and k · d_in · d_out active."""
    names = ("original_total_params", "original_active_params")
    assert_entries(compression_statistics, case, *names)


@requirement("compression_statistics.entry.core-and-wrappers", source=FORMULA)
@given(case=ANY)
def test_core_and_wrappers_of_an_entry(compression_statistics, case):
    """The core has d_in · d_out parameters, the wrappers of an expert 2 · r · (d_in + d_out)."""
    names = ("core_params", "wrapper_params_per_expert")
    assert_entries(compression_statistics, case, *names)


@requirement("compression_statistics.entry.compressed-total", source=FORMULA)
@given(case=ANY)
def test_compressed_total_of_an_entry(compression_statistics, case):
    """The compressed total is the core once, and the wrappers of all E experts."""
    assert_entries(compression_statistics, case, "compressed_total_params")


@requirement("compression_statistics.entry.compressed-active", source=FORMULA)
@given(case=ANY)
def test_compressed_active_of_an_entry(compression_statistics, case):
    """What is active of it is the core once, and the wrappers of k experts."""
    assert_entries(compression_statistics, case, "compressed_active_params")


@requirement("compression_statistics.entry.ratios", source=FORMULA)
@given(case=ANY)
def test_ratios_of_an_entry(compression_statistics, case):
    """Ratios of an entry are compressed / original, unrounded, in total and active."""
    names = ("total_compression_ratio", "active_compression_ratio")
    assert_entries(compression_statistics, case, *names)


@requirement("compression_statistics.entry.percentages", source=FORMULA)
@given(case=ANY)
def test_percentages_of_an_entry(compression_statistics, case):
    """The reduction is 100 · (1 − ratio), the increase of active ones 100 · (ratio − 1)."""
    names = ("total_reduction_percent", "active_increase_percent")
    assert_entries(compression_statistics, case, *names)


@requirement("compression_statistics.entry.as-given", source=FORMULA)
@given(case=ANY)
def test_entries_are_in_the_order_given(compression_statistics, case):
    """``per_layer_stats`` has every entry with the fields that were given, in their order."""
    names = (
        "layer_idx",
        "projection",
        "num_experts",
        "num_active_experts",
        "d_in",
        "d_out",
        "rank",
    )
    assert_entries(compression_statistics, case, *names)


# Aggregates


@requirement("compression_statistics.aggregate.totals", source=FORMULA, smoke=True)
@given(case=ANY)
def test_totals_are_sums(compression_statistics, case):
    """Total parameters, original and compressed, are the sums over the entries."""
    names = ("total_params_original", "total_params_compressed")
    assert_fields(compression_statistics, case, *names)


@requirement("compression_statistics.aggregate.active", source=FORMULA)
@given(case=ANY)
def test_active_parameters_are_sums(compression_statistics, case):
    """Active parameters, original and compressed, are the sums over the entries."""
    names = ("active_params_original", "active_params_compressed")
    assert_fields(compression_statistics, case, *names)


@requirement("compression_statistics.aggregate.ratio-of-sums", source=FORMULA)
@given(case=ANY)
def test_ratio_is_that_of_the_sums(compression_statistics, case):
    """Ratios of entries of different sizes are ratios of sums, and not means of ratios."""
    names = ("total_compression_ratio", "active_compression_ratio")
    assert_fields(compression_statistics, case, *names)


@requirement("compression_statistics.aggregate.reduction", source=FORMULA)
@given(case=st.one_of(ANY, LARGE_RANK))
def test_reduction_is_positive_for_fewer(compression_statistics, case):
    """The reduction is 100 · (1 − ratio) percent: positive for fewer, negative for more parameters."""
    assert_fields(compression_statistics, case, "total_reduction_percent")


@requirement("compression_statistics.aggregate.active-change", source=FORMULA)
@given(case=st.one_of(ANY, LARGE_RANK))
def test_change_is_negative_for_fewer(compression_statistics, case):
    """The change of active parameters is 100 · (ratio − 1) percent: negative for fewer."""
    assert_fields(compression_statistics, case, "active_change_percent")


@requirement("compression_statistics.aggregate.compute", source=COMPUTE)
@given(case=ANY)
def test_compute_has_the_core_for_every_active_expert(compression_statistics, case):
    """``compute_ratio`` is Σ k · (core + wrappers) / Σ k · d_in · d_out, which is always above 1."""
    assert_fields(compression_statistics, case, "compute_ratio")


@requirement("compression_statistics.aggregate.memory", source=FORMULA)
@given(case=ANY)
def test_memory_is_two_bytes_a_parameter(compression_statistics, case):
    """Memory is 2 bytes a parameter in units of 10⁹ bytes; what is saved is the difference."""
    names = ("total_memory_original_gb", "total_memory_compressed_gb", "memory_saved_gb")
    assert_fields(compression_statistics, case, *names)


@requirement("compression_statistics.aggregate.layers-and-entries", source=FORMULA)
@given(case=ANY)
def test_layers_are_counted_once(compression_statistics, case):
    """``num_layers_compressed`` counts distinct layers, ``num_entries`` their projections."""
    assert_fields(compression_statistics, case, "num_layers_compressed", "num_entries")


@requirement("compression_statistics.aggregate.all-active", source=FORMULA, confusable=ALL_ACTIVE)
@given(case=DENSE)
def test_active_is_total_if_all_experts_are(compression_statistics, case):
    """With k = E the active parameters are all of them."""
    assert_fields(compression_statistics, case)


@requirement("compression_statistics.aggregate.one-expert", source=FORMULA, confusable=ALL_ACTIVE)
@given(case=LONE)
def test_one_expert_is_enlarged(compression_statistics, case):
    """Of single experts the ratio is above 1 and the reduction negative."""
    assert_fields(compression_statistics, case)


@requirement("compression_statistics.aggregate.one-entry", source=FORMULA, confusable=SINGLE)
@given(case=statistics_cases(least=1, most=1))
def test_one_entry_is_its_own_aggregate(compression_statistics, case):
    """The aggregate of one entry has its figures."""
    assert_fields(compression_statistics, case)
    assert_entries(compression_statistics, case)


@requirement("compression_statistics.aggregate.exact-integers", source=FORMULA)
@given(case=HUGE)
def test_counts_beyond_floats_are_exact(compression_statistics, case):
    """Counts beyond 2⁵³ are exact to the last digit."""
    assert_fields(compression_statistics, case)
    assert_entries(compression_statistics, case)


@requirement("compression_statistics.aggregate.order-of-entries", source=FORMULA)
@given(case=ANY)
def test_order_of_entries_makes_no_difference(compression_statistics, case):
    """Entries in another order have the same aggregate."""
    assert_order_is_free(compression_statistics, case)


@requirement("compression_statistics.aggregate.again", source=FORMULA)
@given(case=ANY)
def test_asking_again_counts_nothing_twice(compression_statistics, case):
    """Asked again, and after saving, the aggregate is what it was."""
    assert_again(compression_statistics, case)


# Published models


@requirement(
    "compression_statistics.published.mixtral",
    source=FIGURES,
    smoke=True,
    confusable={"one entry a layer", "one entry"},
)
@given(case=published_cases("Mixtral-8x7B at rank 64"))
def test_figures_of_mixtral_are_those_of_the_formula(compression_statistics, case):
    """Mixtral's shapes at rank 64 give 232,783,872 of 1,409,286,144 parameters: 0.1652, not 0.19."""
    assert_published(compression_statistics, case)


@requirement(
    "compression_statistics.published.models",
    source=FIGURES,
    confusable={*SINGLE},
)
@given(case=published_cases())
def test_figures_of_published_models(compression_statistics, case):
    """The figures of Mixtral and of Qwen3-30B-A3B at three ranks are those of the formula."""
    assert_published(compression_statistics, case)


# Files


@requirement("compression_statistics.file.every-field", source=FILES)
@given(case=ANY)
def test_file_has_every_field(compression_statistics, case):
    """The file is plain YAML that reads back to the aggregate and its entries, unrounded."""
    assert_file(compression_statistics, case)


@requirement("compression_statistics.file.exact-integers", source=FILES)
@given(case=HUGE)
def test_file_has_exact_integers(compression_statistics, case):
    """Counts beyond 2⁵³ are whole numbers in the file, exact to the last digit."""
    assert_file(compression_statistics, case)


@requirement("compression_statistics.file.replaced", source=FILES)
@given(case=ANY)
def test_file_takes_the_place_of_an_older_one(compression_statistics, case):
    """Saving over an older, longer file, and saving twice, leaves one right file and no other."""
    assert_file_replaced(compression_statistics, case)


# Contradictions


@requirement("compression_statistics.contradictions.none", source=FIGURES)
@given(case=st.one_of(ANY, HUGE))
def test_a_right_file_is_not_contradicted(compression_statistics, case):
    """Neither a right file nor one that was saved has a contradiction."""
    assert_no_contradictions(compression_statistics, case)


@requirement("compression_statistics.contradictions.of-the-file", source=FIGURES)
@given(case=FEW)
def test_a_file_is_judged_by_its_own_entries(compression_statistics, case):
    """A right file of other entries than the statistics' own is right."""
    assert_other_file(compression_statistics, case)


@requirement("compression_statistics.contradictions.totals", source=FIGURES)
@given(case=FEW)
def test_a_field_that_is_off_is_named(compression_statistics, case):
    """Whichever field of the aggregate does not follow from the entries, a line names it."""
    assert_contradicted(compression_statistics, case, edited_totals(case))


@requirement("compression_statistics.contradictions.entries", source=FIGURES)
@given(case=FEW)
def test_a_field_of_an_entry_that_is_off_is_named(compression_statistics, case):
    """Whichever field of an entry does not follow from its sizes, a line names it."""
    assert_contradicted(compression_statistics, case, edited_entries(case))


@requirement("compression_statistics.contradictions.rounded", source=FIGURES)
@given(case=FEW)
def test_a_rounded_figure_is_named(compression_statistics, case):
    """A quotient that was rounded to two or four digits is named."""
    assert_contradicted(compression_statistics, case, rounded(case))


@requirement(
    "compression_statistics.contradictions.printed-figures",
    source=FIGURES,
    confusable={"one entry a layer"},
)
@given(case=st.just(StatisticsCase(entries=MIXTRAL)))
def test_printed_figures_are_named(compression_statistics, case):
    """The figures that are printed for Mixtral's shapes at rank 64, 0.19 among them, are all named."""
    assert_contradicted(compression_statistics, case, printed())


@requirement("compression_statistics.contradictions.missing-fields", source=FIGURES)
@given(case=FEW)
def test_a_missing_field_is_named(compression_statistics, case):
    """A field that is missing, of the aggregate or of an entry, is named."""
    assert_contradicted(compression_statistics, case, missing(case))


@requirement("compression_statistics.contradictions.missing-entry", source=FIGURES)
@given(case=FEW)
def test_totals_of_more_entries_than_there_are_are_named(compression_statistics, case):
    """Totals, and the number of entries, that have one that is missing are named."""
    assert_contradicted(compression_statistics, case, entries_left_out(case))


@requirement("compression_statistics.contradictions.duplicates", source=FIGURES)
@given(case=FEW)
def test_an_entry_that_is_there_twice_is_told(compression_statistics, case):
    """A file that has a projection of a layer twice is contradicted, whatever its totals are."""
    assert_duplicates_contradicted(compression_statistics, case)


@requirement("compression_statistics.contradictions.impossible-sizes", source=FIGURES)
@given(case=FEW)
def test_a_size_that_cannot_be_is_named(compression_statistics, case):
    """A size below 1 in an entry of the file is named, and nothing is divided by it."""
    assert_contradicted(compression_statistics, case, impossible(case))


@requirement("compression_statistics.contradictions.damaged-file", source=FIGURES)
@given(case=FEW)
def test_a_damaged_file_is_not_right(compression_statistics, case):
    """A file that is missing, cut off, or no mapping raises an exception or is contradicted."""
    assert_damage_told(compression_statistics, case)


@requirement("compression_statistics.contradictions.no-code", source="PyYAML: load is unsafe")
@given(case=FEW)
def test_a_file_runs_no_code(compression_statistics, case):
    """A file that names a function to call has it not called."""
    assert_no_code_is_run(compression_statistics, case)


# Refusals


@requirement("compression_statistics.refuses.no-entries", source=FORMULA)
@given(case=ANY)
def test_no_entries_are_refused(compression_statistics, case):
    """Without entries there is nothing to count: an exception, at the latest in ``save``."""
    assert_refused(compression_statistics, case, "entries.clear()")


@requirement("compression_statistics.refuses.sizes-below-one", source=FORMULA)
@given(case=ANY)
def test_sizes_below_one_are_refused(compression_statistics, case):
    """No experts, no width and negative ones are refused."""
    for name in ("num_experts", "d_in", "d_out"):
        for value in (0, -4):
            edit = f"entries[{case.one}]['{name}'] = {value}"
            assert_refused(compression_statistics, case, edit)


@requirement("compression_statistics.refuses.rank-below-one", source=FORMULA)
@given(case=ANY)
def test_ranks_below_one_are_refused(compression_statistics, case):
    """A rank of 0 or less is refused."""
    for value in (0, -2):
        edit = f"entries[{case.one}]['rank'] = {value}"
        assert_refused(compression_statistics, case, edit)


@requirement("compression_statistics.refuses.no-active-experts", source=FORMULA)
@given(case=ANY)
def test_no_active_experts_are_refused(compression_statistics, case):
    """k = 0 or less is refused: ratios would divide by it."""
    for value in (0, -1):
        edit = f"entries[{case.one}]['num_active_experts'] = {value}"
        assert_refused(compression_statistics, case, edit)


@requirement("compression_statistics.refuses.more-active-than-there-are", source=FORMULA)
@given(case=ANY)
def test_more_active_experts_than_there_are_are_refused(compression_statistics, case):
    """k above E is refused."""
    edit = f"entries[{case.one}]['num_active_experts'] = entries[{case.one}]['num_experts'] + 1"
    assert_refused(compression_statistics, case, edit)


@requirement("compression_statistics.refuses.duplicates", source=FORMULA)
@given(case=ANY)
def test_an_entry_given_twice_is_refused(compression_statistics, case):
    """One projection of a layer given twice is refused, with the same sizes and with others."""
    again = f"entries.append(dict(entries[{case.one}]))"
    assert_refused(compression_statistics, case, again)
    assert_refused(compression_statistics, case, again, "entries[-1]['rank'] += 1")
