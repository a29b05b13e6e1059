"""A distillation run: what is trained, what is written, and that resuming changes nothing."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from command_line import ROOT, environment
from small_distillation import (
    TEXTS,
    divergence,
    documents,
    make_student,
    make_tasks,
    make_teacher,
    names_in,
    run_options,
    same_weights,
    weights,
    with_,
    words_of,
)

pytest.importorskip("accelerate")

from reference_impl.shared_core import distillation_trainer, loss_curve
from reference_impl.shared_core.__main__ import main
from reference_impl.shared_core.checkpoint import load_compressed_model
from reference_impl.shared_core.distillation import distil, make_trainer
from reference_impl.shared_core.evaluation import evaluate_model
from reference_impl.shared_core.loss_curve import read_csv
from reference_impl.shared_core.parameter_groups import parameter_groups
from reference_impl.shared_core.trained_model import load_model

HELD_OUT = documents(20, seed=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with ``teacher`` and ``student``."""
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher")
    make_student(folder / "teacher", folder / "student")
    return folder


@pytest.fixture
def options(models, tmp_path):
    """Options of a run of three steps."""
    return run_options(models, tmp_path / "run")


# The bar


@pytest.mark.slow
def test_a_compressed_model_is_distilled_resumed_exported_and_evaluated(options, tmp_path):
    """The divergence from the teacher on held-out text falls by half and more in sixty steps."""
    whole = with_(
        options,
        data=documents(960, seed=1),
        steps=60,
        batch_size=16,
        lr=8e-3,
        alpha=1.0,
        temperature=1.0,
        save_steps=30,
    )
    teacher, student = (load_model(f).module for f in (options.teacher, options.student))
    before = divergence(teacher, student, HELD_OUT)
    done = distil(whole)
    after = divergence(teacher, load_model(done.folder).module, HELD_OUT)
    assert before > 1
    assert after < before / 2

    resumed = with_(whole, output=str(tmp_path / "resumed"), resume=True)
    middle = tmp_path / "resumed" / "checkpoint-30"
    shutil.copytree(tmp_path / "run" / "checkpoint-30", middle)
    again = distil(resumed)
    assert same_weights(done.folder, again.folder)
    assert again.curve == done.curve
    assert [row["step"] for row in again.curve] == list(range(1, 61))

    trained = load_compressed_model(done.folder)
    trained.export(tmp_path / "exported")
    ids = torch.tensor([row[:9] for row in HELD_OUT])
    with torch.no_grad():
        exported = load_model(tmp_path / "exported").module(input_ids=ids).logits
    torch.testing.assert_close(exported, trained.logits(ids), rtol=1e-5, atol=1e-4)

    pytest.importorskip("lm_eval")
    tasks = make_tasks(tmp_path / "tasks")
    direct = evaluate_model(done.folder, tasks)
    assert direct == pytest.approx(evaluate_model(tmp_path / "exported", tasks), rel=1e-5)
    assert direct["local_text/word_perplexity"] > 1


# What is trained


def test_students_of_either_kind_are_told_apart_and_saved_as_they_came(options, models, tmp_path):
    """A compressed folder gives a compressed one; an ordinary model one that transformers loads."""
    compressed = distil(with_(options, steps=1))
    assert (compressed.folder / "compressed_metadata.json").is_file()
    assert (compressed.folder / "tokenizer.json").is_file()
    make_teacher(tmp_path / "other", seed=8)
    ordinary = distil(
        with_(options, steps=1, student=str(tmp_path / "other"), output=str(tmp_path / "ordinary"))
    )
    assert not (ordinary.folder / "compressed_metadata.json").exists()
    assert (ordinary.folder / "tokenizer.json").is_file()
    before, after = weights(tmp_path / "other"), weights(ordinary.folder)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    stored = json.loads((ordinary.folder / "config.json").read_text())
    assert stored.get("use_cache", True), "Trainer's own setting is not the model's"


def test_an_ordinary_student_is_resumed_with_its_experts(options, tmp_path):
    """transformers fuses experts in memory and not in files; Trainer loads such files without them."""
    make_teacher(tmp_path / "other", seed=8)
    given = with_(options, student=str(tmp_path / "other"))
    done = distil(given)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = distil(with_(given, output=str(tmp_path / "again"), resume=True))
    assert same_weights(done.folder, again.folder)
    assert again.curve == done.curve


def test_the_teacher_is_in_evaluation_mode_and_untouched(options):
    """Also while Trainer has the student in training mode; it has no gradients before or after."""
    trainer = make_trainer(options)
    teacher, seen = trainer.teacher.model.module, []
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    watched = teacher.register_forward_hook(
        lambda module, *_: seen.append(
            any(m.training for m in module.modules()) or torch.is_grad_enabled()
        )
    )
    students = trainer.student.module.register_forward_hook(
        lambda module, *_: seen.append(not module.training)
    )
    trainer.train()
    for hook in (watched, students):
        hook.remove()
    assert seen == [False] * 6
    for name, parameter in teacher.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_parameter_groups_scale_and_freeze(options):
    """The first pattern that matches holds; 0 freezes; the rate that is logged is the whole one."""
    multipliers = ((r"\.u$", 0.5), ("layers", 2.0), ("embed_tokens|lm_head|router", 0.0))
    # A second pattern for the same names changes nothing; routers are found by the one before.
    trainer = make_trainer(with_(options, multipliers=multipliers, schedule="constant"))
    before = {name: p.detach().clone() for name, p in trainer.student.parameters().items()}
    groups = {name: g for g in trainer.create_optimizer().param_groups for name in g["names"]}
    rates = {name: groups[name]["lr"] / 5e-3 if name in groups else 0 for name in before}
    assert rates["model.layers.0.mlp.layers.up_proj.input_wrapper.u"] == 0.5
    assert rates["model.layers.0.mlp.layers.up_proj.core"] == 2
    assert rates["model.layers.1.mlp.router"] == 2
    assert rates["model.norm.weight"] == 1
    assert rates["model.embed_tokens.weight"] == rates["lm_head.weight"] == 0
    trainer.train()
    after = trainer.student.parameters()
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {row["learning_rate"] for row in trainer.state.log_history if "loss" in row} == {5e-3}


@pytest.mark.parametrize(
    ("multipliers", "named"),
    [
        ([("nothing", 1.0)], "'nothing' matches no parameter"),
        ([("(", 1.0)], "is no regular expression"),
        ([("a", -1.0)], "expected 0 or more"),
        ([("a", math.nan)], "expected 0 or more"),
        ([(".", 0.0)], "every parameter of the student is frozen"),
    ],
)
def test_groups_that_make_no_sense_are_refused(multipliers, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        parameter_groups({"a": torch.zeros(2, requires_grad=True)}, multipliers, 0.0)


def still_student(models, folder):
    """A student without dropout."""
    student = folder / "still"
    if not student.exists():
        shutil.copytree(models / "student", student)
        config = json.loads((student / "config.json").read_text())
        (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0}))
    return student


def in_float64(models, folder, **changes):
    """The parameters after two steps in float64, of a student without dropout."""
    name = "-".join(map(str, changes.values()))
    student = str(still_student(models, folder))
    given = run_options(models, folder / name, student=student, steps=2, lr=1e-3, **changes)
    done = distil(with_(given, dtype="float64"))
    return weights(done.folder), done.curve


def test_accumulated_micro_batches_are_one_batch(models, tmp_path):
    """Rows of different lengths in micro-batches of different widths; also the losses that are logged.

    Adam's first steps are as large for a gradient of 1e-9 as for one of 1: an error in the last bits of
    a small gradient is seen whole, so that weights are held to 1e-6 of the largest step.
    """
    together, expected = in_float64(models, tmp_path, batch_size=8, accumulation=1)
    apart, curve = in_float64(models, tmp_path, batch_size=2, accumulation=4)
    for name, weight in together.items():
        torch.testing.assert_close(apart[name], weight, rtol=0, atol=2e-9, msg=name)
    for found, row in zip(curve, expected):
        assert found == pytest.approx(row, rel=1e-6)


@pytest.mark.slow
def test_two_ranks_are_one_batch(models, tmp_path):
    """Two processes with half of each batch: the weights, and a checkpoint that either can resume."""
    student = still_student(models, tmp_path)
    text = tmp_path / "ids.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in TEXTS))
    given = "--steps=3 --lr=1e-3 --dtype=float64 --device=cpu --quiet --save-steps=2"
    for name, ranks, batch in (("one", 1, 8), ("two", 2, 4)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", "-m", "reference_impl.shared_core", "distil"]
        command += [student, models / "teacher", text, tmp_path / name, *given.split()]
        done = subprocess.run(
            [*map(str, command), "--batch-size", str(batch)],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("at step 3") == 1, done.stdout
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-9, msg=name)
    curves = [read_csv(tmp_path / name / "loss_curve.csv") for name in ("one", "two")]
    for row, expected in zip(*curves):
        assert row == pytest.approx(expected, rel=1e-6)
    names = names_in(tmp_path / "two" / "checkpoint-2")
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "layer_0"} <= {*names}


# What is written


@pytest.mark.parametrize(
    "method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state", "publish"]
)
def test_a_crash_while_saving_leaves_no_checkpoint(options, tmp_path, monkeypatch, method):
    """Before each part of a checkpoint; the run then goes on from the one before."""
    trainer = distillation_trainer.DistillationTrainer
    kept = getattr(trainer, method)

    def fail_at_second(self, *arguments, **further):
        if self.state.global_step == 2:
            raise OSError("no space left on device")
        return kept(self, *arguments, **further)

    monkeypatch.setattr(trainer, method, fail_at_second)
    with pytest.raises(OSError, match="no space left"):
        distil(options)
    assert names_in(tmp_path / "run") == ["checkpoint-1", "loss_curve.csv"]
    monkeypatch.undo()
    resumed = distil(with_(options, resume=True))
    assert [row["step"] for row in resumed.curve] == [1, 2, 3]
    assert load_model(resumed.folder)


def test_a_killed_process_leaves_no_checkpoint(options, tmp_path, monkeypatch):
    """What it wrote has another name, which no watcher takes; the resumed run removes it."""
    trainer = distillation_trainer.DistillationTrainer
    kept = trainer._save_rng_state

    def end_at_second(self, *arguments, **further):
        if self.state.global_step == 2:
            os._exit(9)
        return kept(self, *arguments, **further)

    whole = distil(with_(options, output=str(tmp_path / "whole")))
    monkeypatch.setattr(trainer, "_save_rng_state", end_at_second)
    child = os.fork()
    if child == 0:
        try:
            distil(options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert names_in(tmp_path / "run") == [".checkpoint-2.tmp", "checkpoint-1", "loss_curve.csv"]
    monkeypatch.undo()
    resumed = distil(with_(options, resume=True))
    assert same_weights(whole.folder, resumed.folder)
    assert ".checkpoint-2.tmp" not in names_in(tmp_path / "run")


def test_a_checkpoint_is_whole_and_the_default_saving_is_not_run(options, tmp_path):
    """It is a compressed model with what resuming needs; nothing of Trainer's own weights."""
    distil(with_(options, steps=1))
    names = names_in(tmp_path / "run" / "checkpoint-1")
    assert set(distillation_trainer.NEEDED) | {"rng_state.pth", "layer_0", "config.json"} <= {
        *names
    }
    assert not [name for name in names if name.startswith(("model", "training_args", "pytorch"))]
    assert same_weights(tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "model")


def test_the_limit_keeps_the_newest_checkpoints(options, tmp_path):
    """Also where a later one is there of a run that was resumed from an earlier checkpoint."""
    distil(with_(options, save_total_limit=2))
    kept = ["checkpoint-2", "checkpoint-3"]
    run = tmp_path / "run"
    assert [name for name in names_in(run) if "checkpoint" in name] == kept
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-best").mkdir()
    distillation_trainer.remove_old_checkpoints(run / "checkpoint-3", 2)
    left = [name for name in names_in(run) if "checkpoint" in name]
    assert left == ["checkpoint-10", "checkpoint-3", "checkpoint-best"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_resumed_is_the_same_run(options, tmp_path, steps):
    """From either checkpoint of a student with dropout; its curve has the steps of before."""
    given = with_(options, batch_size=16, alpha=0.3, divergence="jsd", warmup_steps=1)
    done = distil(given)  # 40 rows: an epoch is 3 batches, the last of them smaller
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run" / f"checkpoint-{steps}", again / f"checkpoint-{steps}")
    resumed = distil(with_(given, output=str(again), resume=True))
    assert same_weights(done.folder, resumed.folder)
    for name in ("loss_curve.csv", "loss_curve.png"):
        assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_resuming_over_the_end_of_an_epoch(options, tmp_path):
    """The order of the rows of the next epoch is that of the uninterrupted run."""
    given = with_(options, steps=4, batch_size=20)  # an epoch is 2 steps
    done = distil(given)
    for step in (1, 2, 3):
        again = tmp_path / f"again-{step}"
        checkpoint = again / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "run" / checkpoint.name, checkpoint)
        resumed = distil(with_(given, output=str(again), resume=str(checkpoint)))
        assert same_weights(done.folder, resumed.folder)
        assert resumed.curve == done.curve


def test_the_curve_has_every_step_and_its_terms(options, tmp_path, monkeypatch):
    """The loss is made of its terms; the table is read back as it was; the picture is one."""
    done = distil(with_(options, alpha=0.25))
    assert read_csv(tmp_path / "run" / "loss_curve.csv") == done.curve
    with (tmp_path / "run" / "loss_curve.csv").open() as file:
        assert next(csv.reader(file)) == list(loss_curve.COLUMNS)
    assert [row["step"] for row in done.curve] == [1, 2, 3]
    for row in done.curve:
        assert row["loss"] == pytest.approx(0.25 * row["kl"] + 0.75 * row["ce"], rel=1e-6)
    assert (tmp_path / "run" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_divergence_the_teacher_is_not_run(options, tmp_path):
    """And the table has no entry for it."""
    trainer = make_trainer(with_(options, alpha=0.0, steps=1))
    trainer.teacher = None
    trainer.train()
    (row,) = loss_curve.curve_of(trainer.state.log_history)
    assert row["loss"] == pytest.approx(row["ce"])
    assert "kl" not in row
    loss_curve.write_csv([row], tmp_path)
    assert read_csv(tmp_path / "loss_curve.csv") == [row]


def test_without_matplotlib_the_table_is_written(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_curve, "need", missing)
    distil(with_(options, steps=1))
    assert "pip install 'model-conformance[distillation]'" in capsys.readouterr().err
    assert len(read_csv(tmp_path / "run" / "loss_curve.csv")) == 1
    assert not (tmp_path / "run" / "loss_curve.png").exists()


def missing(package, extra, purpose):
    """As :func:`need` where nothing is installed."""
    from reference_impl.shared_core.extras import MissingExtra, need

    with pytest.raises(MissingExtra) as error:
        need("a_package_that_nobody_has", extra, purpose)
    raise error.value


# As it is used


def test_command_line_distils_and_goes_on(models, tmp_path, capsys):
    """The commands of the page: a run, and the same run resumed at its end."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(map(words_of, TEXTS)))
    command = ["distil", models / "student", models / "teacher", text, tmp_path / "run"]
    given = "--steps 2 --batch-size 4 --lr 0.005 --save-steps 1 --device cpu --quiet"
    given += " --multiplier router=0.5 --multiplier embed_tokens=0"
    arguments = [*map(str, command), *given.split()]
    assert main(arguments) == 0
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    assert main(arguments) == 1
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert main([*arguments, "--resume"]) == 0
    assert len(read_csv(tmp_path / "run" / "loss_curve.csv")) == 2


def test_example_of_the_page_runs():
    """The Python of docs/distillation.md, as written."""
    page = (ROOT / "docs/distillation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(example, "docs/distillation.md", "exec"), {})
