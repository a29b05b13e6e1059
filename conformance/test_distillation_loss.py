"""The requirements of the contract ``distillation_loss``.

Rules about values are apart from those about temperatures, dtypes and columns, so that an
implementation that lacks one of them is told so by the rules about it.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.distillation_cases import (
    ALL,
    ALPHAS,
    ANY_DIVERGENCE,
    ANYTHING,
    BETAS,
    EVERY,
    SIXTEEN_BITS,
    SOME,
    TEMPERATURES,
    TEMPERED,
    distillation_cases,
    fully_masked,
    one_target,
    with_masked_row,
)
from conformance.harness.distillation_checks import (
    assert_adds_up,
    assert_after,
    assert_as,
    assert_as_whole,
    assert_disjoint,
    assert_finite_differences,
    assert_large,
    assert_limit_of_large_temperatures,
    assert_not_above_whole,
    assert_nothing_to_learn,
    assert_oracle,
    assert_padding_of_vocabulary,
    assert_positions_do_not_matter,
    assert_positive,
    assert_refused,
    assert_swapped,
    assert_tail_gradient,
    assert_teacher_gets_no_gradient,
    assert_unaffected,
    assert_vanishes,
)
from conformance.harness.distillation_modules import (
    assert_modes_kept,
    assert_modules,
    assert_same_twice,
    assert_teacher_alone_untouched,
    module_cases,
)
from conformance.harness.requirement import requirement

HINTON = "arXiv 1503.02531, Hinton, Vinyals and Dean 2015"
GKD = "arXiv 2306.13649, Agarwal et al. 2024, GKD"
SOURCE = "LawrenceRLiu/MoE_Factorize_Compress, src/distillation_trainer.py"
LOSS = "huggingface/transformers, loss/loss_utils.py, ForCausalLMLoss"
BAD = "huggingface/trl, experimental/gkd/gkd_config.py; torch, nn.functional.cross_entropy"
FEW_TARGETS = {
    "a number of targets that is another number",
    "nothing is padded",
    "no prompt",
    "rows alike",
}
BLENDS = st.sampled_from([0.3, 0.8])
MASKED = "torch.nn.functional.pad(labels[:, 1:] == -100, (0, 1), value=True)"
LAST = "(torch.arange(labels.shape[1]) == labels.shape[1] - 1).expand(labels.shape)"
LARGE = "student, teacher = 1500 * student, 1500 * teacher"
SAME = "teacher = student + 3 * r(*student.shape[:2], 1)"
COLUMNS = distillation_cases(
    divergence=ANY_DIVERGENCE, beta=BETAS, top=SOME, temperature=st.sampled_from([1.0, 0.5, 2.0])
)
"""Some of the teacher's columns."""


# Values


@requirement("distillation_loss.forward-kl.values", source=HINTON, smoke=True)
@given(case=distillation_cases())
def test_forward_kl_is_the_mean_over_valid_targets(distillation_loss, case):
    """With ``alpha`` 1 the loss is the mean over the valid targets of KL(teacher ‖ student)."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.reverse-kl.values", source=GKD)
@given(case=distillation_cases(divergence="reverse_kl"))
def test_reverse_kl_is_the_mean_over_valid_targets(distillation_loss, case):
    """With ``"reverse_kl"`` it is the mean of KL(student ‖ teacher)."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.jsd.values", source=GKD)
@given(case=distillation_cases(divergence="jsd", beta=BETAS))
def test_jensen_shannon_divergence_is_weighted_by_beta(distillation_loss, case):
    """``"jsd"`` is β KL(Q ‖ M) + (1 − β) KL(S ‖ M) with M = β Q + (1 − β) S, Q the teacher's."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.jsd.ends", source=GKD)
@given(case=distillation_cases(divergence="jsd", beta=st.sampled_from([0.0, 1.0])))
def test_ends_of_the_jensen_shannon_divergence_are_the_divergences(distillation_loss, case):
    """At β = 0 ``"jsd"`` is the forward KL, and at β = 1 the reverse one: it does not vanish."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.jsd.disjoint", source=GKD)
@given(case=distillation_cases(divergence="jsd", beta=BETAS))
def test_divergence_of_disjoint_distributions_is_bounded(distillation_loss, case):
    """Of distributions without a common token it is −β log β − (1 − β) log(1 − β), and finite."""
    assert_disjoint(distillation_loss, case)


@requirement("distillation_loss.cross-entropy.values", source=LOSS, smoke=True)
@given(case=distillation_cases(alpha=0.0))
def test_cross_entropy_is_that_of_the_next_token(distillation_loss, case):
    """With ``alpha`` 0 the loss is the mean cross entropy of the label that follows each position."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.alpha.blend", source=HINTON)
@given(case=distillation_cases(alpha=BLENDS, divergence=ANY_DIVERGENCE, beta=BETAS))
def test_alpha_weighs_the_divergence(distillation_loss, case):
    """The loss is ``alpha`` times the divergence and 1 − ``alpha`` times the cross entropy."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.options.any-combination", source=SOURCE)
@given(case=ANYTHING)
def test_options_combine(distillation_loss, case):
    """Value and gradient are the oracle's for every combination of options, in every dtype."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.gradient.finite-differences", source=HINTON)
@given(case=TEMPERED)
def test_gradient_is_that_of_the_loss(distillation_loss, case):
    """The gradient is the slope of the implementation's own loss along any direction."""
    assert_finite_differences(distillation_loss, case)


# Divergences


@requirement("distillation_loss.zero.same-distributions", source=HINTON)
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, beta=BETAS))
def test_divergence_of_equal_distributions_is_zero(distillation_loss, case):
    """Divergence and gradient vanish where the logits differ by a constant of the token."""
    assert_vanishes(distillation_loss, case, SAME)


@requirement("distillation_loss.zero.only-for-equal", source=HINTON)
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, beta=BETAS))
def test_divergence_of_different_distributions_is_positive(distillation_loss, case):
    """Where one logit of each token differs the divergence is above zero."""
    assert_positive(distillation_loss, case, SAME, f"teacher[..., {case.seed % case.vocab}] += 1")


@requirement("distillation_loss.direction.kl-swapped", source=GKD)
@given(case=distillation_cases())
def test_the_two_kls_are_each_other_with_the_models_swapped(distillation_loss, case):
    """The forward KL is the reverse KL with student and teacher in each other's place."""
    assert_swapped(distillation_loss, case, divergence="reverse_kl")


@requirement("distillation_loss.direction.jsd-swapped", source=GKD)
@given(case=distillation_cases(divergence="jsd", beta=st.sampled_from([0.1, 0.25, 0.9])))
def test_jensen_shannon_divergence_swapped_has_the_other_weight(distillation_loss, case):
    """With student and teacher swapped, and 1 − β for β, the divergence is the same."""
    assert_swapped(distillation_loss, case, beta=1 - case.beta)


@requirement("distillation_loss.logits.constant-shift", source=HINTON)
@given(case=EVERY)
def test_constants_of_a_token_do_not_matter(distillation_loss, case):
    """A constant that is added to all logits of a token, in either model, changes nothing."""
    shift = "30 * r(*student.shape[:2], 1)"
    edits = (f"student, teacher = student + {shift}, teacher + {shift}",)
    assert_oracle(distillation_loss, case, *edits)


@requirement("distillation_loss.logits.large", source=SOURCE)
@given(case=distillation_cases(alpha=ALPHAS, divergence=ANY_DIVERGENCE))
def test_large_logits_are_finite(distillation_loss, case):
    """Logits of ±10000 give the oracle's finite loss: probabilities of 0 have finite logarithms."""
    assert_large(distillation_loss, case, LARGE)


# Temperature


@requirement("distillation_loss.temperature.values", source=HINTON)
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, beta=BETAS, temperature=TEMPERATURES))
def test_divergence_is_multiplied_by_the_temperature_squared(distillation_loss, case):
    """The divergence of distributions at temperature T, both of them, is multiplied by T²."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.temperature.blend", source=HINTON)
@given(case=distillation_cases(alpha=BLENDS, temperature=TEMPERATURES))
def test_cross_entropy_is_not_tempered(distillation_loss, case):
    """In a blend T² multiplies the divergence alone, and the cross entropy is at temperature 1."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.temperature.cross-entropy", source=HINTON)
@given(case=distillation_cases(alpha=0.0, temperature=TEMPERATURES))
def test_cross_entropy_alone_has_no_temperature(distillation_loss, case):
    """With ``alpha`` 0 the temperature has no part."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.temperature.large-limit", source=HINTON)
@given(
    case=distillation_cases(
        divergence=ANY_DIVERGENCE, beta=BETAS, temperature=st.sampled_from([512.0, 1024.0])
    )
)
def test_gradient_at_large_temperatures_is_the_difference_of_logits(distillation_loss, case):
    """As T grows the gradient tends to the difference of the centred logits over the vocabulary."""
    assert_limit_of_large_temperatures(distillation_loss, case)


# The two ends of alpha


@requirement("distillation_loss.alpha.zero-has-no-teacher", source=SOURCE)
@given(case=distillation_cases(alpha=0.0, divergence=ANY_DIVERGENCE))
def test_teacher_has_no_part_with_alpha_zero(distillation_loss, case):
    """With ``alpha`` 0 a teacher of NaN changes no bit."""
    edit = "teacher = teacher * torch.nan"
    assert_unaffected(distillation_loss, case, edit, because="the teacher's logits are NaN")


@requirement("distillation_loss.alpha.one-has-no-tokens", source=SOURCE)
@given(case=distillation_cases(divergence=ANY_DIVERGENCE))
def test_labels_are_a_mask_alone_with_alpha_one(distillation_loss, case):
    """With ``alpha`` 1 other labels at the same places change no bit."""
    edit = f"labels = torch.where(labels < 0, labels, (labels + 3) % {case.vocab})"
    assert_unaffected(distillation_loss, case, edit, because="labels are other tokens")


@requirement("distillation_loss.alpha.one-has-no-cross-entropy", source=SOURCE, level="extended")
@given(case=distillation_cases(divergence=ANY_DIVERGENCE))
def test_infinite_cross_entropy_has_no_part_with_alpha_one(distillation_loss, case):
    """With ``alpha`` 1 a label that neither model can give does no harm: 0 · ∞ is not computed."""
    edits = (
        "impossible = labels.roll(-1, 1).clamp(min=0)[..., None]",
        "student = student.scatter(-1, impossible, -torch.inf)",
        "teacher = teacher.scatter(-1, impossible, -torch.inf)",
    )
    assert_oracle(distillation_loss, case, *edits)


# The shift


@requirement("distillation_loss.shift.last-logits", source=LOSS)
@given(case=EVERY)
def test_last_logits_predict_nothing(distillation_loss, case):
    """The logits of the last position change no bit, and their gradient is exactly 0."""
    assert_positions_do_not_matter(distillation_loss, case, LAST, "-3.5")


@requirement("distillation_loss.shift.first-label", source=LOSS)
@given(case=EVERY)
def test_first_label_is_no_target(distillation_loss, case):
    """Whether the first label of a row is ignored or a token changes no bit."""
    edit = "labels[:, 0] = torch.where(labels[:, 0] < 0, 1, -100)"
    assert_unaffected(distillation_loss, case, edit, because="first labels were changed")


@requirement("distillation_loss.shift.fixture", source=LOSS, confusable=FEW_TARGETS)
@given(
    case=distillation_cases(
        alpha=ALPHAS, divergence=ANY_DIVERGENCE, batch=1, tokens=3, spans=st.just(((1, 3),))
    )
)
def test_first_two_logits_predict_the_last_two_labels(distillation_loss, case):
    """With labels [-100, 5, 2] the logits at 0 are about 5, those at 1 about 2, the last about none."""
    assert_oracle(distillation_loss, case, "labels = torch.tensor([[-100, 5, 2]])")


# The mask


@requirement("distillation_loss.mask.content", source="linkedin/Liger-Kernel#974")
@given(case=EVERY)
def test_masked_positions_do_not_matter(distillation_loss, case):
    """Logits that predict an ignored label change no bit; their gradient is exactly 0."""
    assert_positions_do_not_matter(distillation_loss, case, MASKED, "-2.5")


@requirement("distillation_loss.mask.non-finite", source=SOURCE, level="extended")
@given(case=EVERY)
def test_masked_positions_may_be_nan(distillation_loss, case):
    """NaN in logits that predict an ignored label reaches neither the loss nor its gradient."""
    assert_positions_do_not_matter(distillation_loss, case, MASKED, "torch.nan")


@requirement("distillation_loss.mask.nothing-to-learn", source=LOSS, confusable=FEW_TARGETS)
@given(case=fully_masked(alpha=ALPHAS, divergence=ANY_DIVERGENCE))
def test_nothing_to_learn_is_zero(distillation_loss, case):
    """Without a target the loss is exactly 0, and so is its gradient: not NaN."""
    assert_nothing_to_learn(distillation_loss, case)


@requirement("distillation_loss.mask.row-without-targets", source=LOSS)
@given(case=with_masked_row(alpha=ALPHAS, divergence=ANY_DIVERGENCE))
def test_a_row_without_targets_adds_nothing(distillation_loss, case):
    """A row without a target adds neither to the sum nor to the number it is divided by."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.mask.one-target", source=LOSS, confusable=FEW_TARGETS)
@given(case=one_target(alpha=ALPHAS, divergence=ANY_DIVERGENCE))
def test_one_target_is_its_own_mean(distillation_loss, case):
    """With one target in the whole batch the loss is that token's."""
    assert_oracle(distillation_loss, case)


# The denominator


@requirement("distillation_loss.denominator.more-columns", source="huggingface/trl#4105")
@given(case=EVERY)
def test_more_padding_behind_rows_does_not_matter(distillation_loss, case):
    """Padding all rows to a greater length leaves the loss and its gradient."""
    edits = (
        "student, teacher = (torch.cat([x, 4 * r(len(x), 4, x.shape[2])], 1)"
        " for x in (student, teacher))",
        "labels = torch.nn.functional.pad(labels, (0, 4), value=-100)",
    )
    assert_as(distillation_loss, case, *edits)


@requirement("distillation_loss.denominator.more-rows", source="huggingface/trl#4105")
@given(case=EVERY)
def test_more_rows_without_targets_do_not_matter(distillation_loss, case):
    """A further row of padding leaves the loss and its gradient."""
    edits = (
        "student, teacher = (torch.cat([x, 4 * r(1, *x.shape[1:])]) for x in (student, teacher))",
        "labels = torch.nn.functional.pad(labels, (0, 0, 0, 1), value=-100)",
    )
    assert_as(distillation_loss, case, *edits)


@requirement("distillation_loss.denominator.batch-twice", source="huggingface/trl#4105")
@given(case=EVERY)
def test_the_same_batch_twice_has_the_same_loss(distillation_loss, case):
    """With every row given twice the loss is the same, and each row has half its gradient."""
    edit = "student, teacher, labels = (torch.cat([x, x]) for x in (student, teacher, labels))"
    assert_as(distillation_loss, case, edit, of_gradient=0.5)


@requirement("distillation_loss.denominator.vocabulary", source="huggingface/trl#4105")
@given(case=EVERY)
def test_tokens_that_never_come_do_not_matter(distillation_loss, case):
    """Further columns of −10000 in both models leave the loss and its gradient."""
    more = "torch.nn.functional.pad(x, (0, 5), value=-1e4)"
    edit = f"student, teacher = ({more} for x in (student, teacher))"
    assert_as(distillation_loss, case, edit)


@requirement("distillation_loss.denominator.num-items", source="verl-project/verl#5625")
@given(
    case=distillation_cases(
        alpha=ALPHAS, divergence=ANY_DIVERGENCE, num_items=st.sampled_from([1, 29, 53])
    )
)
def test_sums_are_divided_by_the_number_that_is_given(distillation_loss, case):
    """With ``num_items_in_batch`` both sums are divided by it, whatever this batch has."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.micro-batches.add-up", source="verl-project/verl#5625")
@given(case=EVERY)
def test_micro_batches_add_up(distillation_loss, case):
    """Losses and gradients of single rows, with the targets of all, add up to those of the batch."""
    rows = tuple(slice(row, row + 1) for row in range(case.batch))
    assert_adds_up(distillation_loss, case, rows)


@requirement("distillation_loss.micro-batches.one-without-targets", source="huggingface/trl#6006")
@given(case=with_masked_row(alpha=ALPHAS, divergence=ANY_DIVERGENCE))
def test_a_micro_batch_without_targets_adds_nothing(distillation_loss, case):
    """They add up too when one of them has no target."""
    rows = tuple(slice(row, row + 1) for row in range(case.batch))
    assert_adds_up(distillation_loss, case, rows)


# The vocabulary


@requirement("distillation_loss.vocabulary.padding", source=SOURCE)
@given(case=distillation_cases(alpha=ALPHAS, divergence=ANY_DIVERGENCE, padding=st.integers(2, 5)))
def test_padding_of_the_vocabulary_has_no_probability(distillation_loss, case):
    """What stands in columns from ``vocab_size`` on changes no bit; their gradient is exactly 0."""
    assert_padding_of_vocabulary(distillation_loss, case)


@requirement("distillation_loss.vocabulary.widths", source=SOURCE, level="extended")
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, padding=st.integers(2, 5)))
def test_models_may_be_padded_to_other_widths(distillation_loss, case):
    """With ``vocab_size`` the logits of the two models may have different columns of padding."""
    edit = f"teacher = teacher[..., :{case.vocab + 1}]"
    assert_oracle(distillation_loss, case, edit)


@requirement("distillation_loss.vocabulary.minus-infinity", source=SOURCE, level="extended")
@given(case=EVERY)
def test_tokens_that_cannot_come_add_nothing(distillation_loss, case):
    """Columns of −∞ in both models add nothing, and leave no NaN in the gradient."""
    edits = (
        f"labels = labels.clamp(max={case.vocab - 3})",
        "student[..., -2:], teacher[..., -2:] = -torch.inf, -torch.inf",
    )
    assert_oracle(distillation_loss, case, *edits)


# Dtypes and memory


@requirement("distillation_loss.dtype.divergence", source="huggingface/trl#5862")
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, beta=BETAS, dtype=SIXTEEN_BITS))
def test_divergence_of_16_bit_logits_is_computed_in_float32(distillation_loss, case):
    """Of 16-bit logits the divergence is as exact as in float32, and its gradient but for rounding."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.dtype.cross-entropy", source=LOSS)
@given(case=distillation_cases(alpha=0.0, dtype=SIXTEEN_BITS))
def test_cross_entropy_of_16_bit_logits_is_computed_in_float32(distillation_loss, case):
    """Of 16-bit logits the cross entropy is as exact as in float32."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.dtype.large", source=SOURCE)
@given(case=distillation_cases(alpha=ALPHAS, divergence=ANY_DIVERGENCE, dtype=SIXTEEN_BITS))
def test_large_16_bit_logits_are_finite(distillation_loss, case):
    """16-bit logits of ±10000 give the oracle's finite loss."""
    assert_large(distillation_loss, case, LARGE)


@requirement("distillation_loss.memory.any-strides", source=LOSS)
@given(case=EVERY)
def test_logits_may_have_any_strides(distillation_loss, case):
    """Logits and labels need not be contiguous."""
    edits = (
        "student, teacher = (x.movedim(2, 0).contiguous().movedim(0, 2) for x in (student, teacher))",
        "labels = labels.t().contiguous().t()",
    )
    assert_oracle(distillation_loss, case, *edits)


@requirement("distillation_loss.teacher.no-gradient", source=HINTON)
@given(case=EVERY)
def test_teacher_gets_no_gradient(distillation_loss, case):
    """No gradient reaches the teacher's logits."""
    assert_teacher_gets_no_gradient(distillation_loss, case)


# Some of the teacher's columns


@requirement("distillation_loss.top-k.values", source=SOURCE)
@given(case=COLUMNS)
def test_lost_columns_are_one_outcome(distillation_loss, case):
    """With k of the teacher's columns the divergence is over those and all others together."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.top-k.likeliest", source=SOURCE)
@given(case=distillation_cases(top=SOME, likeliest=True, temperature=st.sampled_from([1.0, 2.0])))
def test_likeliest_columns_are_a_cache(distillation_loss, case):
    """With the teacher's likeliest columns, which have nearly all mass, it is the oracle's as well."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.top-k.blend", source=SOURCE)
@given(case=distillation_cases(alpha=BLENDS, top=SOME, padding=st.sampled_from([0, 3])))
def test_cross_entropy_has_all_columns(distillation_loss, case):
    """The cross entropy is over the whole vocabulary, however few columns the teacher gives."""
    assert_oracle(distillation_loss, case)


@requirement("distillation_loss.top-k.whole-vocabulary", source=SOURCE)
@given(case=distillation_cases(divergence=ANY_DIVERGENCE, beta=BETAS, top=ALL))
def test_all_columns_are_the_whole_teacher(distillation_loss, case):
    """With all columns, in any order, loss and gradient are those of the teacher's full logits."""
    assert_as_whole(distillation_loss, case)


@requirement("distillation_loss.top-k.never-above-whole", source=SOURCE)
@given(case=COLUMNS)
def test_fewer_columns_do_not_tell_more(distillation_loss, case):
    """The divergence over k + 1 outcomes is never above that of the whole vocabulary."""
    assert_not_above_whole(distillation_loss, case)


@requirement("distillation_loss.top-k.lost-mass", source=SOURCE)
@given(case=COLUMNS)
def test_lost_mass_counts(distillation_loss, case):
    """Two teachers that differ only in how much mass the other columns have differ in the loss."""
    assert_after(distillation_loss, case, "logsumexp = logsumexp + 0.7")


@requirement("distillation_loss.top-k.tail-gradient", source=SOURCE)
@given(case=COLUMNS)
def test_other_columns_have_gradients(distillation_loss, case):
    """Each column that the teacher does not give has its share of the last outcome's gradient."""
    assert_tail_gradient(distillation_loss, case)


@requirement("distillation_loss.top-k.order", source=SOURCE)
@given(case=COLUMNS)
def test_order_of_columns_does_not_matter(distillation_loss, case):
    """The teacher's columns may be in any order, and in another one at each token."""
    order = "torch.rand(indices.shape, generator=g).to(indices.device).argsort(-1)"
    lines = (
        f"order = {order}",
        "teacher, indices = teacher.gather(-1, order), indices.gather(-1, order)",
    )
    assert_after(distillation_loss, case, *lines)


# Modules


@requirement("distillation_loss.modules.values", source=SOURCE)
@given(case=module_cases(student_trains=False, teacher_trains=False))
def test_modules_are_run_on_the_ids(distillation_loss, case):
    """With ``ids`` loss and gradients of the student's parameters are those of the modules' logits."""
    assert_modules(distillation_loss, case)


@requirement("distillation_loss.modules.teacher-evaluates", source="neuralmagic/sparseml#2191")
@given(case=module_cases(student_trains=False, teacher_trains=True))
def test_teacher_is_run_in_evaluation_mode(distillation_loss, case):
    """A teacher that is in training mode is run in evaluation mode all the same."""
    assert_modules(distillation_loss, case)


@requirement("distillation_loss.modules.student-own-mode", source="neuralmagic/sparseml#2191")
@given(case=module_cases(student_trains=True, teacher_trains=st.booleans()))
def test_student_is_run_in_its_own_mode(distillation_loss, case):
    """A student in training mode is run in it."""
    assert_modules(distillation_loss, case)


@requirement("distillation_loss.modules.shared", source="huggingface/trl#5862")
@given(case=module_cases(student_trains=True, shared=True))
def test_models_may_share_modules(distillation_loss, case):
    """Of modules that both have the student's pass is in training mode, and alone has gradients."""
    assert_modules(distillation_loss, case)


@requirement("distillation_loss.modules.modes-kept", source="neuralmagic/sparseml#2191")
@given(case=module_cases(student_trains=st.booleans(), shared=st.booleans()))
def test_every_module_keeps_its_mode(distillation_loss, case):
    """Afterwards every module has the mode it had before, where parts of a model differ too."""
    assert_modes_kept(distillation_loss, case)


@requirement("distillation_loss.modules.teacher-no-gradient", source="huggingface/trl#5862")
@given(case=module_cases(shared=st.booleans()))
def test_parameters_of_the_teacher_alone_have_no_gradient(distillation_loss, case):
    """No gradient reaches parameters that are the teacher's alone."""
    assert_teacher_alone_untouched(distillation_loss, case)


@requirement("distillation_loss.modules.teacher-twice", source="neuralmagic/sparseml#2191")
@given(case=module_cases(student_trains=False, teacher_trains=True, dropout=True))
def test_dropout_of_the_teacher_has_no_part(distillation_loss, case):
    """Two calls give the same bits although the teacher has dropout and is in training mode."""
    assert_same_twice(distillation_loss, case)


# Bad input


@requirement("distillation_loss.refused.temperature", source=BAD)
@given(case=distillation_cases())
def test_temperatures_that_are_not_positive_are_refused(distillation_loss, case):
    """A temperature of 0 or below raises."""
    bad = ("0.0", "-2.0")[case.seed % 2]
    assert_refused(distillation_loss, case, temperature=bad)


@requirement("distillation_loss.refused.alpha", source=BAD)
@given(case=distillation_cases())
def test_weights_outside_0_to_1_are_refused(distillation_loss, case):
    """``alpha`` outside [0, 1] raises."""
    bad = ("-0.1", "1.5")[case.seed % 2]
    assert_refused(distillation_loss, case, alpha=bad)


@requirement("distillation_loss.refused.beta", source=BAD)
@given(case=distillation_cases(divergence="jsd"))
def test_betas_outside_0_to_1_are_refused(distillation_loss, case):
    """``beta`` outside [0, 1] raises."""
    bad = ("-0.1", "1.5")[case.seed % 2]
    assert_refused(distillation_loss, case, beta=bad)


@requirement("distillation_loss.refused.divergence", source=BAD)
@given(case=distillation_cases())
def test_unknown_divergences_are_refused(distillation_loss, case):
    """A divergence of another name raises."""
    bad = ("'kl'", "'forward'", "'wasserstein'")[case.seed % 3]
    assert_refused(distillation_loss, case, divergence=bad)


@requirement("distillation_loss.refused.vocabularies", source=BAD)
@given(case=distillation_cases(alpha=st.sampled_from([0.3, 1.0])))
def test_different_vocabularies_are_refused(distillation_loss, case):
    """A teacher of another vocabulary raises, one of a single column too."""
    bad = ("[..., :-1]", "[..., :1]")[case.seed % 2]
    assert_refused(distillation_loss, case, f"teacher = teacher{bad}")


@requirement("distillation_loss.refused.shapes", source=BAD)
@given(case=distillation_cases(alpha=st.sampled_from([0.3, 1.0])))
def test_different_tokens_are_refused(distillation_loss, case):
    """A teacher of another batch or length raises, and is not broadcast."""
    bad = ("[:1]", "[:, :-1]", "[:, :1]")[case.seed % 3]
    assert_refused(distillation_loss, case, f"teacher = teacher{bad}")


@requirement("distillation_loss.refused.shape-of-labels", source=BAD)
@given(case=distillation_cases(alpha=ALPHAS))
def test_labels_of_another_shape_are_refused(distillation_loss, case):
    """Labels of another batch or length than the logits raise."""
    bad = ("[:1]", "[:, :-1]", ".flatten()")[case.seed % 3]
    assert_refused(distillation_loss, case, f"labels = labels{bad}")


@requirement("distillation_loss.refused.labels", source=BAD)
@given(case=distillation_cases(alpha=ALPHAS))
def test_labels_outside_the_vocabulary_are_refused(distillation_loss, case):
    """A label that is neither −100 nor in the vocabulary raises, −1 too."""
    bad = (case.vocab, -1)[case.seed % 2]
    assert_refused(distillation_loss, case, f"labels[labels.clone() >= 0] = {bad}")


@requirement("distillation_loss.refused.num-items", source=BAD)
@given(case=distillation_cases(alpha=ALPHAS))
def test_numbers_of_items_below_one_are_refused(distillation_loss, case):
    """``num_items_in_batch`` of 0 or below raises."""
    bad = ("0", "-3")[case.seed % 2]
    assert_refused(distillation_loss, case, num_items_in_batch=bad)


@requirement("distillation_loss.refused.top-k", source=BAD)
@given(case=distillation_cases(top=SOME))
def test_columns_without_their_normaliser_are_refused(distillation_loss, case):
    """``teacher_indices`` without ``teacher_logsumexp``, or of another shape, raise."""
    without = {"teacher_logsumexp": "None"}
    shaped = {"teacher_indices": "indices[..., :-1]"}
    bad = (without, without, shaped)[case.seed % 3]
    assert_refused(distillation_loss, case, **bad)
