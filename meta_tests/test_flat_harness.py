"""What a sharded model gives that is no tensor, or has no such name, fails in words of the contract."""

import hypothesis
import pytest
import torch

from conformance.harness import profiles
from conformance.harness.failures import ConformanceFailure
from conformance.harness.flat_stories import Attempt, packed, unpacked
from conformance.harness.requirement import all_requirements
from reference_impl.flat_shards.engine import FlatShards, Sharded


def giving(name, value):
    """The reference, but for one method that gives something else."""
    model = type("Fake", (Sharded,), {name: lambda self, *arguments, **options: value})
    return type("FakeShards", (FlatShards,), {"sharded_type": model})().flat_shards


@pytest.mark.parametrize(
    ("name", "value", "slug", "says"),
    [
        ("full_parameters", {}, "parameters.of-a-new-model", "lacks 0.0.weight"),
        ("full_parameters", [1], "parameters.of-a-new-model", "gives list, not a mapping"),
        ("full_parameters", {}, "parameter.after-step", "full_parameters() of rank 0"),
        ("full_parameters", {}, "step.frozen", "lacks 0.0.weight"),
        ("full_gradients", {}, "gradient.mean", "0.0.weight"),
        ("full_gradients", {"0.0.weight": 3}, "gradient.mean", "gives int, not a tensor"),
        ("forward", None, "forward.whole-model", "forward() gives NoneType, not a tensor"),
        ("get_shard", None, "shard.is-the-model", "get_shard() gives NoneType, not a tensor"),
        ("split_shard", None, "shard.split", "split_shard() gives NoneType, not a mapping"),
        ("parameter", None, "parameter.restored", "parameter() gives NoneType, not a tensor"),
        ("clip_gradients", None, "clip.global-norm", "gives NoneType, not a number"),
        ("buffers", None, "buffers.forward", "buffers() gives NoneType, not a list"),
        ("full_parameters", {}, "checkpoint.any-ranks", "a model that has none"),
    ],
)
def test_wrong_results_are_failures_and_not_errors_of_the_suite(name, value, slug, says):
    one = hypothesis.settings(profiles.without_shrinking(profiles.PROFILES["gate"]), max_examples=3)
    with profiles.temporarily(one), pytest.raises(ConformanceFailure) as caught:
        all_requirements()[f"flat_shards.{slug}"].check(giving(name, value))
    assert says in caught.value.summary


def test_a_name_that_a_rank_did_not_give_is_a_failure():
    """Also of what came from another process."""
    given = {"0.weight": torch.ones(2)}
    attempt = Attempt(None, given, given)
    for found in (unpacked(packed(given)), unpacked(packed(attempt)).parameters):
        assert torch.equal(found["0.weight"], given["0.weight"])
        with pytest.raises(ConformanceFailure, match=r"there is no 1\.bias among 0\.weight"):
            found["1.bias"]
