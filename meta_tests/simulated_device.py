"""A CUDA device that is not there: tensors that say ``cuda`` and compute on the CPU.

Loaded as a plugin of pytest (``-p simulated_device``), it lets ``pytest -m gpu`` run without a GPU. A
tensor that is moved to ``cuda``, or made there, is an :class:`OnDevice`: a CPU tensor for torch's C++,
one of the device for Python. Every function of torch that Python calls is looked at: one that mixes
the device with the CPU raises as torch does, and so does one that reads the device's memory as if it
were the host's. What is not simulated: CUDA's kernels with their rounding and their order of addition,
streams, graphs, Triton, NCCL, autocast and generators on the device; and what C++ calls inside.
"""

from __future__ import annotations

import os
import types

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAME = "Simulated GPU"

MIXED = "Expected all tensors to be on the same device, but found at least two devices, {} and {}!"
HOST_ONLY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
    "memory first."
)


class OnDevice(Tensor):
    """A tensor of the simulated device."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return called(function, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return rebuilt, (host(self.detach()), self.requires_grad)


def rebuilt(values: Tensor, requires_grad: bool) -> Tensor:
    """A tensor of the device that was written down."""
    return on_device(values).requires_grad_(requires_grad)


def on_device(values: Tensor) -> Tensor:
    """The tensor itself, which is nobody else's, from now on one of the device."""
    values.__class__ = OnDevice
    return values


def host(values: Tensor) -> Tensor:
    """The same memory, as a tensor of the CPU."""
    with torch._C.DisableTorchFunction():
        return values.as_subclass(Tensor)


class Device:
    """What has gone wrong on the device. After an error of its context every operation raises it."""

    broken: str | None = None
    touched = False
    """Whether anything has been done on the device."""

    def check(self) -> None:
        """Raise what the device is broken by."""
        self.touched = True
        if self.broken is not None:
            raise torch.AcceleratorError(self.broken)


DEVICE = Device()

ILLEGAL_ADDRESS = "CUDA error: an illegal memory access was encountered"


class Simulation(TorchFunctionMode):
    """Sees every function of torch that is called, also one that takes no tensor of the device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return called(function, args, kwargs or {})


def getter(name: str):
    """The function that torch names where a property of a tensor is read."""
    return getattr(Tensor, name).__get__


PROPERTIES = {getter("device"): CUDA, getter("is_cuda"): True, getter("is_cpu"): False}
MOVES = {Tensor.cpu, Tensor.cuda, Tensor.to}
OF_THE_HOST = {Tensor.numpy, Tensor.__array__, Tensor.pin_memory}
ANY_DEVICES = {
    Tensor.copy_,
    Tensor.type_as,
    Tensor.data.__set__,
    torch._has_compatible_shallow_copy_type,
    Tensor.new_tensor,
    torch.as_tensor,
    torch.tensor,
}
MADE_FOR_HOST = {Tensor.untyped_storage, Tensor.data_ptr, Tensor.__repr__, Tensor.__format__}


KNOWN = (Tensor, torch.nn.Parameter, OnDevice)


def called(function, args, kwargs):
    """What ``function`` gives, where its tensors are where they say."""
    flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    for each in flat:
        if (
            type(each) not in KNOWN
            and type(each).__torch_function__ is not Tensor.__torch_function__
        ):
            with Simulation():  # it knows what to do, as torch's CausalBias does
                return type(each).__torch_function__(function, (type(each),), args, kwargs)
    ours = any(isinstance(each, OnDevice) for each in flat)
    device, args, kwargs = without_device(function, args, kwargs)
    if not ours and not is_cuda(device):
        return (
            plain(function, args, kwargs)
            if device is None
            else plain(
                function, args, {**kwargs, **({"device": device} if function not in MOVES else {})}
            )
        )
    if function in PROPERTIES:
        return PROPERTIES[function]
    if function is Tensor.get_device:
        return 0
    if function in OF_THE_HOST and not kwargs.get("force"):
        raise TypeError(HOST_ONLY)
    DEVICE.check()
    if function in MOVES:
        return moved(function, args, kwargs, device)
    if function == Tensor.data.__set__:
        return data_set(*args)
    if function not in ANY_DEVICES:
        reject_mixed(function, args, kwargs, flat)
    found = plain(function, args, kwargs)
    to = device or (
        CUDA if isinstance(first(flat), OnDevice) or function not in ANY_DEVICES else CPU
    )
    if function in MADE_FOR_HOST or not is_cuda(to):
        return tree_map_only(OnDevice, host, found) if not is_cuda(to) else found
    return tree_map(lambda x: on_device(x) if type(x) is Tensor else x, found)


def plain(function, args, kwargs):
    """The function itself; inside it the tensors are those of the CPU."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def first(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def without_device(function, args, kwargs):
    """The device that a call names, and its arguments without it."""
    device = None
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    if function is Tensor.cuda:
        return CUDA, args[:1], kwargs
    if function is Tensor.cpu:
        return CPU, args, kwargs
    if function is Tensor.to:
        for number, each in enumerate(args[1:], 1):
            if isinstance(each, (str, torch.device)):
                return torch.device(each), (*args[:number], CPU, *args[number + 1 :]), kwargs
            if isinstance(each, Tensor):
                device = CUDA if isinstance(each, OnDevice) else CPU
    return device, args, kwargs


def moved(function, args, kwargs, device):
    """``to`` with or without another device; a copy where the device changes."""
    source, rest = args[0], args[1:]
    here = CUDA if isinstance(source, OnDevice) else CPU
    target = here if device is None else device
    with torch._C.DisableTorchFunctionSubclass():
        found = source.to(*rest, **kwargs) if rest or kwargs else source
        if target.type != here.type and found is source:
            found = source.clone()
    if found is source:
        return source
    return on_device(found) if is_cuda(target) else host(found)


def data_set(tensor: Tensor, values: Tensor) -> None:
    """``tensor.data = values``, which takes the tensor to where the values are."""
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(tensor, values)
    if isinstance(values, OnDevice) != isinstance(tensor, OnDevice):
        parameter = isinstance(tensor, torch.nn.Parameter)
        if isinstance(values, OnDevice):
            tensor.__class__ = OnDevice
            tensor._is_param = parameter
        else:
            tensor.__class__ = torch.nn.Parameter if parameter else Tensor


def is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def reject_mixed(function, args, kwargs, tensors) -> None:
    """Raise as torch does where tensors of the device meet tensors of the CPU."""
    indexing = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, torch.index_put}
    if function in indexing and isinstance(args[0], OnDevice):
        return  # indices may be the CPU's, and values are copied
    with torch._C.DisableTorchFunction():
        where = {
            isinstance(each, OnDevice) for each in tensors if each.ndim or type(each) is OnDevice
        }
    if len(where) == 2:
        name = getattr(function, "__name__", function)
        raise RuntimeError(MIXED.format("cuda:0", "cpu") + f" (in {name})")


def memory() -> tuple[int, int]:
    """Free and total bytes of the device."""
    total = int(os.environ.get("SIMULATED_BYTES", 1 << 30))
    return total, total


_mode: list[Simulation] = []


def install() -> None:
    """Simulate the device in this process from now on."""
    if _mode:
        return
    properties = types.SimpleNamespace(
        name=NAME, total_memory=memory()[1], multi_processor_count=1, major=9, minor=0
    )
    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: DEVICE.touched,
        "_lazy_init": lambda: None,
        "device_count": lambda: int(os.environ.get("SIMULATED_GPUS", 1)),
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: DEVICE.check(),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "mem_get_info": lambda device=None: memory(),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda *a, **k: True,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }.items():
        setattr(torch.cuda, name, value)
    from conformance.harness import gpu_ranks

    gpu_ranks.BACKEND[:] = ["gloo"]
    gpu_ranks.IMPORTED_FIRST[:] = [__name__]
    _mode.append(Simulation())
    _mode[0].__enter__()


install()
