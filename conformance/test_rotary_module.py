"""The requirements of the contract ``rotary_module``: tables survive what a model goes through."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.requirement import requirement
from conformance.harness.rotary_cases import RULES, any_layout, any_positions, rotary_cases
from conformance.harness.rotary_module_checks import (
    assert_instances_independent,
    assert_meta_restored,
    assert_module_matches,
    assert_module_stateless,
    assert_state_round_trips,
    assert_survives_cast,
)

LLAMA = "transformers modeling_llama, LlamaRotaryEmbedding"
META = "huggingface/transformers#45902; pytorch/torchtitan#4783"

SCATTERED = st.sampled_from(["shuffled", "per-row", "offset"])
LOW_FIRST = ("bfloat16", "float16", "float32")


@requirement("rotary_module.output.oracle", source=LLAMA, level="extended", smoke=True)
@given(case=rotary_cases(positions=any_positions()))
def test_module_rotates_as_the_function_does(rotary_module, case):
    """The module turns each pair by position times frequency."""
    assert_module_matches(rotary_module, case)


@requirement("rotary_module.options.any-combination", source=LLAMA, level="extended")
@given(
    case=rotary_cases(
        positions=any_positions(), layout=any_layout(), rule=st.sampled_from([None, *RULES])
    )
)
def test_module_takes_every_option(rotary_module, case):
    """Layouts, partial rotation and scaling rules combine as in the function."""
    assert_module_matches(rotary_module, case)


@requirement(
    "rotary_module.cast.far-positions", source="EleutherAI/gpt-neox#1003", level="extended"
)
@given(case=rotary_cases(positions="far", dtypes=LOW_FIRST))
def test_cast_leaves_angles_exact(rotary_module, case):
    """After a cast of the module to bfloat16 or float16, far positions are still exact."""
    assert_survives_cast(rotary_module, case)


@requirement("rotary_module.cast.scaled", source="deepspeedai/DeepSpeed#4932", level="extended")
@given(case=rotary_cases(positions="far", dtypes=LOW_FIRST, rule=st.sampled_from(RULES)))
def test_cast_leaves_scaled_angles_exact(rotary_module, case):
    """The same under every scaling rule."""
    assert_survives_cast(rotary_module, case)


@requirement("rotary_module.meta.restored", source=META, level="extended")
@given(case=rotary_cases(positions=SCATTERED))
def test_meta_construction_is_restored(rotary_module, case):
    """Built on the meta device, given memory and reset, the module is as one built plainly."""
    assert_meta_restored(rotary_module, case)


@requirement("rotary_module.meta.every-option", source=META, level="extended")
@given(
    case=rotary_cases(
        positions=SCATTERED, layout=any_layout(), rule=st.sampled_from([*RULES, None])
    )
)
def test_meta_construction_is_restored_with_every_option(rotary_module, case):
    """The same in every layout and under every scaling rule."""
    assert_meta_restored(rotary_module, case)


@requirement("rotary_module.state.round-trip", source=META, level="extended")
@given(case=rotary_cases(positions="far", dtypes=LOW_FIRST))
def test_a_checkpoint_does_not_change_tables(rotary_module, case):
    """Loading the state of a module that was cast to bfloat16 leaves the angles exact."""
    assert_state_round_trips(rotary_module, case)


@requirement(
    "rotary_module.scaling.stateless", source="huggingface/transformers#25306", level="extended"
)
@given(
    case=rotary_cases(
        positions=SCATTERED, rule=st.sampled_from(["dynamic", "longrope"]), reach="beyond"
    )
)
def test_module_forgets_longer_calls(rotary_module, case):
    """Short, long, short: each call is scaled by its own length."""
    assert_module_stateless(rotary_module, case)


@requirement("rotary_module.instances.independent", source="THUDM/slime#1720", level="extended")
@given(case=rotary_cases(positions=SCATTERED))
def test_modules_do_not_share_tables(rotary_module, case):
    """Two modules of different theta, built one after the other, each keep their own."""
    assert_instances_independent(rotary_module, case)
