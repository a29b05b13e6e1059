"""Evaluation through lm-eval: local tasks, folders of either kind, and as a watcher's ``evaluate``."""

from __future__ import annotations

import functools
import json
import random
import shutil

import numpy
import pytest
import torch
from small_distillation import make_student, make_tasks, make_teacher, words_of

pytest.importorskip("lm_eval")

from reference_impl.shared_core import evaluation, extras
from reference_impl.shared_core.__main__ import main
from reference_impl.shared_core.checkpoint import load_compressed_model
from reference_impl.shared_core.evaluation import evaluate_model
from reference_impl.shared_core.trained_model import load_model
from reference_impl.shared_core.watcher import CheckpointWatcher
from reference_impl.stored import CheckpointError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with ``teacher``, ``student``, its export, and ``tasks``."""
    folder = tmp_path_factory.mktemp("models")
    make_teacher(folder / "teacher")
    make_student(folder / "teacher", folder / "student")
    load_compressed_model(folder / "student").export(folder / "exported")
    make_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def direct(folders):
    """The metrics of the compressed model itself."""
    return evaluate_model(folders / "student", folders / "tasks")


def test_a_compressed_model_and_its_export_have_the_same_metrics(folders, direct):
    assert set(direct) == {"local_choice/acc", "local_text/word_perplexity"}
    assert evaluate_model(folders / "exported", folders / "tasks") == pytest.approx(
        direct, rel=1e-5
    )


def test_metrics_do_not_depend_on_the_batch_size(folders, direct):
    found = evaluate_model(folders / "student", folders / "tasks", batch_size=1)
    assert found == pytest.approx(direct, rel=1e-5)


def test_metrics_are_those_of_the_model(folders, direct):
    """Perplexity and the choice, computed from the logits of one document at a time."""
    model = load_compressed_model(folders / "student")
    lines = (folders / "tasks" / "text.jsonl").read_text().splitlines()
    total = words = 0.0
    for line in lines:
        text = json.loads(line)["text"]
        total -= float(scores(model, [1], ids_of(text)).sum())  # 1 is <s>, before the first word
        words += len(text.split())
    expected = torch.tensor(total / words).exp()
    assert direct["local_text/word_perplexity"] == pytest.approx(float(expected), rel=1e-5)

    right = 0
    asked = [json.loads(x) for x in (folders / "tasks" / "choice.jsonl").read_text().splitlines()]
    for each in asked:
        found = [
            float(scores(model, ids_of(each["text"]), ids_of(choice)).sum())
            for choice in each["choices"]
        ]
        right += found.index(max(found)) == each["answer"]
    assert direct["local_choice/acc"] == pytest.approx(right / len(asked))
    assert 0 < right < len(asked)


def ids_of(text):
    """The ids of words, as the tokenizer gives them."""
    return [int(word[1:]) + 3 for word in text.split()]


def scores(model, context, continuation):
    """Log probabilities of the continuation's tokens, in float64."""
    ids = torch.tensor([[*context, *continuation]])
    found = torch.log_softmax(model.logits(ids)[0, :-1].double(), dim=-1)
    return found[range(len(ids[0]) - 1), ids[0, 1:]][len(context) - 1 :]


def test_the_words_of_the_helper_are_those_of_the_tokenizer():
    assert ids_of(words_of([3, 59, 17])) == [3, 59, 17]


def test_random_numbers_are_as_they_were(folders):
    """lm-eval seeds every generator; a run that evaluates on its way must not become another."""
    draw = lambda: (random.random(), float(numpy.random.rand()), float(torch.rand(())))
    for each in (random.seed, numpy.random.seed, torch.manual_seed):
        each(7)
    expected = draw()
    for each in (random.seed, numpy.random.seed, torch.manual_seed):
        each(7)
    evaluate_model(folders / "student", folders / "tasks" / "choice.yaml", limit=1)
    assert draw() == expected


def test_a_watcher_evaluates_the_checkpoints_of_a_run(folders, tmp_path, direct):
    """As ``functools.partial``, and by the command; a partial checkpoint is left for later."""
    run = tmp_path / "run"
    shutil.copytree(folders / "student", run / "checkpoint-900")
    shutil.copytree(folders / "exported", run / "checkpoint-1000")
    shutil.copytree(folders / "student", run / "checkpoint-1100")
    (run / "checkpoint-1100" / "non_moe_weights.safetensors").unlink()
    evaluate = functools.partial(evaluate_model, task=folders / "tasks")
    results = tmp_path / "results.jsonl"
    watcher = CheckpointWatcher().checkpoint_watcher(str(run), evaluate, results=str(results))
    assert list(watcher.poll()) == ["checkpoint-900", "checkpoint-1000"]
    for line in results.read_text().splitlines():
        assert json.loads(line)["results"] == pytest.approx(direct, rel=1e-5)
    (run / "checkpoint-1100").rename(run / "aside")
    watched = ["watch", str(run), str(folders / "tasks"), "--results", str(results), "--once"]
    assert main(watched) == 0
    assert len(results.read_text().splitlines()) == 2


def test_command_line_prints_the_metrics(folders, capsys, direct):
    assert main(["evaluate", str(folders / "student"), str(folders / "tasks")]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(direct)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("task: [", "is not YAML"),
        ("output_type: multiple_choice", "task: names no task"),
        ("task: a\ndataset_kwargs: {data_files: {test: none.jsonl}}", "none.jsonl: is missing"),
    ],
)
def test_tasks_that_cannot_be_read_are_named(folders, tmp_path, capsys, text, named):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    assert main(["evaluate", str(folders / "student"), str(path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert named in error
    assert str(path) in error


def test_what_is_missing_is_named(folders, tmp_path, monkeypatch, capsys):
    """A folder, tasks in a folder, a tokenizer, and lm-eval itself."""
    with pytest.raises(CheckpointError, match="nowhere: is not a directory"):
        evaluate_model(tmp_path / "nowhere", folders / "tasks")
    with pytest.raises(CheckpointError, match="holds no task"):
        evaluate_model(folders / "student", tmp_path)
    bare = tmp_path / "bare"
    shutil.copytree(folders / "exported", bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="bare: has no tokenizer"):
        evaluate_model(bare, folders / "tasks")
    found = evaluate_model(bare, folders / "tasks", tokenizer=folders / "student")
    assert found["local_text/word_perplexity"] > 1
    capsys.readouterr()
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert main(["watch", str(tmp_path), str(folders / "tasks"), "--once"]) == 1
    expected = "error: evaluation needs lm-eval: pip install 'model-conformance[eval]'"
    assert capsys.readouterr().err.strip() == expected


def test_tasks_with_functions_are_left_to_lm_eval(tmp_path):
    """As are those that include another file; what is included is no task of its own."""
    (tmp_path / "a.yaml").write_text("task: a\nprocess_docs: !function utils.docs\n")
    (tmp_path / "b.yaml").write_text("task: b\ninclude: _common.yaml\n")
    (tmp_path / "_common.yaml").write_text("output_type: multiple_choice\n")
    names = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    assert evaluation.read_tasks(tmp_path) == names


def test_models_are_loaded_whole_or_not_at_all(folders, tmp_path):
    """transformers would give missing weights random values."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(folders / "exported", model)
    index = model / "model.safetensors.index.json"
    stored = json.loads(index.read_text())
    name = stored["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(stored))
    tensors = load_file(model / name)
    del tensors["model.norm.weight"]
    save_file(tensors, model / name, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight: missing"):
        load_model(model)
