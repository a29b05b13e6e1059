"""Time and memory of fitting the experts of one layer to shared cores.

    python -m conformance.benchmarks.shared_core_fit --output record.json

The layer has the shape of Mixtral's divided by 8 in each width: 8 experts, three projections of
512 × 1792, rank 8, 200 steps. The fit is compared with the matrix products that its loss and gradients
consist of, made in the same number and shapes with nothing between them; both take turns in one run,
projection by projection, so that the ratio does not depend on what else the machine does.

The bars: the fit takes at most 1.5 times as long as its products, and adds less than four times the
bytes of the layer's experts (float32) to the memory of the process. Exit status 1 says that one is not
met, or that the fit is worse than where it began.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from conformance.benchmarks.machine import machine, memory, rounded, warm_up
from conformance.benchmarks.phases import Options, Record, finish, run_phase

BARS = {"time": 1.5, "memory": 4.0}
"""Over the products' seconds, and over the bytes of the layer's experts."""
MIB = 2**20
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def shape_of(projection: str, options: Options) -> tuple[int, int, int]:
    """[experts, d_out, d_in] of a projection."""
    widths = (options["intermediate"], options["hidden"])
    if projection == "down_proj":
        widths = widths[::-1]
    return (options["experts"], *widths)


def experts_of(projection: str, options: Options) -> Any:
    """Random experts around a common mean, as those of a trained model are."""
    import torch

    generator = torch.Generator().manual_seed(PROJECTIONS.index(projection))
    shape = shape_of(projection, options)
    common = torch.randn(1, *shape[1:], generator=generator)
    return (common + torch.randn(shape, generator=generator)) / shape[2] ** 0.5


# In a process of its own


def fitting(options: Options) -> Record:
    """Fit the projections of the layer one after another; what that adds to the memory."""
    import torch

    from reference_impl.shared_core.fit import SharedCoreFit

    torch.set_num_threads(options["threads"])
    warm_up()
    fit_experts = SharedCoreFit().shared_core_fit
    fit_experts(torch.ones(2, 3, 4), rank=1, num_steps=1)  # Adam's own imports
    before = memory()["now"]
    layer = {projection: experts_of(projection, options) for projection in PROJECTIONS}
    size = sum(experts.nbytes for experts in layer.values())
    found = {}
    for projection, experts in layer.items():
        fitted = fit_experts(experts, rank=options["rank"], num_steps=options["steps"])
        found[projection] = [fitted.history[0], min(fitted.history)]
    return {
        "bytes_of_experts": size,
        "bytes_added": memory()["peak"] - before,
        "loss": found,
        "better": all(end < begin for begin, end in found.values()),
    }


def timing(options: Options) -> Record:
    """Fit each projection and make its products, in turns."""
    import torch

    from reference_impl.shared_core.fit import SharedCoreFit

    torch.set_num_threads(options["threads"])
    warm_up()
    rounds = []
    for number in range(options["rounds"]):
        seconds = {"fit": 0.0, "products": 0.0}
        for projection in PROJECTIONS:
            experts = experts_of(projection, options)
            rank, steps = options["rank"], options["steps"]
            for name in sorted(seconds, reverse=bool(number % 2)):
                start = time.perf_counter()
                if name == "fit":
                    SharedCoreFit().shared_core_fit(experts, rank=rank, num_steps=steps)
                else:
                    make_products(experts, rank, steps)
                seconds[name] += time.perf_counter() - start
        rounds.append(seconds)
    return {"rounds": rounds}


def make_products(experts_EOD: Any, rank: int, steps: int) -> None:
    """The matrix products of so many steps, and of the loss at either end, into memory that is there.

    Operands are random and stay the same; what is as large as the experts is made a chunk at a time,
    as in the fit. Axes are E experts, O d_out, D d_in, R rank, S twice the rank.
    """
    import torch

    from reference_impl.shared_core.fit import chunks, room_for

    experts, d_out, d_in = experts_EOD.shape
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator) / 100
    room_EOD, core = room_for(experts_EOD), random(d_out, d_in)
    as_core = torch.empty_like(core)
    o_EOR, i_EDR = random(experts, d_out, rank), random(experts, d_in, rank)
    o_EOS, i_EDS = random(experts, d_out, 2 * rank), random(experts, d_in, 2 * rank)
    left, right = random(d_out, 2 * rank * experts), random(2 * rank * experts, d_in)
    as_EOR, as_EDR = torch.empty_like(o_EOR), torch.empty_like(i_EDR)
    as_EOS, as_ESD = torch.empty_like(o_EOS), torch.empty_like(i_EDS.mT)
    as_ERD, as_ERR = torch.empty_like(i_EDR.mT), random(experts, rank, rank)

    def of_sides() -> None:
        torch.matmul(core, i_EDR, out=as_EOR)  # C U_in
        torch.bmm(o_EOR.mT, as_EOR, out=as_ERR)  # V_outᵀ C U_in
        torch.matmul(o_EOR.mT, core, out=as_ERD)  # V_outᵀ C
        torch.bmm(as_ERR, i_EDR.mT, out=as_ERD)  # … + (V_outᵀ C U_in) V_inᵀ

    for _ in range(steps):
        of_sides()
        for part in chunks(experts_EOD):
            room = room_EOD[: len(experts_EOD[part])]
            torch.bmm(o_EOS[part], i_EDS[part].mT, out=room)  # the residual
            torch.bmm(o_EOS[part].mT, room, out=as_ESD[part])  # [U_out | C U_in]ᵀ R
            torch.bmm(room, i_EDS[part], out=as_EOS[part])  # R [(V_outᵀ M)ᵀ | V_in]
        torch.bmm(as_ERD, i_EDR, out=as_ERR)  # (U_outᵀ R) V_in
        torch.bmm(o_EOR, as_ERR, out=as_EOR)  # G V_in
        torch.matmul(core, i_EDR, out=as_EOR)  # C (U_outᵀ R)ᵀ
        torch.bmm(i_EDR.mT, i_EDR, out=as_ERR)  # V_inᵀ (U_outᵀ R)ᵀ
        torch.bmm(o_EOR, as_ERR, out=as_EOR)  # the gradient of V_out
        torch.matmul(core.mT, o_EOR, out=as_EDR)  # Cᵀ G V_in
        torch.bmm(i_EDR, as_ERR, out=as_EDR)  # the gradient of V_in
        torch.mm(left, right, out=as_core)  # that of the core
    for _ in range(2):
        of_sides()
        for part in chunks(experts_EOD):
            room = room_EOD[: len(experts_EOD[part])]
            torch.bmm(o_EOS[part], i_EDS[part].mT, out=room)


PHASES = {"fitting": fitting, "timing": timing}


# The process of the command line


def run(options: Options) -> Record:
    """The whole record: the machine, the options, memory, time and ratios."""
    said = machine()  # before the benchmark itself makes the load
    made = run_phase(__spec__.name, "fitting", options)
    rounds = run_phase(__spec__.name, "timing", options)["rounds"]
    ratios = {
        "time": statistics.median(each["fit"] / each["products"] for each in rounds),
        "memory": made["bytes_added"] / made["bytes_of_experts"],
    }
    record = {
        "benchmark": "shared_core_fit",
        "bars": BARS,
        "machine": said,
        "options": options,
        **made,
        "rounds": rounds,
        "ratios": ratios,
        "within_bars": all(ratios[name] <= bar for name, bar in BARS.items()),
    }
    return rounded(record)


def table(record: Record) -> str:
    """The record in a few lines."""
    options, ratios = record["options"], record["ratios"]
    seconds = {n: statistics.median(r[n] for r in record["rounds"]) for n in ("fit", "products")}
    size, added = record["bytes_of_experts"] / MIB, record["bytes_added"] / MIB
    verdict = "within" if record["within_bars"] else "OVER"
    lines = [
        f"{options['experts']} experts of {options['hidden']} × {options['intermediate']}, rank "
        f"{options['rank']}, {options['steps']} steps, {size:,.0f} MiB of experts",
        f"  fit {seconds['fit']:.2f} s, its products {seconds['products']:.2f} s, ratio "
        f"{ratios['time']:.2f}",
        f"  memory added {added:,.0f} MiB, ratio {ratios['memory']:.2f}",
        f"  {verdict} the bars of {BARS['time']} and {BARS['memory']}",
    ]
    for projection, (begin, end) in record["loss"].items():
        lines.append(f"  {projection:10} loss {begin:,.1f} to {end:,.1f}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conformance.benchmarks.shared_core_fit",
        description="Time and memory of fitting the experts of a layer to shared cores.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record here")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="turns of both (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--phase", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 where a bar is not met or the fit made nothing better."""
    chosen = vars(parse(arguments))
    if chosen["phase"]:
        name, options = chosen["phase"]
        print(json.dumps(PHASES[name](json.loads(options))))
        return 0
    output = chosen.pop("output")
    del chosen["phase"]
    record = run(chosen)
    finish(record, table(record), output)
    return 0 if record["within_bars"] and record["better"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
