"""Compress the experts of a model, look at what that gave, and turn it back.

    python -m reference_impl.shared_core compress MODEL COMPRESSED --rank 64
    python -m reference_impl.shared_core inspect COMPRESSED
    python -m reference_impl.shared_core export COMPRESSED EXPORTED
    python -m reference_impl.shared_core convert COMPRESSED OTHER --format pt

MODEL is a Hugging Face directory of Qwen3-MoE or Mixtral; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys

from reference_impl.stored import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked; a user's mistake is one line on stderr, and status 1."""
    given = parser().parse_args(arguments)
    try:
        given.do(given)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
    return whole


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


if __name__ == "__main__":
    sys.exit(main())
