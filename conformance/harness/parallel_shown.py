"""Lines that show on several ranks what a check of parallel layers has seen.

Each context here is of one thing that a check does beside a call of a layer: a failure inside it gets
lines that do this too. ``rank`` is the number of the process that runs them; every rank runs the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from conformance.harness.calls import Call, course
from conformance.harness.failures import ConformanceFailure
from conformance.harness.parallel_cases import LayerCall, LayerCase
from conformance.harness.parallel_oracle import dense_of_group, heads_of
from conformance.harness.shown import after, made_by

DRAWN = """\
_ = torch.manual_seed(7)
out.reset_parameters()
print(f'rank {rank}:', out.shards())"""
"""What draws the weights of a layer in ``out`` anew, and shows them."""

SUMMED = ("total = out.double()", "dist.all_reduce(total)")
"""What leaves the sum of the ranks' outputs in ``total``."""

BACKWARD = "torch.autograd.backward(out, upstream)"


def rank_of(case: LayerCase) -> str:
    """The number of the process as source text."""
    return "0" if case.ranks == 1 else "rank"


def layer_line(call: LayerCall) -> str:
    """The line that makes the layer, and does not call it."""
    return f"layer = {replace(call, applied=False).source()}"


def shown_by_layer(call: LayerCall, line: str) -> AbstractContextManager[None]:
    """A failure in here is of a layer, whatever it computes: ``line`` sees it in ``out``."""
    return made_by(replace(call, applied=False), then=line)


def called_twice(call: LayerCall) -> Call:
    """Leaves what a second call gives in ``out``, and what the first gave in ``first``."""
    again = f"layer(*inputs[{rank_of(call.case)}])"
    return course(call, layer_line(call), f"first = {again}", result=again)


def weights_spoilt(call: LayerCall) -> Call:
    """Spoils the caller's weights between making the layer and calling it."""
    spoilt = "for each in weights.values(): each.fill_(torch.nan)"
    return course(call, layer_line(call), spoilt, result=f"layer(*inputs[{rank_of(call.case)}])")


def communication(call: LayerCall) -> Call:
    """Leaves how often which operation of a process group was called in ``out``."""
    return course(
        call,
        "from torch.distributed.tensor.debug import CommDebugMode",
        layer_line(call),
        "with CommDebugMode() as made:",
        f"    _ = layer(*inputs[{rank_of(call.case)}])",
        result="dict(made.get_comm_counts())",
    )


def compared_with(other: int, source: str = "out") -> str:
    """Lines that print on every rank whether it has the bits of another."""
    return "\n".join(
        (
            f"of_rank = [torch.empty_like({source}) for _ in range(dist.get_world_size())]",
            f"dist.all_gather(of_rank, {source}.detach())",
            f"print(f'rank {{rank}}:', torch.equal({source}, of_rank[{other}]), '- expected True')",
        )
    )


@contextmanager
def run_shown(call: LayerCall, *, backward: bool) -> Iterator[None]:
    """A failure in here ends a run of a layer: an exception, or an argument that has changed."""
    changed = (
        "given = [*weights.values(), *x]",
        "before = [each.detach().clone() for each in given]",
    )
    counts = "[int((a != b).sum()) for a, b in zip(given, before)]"
    try:
        yield
    except ConformanceFailure as failure:
        if failure.kind == "changed input":
            failure.call = run_of(call, *changed, backward=backward)
            failure.shown_by = f"print('elements changed:', {counts}, '- expected none')"
        elif backward:
            failure.call = run_of(call, backward=True)
        if backward:
            failure.shown_by = f"{BACKWARD}\n{failure.shown_by}"
        raise


def run_of(call: LayerCall, *before: str, backward: bool) -> Call:
    """Makes the layer, after the lines ``before``, and calls it with ``x``."""
    x = f"x = list(inputs[{rank_of(call.case)}])"
    leaf = "x[0].requires_grad_()"
    lines = [x]
    if backward:
        lines = [*upstream_lines(call), x, *([] if call.case.kind == "embedding" else [leaf])]
    return course(call, *lines, *before, layer_line(call), result="layer(*x)")


# Gradients


@contextmanager
def backward_shown(call: LayerCall) -> Iterator[None]:
    """A failure in here is seen after a backward pass, in ``x``, ``layer`` and ``gradients``."""
    told = "gradients = layer.gradients()"
    with made_by(run_of(call, backward=True)), after(BACKWARD, told):
        yield


def upstream_lines(call: LayerCall) -> list[str]:
    """Lines that leave the gradients at the outputs of a rank in ``upstream``.

    Ranks that hold one key/value head have it read by their own query heads: each is given another
    share of the gradient, and the shares add up to it.
    """
    case = call.case
    group = f" + {rank_of(case)} // {case.size}" if case.groups > 1 else ""
    member = f"{rank_of(case)} % {case.size}"
    shapes = [tuple(each.shape) for each in dense_of_group(call, 0).upstream]
    cast = f".to({case.dtype})"
    lines = [
        f"gu = torch.Generator().manual_seed({case.seed + 1}{group})",
        f"upstream = [torch.randn(shape, generator=gu){cast} for shape in {shapes}]",
    ]
    if case.kind == "qkv":
        queries, read = zip(*(heads_of(case, number) for number in range(case.size)))
        heads = f"heads = [of[{member}] for of in ({list(queries)}, {list(read)}, {list(read)})]"
        lines += [
            heads,
            f"upstream = [u.unflatten(-1, (-1, {case.head_dim}))[..., h, :].flatten(-2)"
            " for u, h in zip(upstream, heads)]",
        ]
        replicas = case.size // case.kv_heads
        if replicas > 1:
            shares = [2 * (i + 1) / (replicas * (replicas + 1)) for i in range(replicas)]
            share = f"{shares}[{member} % {replicas}]"
            lines.append(f"upstream[1:] = [u * {share} for u in upstream[1:]]")
    elif case.kind in ("gate_up", "norm") or (case.kind == "column" and not case.gather_output):
        part = f"u.chunk({case.size}, -1)[{member}].contiguous()"
        lines.append(f"upstream = [{part} for u in upstream]")
    return lines
