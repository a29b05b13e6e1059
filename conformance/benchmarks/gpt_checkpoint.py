"""Time and memory of loading a small GPT checkpoint of full size, and of one answer.

    python -m conformance.benchmarks.gpt_checkpoint --output record.json

A checkpoint as the training script leaves it (``_orig_mod.`` in front of every name, optimizer state
along with it) is written to a temporary folder. Fresh processes then load it: the implementation,
``torch.load`` alone, and ``torch.load`` into a model by ``load_state_dict``, in turns, so that their
ratio does not depend on what else the machine does. The file is in the page cache for all of them.

The bar: the process that loads the checkpoint and answers 1,024 tokens never holds more than 2.5
times the size of the file. Exit status 1 says that it does.

The process of the command line imports no torch: Linux hands a parent's peak memory on to its
children's ``ru_maxrss``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.benchmarks.machine import machine, memory, rounded, warm_up
from conformance.benchmarks.phases import Options, Record, finish, run_phase

BAR = 2.5
"""Peak memory of the whole process over the size of the file."""

PREFIX = "_orig_mod."

EMBEDDING_DTYPES = {"mixed": "bfloat16", "float32": "float32"}
"""Dtype of the four embeddings; ``mixed`` is what the training script stores. The rest is float32."""

HEAD_DIM = 128
WORLD_SIZE = 8
"""Training ranks, which decide how the scalars are padded."""

MIB = 2**20

CONTESTANTS = ("implementation", "torch.load", "load_state_dict")


# In a process of its own


def small_config(options: Options):
    """The configuration of the checkpoint."""
    from reference_impl.gpt.config import GPTConfig, next_multiple, scalars_needed, scalars_padding

    layers = options["layers"]
    vocabulary = next_multiple(options["vocabulary"], 128)
    return GPTConfig(
        format="small",
        num_layers=layers,
        num_heads=options["width"] // HEAD_DIM,
        head_dim=HEAD_DIM,
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        scalars_size=scalars_needed(layers) + scalars_padding(layers, WORLD_SIZE),
    )


def write(options: Options) -> Record:
    """Write the checkpoint; gives its size on disk and the number of its elements."""
    import torch

    from reference_impl.gpt.config import parameter_count, state_shapes

    config = small_config(options)
    generator = torch.Generator().manual_seed(0)
    embedding_dtype = getattr(torch, EMBEDDING_DTYPES[options["dtype"]])
    state = {}
    for key, shape in state_shapes(config).items():
        embedding = key.startswith(("embed.", "value_embeds."))
        values = torch.randn(shape, generator=generator).mul_(0.02)
        state[PREFIX + key] = values.to(embedding_dtype) if embedding else values
    state[f"{PREFIX}scalars"] += 1
    state[f"{PREFIX}scalars"][5 * config.num_layers :] = 1
    moments = {"exp_avg": torch.zeros(1000), "exp_avg_sq": torch.zeros(1000), "step": 10}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 0.008, "params": [0]}]}
    content = {"step": 10, "code": "", "model": state, "optimizers": [optimizer], "val_loss": 3.3}
    torch.save(content, options["path"])
    return {"bytes": os.path.getsize(options["path"]), "elements": parameter_count(config)}


def load(options: Options) -> Record:
    """Load the checkpoint through the implementation, and answer one batch."""
    start = time.perf_counter()
    import torch
    import tqdm  # noqa: F401  (so that its import is no part of loading)

    loader = loader_of(options["implementation"])
    torch.set_num_threads(options["threads"])
    warm_up()
    baseline = memory()
    imported = time.perf_counter()
    model = loader(options["path"])
    loaded, after_load = time.perf_counter(), memory()
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(
        options["vocabulary"], (1, options["tokens"]), generator=generator, dtype=torch.int64
    )
    with torch.inference_mode():
        logits_BTV = model.logits(ids_BT)
    answered, after_answer = time.perf_counter(), memory()
    return {
        "seconds": {
            "import": imported - start,
            "load": loaded - imported,
            "answer": answered - loaded,
        },
        "memory": {
            "baseline": baseline["now"],
            "after_load": after_load["now"],
            "peak_of_load": after_load["peak"],
            "peak": after_answer["peak"],
            "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "logits": list(logits_BTV.shape),
        "finite": bool(torch.isfinite(logits_BTV).all()),
    }


def loader_of(implementation: str) -> Callable[[str], Any]:
    """What turns a path into a model with ``logits``."""
    if implementation == "reference":
        from reference_impl.gpt import load_pretrained_checkpoint

        return lambda path: load_pretrained_checkpoint(path, progress=True)[0]
    from conformance.harness.resolve import resolve

    adapter = resolve(implementation).adapter
    return lambda path: adapter.gpt_checkpoint(path).load()


def torch_load(options: Options) -> Record:
    """``torch.load`` alone."""
    import torch

    torch.set_num_threads(options["threads"])
    warm_up()
    baseline, start = memory()["now"], time.perf_counter()
    content = torch.load(options["path"], map_location="cpu", weights_only=True)
    return plain_record(start, baseline, len(content["model"]))


def load_state_dict(options: Options) -> Record:
    """``torch.load``, names without their prefix, and a strict ``load_state_dict`` in float32."""
    import torch

    from reference_impl.gpt.training import SmallGPT

    torch.set_num_threads(options["threads"])
    warm_up()
    baseline, start = memory()["now"], time.perf_counter()
    content = torch.load(options["path"], map_location="cpu", weights_only=True)
    state = {
        key.removeprefix(PREFIX).replace(".", "/"): tensor
        for key, tensor in content["model"].items()
    }
    model = SmallGPT(small_config(options))
    model.load_state_dict(state, strict=True)
    return plain_record(start, baseline, len(state))


def plain_record(start: float, baseline: int, tensors: int) -> Record:
    """Time since ``start``, and memory."""
    seconds = time.perf_counter() - start
    return {
        "seconds": {"load": seconds},
        "memory": {"baseline": baseline, "peak_of_load": memory()["peak"]},
        "tensors": tensors,
    }


PHASES = {
    "write": write,
    "implementation": load,
    "torch.load": torch_load,
    "load_state_dict": load_state_dict,
}


# The process of the command line


def run_variant(options: Options) -> Record:
    """Write one checkpoint, load it in every way in turns, delete it."""
    with tempfile.TemporaryDirectory(dir=options["folder"], prefix="gpt_checkpoint.") as folder:
        options = {**options, "path": str(Path(folder) / "best_state_step000010_val3.3000.pt")}
        file = run_phase(__spec__.name, "write", options)
        rounds = [
            {phase: run_phase(__spec__.name, phase, options) for phase in CONTESTANTS}
            for _ in range(options["rounds"])
        ]
    return {"dtype": options["dtype"], "file": file, **summary(file, rounds), "rounds": rounds}


def summary(file: Record, rounds: list[Record]) -> Record:
    """Medians of times and of their ratios within a round; the largest peaks."""
    ours = [each["implementation"] for each in rounds]
    size = file["bytes"]
    peak = max(max(each["memory"]["peak"], each["memory"]["ru_maxrss"]) for each in ours)
    added = {
        phase: max(
            each[phase]["memory"]["peak_of_load"] - each[phase]["memory"]["baseline"]
            for each in rounds
        )
        for phase in CONTESTANTS
    }
    seconds = {
        "import": statistics.median(each["seconds"]["import"] for each in ours),
        "answer": statistics.median(each["seconds"]["answer"] for each in ours),
        "load": {
            phase: statistics.median(each[phase]["seconds"]["load"] for each in rounds)
            for phase in CONTESTANTS
        },
    }
    ratios = {
        phase: statistics.median(
            each["implementation"]["seconds"]["load"] / each[phase]["seconds"]["load"]
            for each in rounds
        )
        for phase in CONTESTANTS[1:]
    }
    return {
        "seconds": seconds,
        "load_time_ratio": ratios,
        "peak_bytes": peak,
        "peak_over_file": peak / size,
        "load_added_over_file": {phase: added[phase] / size for phase in CONTESTANTS},
        "finite": all(each["finite"] for each in ours),
        "within_bar": peak < BAR * size,
    }


def run(options: Options) -> Record:
    """The whole record: the machine, the options, and one entry a variant."""
    found = machine()  # before the benchmark itself makes the load
    variants = [run_variant({**options, "dtype": dtype}) for dtype in options["dtypes"]]
    said = {key: value for key, value in options.items() if key != "folder"}
    return {
        "benchmark": "gpt_checkpoint",
        "bar": {"peak_over_file": BAR},
        "machine": found,
        "options": said,
        "variants": [rounded(variant) for variant in variants],
    }


def table(record: Record) -> str:
    """The record in a few lines."""
    lines = []
    for variant in record["variants"]:
        file, seconds = variant["file"], variant["seconds"]
        lines.append(
            f"{variant['dtype']}: {file['elements']:,} elements, {file['bytes'] / MIB:,.0f} MiB"
        )
        lines.append(f"  {'':18}{'load s':>8}{'ours / it':>11}{'memory added / file':>21}")
        for phase in CONTESTANTS:
            ratio = variant["load_time_ratio"].get(phase, 1.0)
            added = variant["load_added_over_file"][phase]
            lines.append(f"  {phase:18}{seconds['load'][phase]:8.2f}{ratio:11.2f}{added:21.2f}")
        verdict = "within" if variant["within_bar"] else "OVER"
        lines.append(
            f"  import {seconds['import']:.2f} s, answer {seconds['answer']:.2f} s, "
            f"peak {variant['peak_bytes'] / MIB:,.0f} MiB = {variant['peak_over_file']:.2f} x file, "
            f"{verdict} the bar of {BAR}"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks.gpt_checkpoint",
        description="Time and memory of loading a small GPT checkpoint of full size.",
    )
    parser.add_argument(
        "--dtype",
        choices=[*EMBEDDING_DTYPES, "both"],
        default="both",
        help="embeddings as trained (mixed: bfloat16), or float32 (default: both, one by one)",
    )
    parser.add_argument("--implementation", "--impl", default="reference", metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record here")
    parser.add_argument(
        "--folder", metavar="DIR", help="where the checkpoint is written for a time"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every loader (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the answered batch")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where the bar is not met or the answer not finite."""
    chosen = vars(parse(arguments))
    if chosen["phase"]:
        name, options = chosen["phase"]
        print(json.dumps(PHASES[name](json.loads(options))))
        return 0
    output, dtype = chosen.pop("output"), chosen.pop("dtype")
    del chosen["phase"]
    record = run({**chosen, "dtypes": list(EMBEDDING_DTYPES) if dtype == "both" else [dtype]})
    finish(record, table(record), output)
    good = all(variant["within_bar"] and variant["finite"] for variant in record["variants"])
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
