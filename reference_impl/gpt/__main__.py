"""Print what a checkpoint of the small or medium GPT holds: ``python -m reference_impl.gpt FILE``."""

from __future__ import annotations

import argparse
import sys

from reference_impl.gpt import CheckpointError, CheckpointReader
from reference_impl.gpt.config import parameter_count


def main(arguments: list[str] | None = None) -> int:
    """Print the facts as a table; an error is one line on stderr, and status 1."""
    parser = argparse.ArgumentParser(prog="python -m reference_impl.gpt", description=__doc__)
    parser.add_argument("file", help="a checkpoint of torch.save or safetensors")
    parser.add_argument("--head-dim", type=int, help="width of the heads, where shapes do not tell")
    given = parser.parse_args(arguments)
    try:
        reader = CheckpointReader(given.file, head_dim=given.head_dim)
        facts = reader.inspect() | {"elements": parameter_count(reader.config())}
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in facts.items():
        print(f"{name:<20}{value:>14,}" if isinstance(value, int) else f"{name:<20}{value:>14}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
