"""Every failure ends with lines that show it: run alone, they do something else than the reference.

One planted bug, or near miss, for each contract and kind of failure; ``reproducing.py`` runs the lines.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import reproducing
import torch
from command_line import ROOT

from conformance.harness.likelihood_lines import stand_alone
from conformance.harness.likelihood_model import tiny_lm
from conformance.known_bugs import all_known_bugs

PLANTED = {
    "attn-causal-top-left-with-cache": "wrong keys",
    "attn-fully-masked-row-nan": "non-finite",
    "attn-fully-masked-row-nan.gradient": "non-finite",
    "attn-gqa-backward-not-summed": "wrong values",
    "attn-gqa-tile-not-interleave.time": "wrong heads",
    "attn-window-ignored-in-decode": "wrong values",
    "rope-backward-formula": "wrong values",
    "rope-backward-formula.in-place": "changed input",
    "rope-backward-formula.none": "no gradient",
    "rope-ntk-not-reset": "wrong values",
    "rope-pair-layout-mismatch.reverse": "wrong pair",
    "rope-partial-ignored": "not identical",
    "rope-ntk-not-reset.module": "wrong values",
    "rope-theta-ignored.shared-table": "wrong values",
    "rope-theta-ignored.cached": "wrong values",
    "ckpt-mmap-overwrite-in-place": "not identical",
    "ckpt-mmap-overwrite-in-place.shared-map": "changed input",
    "ckpt-nonatomic-save": "half written",
    "ckpt-pickle-arbitrary-code": "executed code",
    "ckpt-shape-compatible-wrong-architecture.heads": "wrong fact",
    "ckpt-vocab-padding-rows-live.head-cut": "wrong shape",
    "gpt-callers-dictionary.scalars": "changed input",
    "gpt-callers-dictionary.shared": "not identical",
    "gpt-checksums-ignored.any": "accepted",
    "gpt-errors-without-names.accident": "accidental error",
    "gpt-errors-without-names.file": "unclear error",
    "gpt-mask-of-other-row-or-call.kept": "wrong values",
    "gpt-optimizer-not-ignored": "raised CheckpointError",
    "gpt-padding-mask-ignored": "wrong values",
    "gpt-projections-left-at-zero.scalars": "no effect",
    "gpt-saved-without-head": "not identical",
    "loader-base-prefix-mismatch": "wrong values",
    "loader-qkv-bias-dropped.names": "wrong names",
    "loader-strict-false-drops-all.missing": "accepted",
    "q2-additive-mask-nan": "non-finite",
    "q2-cache-stored-repeated": "wrong shape",
    "q2-norm-weight-before-cast": "rounded late",
    "q2-o-bias-never-loaded": "not identical",
    "flat-count-for-names": "accepted",
    "flat-module-order.decay-only": "wrong position",
    "flat-reshard-other-pad": "wrong elements",
    "flat-gradient-survives-load": "not identical",
    "flat-missing-rank-is-zero": "accepted",
    "flat-momentum-not-saved": "wrong values",
    "flat-restore-incomplete.always": "not identical",
    "flat-save-in-place": "lost checkpoint",
    "flat-save-in-place.metadata-first": "lost checkpoint",
    "fsdp-frozen-params-saved-empty": "not identical",
    "eval-continuation-slice-offset": "wrong values",
    "eval-batch-padding-changes-scores.last-columns": "wrong values",
    "eval-left-in-evaluation-mode": "mode not restored",
    "eval-gradients-recorded": "gradients",
    "eval-id-clamped": "accepted bad input",
    "mix-group-mask-zero": "wrong experts",
    "moe-aux-loss-constant-or-mis-scaled": "wrong values",
    "moe-aux-loss-constant-or-mis-scaled.over-slots": "wrong values",
    "experts-sentinel-off-by-one.negative": "accepted",
    "moe-empty-expert-uninitialised.none": "no gradient",
    "moe-empty-expert-uninitialised.output": "non-finite",
    "moe-expert-index-substring-slot": "wrong expert",
    "moe-fused-expert-transpose-by-shape.down": "wrong values",
    "moe-masked-row-nan-times-zero.weight": "non-finite",
    "mix-tuple-or-tensor.bare": "wrong type",
    "mix-weights-by-expert-id": "wrong values",
    "moe-shared-expert-gate-ignored.detached": "no gradient",
    "comp-merge-into-quantised-base": "wrong values",
    "comp-merge-not-idempotent": "not identical",
    "comp-param-count-packed-or-active": "wrong count",
    "cc-no-compression-config": "incomplete",
    "cc-statistics-rounded": "wrong fact",
    "cc-trained-weights-lost": "not identical",
    "cc-trained-weights-lost.export": "not identical",
    "comp-stale-intermediate-artifact-reused.left": "stale file",
    "fit-last-iterate": "worse",
    "fit-global-generator": "not identical",
    "core-shared-as-buffer": "wrong storage",
    "core-block-gate-and-up": "wrong values",
    "core-block-returned-type.never": "wrong type",
    "core-block-shared-as-buffer": "wrong storage",
    "stats-active-with-all-wrappers": "wrong figure",
    "stats-nothing-counted": "accepted",
    "stats-printed-figures.bands": "false contradiction",
    "stats-printed-figures.not-recomputed": "missed",
    "dist-microbatch-normalisation": "wrong values",
    "dist-teacher-mode.all-alike": "changed mode",
    "dist-teacher-mode.dropout": "not identical",
    "dist-teacher-mode.gradient": "not zero",
    "dist-teacher-mode.student-evaluates": "wrong values",
    "distill-minus-infinity": "non-finite",
    "watcher-lexical-order": "wrong order",
    "watcher-partial-evaluated.length": "partial",
    "watcher-torn-line": "evaluated",
    "tp-identical-shard-init": "wrong initialisation",
    "tp-row-bias-summed": "wrong values",
    "tp-row-bias-grad-divided": "wrong values",
    "q2-row-bias-with-partial-results": "wrong values",
    "tp-missing-or-partial-reduce.subgroup": "wrong values",
    "tp-kv-replica-modulo": "wrong values",
    "tp-vocab-padding-logits": "wrong shape",
    "tp-logprob-allreduce-no-autograd": "wrong values",
    "moe-ep-router-grad-partial": "wrong values",
    "moe-masked-row-nan-times-zero.parallel": "not identical",
    "mix-ep-order-of-ranks": "wrong values",
}
"""Ids of planted bugs, and how the requirement fails that each breaks."""

PARALLEL = "test_near_misses_parallel:NEAR_PARALLEL:"
EXPERT_PARALLEL = "test_near_misses_expert_parallel:NEAR_EXPERT_PARALLEL:"
NEAR_MISSES = {
    f"{PARALLEL}OwnPartAddedLast": "not identical",
    f"{PARALLEL}ReplicasKeepTheirOwn": "wrong values",
    f"{PARALLEL}RowsOfTheFirstRank": "wrong elements",
    f"{PARALLEL}ViewsOfTheCaller": "non-finite",
    f"{PARALLEL}ReducedInHalves": "wrong communication",
    f"{PARALLEL}GrowingTemperature": "not identical",
    f"{PARALLEL}ColumnRoundedDown": "accepted",
    f"{EXPERT_PARALLEL}OwnPartAddedLast": "not identical",
    f"{EXPERT_PARALLEL}PartsNotCounted": "accepted",
}
"""The same of near misses, for what no planted bug is shown by."""

FOUND = {**PLANTED, **NEAR_MISSES}

SAYS_BY_RAISING = ("unclear error", "accidental error")
"""Kinds of failure that the text or the type of an exception is."""
REFUSED = "accepted"
"""How kinds of failure begin where the reference raises an exception, and the bug none."""

NUMBER = r"(nan|-?inf|-?[\d.]+(?:e[-+]?\d+)?)"
VALUE = re.compile(rf"{NUMBER} expected (?:.*: )?{NUMBER}")
"""A printed number beside what it must be."""
PRINTS_AN_ELEMENT = re.compile(r"\.item\(\), 'expected")

MOST_LINES = {
    "attention": 20,
    "rotary": 20,
    "rotary_module": 15,
    "cached_attention": 15,
    "gpt_checkpoint": 40,
    "weight_loader": 32,
    "causal_lm": 32,
    "flat_layout": 30,
    "flat_shards": 56,
    "loglikelihood": 45,
    "moe_router": 15,
    "experts": 20,
    "moe_block": 20,
    "shared_core": 20,
    "shared_core_block": 25,
    "shared_core_fit": 20,
    "compression_statistics": 12,
    "compressed_checkpoint": 60,
    "distillation_loss": 40,
    "checkpoint_watcher": 120,
    "parallel_linear": 30,
    "expert_parallel_block": 32,
}
"""Lines that a contract's failures may have: the longest measured, of files and folders that the lines
write themselves, and some room."""


@pytest.fixture(scope="module")
def reproducer() -> Iterator[subprocess.Popen]:
    """A process that answers ids with what the lines of their failures do."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "meta_tests")]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "meta_tests" / "reproducing.py")]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
        yield process
        process.stdin.close()


def asked(reproducer: subprocess.Popen, id: str) -> dict[str, Any]:
    """What the lines of a failure do."""
    print(id, file=reproducer.stdin, flush=True)
    return json.loads(reproducer.stdout.readline())


@pytest.fixture(scope="module", params=FOUND)
def found(reproducer, request) -> dict[str, Any]:
    """What the lines of each failure do; tests of one are run one after the other."""
    return asked(reproducer, request.param)


def test_the_lines_show_what_the_bug_does_and_the_reference_does_not(found):
    """They end as the failure says: by its exception, or by printing what the reference does not."""
    assert found.get("kind") == FOUND[found["id"]], found
    ended, right = found["bug"], found["reference"]
    assert ended != right, found["lines"]
    errors = [rank["error"] for rank in ended]
    refuses = found["kind"].startswith(REFUSED) or found["kind"] in SAYS_BY_RAISING
    assert refuses or not any(rank["error"] for rank in right), right
    raised = re.fullmatch(r"raised (\w+)", found["kind"])
    if raised:
        assert raised[1] in [error[0] for error in errors if error]
    elif found["kind"] in SAYS_BY_RAISING:
        assert any(errors)
    else:
        assert not any(errors), errors
        assert any(rank["printed"].strip() for rank in ended)


def test_what_is_printed_as_expected_is_what_the_reference_gives(found):
    """Of numbers that are printed beside the expected one the reference's is nearer than the bug's."""
    ended, right = (printed_values(found[of]) for of in ("bug", "reference"))
    assert ended or not any(map(PRINTS_AN_ELEMENT.search, found["lines"]))
    for (wrong, expected), (value, same) in zip(ended, right, strict=True):
        assert expected == same
        assert math.isfinite(value)
        assert not abs(wrong - expected) <= abs(value - expected), (wrong, value, expected)


def printed_values(ranks: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The numbers that all ranks print, each with what it must be."""
    lines = [line for rank in ranks for line in rank["printed"].splitlines()]
    return [(float(at[1]), float(at[2])) for at in map(VALUE.fullmatch, lines) if at]


def test_torchrun_runs_the_lines_as_they_say(reproducer, tmp_path):
    """What each rank prints under torchrun is what it prints here, and every rank ends well."""
    each = asked(reproducer, "tp-row-bias-summed")
    assert f"torchrun --nproc-per-node={each['ranks']}" in each["lines"][1]
    file = tmp_path / "lines.py"
    file.write_text("\n".join(each["lines"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={each['ranks']}", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "".join(rank["printed"] for rank in each["bug"])


def test_the_lines_are_few_and_stand_alone(found):
    """Beside the adapter they import nothing of ours, and no contract's are longer than need be."""
    lines = found["lines"]
    at = next(number for number, line in enumerate(lines) if line.endswith("as broken"))
    own = [*lines[:at], *lines[at + 2 :]]
    assert not [line for line in own if re.search(r"\b(conformance|reference_impl)\b", line)]
    assert len(lines) <= MOST_LINES[contract_of(found["id"])]


def contract_of(id: str) -> str:
    """The contract whose failure it is."""
    return reproducing.named(id)[0].contract


def test_every_contract_has_a_failure_here():
    """And each is of a bug that is planted."""
    contracts = {all_known_bugs()[id].contract for id in PLANTED}
    assert contracts == set(MOST_LINES) == {each.contract for each in all_known_bugs().values()}


@pytest.mark.parametrize("kind", ["states", "attention"])
def test_the_model_that_is_written_out_is_the_one_that_was_scored(kind):
    """The same bits, the same notes, and the same exceptions."""
    namespace = {"torch": torch}
    exec("\n".join(stand_alone(kind)), namespace)
    given = {"seed": 3, "vocab": 13, "positions": 9, "dtype": torch.bfloat16}
    models = [tiny_lm(kind, **given), namespace["tiny_lm"](kind, **given)]
    ids = torch.randint(13, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for arguments in ((ids,), (ids, mask), (ids, mask, mask.cumsum(1))):
        one, other = (model(*arguments).logits for model in models)
        assert torch.equal(one, other)
    assert [vars(seen) for seen in models[0].seen] == [vars(seen) for seen in models[1].seen]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    assert vars(models[0].config) == vars(models[1].config)
    for wrong in (ids + 13, ids - 13, torch.zeros(1, 10, dtype=torch.int64)):
        for model in models:
            with pytest.raises(IndexError, match="index out of range"):
                model(wrong)
    for model in models:
        model.fails_at = len(model.seen)
        with pytest.raises(RuntimeError, match="the model ran out of memory"):
            model(ids)
