"""transformers' Trainer with a distillation loss, and checkpoints that are whole or not there.

What differs from Trainer, and why:

- the loss is divided by the valid targets of the whole global batch, counted here: Trainer's own count
  depends on what it makes of the model's class;
- a checkpoint is written beside its place and renamed when everything is in it. Trainer writes into
  ``checkpoint-{step}`` itself, file by file, where a crash leaves part of one;
- the weights are written by :meth:`TrainedModel.save` in place of Trainer's own saving, not after it: a
  callback of ``on_save`` comes too late for that;
- what resuming needs must be there. Trainer goes on with a new optimizer where its file is missing.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from reference_impl.hf_directory import read_json
from reference_impl.shared_core.distillation_data import Rows, collate, valid_targets
from reference_impl.shared_core.distillation_loss import DistillationLoss
from reference_impl.shared_core.folders import flush, put_in_place, write_json
from reference_impl.shared_core.loss_curve import curve_of, write_csv
from reference_impl.shared_core.parameter_groups import parameter_groups
from reference_impl.shared_core.trained_model import TrainedModel, load_model
from reference_impl.stored import CheckpointError

if TYPE_CHECKING:
    from reference_impl.shared_core.distillation import DistillationOptions

SETTINGS = "distillation.json"
"""What a run was made with, in each of its checkpoints."""
NEEDED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", SETTINGS)
"""What resuming needs beside the weights and the states of random numbers."""
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def training_arguments(options: DistillationOptions) -> TrainingArguments:
    """What Trainer is told."""
    return TrainingArguments(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.lr,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        # Of every step, so that no part of a sum is lost between a log and a checkpoint.
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=options.device != "cpu",
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its bars while models are loaded, which say nothing about the run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class DistillationTrainer(Trainer):
    """Trains a student on its teacher's distributions and on the text.

    ``teacher`` takes a batch and gives the arguments of the loss that are about the teacher, see
    :mod:`reference_impl.shared_core.teachers`. ``settings`` is what the course of the run depends on:
    it is in every checkpoint, and resuming with other settings is refused.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        student: TrainedModel,
        teacher: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        rows: Rows,
        args: TrainingArguments,
        *,
        alpha: float,
        loss_options: Mapping[str, Any],
        multipliers: Iterable[tuple[str, float]] = (),
        settings: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.alpha, self.loss_options = alpha, dict(loss_options)
        self.settings = json.loads(json.dumps(dict(settings or {})))
        self.groups = parameter_groups(student.parameters(), multipliers, args.weight_decay)
        self._staging: Path | None = None
        self._terms, self._terms_since = torch.zeros(2, dtype=torch.float64), 0
        config = student.module.config
        use_cache = getattr(config, "use_cache", True)
        super().__init__(model=student.module, args=args, train_dataset=rows, data_collator=collate)
        config.use_cache = use_cache  # Trainer sets it, and it would be saved with the model
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs need a process each: start it with torchrun")
        self.remove_callback(PrinterCallback)
        if progress:
            self.add_callback(ProgressLine())

    # The loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """``alpha · kl + (1 − alpha) · ce`` of a micro-batch, as its share of the global mean."""
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        kl, ce = self.terms(outputs.logits, inputs, given)
        self._terms += torch.stack([kl.detach(), ce.detach()]).to(self._terms)
        loss = sum(w * term for w, term in ((self.alpha, kl), (1 - self.alpha, ce)) if w)
        if given:  # ranks' gradients are averaged, where they must be added
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def terms(
        self, logits: Tensor, inputs: Mapping[str, Tensor], given: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Divergence times T², and cross entropy; what has no weight gets no gradient.

        The loss is linear in ``alpha``: its terms are what it is at 1 and at 0.
        """
        loss = DistillationLoss().distillation_loss
        options, labels = self.loss_options | dict(given), inputs["labels"]
        kl = logits.new_full((), math.nan)
        if self.alpha > 0:
            of_teacher = self.teacher(inputs)
            kl = loss(logits, labels=labels, alpha=1.0, **of_teacher, **options)
        for_ce = logits if self.alpha < 1 else logits.detach()
        return kl, loss(for_ce, for_ce.detach(), labels, alpha=0.0, **options)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> int:
        """The valid targets of all micro-batches of a step, on all ranks; at least 1."""
        counts = [valid_targets(batch["labels"]) for batch in batch_samples]
        total = torch.stack(counts).sum().to(device) if counts else torch.zeros((), device=device)
        return max(1, int(self.accelerator.gather(total).sum()))

    # Optimizer and log

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups, each with its share of the learning rate."""
        if self.optimizer is None:
            groups = [
                {**group, "lr": self.args.learning_rate * group["multiplier"]}
                for group in self.groups
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """The rate that a parameter with multiplier 1 has."""
        group = self.optimizer.param_groups[0]
        return super()._get_learning_rate() / group["multiplier"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss; raises FloatingPointError where the loss is not finite."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                step = self.state.global_step
                raise FloatingPointError(f"the loss is {logs['loss']} at step {step}")
            total = self.accelerator.reduce(self._terms.to(self.args.device), "sum")
            steps = self.state.global_step - self._terms_since
            found = dict(zip(("kl", "ce"), (total / steps).tolist()))
            logs |= {name: value for name, value in found.items() if not math.isnan(value)}
            self._terms.zero_()
            self._terms_since = self.state.global_step
        super().log(logs, start_time)

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: beside their place, while one is."""
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a whole checkpoint beside its place, and rename it; on all ranks."""
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        self._staging = output / f".{name}.tmp"
        try:
            if self.is_world_process_zero():
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.publish(self._staging / name, output / name)
            self.accelerator.wait_for_everyone()
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def publish(self, fresh: Path, target: Path) -> None:
        """Put a checkpoint that is written in its place, and take away those beyond the limit."""
        write_json(fresh / SETTINGS, self.settings)
        for path in (*fresh.rglob("*"), fresh):
            flush(path)
        put_in_place(fresh, target)
        flush(target.parent)
        remove_old_checkpoints(target, self.args.save_total_limit)
        write_csv(curve_of(self.state.log_history), target.parent)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The student's folder, in place of what Trainer writes."""
        if self.args.should_save:
            self.student.save(output_dir or self.args.output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait for the model's folder: another rank must not make it before the model is in it."""
        self.accelerator.wait_for_everyone()
        super()._save_rng_state(output_dir)

    # Resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The student's weights; raises unless all that resuming needs is there and fits."""
        folder = Path(resume_from_checkpoint)
        check_resumable(folder, self.settings, self.args.world_size)
        dtype = next(self.student.module.parameters()).dtype
        self.student.take(load_model(folder, dtype=dtype, device=self.args.device))
        self._terms_since = read_json(folder / "trainer_state.json")["global_step"]


def check_resumable(folder: Path, settings: Mapping[str, Any], processes: int = 1) -> None:
    """Raise :class:`CheckpointError` unless a checkpoint is whole and of a run with these settings."""
    if not folder.is_dir():
        raise CheckpointError(str(folder), "is not a directory")
    states = [f"rng_state_{i}.pth" for i in range(processes)]
    for name in (*NEEDED, *(states if processes > 1 else ["rng_state.pth"])):
        if not (folder / name).is_file():
            raise CheckpointError(
                str(folder / name), "is missing: the run cannot be resumed from here"
            )
    found = read_json(folder / SETTINGS)
    for name in sorted({*settings, *found}):
        if settings.get(name) != found.get(name):
            problem = f"is {found.get(name)!r}, now given as {settings.get(name)!r}"
            raise CheckpointError(str(folder / SETTINGS), problem, key=name)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    found = {
        int(matched[1]): path
        for path in folder.glob("checkpoint-*")
        if (matched := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def remove_old_checkpoints(newest: Path, limit: int | None) -> None:
    """Remove the earliest checkpoints beyond ``limit``, never the one that was just written.

    Each is renamed first: one that is half removed is not called a checkpoint.
    """
    if not limit:
        return
    found = checkpoints_in(newest.parent)
    others = [path for path in found if path != newest]
    for path in others[: len(found) - limit]:
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was ended left of checkpoints that it was writing or removing."""
    for path in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


class ProgressLine(TrainerCallback):
    """One line with the step and the loss."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Start at the step that is gone on from."""
        if state.is_world_process_zero:
            self.line = tqdm(total=state.max_steps, initial=state.global_step, desc="distil")

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Show where the run is."""
        if state.is_world_process_zero and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.4f}" for name in ("loss", "kl", "ce") if name in logs}
            self.line.set_postfix(shown, refresh=False)
            self.line.update(state.global_step - self.line.n)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the line as it is."""
        if state.is_world_process_zero:
            self.line.close()
