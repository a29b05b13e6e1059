"""Time of restoring and of resharding flat shards, as ratios to copying as many bytes.

    python -m conformance.benchmarks.flat_shards --output record.json

200 million float32 elements, the parameters of a small transformer, are sharded over two and over
three ranks, which are threads of one process. Restoring gathers the shards into every rank's buffer;
it is compared with ``torch.Tensor.copy_`` of the whole to the same buffers, by the same threads at
once. Resharding makes the three shards of the two, and the two of the three, in memory that is there;
it is compared with ``copy_`` of the shards to such memory. (The same in new memory is on record,
without a bar.) Both take turns in one run, so that their ratio does not depend on what else the
machine does. Each part runs in a process of its own, and its result is compared, element by element.

The layout of 2,804,643,712 elements over 64 ranks is timed too: arithmetic, without any tensor.

The bars: restoring takes at most 1.3 times, resharding at most 2 times as long as copying. Exit
status 1 says that one is not met, or that an element is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.benchmarks.machine import machine, memory, rounded, warm_up
from conformance.benchmarks.phases import Options, Record, finish, run_phase

BARS = {"restore": 1.3, "reshard": 2.0}
"""Seconds over those of a copy of as many bytes."""
ELEMENTS = 200_000_000
BILLIONS = 2_804_643_712
"""Elements of the layout that is computed and never filled."""
LAYOUT_RANKS = (64, 48)
PARTS = (("restore", 2), ("restore", 3), ("reshard", 2, 3), ("reshard", 3, 2))
MIB = 2**20


# In a process of its own


def shapes_of(elements: int, width: int = 1024) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer's parameters with so many elements in all."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (elements // (4 * width), width)}
    layer = {
        "norm_1": (width,),
        "qkv": (3 * width, width),
        "qkv_bias": (3 * width,),
        "out": (width, width),
        "norm_2": (width,),
        "up": (4 * width, width),
        "up_bias": (4 * width,),
        "down": (width, 4 * width),
    }
    left = elements - math.prod(shapes["embedding"])
    size = sum(map(math.prod, layer.values()))
    for number in range(left // size):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    rest = left % size
    return shapes | ({"rest": (rest,)} if rest else {})


def layout_of(elements: int, ranks: int, width: int = 1024):
    """The layout of such parameters over ranks."""
    from reference_impl.flat_shards import FlatLayout, ParameterMeta

    metas = (ParameterMeta(name, shape) for name, shape in shapes_of(elements, width).items())
    return FlatLayout(tuple(metas), ranks)


def whole_buffer(layout: Any) -> Any:
    """A buffer of random numbers, with padding of zeros."""
    import torch

    whole = torch.empty(layout.buffer_size)
    whole.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    whole[layout.parameter_count :] = 0
    return whole


def timed(do: Callable[[], object]) -> tuple[float, Any]:
    """Seconds that ``do`` takes, and what it gives."""
    start = time.perf_counter()
    result = do()
    return time.perf_counter() - start, result


def restore(options: Options) -> Record:
    """Restore the buffers of all ranks, and have each copy the whole to its own, in turns."""
    import torch

    from reference_impl.flat_shards import StageMode
    from reference_impl.flat_shards.unit import FlatUnit
    from reference_impl.ranks import Ranks, in_process

    (ranks,) = options["part"]
    layout = layout_of(options["elements"], ranks)
    whole = whole_buffer(layout)
    shards = [shard.clone() for shard in whole.split(layout.shard_size)]
    buffers = [torch.zeros(layout.buffer_size) for _ in range(ranks)]
    rounds: list[Record] = []

    def program(rank: Ranks) -> bool:
        unit = FlatUnit("all", layout, trainable=False, ranks=rank)
        buffer = buffers[rank.rank]
        unit.setup(StageMode.inference, {"weights": shards[rank.rank]}, weight_buffer=buffer)
        right = True
        for _ in range(options["rounds"]):
            buffer.fill_(torch.nan)
            unit.invalidate_buffer()
            rank.exchange(None)
            seconds, _ = timed(lambda: (unit.restore_parameters(), rank.exchange(None)))
            right &= torch.equal(buffer, whole)
            rank.exchange(None)
            copy, _ = timed(lambda: (buffer.copy_(whole), rank.exchange(None)))
            if rank.rank == 0:
                rounds.append({"seconds": seconds, "copy": copy})
        return right

    right = all(in_process(ranks, program))
    tensors = (whole.nbytes + sum(x.nbytes for x in (*shards, *buffers))) // MIB
    return {"rounds": rounds, "right": right, "tensors_mib": tensors}


def reshard(options: Options) -> Record:
    """Make the shards of other ranks, and copy as many bytes, in turns.

    Once to memory that is there already, as where a model's shards are filled, and once to new memory
    on both sides.
    """
    import torch

    from reference_impl.flat_shards import reshard as made_of

    source, target = (layout_of(options["elements"], ranks) for ranks in options["part"])
    whole = whole_buffer(source)
    shards = {(r, 0): shard.clone() for r, shard in enumerate(whole.split(source.shard_size))}
    copies = [torch.zeros_like(shard) for shard in shards.values()]
    places = {(rank, 0): torch.zeros(target.shard_size) for rank in range(target.ranks)}
    rounds, right = [], True

    def copy_shards() -> None:
        for copy, shard in zip(copies, shards.values()):
            copy.copy_(shard)

    def copy_to_new() -> list[Any]:
        return [torch.empty_like(shard).copy_(shard) for shard in shards.values()]

    def equals_whole(made: Any) -> bool:
        kept = whole[: target.parameter_count]
        return all(
            torch.equal(shard[: target.shard_size - target.shard_pad(rank)], part)
            and not bool(shard[len(part) :].any())
            for ((rank, _), shard), part in zip(made.items(), parts_of(kept, target))
        )

    for _ in range(options["rounds"]):
        for place in places.values():
            place.fill_(torch.nan)
        seconds, made = timed(lambda: made_of(source, shards, target, out=places))
        copy, _ = timed(copy_shards)
        right &= equals_whole(made)
        new_seconds, made = timed(lambda: made_of(source, shards, target))
        right &= equals_whole(made)
        del made
        new_copy, _ = timed(copy_to_new)
        rounds.append({"seconds": seconds, "copy": copy, "new": new_seconds, "new_copy": new_copy})
    tensors = [whole, *shards.values(), *copies, *places.values()]
    new = shards.values()  # as many bytes again, for a time
    return {
        "rounds": rounds,
        "right": right,
        "tensors_mib": sum(tensor.nbytes for tensor in (*tensors, *new)) // MIB,
        "ratio_in_new_memory": statistics.median(x["new"] / x["new_copy"] for x in rounds),
    }


def parts_of(elements: Any, layout: Any) -> list[Any]:
    """What each rank holds of a buffer without its padding; nothing, on ranks of padding alone."""
    size = layout.shard_size
    return [elements[rank * size : (rank + 1) * size] for rank in range(layout.ranks)]


def layout(options: Options) -> Record:
    """Lay billions of elements out, tell every range, and what two shards both hold."""
    from reference_impl.flat_shards import overlaps

    elements, (ranks, other) = options["billions"], LAYOUT_RANKS
    rank, other_rank = ranks // 2, other // 2
    ours = layout_of(elements, ranks, width=320)
    new = ours.over(other)
    times = {
        "layout": lambda: layout_of(elements, ranks, width=320),
        "ranges_of_a_rank": lambda: [ours.range_in_shard(name, rank) for name in ours.names],
        "overlaps_of_a_rank": lambda: [
            list(overlaps(ours, old, new, other_rank)) for old in range(ranks)
        ],
    }
    found = {
        name: statistics.median(timed(do)[0] for _ in range(options["rounds"]))
        for name, do in times.items()
    }
    held = sum(piece.count for pieces in times["overlaps_of_a_rank"]() for piece in pieces)
    return {
        "elements": ours.parameter_count,
        "parameters": len(ours.parameters),
        "ranks": [ranks, other],
        "milliseconds": {name: 1000 * seconds for name, seconds in found.items()},
        "right": held == new.shard_size - new.shard_pad(other_rank),
    }


PHASES = {"restore": restore, "reshard": reshard, "layout": layout}


def measured(phase: str, options: Options) -> Record:
    """What a phase gives, and the memory of the process that it has to itself."""
    import torch

    import reference_impl.flat_shards  # noqa: F401  (its import is baseline too)

    torch.set_num_threads(options["threads"])
    warm_up()
    baseline = memory()["now"]
    record = PHASES[phase](options)
    return record | {"memory": {"baseline": baseline, "peak": memory()["peak"]}}


# The process of the command line


def summary(name: str, ranks: tuple[int, ...], found: Record) -> Record:
    """Medians of a part's seconds and of their ratios within a round."""
    rounds = found["rounds"]
    ratio = statistics.median(each["seconds"] / each["copy"] for each in rounds)
    return {
        "part": name,
        "ranks": list(ranks),
        "seconds": statistics.median(each["seconds"] for each in rounds),
        "copy_seconds": statistics.median(each["copy"] for each in rounds),
        "ratio": ratio,
        "within_bar": ratio <= BARS[name],
        **found,
    }


def run(options: Options) -> Record:
    """The whole record: the machine, the options, the layout, and one entry a part."""
    said = machine()  # before the benchmark itself makes the load
    laid_out = run_phase(__spec__.name, "layout", options)
    parts = [
        summary(name, ranks, run_phase(__spec__.name, name, {**options, "part": ranks}))
        for name, *ranks in PARTS
    ]
    return {
        "benchmark": "flat_shards",
        "bars": BARS,
        "machine": said,
        "options": options,
        "layout": rounded(laid_out),
        "parts": [rounded(part) for part in parts],
    }


def table(record: Record) -> str:
    """The record in a few lines."""
    laid_out = record["layout"]
    times = ", ".join(f"{k} {v:.2f} ms" for k, v in laid_out["milliseconds"].items())
    lines = [
        f"{laid_out['elements']:,} elements in {laid_out['parameters']:,} parameters: {times}",
        f"{record['options']['elements']:,} elements",
    ]
    for part in record["parts"]:
        what = f"{part['part']} {' to '.join(map(str, part['ranks']))} ranks"
        verdict = "within" if part["within_bar"] else "OVER"
        peak = part["memory"]["peak"] / MIB
        lines.append(
            f"  {what:22}{part['seconds']:7.3f} s, copy {part['copy_seconds']:.3f} s, ratio "
            f"{part['ratio']:.2f}, {verdict} the bar of {BARS[part['part']]}; "
            f"peak {peak:,.0f} MiB, of which tensors {part['tensors_mib']:,}"
        )
        if "ratio_in_new_memory" in part:
            lines[-1] += f"; in new memory ratio {part['ratio_in_new_memory']:.2f}"
        if not part["right"]:
            lines.append(f"  {what}: WRONG ELEMENTS")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks.flat_shards",
        description="Time of restoring and of resharding flat shards, over that of copying.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record here")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--billions", type=int, default=BILLIONS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each part (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, a rank (default 1)")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a bar is not met or an element is wrong."""
    chosen = vars(parse(arguments))
    if chosen["phase"]:
        name, options = chosen["phase"]
        print(json.dumps(measured(name, json.loads(options))))
        return 0
    output = chosen.pop("output")
    del chosen["phase"]
    record = run(chosen)
    finish(record, table(record), output)
    right = record["layout"]["right"] and all(part["right"] for part in record["parts"])
    return 0 if right and all(part["within_bar"] for part in record["parts"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
