"""No requirement is vacuous: a planted bug or a mutant fails each of them."""

import json

import pytest
from command_line import ROOT
from mutants import MUTANTS
from test_near_misses import NEAR
from test_near_misses_compressed import NEAR_COMPRESSED
from test_near_misses_core import NEAR_CORE
from test_near_misses_distillation import NEAR_DISTILLATION
from test_near_misses_expert_parallel import NEAR_EXPERT_PARALLEL
from test_near_misses_experts import NEAR_EXPERTS
from test_near_misses_fit import NEAR_FIT
from test_near_misses_flat import NEAR_FLAT
from test_near_misses_flat_checkpoints import NEAR_FLAT_CHECKPOINTS
from test_near_misses_gpt import NEAR_GPT
from test_near_misses_large import NEAR_LARGE
from test_near_misses_layout import NEAR_LAYOUT
from test_near_misses_likelihood import NEAR_LIKELIHOOD
from test_near_misses_lm import NEAR_LM
from test_near_misses_loader import NEAR_LOADER
from test_near_misses_moe_block import NEAR_MOE_BLOCK
from test_near_misses_parallel import NEAR_PARALLEL
from test_near_misses_router import NEAR_ROUTER
from test_near_misses_statistics import NEAR_STATISTICS
from test_near_misses_watcher import NEAR_WATCHER

from conformance.harness.requirement import all_requirements
from conformance.implementations.reference import Reference
from conformance.known_bugs import all_known_bugs

REGISTRIES = (
    MUTANTS,
    NEAR,
    NEAR_GPT,
    NEAR_PARALLEL,
    NEAR_LOADER,
    NEAR_LM,
    NEAR_LARGE,
    NEAR_LAYOUT,
    NEAR_FLAT,
    NEAR_FLAT_CHECKPOINTS,
    NEAR_ROUTER,
    NEAR_EXPERTS,
    NEAR_MOE_BLOCK,
    NEAR_EXPERT_PARALLEL,
    NEAR_CORE,
    NEAR_FIT,
    NEAR_STATISTICS,
    NEAR_COMPRESSED,
    NEAR_DISTILLATION,
    NEAR_LIKELIHOOD,
    NEAR_WATCHER,
)
KILL_MATRIX = ROOT / "fixtures" / "kill_matrix.json"
AGAIN = "write it anew: python fixtures/regenerate.py"


@pytest.fixture(scope="module")
def kill_matrix():
    assert KILL_MATRIX.exists(), f"{KILL_MATRIX.name} is missing; {AGAIN}"
    return json.loads(KILL_MATRIX.read_text())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_fails_the_requirement_it_breaks(name):
    MUTANTS[name].assert_caught()


@pytest.mark.parametrize("slug", sorted({mutant.breaks for mutant in MUTANTS.values()}))
def test_the_reference_passes_what_mutants_fail(slug):
    record = all_requirements()[slug]
    record.check(getattr(Reference(), record.contract))


def test_every_requirement_fails_for_something(kill_matrix):
    fails = {slug for row in kill_matrix.values() for slug in row["caught_by"]}
    for registry in REGISTRIES:
        fails |= {wrong.breaks for wrong in registry.values()}
    cannot = set(all_requirements()) - fails
    assert not cannot, f"nothing fails {sorted(cannot)}: plant a bug or add a mutant; or {AGAIN}"


def test_every_planted_bug_is_in_the_matrix(kill_matrix):
    bugs = all_known_bugs()
    assert set(kill_matrix) == set(bugs), AGAIN
    for id, row in kill_matrix.items():
        found = (row["contract"], row["breaks"])
        assert found == (bugs[id].contract, bugs[id].breaks), f"{id}: {AGAIN}"


def test_every_planted_bug_fails_the_requirement_whose_rule_it_breaks(kill_matrix):
    missed = [id for id, row in kill_matrix.items() if row["breaks"] not in row["caught_by"]]
    assert not missed, f"{missed} pass the requirement that they break"


def test_names_of_requirements_are_known(kill_matrix):
    named = {slug for row in kill_matrix.values() for slug in (*row["caught_by"], row["breaks"])}
    named |= {mutant.breaks for mutant in MUTANTS.values()}
    assert named <= set(all_requirements()), AGAIN
