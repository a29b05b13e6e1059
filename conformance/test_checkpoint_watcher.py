"""The requirements of the contract ``checkpoint_watcher``.

Every case writes real checkpoints, tiny ones whose weights say which they are, and ``evaluate`` reads
what it is shown. Nothing is within a tolerance.
"""

from __future__ import annotations

from hypothesis import given

from conformance.harness import watcher_checks as checks
from conformance.harness import watcher_ends as ends
from conformance.harness import watcher_partial as partial
from conformance.harness import watcher_results as lines
from conformance.harness.requirement import requirement
from conformance.harness.watcher_cases import (
    COMPRESSED,
    ORDINARY,
    THREE_STEPS,
    watcher_cases,
)

WATCHED = "LawrenceRLiu/MoE_Factorize_Compress, src/async_eval.py"
SAVED = "LawrenceRLiu/MoE_Factorize_Compress, src/compressed_moe_model.py"
SHARDS = "huggingface/transformers, utils/hub.py (get_checkpoint_shard_files)"
SAFETENSORS = "huggingface/safetensors, README.md (Format)"
TRAINER = "huggingface/transformers, trainer.py (save_total_limit)"

ANY = watcher_cases()
THREE = watcher_cases(THREE_STEPS)
QUICK = watcher_cases(kinds=ORDINARY)
QUICK_THREE = watcher_cases(THREE_STEPS, ORDINARY)
SHARDED = watcher_cases(kinds=("sharded",))
PACKED = watcher_cases(kinds=COMPRESSED)


# Order


@requirement("checkpoint_watcher.order.numeric", source=WATCHED, smoke=True)
@given(case=ANY)
def test_checkpoints_are_evaluated_by_number(checkpoint_watcher, case):
    """In one poll checkpoints are evaluated in the order of their steps: 900 before 1000."""
    checks.assert_numeric_order(checkpoint_watcher, case)


@requirement("checkpoint_watcher.order.three-lengths", source=WATCHED)
@given(case=QUICK_THREE)
def test_steps_of_any_length_are_numbers(checkpoint_watcher, case):
    """Steps with one, two and three digits are ordered as numbers, whenever they were written."""
    checks.assert_numeric_order(checkpoint_watcher, case)


@requirement("checkpoint_watcher.order.of-lines", source=WATCHED)
@given(case=QUICK_THREE)
def test_lines_are_in_the_order_of_evaluation(checkpoint_watcher, case):
    """The lines that one poll adds are in the order of the steps."""
    checks.assert_order_of_results(checkpoint_watcher, case)


@requirement("checkpoint_watcher.poll.names", source=WATCHED)
@given(case=QUICK)
def test_poll_gives_the_names(checkpoint_watcher, case):
    """``poll()`` gives the names of what was evaluated now, without those that failed."""
    checks.assert_gives_names(checkpoint_watcher, case)


# Once


@requirement("checkpoint_watcher.once.polls", source=WATCHED)
@given(case=QUICK)
def test_a_checkpoint_is_evaluated_once(checkpoint_watcher, case):
    """What was evaluated at one poll is not evaluated at the next ones."""
    checks.assert_once(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.restarts", source=WATCHED, smoke=True)
@given(case=ANY)
def test_a_restart_does_not_evaluate_again(checkpoint_watcher, case):
    """A watcher that is made later evaluates what has no results yet, and nothing else."""
    checks.assert_once_over_restarts(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.another-watcher", source="JSON Lines, jsonlines.org")
@given(case=QUICK)
def test_lines_of_another_watcher_count(checkpoint_watcher, case):
    """Results count whatever order, spaces, encoding and further entries their lines have."""
    checks.assert_once_by_any(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.side-by-side", source=WATCHED)
@given(case=QUICK)
def test_a_watcher_sees_what_another_has_written_since(checkpoint_watcher, case):
    """Of two watchers that poll in turns neither evaluates what the other has."""
    checks.assert_once_side_by_side(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.by-results-alone", source=WATCHED)
@given(case=QUICK)
def test_what_was_done_is_told_by_the_results_alone(checkpoint_watcher, case):
    """With another file of results everything is evaluated anew: no other mark is left."""
    checks.assert_other_results(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.later", source=WATCHED)
@given(case=QUICK_THREE)
def test_new_checkpoints_are_evaluated_at_the_next_poll(checkpoint_watcher, case):
    """A checkpoint that is new is evaluated alone, also one before those that are done."""
    checks.assert_later_ones(checkpoint_watcher, case)


@requirement("checkpoint_watcher.once.same-weights", source=WATCHED)
@given(case=watcher_cases(kinds=("single",)))
def test_checkpoints_with_the_same_weights_are_two(checkpoint_watcher, case):
    """A checkpoint is evaluated though another one has the same weights."""
    checks.assert_same_weights_twice(checkpoint_watcher, case)


# Names and folders


@requirement("checkpoint_watcher.names.others", source=WATCHED)
@given(case=watcher_cases(kinds=("single",)))
def test_other_names_are_not_checkpoints(checkpoint_watcher, case):
    """Folders that are not called ``checkpoint-`` and a number are passed over, whatever they hold."""
    checks.assert_other_names(checkpoint_watcher, case)


@requirement("checkpoint_watcher.names.files-and-links", source=WATCHED)
@given(case=QUICK)
def test_files_and_links_are_not_checkpoints(checkpoint_watcher, case):
    """Files with the name of a checkpoint, links to nothing, and links of other names are none."""
    checks.assert_files_and_links(checkpoint_watcher, case)


@requirement("checkpoint_watcher.names.step-zero", source=WATCHED)
@given(case=QUICK)
def test_step_zero_is_a_step(checkpoint_watcher, case):
    """``checkpoint-0`` is a checkpoint, and the first."""
    checks.assert_step_zero(checkpoint_watcher, case)


@requirement("checkpoint_watcher.directory.later", source=WATCHED)
@given(case=QUICK)
def test_the_directory_may_come_later(checkpoint_watcher, case):
    """A directory that is not there, or has nothing in it, is one without checkpoints so far."""
    checks.assert_directory_later(checkpoint_watcher, case)


@requirement("checkpoint_watcher.evaluate.path", source=WATCHED)
@given(case=ANY)
def test_evaluate_is_given_the_checkpoint_itself(checkpoint_watcher, case):
    """``evaluate`` is given the path of the checkpoint in the directory, as text: no copy of it."""
    checks.assert_path(checkpoint_watcher, case)


# What is not whole


@requirement("checkpoint_watcher.whole.ordinary", source=SHARDS)
@given(case=QUICK)
def test_ordinary_checkpoints_are_whole(checkpoint_watcher, case):
    """``config.json`` with ``model.safetensors``, or an index and its shards, is a checkpoint."""
    partial.assert_each_layout(checkpoint_watcher, case)


@requirement("checkpoint_watcher.whole.compressed", source=SAVED)
@given(case=PACKED)
def test_compressed_checkpoints_are_whole(checkpoint_watcher, case):
    """So is a compressed model, in safetensors or in ``.pt``, with any numbers of layers."""
    partial.assert_each_layout(checkpoint_watcher, case)


@requirement("checkpoint_watcher.partial.config-missing", source=WATCHED)
@given(case=ANY)
def test_a_checkpoint_without_configuration_is_left(checkpoint_watcher, case):
    """Without ``config.json`` a checkpoint is left for later, in any layout."""
    partial.assert_left(checkpoint_watcher, case, partial.without(partial.CONFIG))


@requirement("checkpoint_watcher.partial.config-half", source=WATCHED)
@given(case=QUICK)
def test_a_configuration_that_is_half_written_is_left(checkpoint_watcher, case):
    """With a ``config.json`` that breaks off anywhere a checkpoint is left for later."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.config_file)


@requirement("checkpoint_watcher.partial.weights-missing", source=WATCHED)
@given(case=ANY)
def test_a_checkpoint_without_weights_is_left(checkpoint_watcher, case):
    """A folder with a configuration alone is left for later."""
    partial.assert_left(checkpoint_watcher, case, partial.without_weights)


@requirement("checkpoint_watcher.partial.truncated", source=SAFETENSORS, smoke=True)
@given(case=watcher_cases(kinds=("single",)))
def test_a_file_that_breaks_off_is_left(checkpoint_watcher, case):
    """``model.safetensors`` is left for later at any length that its header does not say."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.weight_files)


@requirement("checkpoint_watcher.partial.too-long", source=SAFETENSORS)
@given(case=watcher_cases(kinds=(*ORDINARY, "compressed")))
def test_a_file_that_is_too_long_is_left(checkpoint_watcher, case):
    """A file that is longer than its header says is of another checkpoint, or is being written."""
    partial.assert_left(checkpoint_watcher, case, partial.too_long)


@requirement("checkpoint_watcher.partial.shard-missing", source=SHARDS)
@given(case=SHARDED)
def test_a_missing_shard_is_waited_for(checkpoint_watcher, case):
    """While a file that the index names is missing, a checkpoint is left for later."""
    partial.assert_left(checkpoint_watcher, case, partial.without_one)


@requirement("checkpoint_watcher.partial.shard-truncated", source=SHARDS)
@given(case=SHARDED)
def test_a_shard_that_breaks_off_is_left(checkpoint_watcher, case):
    """While any of the shards breaks off, a checkpoint is left for later."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.weight_files)


@requirement("checkpoint_watcher.partial.index-missing", source=SHARDS)
@given(case=SHARDED)
def test_shards_without_an_index_are_left(checkpoint_watcher, case):
    """Shards whose index is not there yet are left for later, all of them as they are."""
    partial.assert_left(checkpoint_watcher, case, partial.without(partial.INDEX))


@requirement("checkpoint_watcher.partial.index-half", source=SHARDS)
@given(case=SHARDED)
def test_an_index_that_is_half_written_is_left(checkpoint_watcher, case):
    """With an index that breaks off anywhere a checkpoint is left for later."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.index_file)


@requirement("checkpoint_watcher.partial.projection-missing", source=SAVED)
@given(case=PACKED)
def test_a_missing_projection_is_waited_for(checkpoint_watcher, case):
    """While one projection of a layer is missing, a compressed checkpoint is left for later."""
    partial.assert_left(checkpoint_watcher, case, partial.without_one)


@requirement("checkpoint_watcher.partial.layer-missing", source=SAVED)
@given(case=PACKED)
def test_a_missing_layer_is_waited_for(checkpoint_watcher, case):
    """While the folder of a layer that the metadata name is missing, it is left for later."""
    partial.assert_left(checkpoint_watcher, case, partial.without_layer)


@requirement("checkpoint_watcher.partial.others-missing", source=SAVED)
@given(case=PACKED)
def test_missing_weights_beside_experts_are_waited_for(checkpoint_watcher, case):
    """While ``non_moe_weights`` is missing, a compressed checkpoint is left for later."""
    partial.assert_left(checkpoint_watcher, case, partial.without_others)


@requirement("checkpoint_watcher.partial.metadata-missing", source=SAVED)
@given(case=PACKED)
def test_layers_without_metadata_are_left(checkpoint_watcher, case):
    """Without ``compressed_metadata.json`` nobody knows which layers are to come."""
    partial.assert_left(checkpoint_watcher, case, partial.without(partial.METADATA))


@requirement("checkpoint_watcher.partial.metadata-half", source=SAVED)
@given(case=PACKED)
def test_metadata_that_are_half_written_are_left(checkpoint_watcher, case):
    """With ``compressed_metadata.json`` that breaks off anywhere it is left for later."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.metadata_file)


@requirement("checkpoint_watcher.partial.compressed-truncated", source=SAVED)
@given(case=PACKED)
def test_a_file_of_a_compressed_model_that_breaks_off_is_left(checkpoint_watcher, case):
    """While a projection or the other weights break off, in either format, it is left for later."""
    partial.assert_cut_left(checkpoint_watcher, case, partial.weight_files)


@requirement("checkpoint_watcher.partial.vanishing", source=TRAINER)
@given(case=QUICK_THREE)
def test_a_checkpoint_may_vanish_during_a_poll(checkpoint_watcher, case):
    """A checkpoint that is removed while another is evaluated is passed over, without a line."""
    partial.assert_vanishing(checkpoint_watcher, case)


@requirement("checkpoint_watcher.partial.gone", source=TRAINER)
@given(case=QUICK_THREE)
def test_lines_of_removed_checkpoints_stay(checkpoint_watcher, case):
    """Results of checkpoints that were removed stay, and later ones are added."""
    partial.assert_removed_stays_done(checkpoint_watcher, case)


# Failures


@requirement("checkpoint_watcher.failure.others-go-on", source=WATCHED)
@given(case=QUICK_THREE)
def test_a_failure_is_of_one_checkpoint(checkpoint_watcher, case):
    """An evaluation that raises does not end the poll: the others are evaluated, in order."""
    checks.assert_others_go_on(checkpoint_watcher, case)


@requirement("checkpoint_watcher.failure.recorded", source=WATCHED)
@given(case=QUICK)
def test_a_failure_has_a_line(checkpoint_watcher, case):
    """A failure has a line with checkpoint, step and digest, and the exception's name and text."""
    checks.assert_error_recorded(checkpoint_watcher, case)


@requirement("checkpoint_watcher.failure.tried-again", source=WATCHED)
@given(case=QUICK)
def test_what_failed_is_not_done(checkpoint_watcher, case):
    """What failed is tried again at the next poll; then it has one line of results."""
    checks.assert_tried_again(checkpoint_watcher, case)


@requirement("checkpoint_watcher.failure.attempts", source=WATCHED)
@given(case=QUICK)
def test_attempts_are_bounded(checkpoint_watcher, case):
    """A checkpoint whose evaluation always raises is tried ``attempts`` times, by default 3."""
    checks.assert_attempts(checkpoint_watcher, case, restarts=False)


@requirement("checkpoint_watcher.failure.attempts-over-restarts", source=WATCHED)
@given(case=QUICK)
def test_attempts_are_counted_over_restarts(checkpoint_watcher, case):
    """Attempts are counted in all, by whatever watcher they were made."""
    checks.assert_attempts(checkpoint_watcher, case, restarts=True)


@requirement("checkpoint_watcher.failure.more-attempts", source=WATCHED)
@given(case=QUICK)
def test_a_later_watcher_may_have_more_attempts(checkpoint_watcher, case):
    """What one watcher gave up, one with more attempts goes on with, as many as are left."""
    checks.assert_more_attempts(checkpoint_watcher, case)


@requirement("checkpoint_watcher.failure.of-these-weights", source=WATCHED)
@given(case=QUICK)
def test_failures_are_those_of_the_weights(checkpoint_watcher, case):
    """Failures of weights that were replaced since do not count for the new ones."""
    checks.assert_attempts_of_weights(checkpoint_watcher, case)


@requirement("checkpoint_watcher.failure.interrupt", source="Python, Exception hierarchy")
@given(case=QUICK)
def test_an_interruption_is_no_failure(checkpoint_watcher, case):
    """KeyboardInterrupt and SystemExit of an evaluation come through, and leave no line."""
    checks.assert_interrupt_goes_through(checkpoint_watcher, case)


# Results


@requirement("checkpoint_watcher.results.lines", source=WATCHED)
@given(case=ANY)
def test_every_checkpoint_has_a_line(checkpoint_watcher, case):
    """One line of JSON a checkpoint has its name, its step, a digest and its results."""
    lines.assert_lines(checkpoint_watcher, case)


@requirement("checkpoint_watcher.results.values", source=WATCHED)
@given(case=QUICK)
def test_metrics_are_kept_exactly(checkpoint_watcher, case):
    """Numbers are kept to the last bit, integers as integers, under their names."""
    lines.assert_values(checkpoint_watcher, case, *lines.VALUES)


@requirement(
    "checkpoint_watcher.results.nested",
    source="EleutherAI/lm-evaluation-harness, lm_eval/evaluator.py (simple_evaluate)",
    level="extended",
)
@given(case=QUICK)
def test_nested_metrics_are_kept(checkpoint_watcher, case):
    """Mappings of mappings, lists, text and truth values are kept as they are given."""
    lines.assert_values(checkpoint_watcher, case, *lines.NESTED)


@requirement("checkpoint_watcher.results.own", source=WATCHED)
@given(case=QUICK_THREE)
def test_results_are_those_of_the_checkpoint(checkpoint_watcher, case):
    """Every line has what ``evaluate`` gave for that checkpoint, and none an earlier result."""
    lines.assert_own_results(checkpoint_watcher, case)


@requirement("checkpoint_watcher.results.only-appended", source=WATCHED)
@given(case=QUICK)
def test_lines_stay_as_they_are(checkpoint_watcher, case):
    """An evaluation adds one line; lines that are there, by whatever watcher, keep every byte."""
    lines.assert_only_appended(checkpoint_watcher, case)


@requirement("checkpoint_watcher.results.new-folder", source=WATCHED)
@given(case=QUICK)
def test_the_folder_of_results_is_made(checkpoint_watcher, case):
    """The folder that the results are to be in need not be there."""
    place = "os.path.join(folder.name, 'evaluations', 'of-run', 'results.jsonl')"
    lines.assert_place(checkpoint_watcher, case, place)


@requirement("checkpoint_watcher.results.in-directory", source=WATCHED)
@given(case=QUICK)
def test_results_may_be_in_the_directory(checkpoint_watcher, case):
    """The results may be a file in the directory that is watched."""
    lines.assert_place(checkpoint_watcher, case, "os.path.join(directory, 'results.jsonl')")


@requirement("checkpoint_watcher.results.not-metrics", source="RFC 8259")
@given(case=QUICK)
def test_what_is_no_mapping_of_numbers_is_a_failure(checkpoint_watcher, case):
    """What JSON cannot hold, or is no mapping, is a failure of that checkpoint alone."""
    lines.assert_unwritable(checkpoint_watcher, case)


@requirement("checkpoint_watcher.results.not-finite", source="RFC 8259, 6", level="extended")
@given(case=QUICK)
def test_a_loss_that_is_not_finite_is_no_other_number(checkpoint_watcher, case):
    """NaN and infinity are recorded, as what they are or as a failure, and end nothing."""
    lines.assert_not_a_number(checkpoint_watcher, case)


# Digests


@requirement("checkpoint_watcher.digest.other-weights", source=WATCHED)
@given(case=watcher_cases(THREE_STEPS, ("single",)))
def test_other_weights_have_another_digest(checkpoint_watcher, case):
    """Checkpoints with the same names, shapes and lengths of files have digests of their own."""
    lines.assert_digests_differ(checkpoint_watcher, case)


@requirement("checkpoint_watcher.digest.same-weights", source=WATCHED)
@given(case=ANY)
def test_the_same_weights_have_the_same_digest(checkpoint_watcher, case):
    """The digest is of the weights: not of the folder's name, or of the time of its files."""
    lines.assert_digest_of_weights(checkpoint_watcher, case)


@requirement("checkpoint_watcher.digest.every-file", source=WATCHED)
@given(case=watcher_cases(kinds=("sharded", *COMPRESSED)))
def test_every_element_of_every_file_is_in_the_digest(checkpoint_watcher, case):
    """One element of one shard or projection makes another digest, and is evaluated again."""
    lines.assert_digest_of_each_file(checkpoint_watcher, case)


@requirement("checkpoint_watcher.digest.replaced", source=WATCHED)
@given(case=QUICK)
def test_a_checkpoint_that_was_replaced_is_evaluated_again(checkpoint_watcher, case):
    """A checkpoint with other weights than those that were evaluated is evaluated again, once."""
    lines.assert_replaced(checkpoint_watcher, case)


@requirement("checkpoint_watcher.digest.replaced-meanwhile", source=WATCHED)
@given(case=QUICK)
def test_results_do_not_stand_for_weights_that_came_later(checkpoint_watcher, case):
    """A checkpoint that is replaced while it is evaluated is evaluated again."""
    lines.assert_replaced_meanwhile(checkpoint_watcher, case)


# Processes that end


@requirement("checkpoint_watcher.ends.in-evaluation", source=WATCHED)
@given(case=QUICK_THREE)
def test_a_process_that_ends_in_an_evaluation_has_done_the_others(checkpoint_watcher, case):
    """What was evaluated before a process was killed is done; the rest is not."""
    ends.assert_dies_evaluating(checkpoint_watcher, case)


@requirement("checkpoint_watcher.ends.at-files", source=WATCHED)
@given(case=watcher_cases(kinds=("single",)))
def test_a_process_may_end_at_any_change_of_files(checkpoint_watcher, case):
    """Killed where it opens, locks or renames a file, it leaves what the next watcher goes on with."""
    ends.assert_dies_at_files(checkpoint_watcher, case)


@requirement("checkpoint_watcher.ends.in-line", source=WATCHED)
@given(case=QUICK_THREE)
def test_a_process_may_end_in_the_middle_of_a_line(checkpoint_watcher, case):
    """Killed when part of a line is written, it leaves what the next watcher goes on with."""
    ends.assert_dies_writing(checkpoint_watcher, case)


@requirement("checkpoint_watcher.torn.last-line", source=WATCHED)
@given(case=QUICK)
def test_a_line_that_is_broken_off_is_no_result(checkpoint_watcher, case):
    """A last line that breaks off anywhere is not a result, and not in the way of what follows."""
    ends.assert_torn(checkpoint_watcher, case)


@requirement("checkpoint_watcher.torn.characters", source="RFC 3629")
@given(case=QUICK)
def test_a_line_may_break_off_in_a_character(checkpoint_watcher, case):
    """Neither is one that breaks off between the bytes of a character."""
    ends.assert_torn(checkpoint_watcher, case, ends.WITH_CHARACTERS)


@requirement("checkpoint_watcher.torn.only-line", source=WATCHED)
@given(case=QUICK)
def test_the_only_line_may_be_broken_off(checkpoint_watcher, case):
    """A file with nothing but a part of a line has no results."""
    ends.assert_torn_alone(checkpoint_watcher, case)


@requirement("checkpoint_watcher.torn.failure", source=WATCHED)
@given(case=QUICK)
def test_a_failure_that_is_broken_off_does_not_count(checkpoint_watcher, case):
    """The line of a failure that breaks off is not one of the attempts."""
    ends.assert_torn_failure(checkpoint_watcher, case)


@requirement("checkpoint_watcher.processes.at-once", source=WATCHED, level="extended")
@given(case=watcher_cases(kinds=("single",)))
def test_two_processes_evaluate_each_checkpoint_once(checkpoint_watcher, case):
    """Two processes that poll at the same time evaluate every checkpoint once between them."""
    ends.assert_two_processes(checkpoint_watcher, case)


# Any sequence


@requirement("checkpoint_watcher.story.any-sequence", source=WATCHED)
@given(case=QUICK_THREE)
def test_any_sequence_of_events(checkpoint_watcher, case):
    """Written, half written, replaced, removed, failing, restarted: every poll does what is due."""
    checks.assert_any_sequence(checkpoint_watcher, case)


# Refused


@requirement("checkpoint_watcher.refuses.attempts", source="the contract's documentation")
@given(case=QUICK)
def test_fewer_than_one_attempt_is_refused(checkpoint_watcher, case):
    """``attempts`` below 1 raises an exception."""
    lines.assert_refuses_attempts(checkpoint_watcher, case)


@requirement("checkpoint_watcher.refuses.garbage", source="the contract's documentation")
@given(case=QUICK)
def test_a_line_that_is_not_json_is_refused(checkpoint_watcher, case):
    """A line in the middle that is not JSON raises; nothing is evaluated, and the file is kept."""
    lines.assert_refuses_garbage(checkpoint_watcher, case, named=False)


@requirement("checkpoint_watcher.refuses.garbage-named", source="the contract's documentation")
@given(case=QUICK)
def test_the_line_that_is_not_json_is_named(checkpoint_watcher, case):
    """That error names the file and the number of the line."""
    lines.assert_refuses_garbage(checkpoint_watcher, case, named=True)
