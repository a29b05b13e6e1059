"""Tensors of more elements than an int32 can count, where an offset that wraps reads something else.

The data repeats after a prime number of rows, so that a few rows of a huge tensor can be made alone, on
the CPU, and held against the oracle: the first, the last, and those around the boundary. A wrapped
offset lands on other rows of the period.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.harness import gpu_lane
from conformance.harness.attention_checks import expected_output as expected_attention
from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_tensor
from conformance.harness.experts_oracle import expected as expected_experts
from conformance.harness.failures import ConformanceFailure, NotRun, failing_at
from conformance.harness.rotary_checks import expected_output as expected_rotary
from conformance.harness.subject import Subject
from conformance.harness.tolerance import Expectation

BOUNDARY = [2**31]
"""The first offset that an int32 cannot hold; one value, which tests lower."""

PERIOD = 4099
"""Rows after which the data repeats: a prime, which no power of two is a multiple of."""

BYTES_PER_ELEMENT = 32
"""Of the large tensor: inputs, their copy, the output, and a few temporaries in float32."""

ROWS_LOOKED_AT = 32
"""Rows at each place that are compared."""


@dataclass(frozen=True)
class LargeCase:
    """Which tensor is large, and what its other axes are."""

    what: str
    dtype: str = "bfloat16"
    width: int = 64
    """Channels of a row."""
    heads: int = 32
    tokens_first: bool = False
    """Whether heads are beside each other in memory, so that the steps between tokens are large."""
    seed: int = 0

    def confusable(self) -> frozenset[str]:
        """Nothing: sizes are far apart."""
        return frozenset()

    @property
    def tokens(self) -> int:
        """Tokens of each head with which the tensor has 5 % more elements than the boundary."""
        return BOUNDARY[0] * 105 // (100 * self.width * self.heads) + 1

    @property
    def elements(self) -> int:
        """Elements of the large tensor."""
        return self.heads * self.tokens * self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the data."""
        return getattr(torch, self.dtype)

    def row(self, head: int, token: int) -> int:
        """The number of a row in memory."""
        return token * self.heads + head if self.tokens_first else head * self.tokens + token

    def places(self) -> list[tuple[int, int]]:
        """Heads with first tokens of what is compared: at both ends, and around the boundary."""
        at = BOUNDARY[0] // self.width
        head, token = (
            (at % self.heads, at // self.heads) if self.tokens_first else divmod(at, self.tokens)
        )
        last = max(self.tokens - ROWS_LOOKED_AT, 0)
        around = min(max(token - ROWS_LOOKED_AT // 2, 0), last)
        after = min(token + 1, last)
        return [(0, 0), (head, around), (head, after), (self.heads - 1, last)]


def base_lines(case: LargeCase) -> list[str]:
    """Lines that make the rows that repeat."""
    return [
        f"g = torch.Generator().manual_seed({case.seed})",
        f"base = torch.randn(({PERIOD}, {case.width}), generator=g).to(torch.{case.dtype})",
    ]


def whole_lines(case: LargeCase, name: str, device: str) -> list[str]:
    """Lines that make the large tensor [1, heads, tokens, width] under ``name``."""
    rows = f"torch.arange({case.heads * case.tokens}, device='{device}') % {PERIOD}"
    if case.tokens_first:
        shape = f"view(1, {case.tokens}, {case.heads}, {case.width}).transpose(1, 2)"
    else:
        shape = f"view(1, {case.heads}, {case.tokens}, {case.width})"
    return [f"{name} = base.to('{device}')[{rows}].{shape}"]


def part_lines(case: LargeCase, name: str, head: int, first: int, number: int) -> list[str]:
    """Lines that make some tokens of one head alone, [1, 1, number, width], on the CPU."""
    start, step = case.row(head, first), case.heads if case.tokens_first else 1
    rows = f"torch.arange({start}, {start + number * step}, {step}) % {PERIOD}"
    return [f"{name} = base[{rows}].view(1, 1, {number}, {case.width})"]


def call_of(case: LargeCase, contract: str, lines: list[str], arguments: tuple[str, ...]) -> Call:
    """A call in the dtype of the case."""
    return Call(contract, tuple(lines), arguments, (), case.torch_dtype, case)


def need_memory(case: LargeCase, device: str) -> None:
    """Raise :class:`NotRun` where the device has not the memory that the case takes."""
    needed = case.elements * BYTES_PER_ELEMENT
    if device != "cuda":
        return
    gpu_lane.free_memory()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        raise NotRun(
            f"needs {needed / 2**30:.1f} GiB on the device, of which {free / 2**30:.1f} are free"
        )


def run_large(subject: Subject, call: Call) -> tuple[Tensor, list[Any]]:
    """The output and the arguments of a call whose tensors are kept nowhere else."""
    namespace: dict[str, Any] = {"torch": torch}
    try:
        exec(compile("\n".join(call.lines), "<reproduction>", "exec"), namespace)
        arguments = [namespace[name] for name in call.arguments]
        with failing_at(call):
            output = subject(*arguments)
    except (ConformanceFailure, torch.OutOfMemoryError) as failure:
        if any(map(gpu_lane.is_out_of_memory, gpu_lane.chain_of(failure))):
            gpu_lane.free_memory()
            needed = call.case.elements * BYTES_PER_ELEMENT / 2**30
            raise NotRun(f"takes more than the {needed:.1f} GiB that a case has") from None
        raise
    return output, arguments


def assert_large_queries(attention: Subject, case: LargeCase) -> None:
    """Attention of very many queries to a few keys: queries and output pass the boundary."""
    keys = 16
    small = [
        f"k, v = (torch.randn((1, {case.heads}, {keys}, {case.width}), generator=g) for _ in 'kv')",
        f"k, v = (x.to(torch.{case.dtype}) for x in (k, v))",
    ]

    def part(head: int, first: int, number: int) -> Expectation:
        lines = [*base_lines(case), *small, *part_lines(case, "q", head, first, number)]
        lines.append(f"k, v = (x[:, {head} : {head + 1}] for x in (k, v))")
        return expected_attention(call_of(case, "attention", lines, ("q", "k", "v")))

    move = f"k, v = (x.to('{attention.device}') for x in (k, v))"
    lines = [*base_lines(case), *small, move, *whole_lines(case, "q", attention.device)]
    assert_parts(attention, call_of(case, "attention", lines, ("q", "k", "v")), part, like=0)


def assert_large_cache(attention: Subject, case: LargeCase) -> None:
    """Attention of one query to very many keys: keys and values pass the boundary."""
    size = f"(1, {case.heads}, 1, {case.width})"
    small = [
        f"q = torch.randn({size}, generator=g).to(torch.{case.dtype})",
        # The mean of very many values is alike wherever they are read: each place has its own size.
        f"ramp = torch.linspace(1, 4, {case.tokens}).view(1, 1, -1, 1)",
        f"sizes = torch.arange({case.heads}).remainder(13).add(1).view(1, -1, 1, 1) * ramp",
        f"sizes = sizes.to(torch.{case.dtype})",
    ]

    def part(head: int, first: int, number: int) -> Expectation:
        one = f"[:, {head} : {head + 1}]"
        lines = [*base_lines(case), *small, *part_lines(case, "k", head, 0, case.tokens)]
        lines += [f"q = q{one}", f"v = k * sizes{one}"]
        return expected_attention(call_of(case, "attention", lines, ("q", "k", "v")))

    device = attention.device
    lines = [*base_lines(case), *small, *whole_lines(case, "k", device)]
    lines += [f"q, sizes = q.to('{device}'), sizes.to('{device}')", "v = k * sizes"]
    call = call_of(case, "attention", lines, ("q", "k", "v"))
    assert_parts(attention, call, part, like=0, tokens=1)


def assert_large_rotation(rotary: Subject, case: LargeCase) -> None:
    """A rotation of very many rows passes the boundary."""

    def positions(first: int, number: int) -> str:
        # Small positions, whose angles every dtype of tables can tell.
        return f"positions = (torch.arange({first}, {first + number}) % 1021).view(1, -1)"

    def part(head: int, first: int, number: int) -> Expectation:
        lines = [*base_lines(case), *part_lines(case, "x", head, first, number)]
        lines.append(positions(first, number))
        return expected_rotary(call_of(case, "rotary", lines, ("x", "positions")))

    device = rotary.device
    lines = [*base_lines(case), *whole_lines(case, "x", device), positions(0, case.tokens)]
    lines.append(f"positions = positions.to('{device}')")
    assert_parts(rotary, call_of(case, "rotary", lines, ("x", "positions")), part, like=0)


def assert_large_tokens(experts: Subject, case: LargeCase) -> None:
    """Experts of very many tokens: hidden states and output pass the boundary."""
    number_of, inner, width = 4, 16, case.width
    small = [
        f"gate_up_proj = torch.randn(({number_of}, {2 * inner}, {width}), generator=g) / {width}**0.5",
        f"down_proj = torch.randn(({number_of}, {width}, {inner}), generator=g) / {inner}**0.5",
        f"gate_up_proj, down_proj = (x.to(torch.{case.dtype}) for x in (gate_up_proj, down_proj))",
    ]
    names = ("hidden", "indices", "weights", "gate_up_proj", "down_proj")

    def routing(first: int, number: int) -> list[str]:
        return [
            f"indices = (torch.arange({first}, {first + number}) * 7 % 1021 % {number_of}).view(-1, 1)",
            f"weights = torch.ones({number}, 1, dtype=torch.{case.dtype})",
        ]

    def part(head: int, first: int, number: int) -> Expectation:
        lines = [*base_lines(case), *small, *part_lines(case, "hidden", 0, first, number)]
        lines += ["hidden = hidden[0, 0]", *routing(first, number)]
        return expected_experts(call_of(case, "experts", lines, names)).expectation("output 0")

    lines = [*base_lines(case), *small, *whole_lines(case, "hidden", experts.device)]
    lines += ["hidden = hidden[0, 0]", *routing(0, case.tokens)]
    rest = ", ".join(names[1:])
    lines.append(f"{rest} = (x.to('{experts.device}') for x in ({rest}))")
    assert_parts(experts, call_of(case, "experts", lines, names), part, like=0)


def assert_parts(
    subject: Subject,
    call: Call,
    part: Callable[[int, int, int], Expectation],
    *,
    like: int,
    tokens: int | None = None,
) -> None:
    """A few rows of the output, which has the shape of one argument, are as the oracle says.

    ``part(head, first, number)`` is the expectation of ``number`` tokens of a head from ``first`` on;
    ``tokens`` is how many the output has, where those are not the case's.
    """
    case: LargeCase = call.case
    need_memory(case, subject.device)
    output, arguments = run_large(subject, call)
    given = arguments[like]
    assert_tensor(output, tuple(given.shape), given.dtype, given.device, call=call)
    del arguments, given
    number = min(ROWS_LOOKED_AT, tokens or case.tokens)
    for head, first in case.places():
        first = 0 if tokens else first
        expectation = part(head, first, number)
        whole = output.view(1, 1, *output.shape) if output.ndim == 2 else output
        found = whole[:, head : head + 1, first : first + number].reshape(expectation.value.shape)
        name = f"output of tokens {first} to {first + number - 1} of head {head}"
        assert_close_to(found, expectation, call, name=name)
