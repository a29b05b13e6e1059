"""Asking modules with shared cores: outputs, weights, state, gradients by factor, refusals."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conformance.harness.calls import Call
from conformance.harness.compare import assert_close_to, assert_tensor
from conformance.harness.core_oracle import outputs_of, seed_of, weights_of
from conformance.harness.failures import ConformanceFailure, Declined, Inconclusive, failing_at
from conformance.harness.requirement import current_tally
from conformance.harness.shown import after
from conformance.harness.subject import Subject, changes_caught, errors_named, reject_alias
from conformance.harness.tolerance import Expectation

Edit = Callable[[nn.Module], object]

# Asking a layer


def made(subject: Subject, call: Call) -> nn.Module:
    """The module that a call makes, of tensors that nobody else has."""
    arguments, options = call.values()
    with failing_at(call):
        module = subject(*own(arguments), **own(options))
    if not isinstance(module, nn.Module):
        summary = f"{call.contract} gives {type(module).__name__}, expected a torch module"
        raise ConformanceFailure("wrong type", summary, call=call)
    return module


def own(values: Any) -> Any:
    """The same with copies of all tensors, which an implementation may keep."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, Mapping):
        return {name: own(value) for name, value in values.items()}
    return [own(value) for value in values] if isinstance(values, list) else values


@contextmanager
def asking(source: str, call: Call, *tensors: Tensor) -> Iterator[None]:
    """A failure while something is asked for, or compared, is shown by that line of Python."""
    try:
        with failing_at(call), changes_caught(list(tensors)), errors_named(source):
            yield
    except ConformanceFailure as failure:
        element = re.match(r"print\(out, '(expected .*?(\[[\d, ]*\]): .*)'\)$", failure.shown_by)
        if element:
            text, at = element.groups()
            failure.shown_by = f"print(({source}){at}.item(), {text!r})"
        else:
            failure.shown_by = failure.shown_by.replace("print(out", f"print({source}", 1)
        raise


def output(layer: nn.Module, x: Tensor, expert: int, call: Call, name: str = "x") -> Tensor:
    """The rows of an expert, of the right shape and dtype."""
    with asking(f"out({name}, {expert})", call, x), torch.no_grad():
        y = layer(x, expert)
        shape = (*x.shape[:-1], call.named("core").shape[0])
        assert_tensor(y, shape, x.dtype, x.device, call=call, name=f"the output of expert {expert}")
        reject_alias(y, [x])
    return y


def weight(layer: nn.Module, expert: int, call: Call) -> Tensor:
    """The weight of an expert, of the right shape."""
    core = call.named("core")
    with asking(f"out.reconstruct({expert})", call), torch.no_grad():
        found = layer.reconstruct(expert)
        what = f"the weight of expert {expert}"
        assert_tensor(found, tuple(core.shape), core.dtype, core.device, call=call, name=what)
    return found


def experts_of(call: Call) -> range:
    """The numbers of the experts."""
    return range(len(call.named("u_in")))


def compare_outputs(layer: nn.Module, call: Call, right: Call | None = None) -> None:
    """Every expert's output for ``x`` is what the factors (of another call, if any) give."""
    experts = tuple(experts_of(call))
    truth = outputs_of(right or call, experts)
    for expert in experts:
        y = output(layer, call.named("x"), expert, call)
        with asking(f"out(x, {expert})", call):
            expected = truth.expectation(f"output {expert}")
            assert_close_to(y, expected, call, name=f"the output of expert {expert}")


def compare_weights(layer: nn.Module, call: Call, right: Call | None = None) -> None:
    """Every expert's weight is what the factors (of another call, if any) give."""
    truth = weights_of(right or call)
    for expert in experts_of(call):
        found = weight(layer, expert, call)
        with asking(f"out.reconstruct({expert})", call):
            expected = truth.expectation(f"output {expert}")
            assert_close_to(found, expected, call, name=f"the weight of expert {expert}")


def backward_lines(call: Call, given: str, outputs: str) -> tuple[str, ...]:
    """Python that makes the gradients which the oracle has, at outputs made of ``given``."""
    return (
        f"{given}.requires_grad_()",
        f"h = torch.Generator().manual_seed({seed_of(call)})",
        f"ys = {outputs}",
        "torch.autograd.backward(ys, [torch.randn(y.shape, generator=h).to(y.dtype) for y in ys])",
    )


# State


def core_of(layer: nn.Module, call: Call) -> nn.Parameter:
    """The attribute ``core``, a Parameter."""
    with asking("out.core", call):
        core = layer.core
    if not isinstance(core, nn.Parameter):
        summary = f"out.core is {type(core).__name__}, expected a Parameter"
        raise ConformanceFailure("wrong type", summary, call=call, shown_by="print(type(out.core))")
    return core


def held(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dictionary."""
    state = module.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def stored(tensors: Mapping[str, Tensor]) -> int:
    """Floating elements in memory, what several tensors share counted once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size()
        for t in tensors.values()
        if t.is_floating_point() and t.numel()
    }
    return sum(storages.values())


def assert_stored(module: nn.Module, total: int, call: Call, when: str) -> None:
    """The module holds so many elements."""
    current_tally().comparisons["exact"] += 1
    with asking("out.state_dict()", call):
        found = stored(held(module))
    if found != total:
        summary = f"{when} the module holds {found} elements, expected {total}: each core once"
        shown = "print({k: (v.shape, v.data_ptr()) for k, v in out.state_dict().items()})"
        raise ConformanceFailure("wrong storage", summary, call=call, shown_by=shown)


MOVES: dict[str, Edit] = {
    "after .to(torch.float64)": lambda layer: layer.to(torch.float64),
    "after .to(torch.bfloat16)": lambda layer: layer.to(torch.bfloat16),
    "after .half().float()": lambda layer: layer.half().float(),
    "after copy.deepcopy": copy.deepcopy,
}
"""What may be done to a module without a core becoming several."""


def moved(layer: nn.Module, move: str, call: Call) -> nn.Module:
    """The module that a move gives."""
    with failing_at(call), errors_named(move):
        return MOVES[move](layer)


def as_line(move: str) -> str:
    """A move as a line of Python."""
    done = move.removeprefix("after ")
    return f"out = out{done}" if done.startswith(".") else "import copy; out = copy.deepcopy(out)"


# Gradients


def compare_gradient(
    found: Tensor | None, expected: Expectation, name: str, call: Call, *lines: str
) -> None:
    """A gradient is there, and within the limits; ``lines`` of Python make it."""
    what = f"the gradient of {name}"
    if found is None:
        raise ConformanceFailure("no gradient", f"{what} is missing", call=call)
    shape = tuple(expected.value.shape)
    assert_tensor(found, shape, call.dtype, found.device, call=call, name=what)
    places = {"core": "out.core.grad", "x": "x.grad", "hidden": "hidden.grad"}
    with after(*lines):
        if name in places:
            with asking(places[name], call):
                assert_close_to(found, expected, call, name=what)
            return
        try:
            assert_close_to(found, expected, call, name=what)
        except ConformanceFailure as failure:
            gradients = "[(n, p.grad) for n, p in out.named_parameters()]"
            failure.shown_by = failure.shown_by.replace("print(out", f"print({gradients}", 1)
            raise


def by_element(
    module: nn.Module, factors: Mapping[str, Tensor], call: Call
) -> dict[str, Tensor | None]:
    """Gradients of the factors, whose elements are found among the parameters by their values.

    So the parameters may be stacked, split or transposed. Declined where a parameter has values that
    no factor has; a factor that no parameter holds is a failure.
    """
    values = torch.cat([factor.detach().flatten() for factor in factors.values()]).cpu()
    ordered, order = values.sort()
    if bool((ordered[1:] == ordered[:-1]).any()):
        raise Inconclusive("two elements of the factors are equal: gradients cannot be told apart")
    gradients, seen = torch.zeros_like(values), torch.zeros(len(values), dtype=torch.bool)
    for parameter in module.parameters():
        elements = parameter.detach().cpu().flatten()
        at = torch.searchsorted(ordered, elements.to(values)).clamp(max=len(values) - 1)
        if not torch.equal(ordered[at], elements.to(values)):
            raise Declined("the layer has parameters that are not the factors")
        seen[order[at]] = True
        if parameter.grad is not None:
            gradients.index_add_(0, order[at], parameter.grad.detach().cpu().to(values).flatten())
    split = {}
    begin = 0
    for name, factor in factors.items():
        part = slice(begin, begin + factor.numel())
        if not bool(seen[part].all()):
            raise ConformanceFailure("no parameter", f"no parameter holds {name}", call=call)
        split[name] = gradients[part].view(factor.shape)
        begin += factor.numel()
    return split


# Refusals


def raises(do: Callable[[], object], given: str, call: Call, shown: str) -> None:
    """``do`` raises an exception, which is no failure of another kind."""
    current_tally().comparisons["exact"] += 1
    try:
        with errors_named("it"):
            do()
    except ConformanceFailure as failure:
        if failure.kind.startswith("raised "):
            return
        failure.call = failure.call or call
        raise
    summary = f"{given} where an error is due"
    raise ConformanceFailure("accepted", summary, call=call, shown_by=shown)
