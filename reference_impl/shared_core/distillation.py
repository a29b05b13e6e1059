"""A distillation run, from folders and a file of text to a trained folder and its loss curve.

    distil(DistillationOptions(student="COMPRESSED", teacher="MODEL", data="text.jsonl", output="RUN"))

Source: LawrenceRLiu/MoE_Factorize_Compress, ``src/distillation_trainer.py``; what it got wrong is in
``docs/distillation.md``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reference_impl.shared_core.distillation_data import Rows, read_rows
from reference_impl.shared_core.distillation_loss import check_numbers
from reference_impl.shared_core.extras import need
from reference_impl.shared_core.loss_curve import curve_of, write_csv, write_png
from reference_impl.shared_core.parameter_groups import check_multipliers
from reference_impl.shared_core.teacher_cache import CachedTeacher, cache_facts, write_cache
from reference_impl.shared_core.teachers import LiveTeacher
from reference_impl.shared_core.trained_model import (
    TrainedModel,
    check_vocabularies,
    folder_digest,
    is_compressed,
    load_model,
)

if TYPE_CHECKING:
    from reference_impl.shared_core.distillation_trainer import DistillationTrainer

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "float64")
MODEL = "model"
"""The folder of the trained model in that of the run."""


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """What is trained on what, and how."""

    student: str
    """Folder of a compressed or an ordinary model, told apart by ``compressed_metadata.json``."""
    teacher: str
    """Folder of the model that is learnt from, of either kind."""
    data: str | Sequence[Sequence[int]]
    """A file of text or ids, or the ids themselves."""
    output: str
    """Folder of the run: checkpoints, the trained model, the loss curve."""
    max_length: int = 512
    """Longer documents are cut into pieces of so many tokens."""

    steps: int = 1000
    batch_size: int = 8
    """Rows of a micro-batch, on each rank."""
    accumulation: int = 1
    """Micro-batches of a step."""
    lr: float = 1e-4
    schedule: str = "cosine"
    """Of the learning rate after the warm-up: ``constant``, ``linear`` or ``cosine`` down to 0."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """Shares of the learning rate by patterns of names; the first that matches holds, 0 freezes."""

    alpha: float = 0.5
    temperature: float = 2.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    vocab_size: int | None = None
    """Columns of the logits from this one on are padding of the vocabulary."""
    teacher_cache: str | None = None
    """A file of the teacher's largest logits: made if it is not there, then used in its place."""
    teacher_top_k: int = 64
    """How many logits of a token the cache has."""

    seed: int = 0
    dtype: str = "float32"
    """The student is trained and saved in this dtype; the teacher is run in its own."""
    device: str | None = None
    """``cpu``, or None for an accelerator where there is one."""
    save_steps: int = 100
    save_total_limit: int | None = None
    """How many checkpoints are kept, the newest."""
    resume: bool | str = False
    """True goes on from the last checkpoint of ``output``, if there is one; or the path of one."""
    progress: bool = True


@dataclass(frozen=True)
class Distilled:
    """What a run gave."""

    folder: Path
    """The trained model, in the student's kind of folder."""
    curve: list[dict[str, float]]
    """Step, loss, its terms and the learning rate, from the first step on, also after resuming."""
    is_main: bool = True
    """False on all ranks but the first, which wrote the files."""


def distil(options: DistillationOptions) -> Distilled:
    """Train a student on its teacher, see ``docs/distillation.md``.

    Everything that can be known to be wrong is an error before the first step: ValueError for options
    and models that do not go together, :class:`CheckpointError` for files.
    """
    check_options(options)
    need("accelerate", "distillation", "distillation")
    from reference_impl.shared_core.distillation_trainer import quiet_transformers, remove_leftovers

    with quiet_transformers():
        trainer = make_trainer(options)
        checkpoint = starting_point(options, trainer)
        if trainer.is_world_process_zero():
            remove_leftovers(Path(options.output))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return finish(options, trainer)


def make_trainer(options: DistillationOptions) -> DistillationTrainer:
    """Read and check everything; nothing is trained yet."""
    from reference_impl.shared_core.distillation_trainer import (
        DistillationTrainer,
        training_arguments,
    )

    args = training_arguments(options)
    check_vocabularies(options.student, options.teacher, options.vocab_size)
    student = load_model(options.student, dtype=getattr(torch, options.dtype))
    rows = read_rows(
        options.data,
        max_length=options.max_length,
        vocab_size=options.vocab_size or student.vocab_size,
        tokenizer=options.student,
    )
    digest = folder_digest(options.teacher)
    teacher = make_teacher(options, args, student, rows, digest)
    return DistillationTrainer(
        student,
        teacher,
        rows,
        args,
        alpha=options.alpha,
        loss_options=loss_options(options),
        multipliers=options.multipliers,
        settings=settings_of(options, rows, digest, args.world_size),
        progress=options.progress,
    )


def loss_options(options: DistillationOptions) -> dict[str, Any]:
    """What the loss is told on every batch."""
    names = ("temperature", "divergence", "beta", "vocab_size")
    return {name: getattr(options, name) for name in names}


def settings_of(
    options: DistillationOptions, rows: Rows, teacher: str, processes: int
) -> dict[str, Any]:
    """What the course of a run depends on: with the same, a resumed run is the uninterrupted one."""
    names = "steps batch_size accumulation lr schedule warmup_steps weight_decay max_grad_norm"
    names += " multipliers alpha temperature divergence beta vocab_size seed dtype"
    found = {name: getattr(options, name) for name in names.split()}
    found |= {"data": rows.digest(), "teacher": teacher, "processes": processes}
    found["teacher_top_k"] = options.teacher_top_k if options.teacher_cache else None
    return found | {"compressed": is_compressed(options.student)}


def make_teacher(
    options: DistillationOptions, args: Any, student: TrainedModel, rows: Rows, digest: str
) -> LiveTeacher | CachedTeacher:
    """The teacher's model, or the file of its logits, which the first rank makes."""

    def live() -> LiveTeacher:
        return LiveTeacher(load_model(options.teacher, device=args.device))

    if options.teacher_cache is None:
        return live()
    path, vocabulary = Path(options.teacher_cache), options.vocab_size
    k = min(options.teacher_top_k, vocabulary or student.vocab_size)
    facts = cache_facts(digest, rows, k=k, temperature=options.temperature, vocab_size=vocabulary)
    with args.main_process_first(local=False):
        if not path.exists():
            write_cache(
                path,
                live(),
                rows,
                facts,
                batch_size=options.batch_size,
                device=args.device,
                vocab_size=vocabulary,
                progress=options.progress,
            )
    return CachedTeacher(path, rows, facts)


def starting_point(options: DistillationOptions, trainer: DistillationTrainer) -> Path | None:
    """The checkpoint to go on from; None for a run from the beginning.

    Raises :class:`CheckpointError` for one that is not whole or of another run, and ValueError where a
    new run would be mixed with the checkpoints of an earlier one.
    """
    from reference_impl.shared_core.distillation_trainer import check_resumable, checkpoints_in

    found = checkpoints_in(Path(options.output))
    if not options.resume:
        if found:
            problem = f"holds {found[-1].name} of an earlier run"
            raise ValueError(f"{options.output} {problem}: resume it, or choose another folder")
        return None
    last = found[-1] if found else None
    checkpoint = last if options.resume is True else Path(options.resume)
    if checkpoint is not None:
        check_resumable(checkpoint, trainer.settings, trainer.args.world_size)
    return checkpoint


def finish(options: DistillationOptions, trainer: DistillationTrainer) -> Distilled:
    """Write the trained model and the curve."""
    output = Path(options.output)
    curve = curve_of(trainer.state.log_history)
    if trainer.is_world_process_zero():
        trainer.student.save(output / MODEL)
        write_csv(curve, output)
        write_png(curve, output)
    trainer.accelerator.wait_for_everyone()
    return Distilled(output / MODEL, curve, trainer.is_world_process_zero())


def check_options(options: DistillationOptions) -> None:
    """Raise ValueError for what can be told without opening a file."""
    check_numbers(options.alpha, options.temperature, options.divergence, options.beta, None)
    check_multipliers(options.multipliers)
    least = {"steps": 1, "batch_size": 1, "accumulation": 1, "save_steps": 1, "teacher_top_k": 1}
    least |= {"warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "lr": 0}
    if options.save_total_limit is not None:
        least["save_total_limit"] = 1
    for name, lowest in least.items():
        value = getattr(options, name)
        if not (value >= lowest and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected at least {lowest}")
    for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES), ("device", ("cpu", None))):
        if getattr(options, name) not in known:
            shown = ", ".join(map(str, known))
            raise ValueError(f"{name} is {getattr(options, name)!r}, expected one of {shown}")
