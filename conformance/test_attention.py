"""attention"""
from hypothesis import given

from conformance.harness.attention_cases import attention_cases, GROUPED_HEADS
from conformance.harness.attention_checks import *
from conformance.harness.requirement import requirement

@requirement("attention.causal.aligned-to-last-key", source="x")
@given(case=attention_cases(causal=True, lengths="longer"))
def test_causal(attention, case):
    """With fewer queries than keys, query i sees keys 0 .. kv_len - q_len + i."""
    assert_matches_oracle(attention, case)

@requirement("attention.causal.sees", source="x")
@given(case=attention_cases(causal=True, lengths="longer"))
def test_causal2(attention, case):
    """With fewer queries than keys, query i sees keys 0 .. kv_len - q_len + i."""
    assert_sees_exactly(attention, case)

@requirement("attention.gradient.q-k-v", source="x")
@given(case=attention_cases(causal=True, lengths="longer", sinks=True))
def test_grad(attention, case):
    """g"""
    assert_gradients_match(attention, case)
