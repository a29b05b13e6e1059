"""What a distillation run is given: the teacher's cache, the data, and mistakes."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from small_distillation import (
    TEXTS,
    VOCABULARY,
    make_student,
    make_teacher,
    names_in,
    run_options,
    same_weights,
    save_tokenizer,
    weights,
    with_,
    words_of,
)

pytest.importorskip("accelerate")

from reference_impl.shared_core import distillation_trainer
from reference_impl.shared_core.distillation import distil, make_trainer
from reference_impl.shared_core.distillation_data import IGNORED, collate, read_rows
from reference_impl.stored import CheckpointError


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


# The teacher's cache


def test_a_cache_of_all_logits_gives_the_same_run(options, tmp_path, monkeypatch):
    """And the file alone does, once it is there: the teacher is not loaded again."""
    cache = str(tmp_path / "cache.safetensors")
    live = distil(options)
    cached = with_(options, teacher_cache=cache, teacher_top_k=VOCABULARY)
    for name in ("first", "second"):
        found = distil(with_(cached, output=str(tmp_path / name)))
        for row, expected in zip(found.curve, live.curve):
            assert row == pytest.approx(expected, rel=1e-4)
        monkeypatch.setattr("reference_impl.shared_core.distillation.LiveTeacher", None)
    assert same_weights(tmp_path / "first" / "model", tmp_path / "second" / "model")


def test_a_cache_with_few_logits_has_a_smaller_divergence(options, tmp_path):
    """What is lost is one outcome more: coarser distributions are never further apart."""
    live = distil(with_(options, steps=1)).curve[0]["kl"]
    given = with_(options, steps=1, teacher_cache=str(tmp_path / "cache.safetensors"))
    few = distil(with_(given, teacher_top_k=4, output=str(tmp_path / "few"))).curve[0]["kl"]
    assert 0.2 * live < few < live


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 1.5}, "temperature: is 2.0, this run has 1.5"),
        ({"data": TEXTS[1:]}, "data: is "),
        ({"teacher_top_k": 5}, "k: is 4, this run has 5"),
        ({"teacher": "other"}, "teacher: is "),
    ],
)
def test_a_cache_of_something_else_is_refused(options, models, tmp_path, changes, named):
    cache = tmp_path / "cache.safetensors"
    given = with_(options, teacher_cache=str(cache), teacher_top_k=4)
    make_trainer(given)
    if "teacher" in changes:
        make_teacher(tmp_path / "other", seed=9)
        changes = {"teacher": str(tmp_path / "other")}
    with pytest.raises(CheckpointError) as error:
        make_trainer(with_(given, **changes))
    assert f"{cache}: {named}" in str(error.value)


# Data


def test_rows_are_cut_and_filled_up(tmp_path):
    """An id that serves as padding is a target where it is real."""
    rows = read_rows([[3, 0, 4, 5, 6], [7], [0, 0]], max_length=4, vocab_size=8, tokenizer="")
    assert [row.tolist() for row in rows.ids] == [[3, 0, 4, 5], [0, 0]]
    batch = collate([rows[0], rows[1]])
    assert batch["labels"].tolist() == [[3, 0, 4, 5], [0, 0, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1] * 4, [1, 1, 0, 0]]


def test_files_of_each_format_hold_the_same_rows(tmp_path):
    """Text through the tokenizer, ids as JSON, and tensors with lengths."""
    from safetensors.torch import save_file

    save_tokenizer(tmp_path)
    texts = TEXTS[:3]
    (tmp_path / "a.txt").write_text("\n\n".join(map(words_of, texts)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"input_ids": x}) + "\n" for x in texts))
    (tmp_path / "c.jsonl").write_text(
        "".join(json.dumps({"text": words_of(x)}) + "\n" for x in texts)
    )
    ids = torch.zeros(3, 30, dtype=torch.int32)
    for row, text in zip(ids, texts):
        row[: len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in texts])
    save_file({"input_ids": ids, "lengths": lengths}, tmp_path / "d.safetensors")
    for name in ("a.txt", "b.jsonl", "c.jsonl", "d.safetensors"):
        given = {"max_length": 50, "vocab_size": VOCABULARY, "tokenizer": str(tmp_path)}
        rows = read_rows(tmp_path / name, **given)
        assert [row.tolist() for row in rows.ids] == texts, name


# Mistakes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"schedule": "up"}, "schedule is 'up', expected one of constant, linear, cosine"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"data": "none.jsonl"}, "none.jsonl: is not a file"),
        (
            {"data": [[3, VOCABULARY]]},
            f"row 1: has id {VOCABULARY}, the vocabulary has {VOCABULARY}",
        ),
        ({"data": [[3]]}, "holds no row of two tokens"),
        ({"student": "nowhere"}, "nowhere"),
        ({"resume": "nowhere"}, "nowhere: is not a directory"),
        ({"multipliers": (("nothing", 0.0),)}, "matches no parameter"),
    ],
)
def test_mistakes_are_errors_before_the_first_step(options, tmp_path, changes, named):
    with pytest.raises((ValueError, CheckpointError)) as error:
        distil(with_(options, **changes))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists() or names_in(tmp_path / "run") == []


def test_vocabularies_that_differ_are_refused(options, tmp_path):
    """By their width, and by their words."""
    make_teacher(tmp_path / "wide", vocab_size=VOCABULARY + 4)
    with pytest.raises(ValueError, match=f"has {VOCABULARY} ids, the teacher's {VOCABULARY + 4}"):
        distil(with_(options, teacher=str(tmp_path / "wide")))
    padded = with_(options, teacher=str(tmp_path / "wide"), vocab_size=VOCABULARY, steps=1)
    assert math.isfinite(distil(padded).curve[0]["loss"])
    other = tmp_path / "other"
    shutil.copytree(options.teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w3"', '"W3"'))
    with pytest.raises(ValueError, match="'W3' has id None for the student and 6 for the teacher"):
        distil(with_(options, teacher=str(other), output=str(tmp_path / "second")))


def test_runs_are_not_mixed(options, tmp_path):
    """Neither a new one with the checkpoints of an earlier one, nor settings that differ."""
    distil(with_(options, steps=1))
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run"):
        distil(options)
    with pytest.raises(CheckpointError, match=r"alpha: is 0.5, now given as 0.25"):
        distil(with_(options, steps=1, resume=True, alpha=0.25))
    (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt: is missing"):
        distil(with_(options, steps=1, resume=True))


def test_a_loss_that_is_not_finite_ends_the_run(options, tmp_path):
    """With its step, and without a checkpoint of such weights."""
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step \d"):
        distil(with_(options, lr=1e30, max_grad_norm=0.0))
    for checkpoint in distillation_trainer.checkpoints_in(tmp_path / "run"):
        assert all(bool(torch.isfinite(w).all()) for w in weights(checkpoint).values())
