"""Evaluation through lm-eval's Python API: local tasks, and a folder of either kind.

A compressed model is evaluated as it is; nothing is exported for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from reference_impl.shared_core.extras import need
from reference_impl.shared_core.trained_model import load_model, read_tokenizer
from reference_impl.stored import CheckpointError


def evaluate_model(
    folder: str | Path,
    task: str | Path,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """The metrics of a model, ``{"task/metric": number}``, as a checkpoint watcher wants them.

    ``task`` is a YAML file of lm-eval, or a folder of them; files of data that it names are looked for
    beside it. ``limit`` is a number of documents of each task, ``tokenizer`` a folder, the model's own
    if it is None. Raises :class:`CheckpointError` for a model, a tokenizer or a task that cannot be
    read, and :class:`MissingExtra` where lm-eval is not installed.
    """
    specifications = check_task(task)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = load_model(folder, dtype=dtype, device=device)
    with same_random_numbers():
        wrapped = HFLM(
            pretrained=model.module,
            tokenizer=read_tokenizer(tokenizer or folder),
            backend="causal",
            batch_size=batch_size,
        )
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=specifications,
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    return numbers_of(found["results"])


def check_task(task: str | Path) -> list[dict[str, Any] | str]:
    """The tasks, raised for before a model is loaded or a checkpoint waited for."""
    for package in ("lm_eval", "accelerate"):
        need(package, "eval", "evaluation")
    return read_tasks(Path(task))


def numbers_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``{"task/metric": number}`` of lm-eval's ``{task: {"metric,filter": number, "alias": …}}``."""
    metrics = {}
    for task, entries in results.items():
        for name, value in entries.items():
            metric, _, chosen = name.partition(",")
            if not chosen or isinstance(value, str) or metric.endswith("_stderr"):
                continue
            shown = metric if chosen == "none" else f"{metric},{chosen}"
            metrics[f"{task}/{shown}"] = float(value)
    return metrics


def read_tasks(place: Path) -> list[dict[str, Any] | str]:
    """The tasks of a YAML file, or of a folder of them, as lm-eval takes them."""
    if place.is_dir():
        files = [path for path in sorted(place.glob("*.yaml")) if not path.name.startswith("_")]
        if not files:
            raise CheckpointError(str(place), "holds no task: no file ends in .yaml")
        return [each for path in files for each in read_tasks(path)]
    return [read_task(place)]


def read_task(path: Path) -> dict[str, Any] | str:
    """A task with its files of data found; the path where only lm-eval can read it.

    Which is a task that includes another file, or names functions.
    """
    import yaml

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), f"cannot be read: {error}") from error
    try:
        found = yaml.safe_load(text)
    except yaml.constructor.ConstructorError:
        return str(path)
    except yaml.YAMLError as error:
        raise CheckpointError(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping) or not isinstance(found.get("task"), str):
        raise CheckpointError(str(path), "names no task", key="task")
    if "include" in found:
        return str(path)
    arguments = dict(found.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        arguments["data_files"] = beside(path, arguments["data_files"])
    return {**found, "dataset_kwargs": arguments}


def beside(task: Path, files: Any) -> Any:
    """Paths of data, which a task gives from its own folder; by split, as a list, or one."""
    if isinstance(files, Mapping):
        return {split: beside(task, each) for split, each in files.items()}
    if isinstance(files, list):
        return [beside(task, each) for each in files]
    if "://" in str(files):
        return files
    path = (task.parent / str(files)).resolve()
    if not path.is_file():
        raise CheckpointError(str(path), f"is missing: {task} names it")
    return str(path)


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Give the random generators back as they were: lm-eval seeds them all.

    Without this a run that is evaluated on its way is another run.
    """
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
