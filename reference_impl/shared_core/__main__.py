"""Compress the experts of a model, look at what that gave, train it, evaluate it, and turn it back.

    python -m reference_impl.shared_core compress MODEL COMPRESSED --rank 64
    python -m reference_impl.shared_core inspect COMPRESSED
    python -m reference_impl.shared_core distil COMPRESSED MODEL TEXT RUN --steps 1000
    python -m reference_impl.shared_core evaluate RUN/model TASK
    python -m reference_impl.shared_core watch RUN TASK
    python -m reference_impl.shared_core export COMPRESSED EXPORTED
    python -m reference_impl.shared_core convert COMPRESSED OTHER --format pt

MODEL is a Hugging Face directory of Qwen3-MoE or Mixtral; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys

from reference_impl.shared_core.extras import MissingExtra
from reference_impl.stored import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked; a user's mistake is one line on stderr, and status 1."""
    given = parser().parse_args(arguments)
    try:
        status = given.do(given)
    except (CheckpointError, ValueError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(status or 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="python -m reference_impl.shared_core",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser("compress", help="fit a shared core and wrappers to all experts")
    add.add_argument("model", help="a Hugging Face directory")
    add.add_argument("target", help="the folder to write")
    add.add_argument("--rank", type=int, required=True, help="rank of the wrappers")
    add.add_argument("--steps", type=int, default=1000, help="of the fit (default: 1000)")
    add.add_argument("--lr", type=float, default=1e-3, help="largest step size (default: 0.001)")
    add.add_argument("--seed", type=int, default=0, help="of the random wrappers (default: 0)")
    add_format(add)
    add.set_defaults(do=compress)
    show = commands.add_parser("inspect", help="check a compressed model, and print its counts")
    show.add_argument("folder")
    show.set_defaults(do=inspect)
    back = commands.add_parser("export", help="write an ordinary checkpoint")
    back.add_argument("folder")
    back.add_argument("target", help="the folder to write")
    back.set_defaults(do=export)
    other = commands.add_parser("convert", help="write a compressed model in the other format")
    other.add_argument("folder")
    other.add_argument("target", help="the folder to write")
    add_format(other)
    other.set_defaults(do=convert)
    add_distil(commands.add_parser("distil", help="train a model on another one's distributions"))
    one = commands.add_parser("evaluate", help="evaluate a model through lm-eval")
    add_evaluation(one, "folder", "of the model, compressed or ordinary")
    one.set_defaults(do=evaluate)
    all_of_them = commands.add_parser("watch", help="evaluate checkpoints as a run writes them")
    add_evaluation(all_of_them, "directory", "of the run")
    all_of_them.add_argument(
        "--results", help="file of JSON lines (default: RUN/evaluations.jsonl)"
    )
    all_of_them.add_argument("--attempts", type=int, default=3, help="at a checkpoint (default: 3)")
    all_of_them.add_argument(
        "--interval", type=float, default=60.0, help="seconds between two looks (default: 60)"
    )
    all_of_them.add_argument("--once", action="store_true", help="look once, and end")
    all_of_them.set_defaults(do=watch)
    return whole


def add_evaluation(command: argparse.ArgumentParser, place: str, what: str) -> None:
    """What commands that evaluate are told."""
    command.add_argument(place, help=what)
    command.add_argument("task", help="a YAML file of lm-eval, or a folder of them")
    command.add_argument("--batch-size", type=int, default=8, help="(default: 8)")
    command.add_argument("--limit", type=int, help="documents of each task (default: all)")
    command.add_argument("--device", default="cpu", help="(default: cpu)")
    command.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")


DISTIL = {
    "steps": (int, "of training (default: 1000)"),
    "batch_size": (int, "rows of a micro-batch on a rank (default: 8)"),
    "accumulation": (int, "micro-batches of a step (default: 1)"),
    "max_length": (int, "tokens of a row; longer documents are cut (default: 512)"),
    "lr": (float, "learning rate (default: 0.0001)"),
    "schedule": (str, "of the learning rate: constant, linear or cosine (default: cosine)"),
    "warmup_steps": (int, "(default: 0)"),
    "weight_decay": (float, "(default: 0)"),
    "max_grad_norm": (float, "gradients are scaled down to it, 0 leaves them (default: 1)"),
    "alpha": (float, "share of the divergence in the loss (default: 0.5)"),
    "temperature": (float, "of both distributions (default: 2)"),
    "divergence": (str, "forward_kl, reverse_kl or jsd (default: forward_kl)"),
    "beta": (float, "weight of jsd (default: 0.5)"),
    "vocab_size": (int, "columns from this one on are padding (default: none)"),
    "teacher_cache": (str, "file of the teacher's largest logits, made if it is not there"),
    "teacher_top_k": (int, "logits of a token in it (default: 64)"),
    "seed": (int, "(default: 0)"),
    "dtype": (str, "of the student: float32 or float64 (default: float32)"),
    "device": (str, "cpu (default: an accelerator where there is one)"),
    "save_steps": (int, "between two checkpoints (default: 100)"),
    "save_total_limit": (int, "how many checkpoints are kept (default: all)"),
}
"""Options of a distillation run, by their names in DistillationOptions."""


def add_distil(command: argparse.ArgumentParser) -> None:
    """What a distillation run is told."""
    for name, what in (
        ("student", "folder of the model to train, compressed or ordinary"),
        ("teacher", "folder of the model to learn from"),
        ("data", "a file of text or ids: .txt, .jsonl or .safetensors"),
        ("output", "the folder of the run"),
    ):
        command.add_argument(name, help=what)
    for name, (kind, what) in DISTIL.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=what)
    command.add_argument(
        "--multiplier",
        action="append",
        default=[],
        metavar="PATTERN=SHARE",
        help="of the learning rate, for parameters whose name the pattern is found in; 0 freezes",
    )
    command.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from a checkpoint, by default from the last one of the run, if there is one",
    )
    command.add_argument("--quiet", action="store_true", help="without a line of progress")
    command.set_defaults(do=distil)


def add_format(command: argparse.ArgumentParser) -> None:
    """The option of commands that write a compressed model."""
    command.add_argument(
        "--format",
        choices=("safetensors", "pt"),
        default="safetensors",
        help="of the files of tensors (default: safetensors)",
    )


def compress(given: argparse.Namespace) -> None:
    """Compress, and print how well each projection was fitted."""
    from reference_impl.shared_core.compression import FitOptions, compress_directory

    options = FitOptions(rank=given.rank, num_steps=given.steps, lr=given.lr, seed=given.seed)
    fitted = compress_directory(
        given.model, given.target, options, format=given.format, progress=True
    )
    print(f"{'layer':>5}  {'projection':<12}{'relative error':>15}")
    for each in fitted:
        print(f"{each.layer:>5}  {each.projection:<12}{each.relative_error:>15.4f}")
    inspect(argparse.Namespace(folder=given.target))


def inspect(given: argparse.Namespace) -> None:
    """Print the statistics of a folder that is complete and consistent."""
    from reference_impl.shared_core.checkpoint import read_folder, statistics_of

    folder = read_folder(given.folder)
    totals = statistics_of(folder.architecture, folder.layers).get_aggregate_stats()
    others = sum(tensor.numel() for tensor in folder.others.values())
    facts = {
        "model_type": folder.architecture.model_type,
        "experts": folder.architecture.num_experts,
        "other_params": others,
    }
    facts |= {name: value for name, value in totals.items() if name != "per_layer_stats"}
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        print(f"{name:<28}{shown if isinstance(shown, str) else format(shown, '.6f'):>20}")


def export(given: argparse.Namespace) -> None:
    """Write the ordinary checkpoint."""
    from reference_impl.shared_core.checkpoint import load_compressed_model

    load_compressed_model(given.folder).export(given.target)


def convert(given: argparse.Namespace) -> None:
    """Write the folder in another format."""
    from reference_impl.shared_core.checkpoint import load_compressed_model

    load_compressed_model(given.folder).save(given.target, format=given.format)


def distil(given: argparse.Namespace) -> None:
    """Train, and say where the model is and how the loss went."""
    from reference_impl.shared_core.distillation import DistillationOptions
    from reference_impl.shared_core.distillation import distil as run

    options = dict(vars(given))
    quiet, _ = options.pop("quiet"), options.pop("do")
    multipliers = tuple(map(multiplier, options.pop("multiplier")))
    done = run(DistillationOptions(**options, multipliers=multipliers, progress=not quiet))
    if done.is_main:
        first, last = done.curve[0], done.curve[-1]
        print(f"loss {first['loss']:.4f} at step {first['step']}", end=", ")
        print(f"{last['loss']:.4f} at step {last['step']}: {done.folder}")


def multiplier(text: str) -> tuple[str, float]:
    """A pattern and its share; the pattern may have equals signs."""
    pattern, _, share = text.rpartition("=")
    try:
        return pattern, float(share if pattern else "")
    except ValueError:
        raise ValueError(f"--multiplier is {text!r}, expected PATTERN=SHARE") from None


def evaluate(given: argparse.Namespace) -> None:
    """Print the metrics as JSON."""
    print(json.dumps(evaluator(given)(given.folder), indent=2))


def watch(given: argparse.Namespace) -> bool:
    """Evaluate checkpoints as they come; status 1 if an evaluation failed."""
    from reference_impl.shared_core.evaluation import check_task
    from reference_impl.shared_core.watcher import watch as run

    check_task(given.task)  # or each checkpoint would fail for it
    results = given.results or f"{given.directory}/evaluations.jsonl"
    waits = {name: getattr(given, name) for name in ("attempts", "interval", "once")}
    return not run(given.directory, evaluator(given), results, **waits)


def evaluator(given: argparse.Namespace) -> functools.partial:
    """What gives the metrics of a folder."""
    from reference_impl.shared_core.evaluation import evaluate_model

    names = ("batch_size", "limit", "device", "tokenizer")
    options = {name: getattr(given, name) for name in names}
    return functools.partial(evaluate_model, task=given.task, **options)


if __name__ == "__main__":
    sys.exit(main())
