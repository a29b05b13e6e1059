"""Every failure ends with lines that show it: run alone, they do something else than the reference.

One planted bug for each contract and kind of failure; ``reproducing.py`` runs the lines.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
}
"""Ids of planted bugs, and how the requirement fails that each breaks."""

SAYS_BY_RAISING = ("unclear error", "accidental error")
"""Kinds of failure that the text or the type of an exception is."""

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
}
"""Lines that a contract's failures may have: the longest measured, of files and folders that the lines
write themselves, and some room."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What the lines of each failure do, by the bug's id."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "meta_tests")])
    }
    command = [sys.executable, str(root / "meta_tests" / "reproducing.py"), *PLANTED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return {each["id"]: each for each in map(json.loads, ended.stdout.splitlines())}


@pytest.mark.parametrize("id", PLANTED)
def test_the_lines_show_what_the_bug_does_and_the_reference_does_not(found, id):
    """They end as the failure says: by its exception, or by printing what the reference does not."""
    each = found[id]
    assert each.get("kind") == PLANTED[id], each
    ended, right = each["bug"], each["reference"]
    assert (ended["printed"], ended["error"]) != (right["printed"], right["error"]), each["lines"]
    raised = re.fullmatch(r"raised (\w+)", each["kind"])
    if raised:
        assert ended["error"][0] == raised[1]
    elif each["kind"] in SAYS_BY_RAISING:
        assert ended["error"]
    else:
        assert ended["error"] is None, ended["error"]
        assert ended["printed"].strip()


@pytest.mark.parametrize("id", PLANTED)
def test_the_lines_are_few_and_stand_alone(found, id):
    """Beside the adapter they import nothing of ours, and no contract's are longer than need be."""
    lines = found[id]["lines"]
    own = [line for line in lines if "known_bugs" not in line and "all_of()" not in line]
    assert len(lines) - len(own) == 2
    assert not [line for line in own if re.search(r"\b(conformance|reference_impl)\b", line)]
    assert len(lines) <= MOST_LINES[all_known_bugs()[id].contract]


def test_every_contract_that_one_rank_can_break_has_a_failure_here():
    """And each is of a bug that is planted."""
    contracts = {all_known_bugs()[id].contract for id in PLANTED}
    assert contracts == set(MOST_LINES)


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
