"""The requirements of the contract ``expert_parallel_block``, on real ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conformance.harness.expert_parallel_cases import parallel_cases
from conformance.harness.expert_parallel_checks import (
    assert_gradients,
    assert_idle_experts_do_nothing,
    assert_outputs,
    assert_refused,
    assert_replicas_equal,
)
from conformance.harness.requirement import requirement

PARALLEL = "huggingface/transformers#48205"
FAST_LLM = "ServiceNow/Fast-LLM#489"

TWO = parallel_cases()
IDLE = st.one_of(
    parallel_cases(routing="alike", dtype="float32", top_k=2, experts=12),
    parallel_cases(3, routing="alike", dtype="float32", top_k=2, experts=12),
)
"""All tokens go to the same two experts, so that other ranks have none."""


@requirement(
    "expert_parallel_block.output.two-ranks", source=PARALLEL, smoke=True, several_ranks=True
)
@given(case=TWO)
def test_every_rank_has_the_whole_output(expert_parallel_block, case):
    """On two ranks each has the output of the whole block."""
    assert_outputs(expert_parallel_block, case)


@requirement("expert_parallel_block.output.three-ranks", source=PARALLEL, several_ranks=True)
@given(case=parallel_cases(3))
def test_three_ranks_have_the_whole_output(expert_parallel_block, case):
    """On three ranks each has the output of the whole block."""
    assert_outputs(expert_parallel_block, case)


@requirement("expert_parallel_block.output.one-rank", source=PARALLEL, confusable={"one rank"})
@given(case=parallel_cases(1))
def test_one_rank_has_the_whole_output(expert_parallel_block, case):
    """One rank, which has all experts, computes the block without a group."""
    assert_outputs(expert_parallel_block, case)


@requirement("expert_parallel_block.output.idle-ranks", source=PARALLEL, several_ranks=True)
@given(case=IDLE)
def test_ranks_without_tokens_have_the_output(expert_parallel_block, case):
    """A rank whose experts have no token has the output of the others."""
    assert_outputs(expert_parallel_block, case)


@requirement(
    "expert_parallel_block.output.top-1", source=PARALLEL, confusable={"one expert a token"}
)
@given(case=parallel_cases(top_k=1, normalize=False))
def test_top_1_is_computed_by_one_rank(expert_parallel_block, case):
    """With one expert a token exactly one rank adds to each token's output, on all of them."""
    assert_outputs(expert_parallel_block, case)


@requirement("expert_parallel_block.gradient.router", source=PARALLEL)
@given(case=TWO)
def test_gradient_of_the_router_is_complete(expert_parallel_block, case):
    """The router's gradient has what the experts of every rank contribute, on each of them."""
    assert_gradients(expert_parallel_block, case, "router")


@requirement("expert_parallel_block.gradient.hidden", source=FAST_LLM)
@given(case=TWO)
def test_gradient_of_the_input_is_complete(expert_parallel_block, case):
    """So has the gradient of ``hidden``, through experts and router."""
    assert_gradients(expert_parallel_block, case, "hidden")


@requirement("expert_parallel_block.gradient.experts", source=PARALLEL)
@given(case=st.one_of(TWO, parallel_cases(3)))
def test_gradients_of_experts_are_those_of_the_whole_block(expert_parallel_block, case):
    """Each rank has the gradients of its own experts, once and not once a rank."""
    assert_gradients(expert_parallel_block, case, "gate_up_proj", "down_proj")


@requirement("expert_parallel_block.gradient.idle-ranks", source=PARALLEL, several_ranks=True)
@given(case=IDLE)
def test_ranks_without_tokens_have_complete_gradients(expert_parallel_block, case):
    """A rank without tokens has the gradients of router and input too, and zeros for its experts."""
    assert_gradients(expert_parallel_block, case, "router", "hidden", "gate_up_proj", "down_proj")


@requirement("expert_parallel_block.replicas.identical", source=FAST_LLM, several_ranks=True)
@given(case=st.one_of(TWO, parallel_cases(3)))
def test_replicas_are_the_same_bits(expert_parallel_block, case):
    """Outputs and gradients of what every rank has are the same bits, so that replicas stay equal."""
    assert_replicas_equal(expert_parallel_block, case)


@requirement("expert_parallel_block.replicas.idle-experts", source=PARALLEL)
@given(case=IDLE)
def test_experts_without_tokens_do_nothing(expert_parallel_block, case):
    """NaN in experts that no token goes to reaches no output and no gradient: nothing is 0 · NaN."""
    assert_idle_experts_do_nothing(expert_parallel_block, case)


@requirement("expert_parallel_block.refuses.parts", source=PARALLEL, several_ranks=True)
@given(case=TWO)
def test_experts_that_do_not_add_up_are_refused(expert_parallel_block, case):
    """Too few experts, on all ranks or on one, raise an exception on every rank, and none hangs."""
    assert_refused(expert_parallel_block, case)
