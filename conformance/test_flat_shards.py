"""The requirements of the contract ``flat_shards``: weights are there when they are read.

The oracle is one process with the whole model and the batches of all ranks, in float64, with torch's
modules and optimizers. Models run on real process groups of two, three and four ranks.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.flat_buffer_checks import (
    assert_current_or_error,
    assert_edit_is_lost,
    assert_frozen_shards,
    assert_gradients_are_shorter,
    assert_lost_or_right,
    assert_order,
    assert_padding_stays_zero,
    assert_restore_is_idempotent,
    assert_restored,
    assert_shard_is_the_model,
    assert_shards_kept,
    assert_split,
    assert_stage_refuses,
    assert_stages,
    assert_unknown_shard,
    assert_views,
)
from conformance.harness.flat_cases import ADAMW, SGD, flat_cases
from conformance.harness.flat_checkpoint_cases import checkpoint_cases, small_cases
from conformance.harness.flat_checkpoints import (
    assert_files_not_needed,
    assert_inference,
    assert_loaded_twice,
    assert_nested,
    assert_not_finite_kept,
    assert_other_frozen,
    assert_outputs_after,
    assert_overwritten,
    assert_replaces,
    assert_resumed,
    assert_round_trip,
    assert_save_changes_nothing,
    assert_saved_again,
    assert_step_after,
    assert_stored_values,
    assert_two_directories,
)
from conformance.harness.flat_checks import (
    assert_changes,
    assert_clipped,
    assert_forward,
    assert_gradients,
    assert_load_refused,
    assert_loaded,
    assert_missing_anywhere_named,
    assert_missing_gradient_named,
    assert_norm,
    assert_not_clipped,
    assert_ranks_agree,
    assert_read,
    assert_step_gradients,
    assert_trained,
    assert_twice,
    made_of,
)
from conformance.harness.flat_damage import (
    FILE_DAMAGES,
    NAMED_DAMAGES,
    PLACE_DAMAGES,
    WHOLE_DAMAGES,
    assert_names_file,
    assert_names_parameter,
    assert_other_model_refused,
    assert_refused_or_whole,
    assert_unharmed,
)
from conformance.harness.flat_interrupted import assert_survives, assert_survives_rank
from conformance.harness.flat_programs import (
    LOAD,
    POISON,
    RESTORE,
    STALE,
    STEP,
    VALUES,
    backward,
    evaluate,
    training,
)
from conformance.harness.qwen2_cases import extras
from conformance.harness.requirement import requirement

FAST_LLM = "ServiceNow/Fast-LLM, engine/multi_stage"
SOME_FROZEN = st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True).map(tuple)
ALL_BUT_ONE = st.sampled_from([tuple(n for n in range(11) if n != own) for own in (1, 4, 8)])
"""Of the parameters of a model with one block, one of a single axis trains."""
FEW = (2, 3)
"""Ranks of cases that communicate much: two cores keep four waiting."""
MANY = st.sampled_from([2, 3])
SHARED = st.sampled_from([1, 2])
ANY_BUFFERS = st.sampled_from([None, 1, 2])
COMPUTE = st.sampled_from(["float32", "bfloat16"])
VICTIM = st.tuples(
    st.integers(0, 40).map(lambda n: ("victim", n)), st.integers(0, 1).map(lambda n: ("more", n))
)


def victim(case):
    """The name of the parameter that a case spoils."""
    names = case.names()
    return names[case.drawn["victim"] % len(names)]


# What is read


@requirement("flat_shards.parameters.of-a-new-model", source=FAST_LLM, smoke=True)
@given(case=flat_cases())
def test_new_model_has_its_parameters(flat_shards, case):
    """Right after a model is made, every parameter can be read whole, and is the one it was given."""
    assert_read(flat_shards, case.call(), when="of a new model")


@requirement(
    "flat_shards.parameters.of-few-elements",
    source=FAST_LLM,
    confusable={"few elements"},
    several_ranks=True,
)
@given(case=flat_cases(tiny=True, unused=st.booleans(), frozen=()))
def test_ranks_without_elements_read_all_parameters(flat_shards, case):
    """Where a model has fewer elements than would give each rank some, all ranks read all of it."""
    assert_loaded(flat_shards, case)


@requirement("flat_shards.parameters.on-one-rank", source=FAST_LLM, confusable={"one rank"})
@given(case=flat_cases(ranks=(1,)))
def test_one_rank_reads_its_parameters(flat_shards, case):
    """One rank, without a group, has the parameters that it was given."""
    assert_read(flat_shards, case.call(), when="of a new model")


@requirement("flat_shards.parameters.tied-once", source="deepspeedai/DeepSpeed#3033")
@given(case=flat_cases(ranks=FEW, tied=True))
def test_tied_parameter_is_read_under_its_first_name(flat_shards, case):
    """A tied parameter is there once, under the first of its names, and no other took its place."""
    assert_loaded(flat_shards, case)


@requirement("flat_shards.parameters.frozen", source="deepspeedai/DeepSpeed#3205")
@given(case=flat_cases(ranks=FEW, frozen=SOME_FROZEN))
def test_frozen_parameters_are_read_whole(flat_shards, case):
    """Frozen parameters can be read and loaded as those that train."""
    assert_loaded(flat_shards, case)


@requirement("flat_shards.parameters.scalars", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW))
def test_scalars_and_empty_parameters_are_read(flat_shards, case):
    """A parameter without axes is one element, and one with an axis of length 0 is none."""
    edits = (
        "modules[0].register_parameter('scalar', nn.Parameter(r()))",
        "modules[1].register_parameter('empty', nn.Parameter(r(0, 3)))",
        "parameters = dict(nn.Sequential(*modules).named_parameters())",
    )
    assert_read(flat_shards, case.call(*edits), when="of a new model")


@requirement("flat_shards.parameters.copies", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_what_was_read_is_a_copy(flat_shards, case):
    """To change what was read changes neither the model nor what is read next."""
    spoil = "for value in out.full_parameters().values(): value.data.fill_(7)"
    assert_read(flat_shards, case.call(), spoil, when="after a copy was changed")


@requirement("flat_shards.parameters.after-forward", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW))
def test_forward_and_backward_change_no_parameter(flat_shards, case):
    """Forward and backward pass leave every parameter as it was, bit for bit."""
    assert_read(flat_shards, case.call(), backward(case), when="after forward and backward")


@requirement("flat_shards.parameters.in-full-precision", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, compute="bfloat16"))
def test_parameters_are_float32_whatever_computes(flat_shards, case):
    """With a 16-bit compute dtype parameters are read as they were given, in float32."""
    assert_read(flat_shards, case.call(), evaluate(case), when="after a forward pass")


# Loading


@requirement("flat_shards.load.read-back", source=FAST_LLM)
@given(case=flat_cases())
def test_loaded_parameters_are_read_back(flat_shards, case):
    """After ``load_parameters`` every rank reads what was loaded, bit for bit."""
    assert_loaded(flat_shards, case)


@requirement("flat_shards.load.any-order", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_names_decide_what_is_loaded_where(flat_shards, case):
    """The order of the values that are loaded means nothing."""
    call = case.call(VALUES, "values = {name: values[name] for name in reversed(values)}")
    assert_read(flat_shards, call, LOAD, when="after a load", expected=call.named("values"))


@requirement("flat_shards.load.own-copy", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_model_does_not_keep_what_was_loaded(flat_shards, case):
    """To change the tensors that were loaded afterwards changes no parameter."""
    assert_loaded(flat_shards, case, "read = [value.fill_(7) for value in values.values()]")


@requirement("flat_shards.load.missing", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3), extra=VICTIM))
def test_missing_parameter_is_refused(flat_shards, case):
    """Values without one of the parameters are refused by its name, and nothing is changed."""
    name = victim(case)
    assert_load_refused(flat_shards, case, f"del values[{name!r}]", name)


@requirement("flat_shards.load.unknown", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_unknown_parameter_is_refused(flat_shards, case):
    """Values with a name that the model does not have are refused by that name."""
    assert_load_refused(flat_shards, case, "values['0.other'] = r(3)", "0.other")


@requirement("flat_shards.load.renamed", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3), extra=VICTIM))
def test_as_many_values_of_other_names_are_refused(flat_shards, case):
    """One value too few and one too many are refused, although they are as many as there must be."""
    name = victim(case)
    change = f"values[{name + '_'!r}] = values.pop({name!r})"
    assert_load_refused(flat_shards, case, change, name)


@requirement("flat_shards.load.other-shape", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3), extra=VICTIM))
def test_other_shape_is_refused(flat_shards, case):
    """A value with a row more, or with one row that could be spread, is refused by its name."""
    name = victim(case)
    other = "torch.cat([v, v[:1]])" if case.drawn["more"] else "v[:1]"
    assert_load_refused(
        flat_shards, case, f"v = values[{name!r}]; values[{name!r}] = {other}", name
    )


@requirement("flat_shards.load.swapped-shape", source=FAST_LLM)
@given(case=flat_cases(ranks=(1, 2, 3), extra=VICTIM))
def test_other_shape_of_as_many_elements_is_refused(flat_shards, case):
    """A value with as many elements in another shape is refused by its name."""
    name = victim(case)
    other = "v.reshape(*v.shape[::-1]) if v.ndim > 1 else v[None]"
    assert_load_refused(
        flat_shards, case, f"v = values[{name!r}]; values[{name!r}] = {other}", name
    )


@requirement("flat_shards.load.not-finite", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2, 3), extra=VICTIM))
def test_values_that_are_not_finite_are_refused(flat_shards, case):
    """A single NaN or infinity is refused by the name of its parameter, and nothing is changed."""
    name = victim(case)
    value = "nan" if case.drawn["more"] else "inf"
    change = f"values[{name!r}].view(-1)[-1] = float('{value}')"
    assert_load_refused(flat_shards, case, change, name)


# Forward


@requirement("flat_shards.forward.whole-model", source=FAST_LLM, smoke=True)
@given(case=flat_cases())
def test_forward_is_that_of_the_whole_model(flat_shards, case):
    """Without a call that restores anything, forward gives what the whole model gives."""
    assert_forward(flat_shards, case.call())


@requirement("flat_shards.forward.on-one-rank", source=FAST_LLM, confusable={"one rank"})
@given(case=flat_cases(ranks=(1,)))
def test_forward_on_one_rank_is_the_model(flat_shards, case):
    """One rank, without a group, computes the model."""
    assert_forward(flat_shards, case.call())


@requirement("flat_shards.forward.after-load", source="pytorch/pytorch#137348")
@given(case=flat_cases(ranks=FEW))
def test_forward_has_what_was_loaded(flat_shards, case):
    """Forward after a load has the loaded parameters, also where a forward pass came before it."""
    call = case.call(VALUES)
    assert_forward(flat_shards, call, evaluate(case), LOAD, of=made_of(call))


@requirement("flat_shards.forward.after-step", source="pytorch/pytorch#137348")
@given(case=flat_cases(ranks=FEW, optimizer=st.just(SGD)))
def test_forward_has_what_the_step_updated(flat_shards, case):
    """Forward after a step has the updated parameters, whatever was evaluated before and between."""
    lines = (evaluate(case, 1), backward(case), evaluate(case, 1), STEP)
    assert_forward(flat_shards, case.call(), *lines, step=1)


@requirement("flat_shards.forward.twice", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW))
def test_forward_twice_gives_the_same_bits(flat_shards, case):
    """A second forward pass gives the same bits."""
    assert_twice(flat_shards, case)


@requirement("flat_shards.forward.without-training", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW))
def test_model_for_inference_computes(flat_shards, case):
    """A model that does not train computes, and has its parameters."""
    assert_forward(flat_shards, case.call(training="False"))


@requirement("flat_shards.forward.bfloat16", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, compute="bfloat16"))
def test_forward_computes_in_the_compute_dtype(flat_shards, case):
    """With ``compute_dtype`` the output has that dtype, and what such a model computes."""
    assert_forward(flat_shards, case.call())


@requirement("flat_shards.forward.shared-buffers", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=SHARED))
def test_modules_that_share_buffers_compute(flat_shards, case):
    """Modules that take turns in one or two buffers compute what each with its own does."""
    assert_forward(flat_shards, case.call(), evaluate(case))


# Gradients


@requirement("flat_shards.gradient.mean", source="pytorch/pytorch#162338", several_ranks=True)
@given(case=flat_cases(micro_batches=1))
def test_gradients_are_means_over_the_ranks(flat_shards, case):
    """Where every rank has data of its own, gradients are means over the ranks."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.of-the-same", source=FAST_LLM, several_ranks=True)
@given(case=flat_cases(micro_batches=1))
def test_mean_of_the_same_gradient_is_that_gradient(flat_shards, case):
    """Where every rank has the same data, gradients are those of one rank."""
    same = f"inputs, upstream = [inputs[0]] * {case.ranks}, [upstream[0]] * {case.ranks}"
    assert_step_gradients(flat_shards, case, same)


@requirement("flat_shards.gradient.micro-batches", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, micro_batches=MANY))
def test_gradients_of_micro_batches_add_up(flat_shards, case):
    """Gradients of several micro-batches are sums over these, and means over the ranks."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.complete-again", source="ServiceNow/Fast-LLM#551")
@given(case=flat_cases(ranks=FEW, micro_batches=MANY))
def test_complete_gradients_are_added_to(flat_shards, case):
    """Where gradients are made complete after every micro-batch, they add up all the same."""
    assert_gradients(flat_shards, case.call(), backward(case, complete="each"))


@requirement(
    "flat_shards.gradient.complete-again-on-one-rank",
    source="ServiceNow/Fast-LLM#551",
    confusable={"one rank"},
)
@given(case=flat_cases(ranks=(1,), micro_batches=MANY))
def test_one_rank_adds_to_complete_gradients(flat_shards, case):
    """One rank adds to complete gradients as several do."""
    assert_gradients(flat_shards, case.call(), backward(case, complete="each"))


@requirement("flat_shards.gradient.on-one-rank", source=FAST_LLM, confusable={"one rank"})
@given(case=flat_cases(ranks=(1,), micro_batches=MANY))
def test_gradients_on_one_rank(flat_shards, case):
    """One rank adds the gradients of its micro-batches."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.forgotten", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, optimizer=st.just(SGD)))
def test_step_forgets_gradients(flat_shards, case):
    """Gradients after a step are those of the batches that came after it."""
    assert_gradients(flat_shards, case.call(), backward(case), STEP, backward(case, 1), step=1)


@requirement("flat_shards.gradient.tied", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, tied=True, frozen=()))
def test_gradient_of_a_tied_parameter_is_of_all_its_uses(flat_shards, case):
    """A tied parameter has the sum of the gradients of its uses."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.frozen", source="ServiceNow/Fast-LLM#256")
@given(case=flat_cases(ranks=FEW, frozen=SOME_FROZEN))
def test_frozen_parameters_have_no_gradient(flat_shards, case):
    """Gradients are of the parameters that train and of no others."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.none-is-zero", source=FAST_LLM)
@given(case=flat_cases(unused=True, frozen=()))
def test_parameter_without_a_gradient_has_zeros(flat_shards, case):
    """A parameter that no output depends on has a gradient of zeros."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.missing-is-named", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, unused=True, frozen=(), micro_batches=1))
def test_missing_gradient_is_an_error_where_it_may_not_be(flat_shards, case):
    """With ``allow_no_grad=False`` completing gradients names the parameter that has none."""
    assert_missing_gradient_named(flat_shards, case)


@requirement(
    "flat_shards.gradient.missing-on-some-ranks",
    source=FAST_LLM,
    level="extended",
    several_ranks=True,
)
@given(case=flat_cases(ranks=FEW, unused=True, sometimes=True, frozen=(), micro_batches=1, steps=1))
def test_every_rank_says_that_one_has_no_gradient(flat_shards, case):
    """With ``allow_no_grad=False`` a gradient that is missing on one rank is named on every rank."""
    assert_missing_anywhere_named(flat_shards, case)


@requirement("flat_shards.gradient.of-some-batches", source=FAST_LLM, level="extended")
@given(
    case=flat_cases(
        ranks=FEW,
        unused=True,
        sometimes=True,
        frozen=(),
        micro_batches=1,
        steps=3,
        optimizer=st.just(SGD),
    )
)
def test_gradient_that_did_not_come_is_zero(flat_shards, case):
    """Where a rank's batches do not use a parameter, it counts as zero there, not as it was."""
    lines = training(case, steps=2)
    assert_gradients(flat_shards, case.call(), *lines, backward(case, 2), step=2)


@requirement("flat_shards.gradient.bfloat16", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, compute="bfloat16", micro_batches=MANY))
def test_gradients_are_float32_whatever_computes(flat_shards, case):
    """With a 16-bit compute dtype gradients are added up in float32."""
    assert_step_gradients(flat_shards, case)


@requirement("flat_shards.gradient.shared-buffers", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=SHARED))
def test_modules_that_share_buffers_have_gradients(flat_shards, case):
    """The backward pass of modules that take turns in buffers has each one's own parameters."""
    assert_step_gradients(flat_shards, case)


# Clipping


@requirement(
    "flat_shards.clip.global-norm", source="torch.nn.utils.clip_grad_norm_", several_ranks=True
)
@given(case=flat_cases())
def test_norm_is_that_of_all_gradients(flat_shards, case):
    """Clipping gives the norm of all ranks' gradients together, the same on every rank."""
    assert_norm(flat_shards, case)


@requirement("flat_shards.clip.scaled", source="torch.nn.utils.clip_grad_norm_")
@given(case=flat_cases())
def test_gradients_are_scaled_to_the_norm(flat_shards, case):
    """Gradients above the limit are all scaled by one factor."""
    assert_clipped(flat_shards, case)


@requirement("flat_shards.clip.below-the-limit", source="torch.nn.utils.clip_grad_norm_")
@given(case=flat_cases(ranks=FEW))
def test_small_gradients_are_not_scaled(flat_shards, case):
    """Gradients below the limit keep their bits."""
    assert_not_clipped(flat_shards, case)


@requirement(
    "flat_shards.clip.few-elements",
    source="torch.nn.utils.clip_grad_norm_",
    confusable={"few elements"},
    several_ranks=True,
)
@given(case=flat_cases(tiny=True, frozen=()))
def test_norm_of_ranks_without_elements(flat_shards, case):
    """Ranks without elements, and padding, add nothing to the norm."""
    assert_norm(flat_shards, case)


@requirement("flat_shards.clip.tied", source="torch.nn.utils.clip_grad_norm_")
@given(case=flat_cases(ranks=FEW, tied=True, frozen=()))
def test_norm_counts_tied_parameters_once(flat_shards, case):
    """The gradient of a tied parameter counts once."""
    assert_norm(flat_shards, case)


# Steps


@requirement("flat_shards.step.sgd", source="torch.optim.SGD", smoke=True)
@given(case=flat_cases(optimizer=st.just(SGD), steps=st.sampled_from([2, 3])))
def test_sgd_trains_as_one_process_does(flat_shards, case):
    """Steps with momentum and weight decay end where those of one process with all data do."""
    assert_trained(flat_shards, case.call())


@requirement("flat_shards.step.adamw", source="torch.optim.AdamW")
@given(case=flat_cases(ranks=FEW, optimizer=st.just(ADAMW), steps=st.sampled_from([2, 3])))
def test_adamw_trains_as_one_process_does(flat_shards, case):
    """Steps of AdamW end where those of one process with all data do."""
    assert_trained(flat_shards, case.call())


@requirement("flat_shards.step.on-one-rank", source="torch.optim.SGD", confusable={"one rank"})
@given(case=flat_cases(ranks=(1,), optimizer=st.sampled_from([SGD, ADAMW])))
def test_one_rank_trains(flat_shards, case):
    """One rank, without a group, trains the model."""
    assert_trained(flat_shards, case.call())


@requirement(
    "flat_shards.step.few-elements",
    source="torch.optim.SGD",
    confusable={"few elements"},
    several_ranks=True,
)
@given(case=flat_cases(tiny=True, frozen=(), optimizer=st.sampled_from([SGD, ADAMW])))
def test_ranks_without_elements_take_steps(flat_shards, case):
    """Where most ranks have no element, steps are those of one process."""
    assert_trained(flat_shards, case.call())


@requirement("flat_shards.step.clipped", source="torch.nn.utils.clip_grad_norm_")
@given(case=flat_cases(ranks=FEW, optimizer=st.just(SGD)))
def test_clipped_steps_are_those_of_one_process(flat_shards, case):
    """With gradients clipped before every step, SGD ends where one process does."""
    assert_trained(flat_shards, case.call(), clipped=True)


@requirement("flat_shards.step.frozen", source="ServiceNow/Fast-LLM#270")
@given(case=flat_cases(ranks=FEW, frozen=SOME_FROZEN, optimizer=st.sampled_from([SGD, ADAMW])))
def test_frozen_parameters_keep_their_bits(flat_shards, case):
    """Steps change no bit of frozen parameters, not by weight decay either."""
    assert_trained(flat_shards, case.call())


@requirement("flat_shards.step.tied", source="pytorch/pytorch#176076")
@given(case=flat_cases(ranks=FEW, tied=True, frozen=(), optimizer=st.just(SGD)))
def test_every_row_of_a_tied_parameter_trains(flat_shards, case):
    """A tied parameter is updated as a whole, the rows of the last rank included."""
    assert_trained(flat_shards, case.call())


@requirement("flat_shards.step.ranks-agree", source=FAST_LLM, several_ranks=True)
@given(case=flat_cases(ranks=FEW, optimizer=st.just(ADAMW)))
def test_ranks_read_the_same_after_steps(flat_shards, case):
    """After steps every rank reads the same bits."""
    assert_ranks_agree(flat_shards, case)


@requirement("flat_shards.step.in-full-precision", source=FAST_LLM)
@given(case=flat_cases(ranks=FEW, compute="bfloat16", optimizer=st.just(SGD)))
def test_updates_are_not_rounded_to_the_compute_dtype(flat_shards, case):
    """With a 16-bit compute dtype the updates of parameters are as precise as their gradients."""
    assert_changes(flat_shards, case)


@requirement("flat_shards.step.shared-buffers", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=SHARED, optimizer=st.just(SGD)))
def test_modules_that_share_buffers_train(flat_shards, case):
    """Modules that take turns in buffers are trained as those with their own."""
    assert_trained(flat_shards, case.call())


# Buffers: what gathered parameters are views of


@requirement("flat_shards.buffers.of-a-new-model", source=FAST_LLM, level="extended")
@given(case=flat_cases())
def test_nothing_is_read_from_a_new_buffer(flat_shards, case):
    """With NaN in all buffers of a new model, parameters are read as they were given."""
    assert_read(flat_shards, case.call(), POISON, when="with NaN in all buffers")


@requirement("flat_shards.buffers.after-load", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW))
def test_nothing_is_read_from_a_buffer_after_a_load(flat_shards, case):
    """With NaN in all buffers after a load, parameters are read as they were loaded."""
    assert_loaded(flat_shards, case, POISON)


@requirement("flat_shards.buffers.forward", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=ANY_BUFFERS))
def test_forward_restores_what_was_invalidated(flat_shards, case):
    """With NaN in all buffers, forward after invalidate gives what the whole model gives."""
    assert_forward(flat_shards, case.call(), evaluate(case), STALE, POISON)


@requirement("flat_shards.buffers.training", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, optimizer=st.just(SGD), buffers=ANY_BUFFERS))
def test_training_needs_nothing_that_buffers_held(flat_shards, case):
    """With NaN in all buffers before every step and at the end, steps are those of one process."""
    assert_trained(flat_shards, case.call(), STALE, POISON)


@requirement("flat_shards.buffers.views", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW))
def test_parameters_are_views_of_buffers(flat_shards, case):
    """The modules' parameters lie in the buffers: what is written there is in them."""
    assert_views(flat_shards, case)


@requirement("flat_shards.buffers.edit-is-lost", source="pytorch/pytorch#107081", level="extended")
@given(case=flat_cases(ranks=FEW))
def test_edit_of_a_buffer_never_reaches_the_model(flat_shards, case):
    """An edit of a gathered parameter is not in the model, and is gone after the next restore."""
    assert_edit_is_lost(flat_shards, case)


# Parameters of modules


@requirement("flat_shards.parameter.of-a-new-model", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=ANY_BUFFERS))
def test_parameter_of_a_new_model_is_right_or_an_error(flat_shards, case):
    """A parameter of a new model is the one that was given or cannot be read; it is never zeros."""
    assert_current_or_error(flat_shards, case.call(), when="of a new model")


@requirement("flat_shards.parameter.after-load", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=ANY_BUFFERS))
def test_parameter_after_a_load_is_right_or_an_error(flat_shards, case):
    """A parameter that was gathered before a load is the loaded one then, or cannot be read."""
    call = case.call(VALUES)
    lines = (evaluate(case), LOAD)
    assert_current_or_error(flat_shards, call, *lines, when="after a load", loaded=True)


@requirement("flat_shards.parameter.after-step", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, optimizer=st.just(SGD), buffers=ANY_BUFFERS))
def test_parameter_after_a_step_is_right_or_an_error(flat_shards, case):
    """A parameter that was gathered before a step is the updated one then, or cannot be read."""
    lines = (backward(case), STEP)
    assert_current_or_error(flat_shards, case.call(), *lines, when="after a step")


@requirement("flat_shards.parameter.invalidated", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW))
def test_invalidated_parameter_is_right_or_an_error(flat_shards, case):
    """After invalidate, with NaN in all buffers, a parameter is the current one or cannot be read."""
    lines = (RESTORE, STALE, POISON)
    assert_current_or_error(flat_shards, case.call(), *lines, when="after invalidate")


@requirement("flat_shards.parameter.restored", source=FAST_LLM, level="extended")
@given(case=flat_cases(compute=COMPUTE))
def test_restored_parameter_is_the_one_of_the_model(flat_shards, case):
    """After restore a parameter has the bits of the model, cast to the compute dtype."""
    assert_restored(flat_shards, case.call())


@requirement("flat_shards.parameter.restored-after-load", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW))
def test_load_reaches_what_is_restored(flat_shards, case):
    """What was loaded is in the modules' parameters after the next restore, and the one after it."""
    lines = (RESTORE, LOAD, RESTORE, STALE)
    assert_restored(flat_shards, case.call(VALUES), *lines, loaded=True)


# Restoring


@requirement("flat_shards.restore.idempotent", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_second_restore_does_nothing(flat_shards, case):
    """A second restore gathers nothing, even if a shard changed; after invalidate it does."""
    assert_restore_is_idempotent(flat_shards, case)


@requirement("flat_shards.restore.keeps-shards", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, compute=COMPUTE))
def test_restore_changes_no_shard(flat_shards, case):
    """Restore and forward leave every bit of a shard, in any compute dtype."""
    assert_shards_kept(flat_shards, case)


@requirement("flat_shards.stage.refuses", source=FAST_LLM, level="extended")
@given(case=flat_cases())
def test_stage_that_is_not_restored_refuses_to_compute(flat_shards, case):
    """A module computes only after it was restored, and no more after invalidate."""
    assert_stage_refuses(flat_shards, case)


@requirement("flat_shards.stage.in-turn", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=ANY_BUFFERS))
def test_stages_in_turn_are_the_model(flat_shards, case):
    """Modules that are restored and computed one after another are the whole model."""
    assert_stages(flat_shards, case)


@requirement("flat_shards.stage.lost-buffer", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, buffers=SHARED, blocks=2))
def test_stage_that_lost_its_buffer_says_so(flat_shards, case):
    """Once another module took its buffer, a module is an error to read, never the other's numbers."""
    assert_lost_or_right(flat_shards, case)


# Shards


@requirement("flat_shards.shard.is-the-model", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2, 3)))
def test_shard_is_the_model_itself(flat_shards, case):
    """What is written to a shard is in the model."""
    assert_shard_is_the_model(flat_shards, case)


@requirement("flat_shards.shard.split", source=FAST_LLM, level="extended")
@given(case=flat_cases())
def test_parts_of_shards_are_the_parameters(flat_shards, case):
    """The parts of a parameter in all shards, in rank order, are the parameter; they are views."""
    assert_split(flat_shards, case)


@requirement("flat_shards.shard.order", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2), frozen=SOME_FROZEN))
def test_shard_has_what_trains_first(flat_shards, case):
    """A shard has the modules in turn, and of each what trains before what is frozen."""
    assert_order(flat_shards, case)


@requirement("flat_shards.shard.padding", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=FEW, optimizer=st.sampled_from([SGD, ADAMW])))
def test_padding_of_shards_stays_zero(flat_shards, case):
    """After steps the padding of shards is zero, whatever buffers held."""
    assert_padding_stays_zero(flat_shards, case)


@requirement("flat_shards.shard.frozen", source="ServiceNow/Fast-LLM#256", level="extended")
@given(case=flat_cases(ranks=FEW, frozen=SOME_FROZEN))
def test_shards_have_weights_alone_of_frozen_parameters(flat_shards, case):
    """Shards hold all weights, and gradients of the parameters that train."""
    assert_frozen_shards(flat_shards, case)


@requirement("flat_shards.shard.short", source="ServiceNow/Fast-LLM#256", level="extended")
@given(case=flat_cases(ranks=FEW, blocks=1, tied=False, frozen=ALL_BUT_ONE))
def test_shard_of_gradients_is_short_where_little_trains(flat_shards, case):
    """Where one small parameter trains, the shard of gradients is shorter than that of weights."""
    assert_gradients_are_shorter(flat_shards, case)


@requirement("flat_shards.shard.unknown", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2)))
def test_unknown_shard_is_a_key_error(flat_shards, case):
    """A shard of a name that there is not is a KeyError."""
    assert_unknown_shard(flat_shards, case, "weight")


@requirement("flat_shards.shard.without-training", source=FAST_LLM, level="extended")
@given(case=flat_cases(ranks=(1, 2)))
def test_model_for_inference_has_no_shard_of_gradients(flat_shards, case):
    """Without training there is no shard of gradients: a KeyError."""
    assert_unknown_shard(flat_shards, case, "grads", training="False")


# Checkpoints

EITHER = st.sampled_from([SGD, ADAMW])
TWO_PAIRS = ((2, 3), (1, 2))
ONE_WORLD = ((1, 1), (2, 2), (3, 3), (4, 4))
TWO_OTHERS = extras(one=st.integers(0, 20), two=st.integers(0, 20))
DEATHS = st.sampled_from(
    [(("rank", rank), ("number", number)) for rank, number in ((0, 0), (0, 2), (1, 0))]
)
ONE_VALUE = st.sampled_from(
    [(("which", which), ("value", value)) for which, value in ((0, 0), (5, 1), (8, 0))]
)


def kinds(number):
    """One of so many kinds of damage."""
    return extras(kind=st.integers(0, number - 1))


@requirement("flat_shards.checkpoint.any-ranks", source=FAST_LLM, smoke=True, several_ranks=True)
@given(case=checkpoint_cases(tied=False, frozen=()))
def test_checkpoint_is_read_by_any_number_of_ranks(flat_shards, case):
    """What some ranks saved, any number of ranks load, bit for bit and whole on every rank."""
    assert_round_trip(flat_shards, case)


@requirement("flat_shards.checkpoint.all-worlds", source=FAST_LLM, several_ranks=True)
@given(case=small_cases(((1, 1), (2, 1), (3, 1), (4, 1))))
def test_every_pair_of_worlds_fits(flat_shards, case):
    """A checkpoint of one, two, three or four ranks is loaded by one, two, three and four."""
    assert_round_trip(flat_shards, case, onto=(1, 2, 3, 4))


@requirement(
    "flat_shards.checkpoint.few-elements",
    source=FAST_LLM,
    confusable={"few elements"},
    several_ranks=True,
)
@given(case=checkpoint_cases(tiny=True, frozen=(), unused=st.booleans()))
def test_ranks_without_elements_save_and_load(flat_shards, case):
    """A model that leaves some ranks without any element is saved and loaded as any other."""
    assert_round_trip(flat_shards, case)


@requirement("flat_shards.checkpoint.tied", source=FAST_LLM)
@given(case=checkpoint_cases(tied=True))
def test_tied_parameter_is_saved_and_loaded_once(flat_shards, case):
    """After loading, the head is still the embedding: it goes on as the one parameter that it is."""
    assert_step_after(flat_shards, case)


@requirement("flat_shards.checkpoint.frozen", source="deepspeedai/DeepSpeed#3205")
@given(case=checkpoint_cases(frozen=SOME_FROZEN))
def test_frozen_parameters_are_in_the_checkpoint(flat_shards, case):
    """Parameters that do not train are saved and loaded whole, whichever they are."""
    assert_round_trip(flat_shards, case)


@requirement("flat_shards.checkpoint.back-again", source=FAST_LLM, several_ranks=True)
@given(case=checkpoint_cases(optimizer=EITHER))
def test_detour_over_other_ranks_changes_nothing(flat_shards, case):
    """Loaded and saved on other ranks, then loaded on the first: it trains on, bit for bit."""
    assert_saved_again(flat_shards, case)


@requirement("flat_shards.checkpoint.output", source=FAST_LLM)
@given(case=checkpoint_cases(blocks=2, frozen=(), buffers=st.sampled_from([None, 1])))
def test_outputs_after_loading_are_those_of_what_was_loaded(flat_shards, case):
    """Right after loading, a model computes with what it loaded, whatever it computed before."""
    assert_outputs_after(flat_shards, case)


@requirement("flat_shards.checkpoint.parameters-of-now", source=FAST_LLM)
@given(case=small_cases(TWO_PAIRS))
def test_what_is_saved_is_what_the_parameters_are(flat_shards, case):
    """A new model, one that was given parameters, and one with stale buffers save their parameters."""
    assert_stored_values(flat_shards, case)


@requirement("flat_shards.checkpoint.full-precision", source=FAST_LLM)
@given(case=small_cases(TWO_PAIRS, compute="bfloat16"))
def test_checkpoint_has_the_precision_of_training(flat_shards, case):
    """A model that computes in bfloat16 saves and loads the bits of its float32 parameters."""
    assert_round_trip(flat_shards, case)


@requirement("flat_shards.checkpoint.step-sgd", source=FAST_LLM, smoke=True)
@given(case=checkpoint_cases(optimizer=SGD))
def test_momentum_goes_on_on_other_ranks(flat_shards, case):
    """The step after loading on other ranks is that of one process: momentum, decay, clipping."""
    assert_step_after(flat_shards, case)


@requirement("flat_shards.checkpoint.step-adamw", source=FAST_LLM)
@given(case=checkpoint_cases(optimizer=ADAMW, steps=3))
def test_adamw_goes_on_on_other_ranks(flat_shards, case):
    """The step after loading on other ranks is that of one process: both moments, and their age."""
    assert_step_after(flat_shards, case)


@requirement("flat_shards.checkpoint.resume-sgd", source="KellerJordan/modded-nanogpt")
@given(case=small_cases(ONE_WORLD, optimizer=SGD, steps=3))
def test_resumed_run_is_the_uninterrupted_one(flat_shards, case):
    """On as many ranks, a run that was interrupted ends with the same bits as one that was not."""
    assert_resumed(flat_shards, case)


@requirement("flat_shards.checkpoint.resume-adamw", source="KellerJordan/modded-nanogpt")
@given(case=small_cases(ONE_WORLD, optimizer=ADAMW, steps=3, tied=True))
def test_resumed_run_of_adamw_is_the_uninterrupted_one(flat_shards, case):
    """The same with AdamW, whose steps depend on how many there were."""
    assert_resumed(flat_shards, case)


@requirement("flat_shards.checkpoint.other-frozen", source=FAST_LLM)
@given(case=checkpoint_cases(frozen=SOME_FROZEN, extra=TWO_OTHERS))
def test_other_parameters_may_be_frozen_after_loading(flat_shards, case):
    """With other parameters frozen, all weights are loaded, and the state of those that trained.

    A parameter that was frozen begins with the state of a new optimizer.
    """
    assert_other_frozen(flat_shards, case)


@requirement("flat_shards.checkpoint.replaces", source=FAST_LLM)
@given(case=small_cases(TWO_PAIRS, optimizer=EITHER))
def test_loading_replaces_what_was_there(flat_shards, case):
    """Parameters, optimizer state and buffers of before have no part in what follows."""
    assert_replaces(flat_shards, case, ("outputs", 0))


@requirement("flat_shards.checkpoint.forgets-gradients", source=FAST_LLM, level="extended")
@given(case=small_cases(((2, 2), (2, 3))))
def test_loading_forgets_gradients(flat_shards, case):
    """Gradients of before, complete or not, are not added to those of after."""
    assert_replaces(flat_shards, case, ("backward", 0), ("backward", 1, False))


@requirement("flat_shards.checkpoint.loaded-twice", source=FAST_LLM)
@given(case=small_cases(((2, 3),), optimizer=EITHER))
def test_loading_twice_is_loading_once(flat_shards, case):
    """Loading again, or after another checkpoint, gives what loading once gives."""
    assert_loaded_twice(flat_shards, case)


@requirement("flat_shards.checkpoint.saving-changes-nothing", source=FAST_LLM)
@given(case=small_cases(((1, 2), (3, 2)), optimizer=ADAMW))
def test_saving_changes_nothing(flat_shards, case):
    """A run in which checkpoints are saved, between backward and step too, has the same bits."""
    assert_save_changes_nothing(flat_shards, case)


@requirement("flat_shards.checkpoint.overwritten", source=FAST_LLM)
@given(case=small_cases(((3, 2), (2, 3), (2, 2)), optimizer=ADAMW))
def test_saving_replaces_the_checkpoint_before(flat_shards, case):
    """A directory to which several numbers of ranks saved holds the latest checkpoint."""
    assert_overwritten(flat_shards, case)


@requirement("flat_shards.checkpoint.two-directories", source=FAST_LLM)
@given(case=small_cases(TWO_PAIRS))
def test_directories_are_independent(flat_shards, case):
    """Two directories with names that begin alike hold two checkpoints."""
    assert_two_directories(flat_shards, case)


@requirement("flat_shards.checkpoint.new-directory", source=FAST_LLM)
@given(case=small_cases(TWO_PAIRS))
def test_saving_makes_the_directory(flat_shards, case):
    """A directory that does not exist is made, with those around it."""
    assert_nested(flat_shards, case)


@requirement("flat_shards.checkpoint.files-not-needed", source=FAST_LLM)
@given(case=small_cases(((2, 3), (1, 1)), optimizer=ADAMW))
def test_loaded_model_does_not_need_the_files(flat_shards, case):
    """Files that are overwritten and removed after loading change nothing."""
    assert_files_not_needed(flat_shards, case)


@requirement("flat_shards.checkpoint.not-finite", source=FAST_LLM)
@given(case=small_cases(((2, 3),), extra=ONE_VALUE))
def test_values_that_are_not_finite_stay_or_are_refused(flat_shards, case):
    """NaN or infinity in a parameter is an error, or is there after loading; never a number."""
    assert_not_finite_kept(flat_shards, case)


@requirement("flat_shards.checkpoint.inference", source=FAST_LLM, level="extended")
@given(case=small_cases(TWO_PAIRS))
def test_model_without_training_reads_a_training_checkpoint(flat_shards, case):
    """A model without optimizer and gradients loads the parameters that a training run saved."""
    assert_inference(flat_shards, case)


# Checkpoints: what goes wrong


@requirement("flat_shards.checkpoint.crash", source=FAST_LLM, confusable={"one rank"})
@given(case=small_cases(((1, 1),), steps=3, optimizer=ADAMW, tiny=st.booleans()))
def test_crash_while_saving_keeps_a_checkpoint(flat_shards, case):
    """Wherever the process ends in a save, the directory holds the checkpoint before or after."""
    assert_survives(flat_shards, case)


@requirement(
    "flat_shards.checkpoint.rank-dies", source=FAST_LLM, level="extended", several_ranks=True
)
@given(case=small_cases(((2, 2),), steps=3, optimizer=ADAMW, extra=DEATHS))
def test_death_of_a_rank_while_saving_keeps_a_checkpoint(flat_shards, case):
    """When one rank of several ends in a save, the directory holds the checkpoint before or after."""
    assert_survives_rank(flat_shards, case)


@requirement("flat_shards.checkpoint.write-error", source=FAST_LLM, confusable={"one rank"})
@given(case=small_cases(((1, 1),), steps=3, optimizer=ADAMW, tiny=st.booleans()))
def test_error_while_saving_keeps_a_checkpoint(flat_shards, case):
    """A save that cannot write raises an exception, and the directory holds a whole checkpoint."""
    assert_survives(flat_shards, case, raises=True)


@requirement("flat_shards.checkpoint.refuses-damage", source=FAST_LLM)
@given(case=small_cases(((3, 2),), extra=kinds(len(FILE_DAMAGES))))
def test_damaged_file_is_refused(flat_shards, case):
    """With a file truncated, missing, empty or zeroed every rank raises, or nothing is lost."""
    assert_refused_or_whole(flat_shards, case, FILE_DAMAGES)


@requirement("flat_shards.checkpoint.refuses-no-checkpoint", source=FAST_LLM)
@given(case=small_cases(((1, 3),), extra=kinds(len(WHOLE_DAMAGES))))
def test_directory_without_checkpoint_is_refused(flat_shards, case):
    """A directory that is missing, empty, a file or full of other things raises on every rank."""
    assert_refused_or_whole(flat_shards, case, WHOLE_DAMAGES)


@requirement(
    "flat_shards.checkpoint.refuses-exchanged",
    source=FAST_LLM,
    level="extended",
    several_ranks=True,
)
@given(case=small_cases(((2, 2), (3, 1)), extra=kinds(len(PLACE_DAMAGES))))
def test_file_of_another_rank_is_refused(flat_shards, case):
    """Files of one size in each other's place raise on every rank, or change nothing."""
    assert_refused_or_whole(flat_shards, case, PLACE_DAMAGES)


@requirement("flat_shards.checkpoint.refuses-other-model", source=FAST_LLM)
@given(case=small_cases(((1, 2),), extra=kinds(9)))
def test_checkpoint_of_another_model_is_refused(flat_shards, case):
    """A parameter too many, too few or of another shape raises, even with as many elements."""
    assert_other_model_refused(flat_shards, case)


@requirement("flat_shards.checkpoint.refusal-harmless", source=FAST_LLM)
@given(case=small_cases(((3, 2),), extra=kinds(len(FILE_DAMAGES))))
def test_refusal_leaves_the_model_as_it_was(flat_shards, case):
    """A model that was refused a checkpoint is as it was or refuses use, and can load another."""
    assert_unharmed(flat_shards, case)


@requirement("flat_shards.checkpoint.names-file", source=FAST_LLM, level="extended")
@given(case=small_cases(((2, 2),), extra=kinds(len(NAMED_DAMAGES))))
def test_refusal_names_the_file(flat_shards, case):
    """The error names the file that is damaged, or a parameter that is not there."""
    assert_names_file(flat_shards, case)


@requirement("flat_shards.checkpoint.names-parameter", source=FAST_LLM, level="extended")
@given(case=small_cases(((2, 2),), extra=kinds(9)))
def test_refusal_names_the_parameter(flat_shards, case):
    """The error names a parameter that is missing, unknown or of another shape."""
    assert_names_parameter(flat_shards, case)
