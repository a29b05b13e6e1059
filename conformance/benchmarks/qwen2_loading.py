"""What each of two ranks reads and holds when a Qwen2 directory of true size is loaded.

    python -m conformance.benchmarks.qwen2_loading --output record.json

A directory with the shapes of Qwen2.5-0.5B (24 layers, vocabulary 151,936, tied, bfloat16, random
weights) is written to a temporary folder. Fresh processes then load it: one rank alone, and two ranks
of a gloo group at the same time. Counted are the bytes that a process reads while it loads, by the
kernel's own count, and its peak memory above that of a process that has imported torch and no more.

The bars: a rank of two reads at most 55 % of what one rank reads, and adds less than 60 % of the
memory. Exit status 1 says that one is not met.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from conformance.benchmarks.machine import machine, memory, rounded, warm_up
from conformance.benchmarks.phases import Options, Record, finish, result_of, start_phase

BARS = {"bytes_read": 0.55, "memory_added": 0.60}
"""Of a rank of two, over those of one rank alone."""
MIB = 2**20
SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
"""Of Qwen2.5-0.5B."""


# In a process of its own


def write(options: Options) -> Record:
    """Write the directory; gives the size of its file."""
    import torch
    from safetensors.torch import save_file

    from reference_impl.qwen2.config import read_config

    folder = Path(options["path"])
    config = {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "max_position_embeddings": 32768,
        **options["shape"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in read_config(folder).shapes().items():
        values = torch.empty(shape, dtype=torch.bfloat16)
        state[name] = values.uniform_(-0.05, 0.05, generator=generator)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return {
        "bytes": (folder / "model.safetensors").stat().st_size,
        "elements": sum(tensor.numel() for tensor in state.values()),
    }


def bare(options: Options) -> Record:
    """A process that imports torch and no more."""
    import torch

    torch.set_num_threads(1)
    warm_up()
    return {"memory": memory()}


def rank(options: Options) -> Record:
    """Load the directory on one rank of ``ranks``, and answer a few tokens."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warm_up()
    loader = loader_of(options["implementation"])
    if options["ranks"] > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{options['path']}/rendezvous",
            rank=options["rank"],
            world_size=options["ranks"],
        )
    before, start = bytes_read(), time.perf_counter()
    model = loader(options["path"])
    seconds = time.perf_counter() - start
    read, loaded = bytes_read() - before, memory()
    ids = torch.arange(options["tokens"])[None] % options["shape"]["vocab_size"]
    logits, _ = model.forward(ids)
    finite = bool(torch.isfinite(logits).all())
    if options["ranks"] > 1:
        dist.destroy_process_group()
    return {
        "seconds": seconds,
        "bytes_read": read,
        "memory": {"after_load": loaded["now"], "peak_of_load": loaded["peak"]},
        "logits": list(logits.shape),
        "finite": finite,
    }


def loader_of(implementation: str):
    """What turns a directory into a model with ``forward``."""
    from conformance.harness.resolve import resolve

    return resolve(implementation).adapter.causal_lm


def bytes_read() -> int:
    """What this process has read so far, from the page cache or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


PHASES = {"write": write, "bare": bare, "rank": rank}


# The process of the command line


def run(options: Options) -> Record:
    """The whole record: the machine, the options, each rank, and the ratios."""
    found = machine()  # before the benchmark itself makes the load
    with tempfile.TemporaryDirectory(dir=options["folder"], prefix="qwen2_loading.") as folder:
        options = {**options, "path": folder}
        file = result_of(start_phase(__spec__.name, "write", options))
        empty = result_of(start_phase(__spec__.name, "bare", options))
        one = result_of(start_phase(__spec__.name, "rank", {**options, "ranks": 1, "rank": 0}))
        ranks = [
            start_phase(
                __spec__.name, "rank", {**options, "ranks": options["ranks"], "rank": number}
            )
            for number in range(options["ranks"])
        ]
        several = [result_of(process) for process in ranks]
    added = [each["memory"]["peak_of_load"] - empty["memory"]["peak"] for each in (one, *several)]
    ratios = {
        "bytes_read": max(each["bytes_read"] for each in several) / one["bytes_read"],
        "memory_added": max(added[1:]) / added[0],
    }
    said = {key: value for key, value in options.items() if key not in ("folder", "path")}
    record = {
        "benchmark": "qwen2_loading",
        "bars": BARS,
        "machine": found,
        "options": said,
        "file": file,
        "bare": empty,
        "one_rank": {**one, "memory_added": added[0]},
        "ranks": [{**each, "memory_added": more} for each, more in zip(several, added[1:])],
        "ratios": ratios,
        "finite": all(each["finite"] for each in (one, *several)),
        "within_bars": all(ratios[name] <= bar for name, bar in BARS.items()),
    }
    return rounded(record)


def table(record: Record) -> str:
    """The record in a few lines."""
    file = record["file"]
    lines = [
        f"{file['elements']:,} elements, {file['bytes'] / MIB:,.0f} MiB",
        f"  {'':14}{'load s':>8}{'read MiB':>10}{'memory added MiB':>18}",
    ]
    named = [("one rank", record["one_rank"])]
    named += [(f"rank {n} of {len(record['ranks'])}", r) for n, r in enumerate(record["ranks"])]
    for name, each in named:
        read, added = each["bytes_read"] / MIB, each["memory_added"] / MIB
        lines.append(f"  {name:14}{each['seconds']:8.2f}{read:10,.0f}{added:18,.0f}")
    verdict = "within" if record["within_bars"] else "OVER"
    shares = ", ".join(f"{name} {ratio:.3f}" for name, ratio in record["ratios"].items())
    lines.append(f"  {shares}: {verdict} the bars of {', '.join(map(str, BARS.values()))}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks.qwen2_loading",
        description="What each rank reads and holds when a Qwen2 directory is loaded.",
    )
    parser.add_argument("--implementation", "--impl", default="reference", metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record here")
    parser.add_argument("--folder", metavar="DIR", help="where the directory is written for a time")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=SHAPE["vocab_size"])
    parser.add_argument("--tokens", type=int, default=8, help="tokens that are answered afterwards")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a bar is not met or an answer not finite."""
    chosen = vars(parse(arguments))
    if chosen["phase"]:
        name, options = chosen["phase"]
        print(json.dumps(PHASES[name](json.loads(options))))
        return 0
    output = chosen.pop("output")
    del chosen["phase"]
    layers, vocabulary = chosen.pop("layers"), chosen.pop("vocabulary")
    shape = SHAPE | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    record = run({**chosen, "shape": shape})
    finish(record, table(record), output)
    return 0 if record["within_bars"] and record["finite"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
