"""Checks of a rotary module: as called, after a cast, and built on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_identical, assert_tensor
from conformance.harness.failures import ConformanceFailure, failing_at
from conformance.harness.lanes import in_every_lane
from conformance.harness.rotary_cases import RotaryCase
from conformance.harness.rotary_checks import expected_output
from conformance.harness.subject import Subject, changes_caught, errors_named, reject_alias
from conformance.harness.tolerance import Expectation


@dataclass(frozen=True)
class ModuleCall(Call):
    """A call whose result is that of a module: ``made`` has ``{}`` for the constructor's call."""

    made: str = "{}"

    @property
    def constructor(self) -> str:
        """The module's construction as an expression."""
        return self.made.format(super().source())

    def source(self) -> str:
        """Construction and call as one expression."""
        return f"{self.constructor}(x, positions)"


def module_call(call: Call, made: str = "{}") -> ModuleCall:
    """The module call of a case's rotary call."""
    width = str(call.case.head_dim)
    return ModuleCall(
        "rotary_module", call.lines, (width,), call.options, call.dtype, call.case, made
    )


def build(rotary_module: Subject, call: ModuleCall) -> nn.Module:
    """A new module of the implementation."""
    (head_dim,), options = call.values()
    with failing_at(call):
        module = rotary_module(head_dim, **options)
    if not isinstance(module, nn.Module):
        found = type(module).__name__
        raise ConformanceFailure("wrong type", f"expected an nn.Module, found {found}", call=call)
    return module


@contextmanager
def steps_named(call: ModuleCall) -> Iterator[None]:
    """Errors of what is done to a module become failures of the call."""
    with failing_at(call), errors_named("the module"):
        yield


@contextmanager
def shown_of(module: str, *lines: str) -> Iterator[None]:
    """A failure in here is one of a module that these lines make and use before."""
    try:
        yield
    except ConformanceFailure as failure:
        before = [line for line in failure.call.lines if "= positions" not in line]
        last = failure.call.lines[len(before) :]
        lines = (*before, *lines, *last)
        failure.call = replace(failure.call, lines=lines, made=module)
        raise


def run_module(module: nn.Module, call: ModuleCall) -> Tensor:
    """The output of the module, checked as the output of a function is."""
    x, positions = call.named("x"), call.named("positions")
    with steps_named(call), changes_caught([x, positions]):
        output = module(x, positions)
    assert_tensor(output, x.shape, x.dtype, x.device, call=call)
    with failing_at(call):
        reject_alias(output, [x, positions])
    return output


def expected_of(call: ModuleCall) -> Expectation:
    """What the oracle of the contract ``rotary`` says of the module's output."""
    return expected_output(
        Call("rotary", call.lines, ("x", "positions"), call.options, call.dtype, call.case)
    )


def assert_module_matches(
    rotary_module: Subject,
    case: RotaryCase,
    change: Callable[[nn.Module, torch.dtype], nn.Module] = lambda module, dtype: module,
    made: Callable[[torch.dtype], str] = lambda dtype: "{}",
) -> None:
    """The output is within the floor of the oracle after ``change``, written as ``made``."""

    def check(call: Call) -> None:
        call = module_call(call, made(call.dtype))
        module = build(rotary_module, call)
        with steps_named(call):
            module = change(module, call.dtype)
        assert_close_to(run_module(module, call), expected_of(call), call)

    in_every_lane(case, check, rotary_module.device)


def assert_survives_cast(rotary_module: Subject, case: RotaryCase) -> None:
    """The module is cast to a 16-bit dtype, and back where x is float32."""

    def change(module: nn.Module, dtype: torch.dtype) -> nn.Module:
        return module.to(torch.bfloat16).float() if dtype == torch.float32 else module.to(dtype)

    def made(dtype: torch.dtype) -> str:
        return "{}.to(torch.bfloat16).float()" if dtype == torch.float32 else f"{{}}.to({dtype})"

    assert_module_matches(rotary_module, case, change, made)


def fill_with_nan(module: nn.Module) -> None:
    """NaN in every parameter and buffer, as memory that nothing was written to may hold."""
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)


ON_META = (
    "[m := (lambda d: (d.__enter__(), {}, d.__exit__(None, None, None))[1])(torch.device('meta')),"
    " m.to_empty(device='%s'), [b.data.fill_(torch.nan) for b in m.buffers()],"
    " m.reset_parameters()] and m"
)


def build_on_meta(rotary_module: Subject, call: ModuleCall) -> nn.Module:
    """A module built on the meta device, materialised in memory full of NaN, and reset."""
    device = rotary_module.device
    with torch.device("meta"):
        module = build(rotary_module, call)
    with steps_named(call):
        module = module.to_empty(device=device)
        fill_with_nan(module)
        module.reset_parameters()
    return module


def assert_meta_restored(rotary_module: Subject, case: RotaryCase) -> None:
    """Built on the meta device and reset, the module gives the bits of one built plainly."""

    def check(call: Call) -> None:
        call = module_call(call, f"({ON_META % rotary_module.device})")
        plain = run_module(build(rotary_module, call), call)
        restored = run_module(build_on_meta(rotary_module, call), call)
        assert_close_to(restored, expected_of(call), call)
        because = "a module restored from the meta device is as one built plainly"
        assert_identical(restored, plain, call, because=because)

    in_every_lane(case, check, rotary_module.device)


def assert_state_round_trips(rotary_module: Subject, case: RotaryCase) -> None:
    """A new module that loads the state of one that was cast to bfloat16 is as exact as before."""
    made = "(lambda a, b: a.load_state_dict(b.to(torch.bfloat16).state_dict()) and a)({0}, {0})"

    def check(call: Call) -> None:
        call = module_call(call, made)
        new, saved = build(rotary_module, call), build(rotary_module, call)
        with steps_named(call):
            new.load_state_dict(saved.to(torch.bfloat16).state_dict())
        assert_close_to(run_module(new, call), expected_of(call), call)

    in_every_lane(case, check, rotary_module.device)


def assert_module_stateless(rotary_module: Subject, case: RotaryCase) -> None:
    """Short, long, short: calls of one module do not change each other's result."""
    trained = dict(case.scaling)["original_max_position_embeddings"]

    def check(call: Call) -> None:
        call = module_call(call)
        module = build(rotary_module, call)
        short = call.then(f"positions = positions % {trained}")
        first = run_module(module, short).clone()
        earlier = (f"for at in (positions % {trained}, positions): module(x, at)",)
        for step in (short, call, short):
            with shown_of("module", f"module = {call.constructor}", *earlier):
                assert_close_to(run_module(module, step), expected_of(step), step)
        because = "a short call is repeated after a long one"
        assert_identical(run_module(module, short), first, short, because=because)

    in_every_lane(case, check, rotary_module.device)


def assert_instances_independent(rotary_module: Subject, case: RotaryCase) -> None:
    """A module of another theta, built and called first, does not change this one."""
    other = replace(case, theta=77.0)

    def check(call: Call) -> None:
        calls = [module_call(other.call(call.dtype, rotary_module.device)), module_call(call)]
        modules = [build(rotary_module, each) for each in calls]
        made = f"modules = [{', '.join(each.constructor for each in calls)}]"
        for number in (0, 1, 0):
            module, each = modules[number], calls[number]
            with shown_of(f"modules[{number}]", made, "for each in modules: each(x, positions)"):
                assert_close_to(run_module(module, each), expected_of(each), each)

    in_every_lane(case, check, rotary_module.device)
