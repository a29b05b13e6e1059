"""Clocks and counters of the kernel benchmarks, on the CPU and on a pretended GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from conformance.benchmarks import clock as clocks
from conformance.benchmarks import counters as counting
from conformance.benchmarks.attention_workloads import prefill
from conformance.benchmarks.ceilings import Ceilings, measure_ceilings
from conformance.benchmarks.clock import HIDE, LONGEST_HIDE, CpuClock, CudaClock
from conformance.benchmarks.counters import counters
from conformance.benchmarks.experts_workloads import ExpertsWorkload, Shape
from conformance.benchmarks.running import Running
from conformance.implementations.grouped_experts import TorchGroupedExperts
from conformance.implementations.reference import Reference
from conformance.implementations.torch_flex import TorchFlex
from conformance.implementations.torch_sdpa import TorchSDPA, TorchSDPAMath

TINY = prefill(64, 32, (4, 2), 16, True, "float32")
FULL = prefill(64, 32, (4, 4), 16, False, "float32")
DENSE = ExpertsWorkload(Shape("tiny", 4, 2, 16, 24), 20, "uniform", "float32")


class Time:
    """A timer that goes on by what launches take, and a little by each look at it."""

    def __init__(self, look=1e-6):
        self.now, self.look = 0.0, look

    def __call__(self):
        self.now += self.look
        return self.now

    def launch(self, seconds):
        def run():
            self.now += seconds

        return run


# The CPU's clock


def test_cpu_clock_gives_each_launch_its_seconds():
    time = Time()
    found = CpuClock(time).seconds([time.launch(s) for s in (1.0, 2.0, 0.5)])
    assert found == pytest.approx([1.0, 2.0, 0.5], abs=1e-5)


def test_cpu_clock_adds_the_delay_inside():
    time = Time()
    found = CpuClock(time).seconds([time.launch(1.0)] * 3, delay=0.25)
    assert found == pytest.approx([1.25] * 3, abs=1e-5)


def test_cpu_clock_keeps_the_garbage_collector_off_and_puts_it_on_again():
    import gc

    seen = []
    CpuClock().seconds([lambda: seen.append(gc.isenabled())])
    assert seen == [False]
    assert gc.isenabled()

    def fails():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        CpuClock().seconds([fails])
    assert gc.isenabled()


def test_a_real_delay_is_seen():
    quick = min(CpuClock().seconds([lambda: None] * 5))
    slow = min(CpuClock().seconds([lambda: None] * 5, delay=0.004))
    assert slow >= 0.004 > 2 * quick


# The GPU's clock, on a pretended device


class Cuda:
    """``torch.cuda`` for a clock: a device with a queue, and what was called in order.

    The device takes ``work`` seconds for a launch, and its host takes ``host`` seconds to enqueue.
    """

    HERTZ = 1.5e9

    def __init__(self):
        self.calls, self.device, self.quiet = [], 0.0, False

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=4096)

    def _sleep(self, cycles):
        assert isinstance(cycles, int)
        self.calls.append(("spin", cycles))
        self.device += cycles / self.HERTZ

    def synchronize(self):
        self.calls.append(("synchronize",))

    def Event(self, enable_timing):
        assert enable_timing
        return Event(self)

    def launch(self, seconds):
        def run():
            self.calls.append(("launch",))
            self.device += seconds

        return run

    def names(self):
        return [call[0] for call in self.calls]


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.cuda.calls.append(("record",))
        self.at = self.cuda.device

    def elapsed_time(self, end):
        assert self.cuda.names()[-1] == "synchronize", "read before the device was done"
        return 1000 * (end.at - self.at)


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(torch.Tensor, "neg_", lambda self: fake.calls.append(("flush", self)))
    return fake


def made(cuda):
    clock = CudaClock("cpu", cuda)
    cuda.calls.clear()
    return clock


def test_cuda_clock_knows_the_cycles_of_a_second(cuda):
    assert CudaClock("cpu", cuda).cycles_a_second == pytest.approx(Cuda.HERTZ)


def test_cuda_clock_flushes_spins_and_records_in_this_order(cuda):
    clock = made(cuda)
    found = clock.seconds([cuda.launch(0.002), cuda.launch(0.001)])
    assert found == pytest.approx([0.002, 0.001])
    once = ["flush", "spin", "record", "launch", "record"]
    assert cuda.names() == ["synchronize", *once, *once, "synchronize"]


def test_cuda_clock_spins_inside_for_the_delay(cuda):
    clock = made(cuda)
    assert clock.seconds([cuda.launch(0.002)], delay=0.0005) == pytest.approx([0.0025], rel=1e-5)
    inside = ["flush", "spin", "record", "launch", "spin", "record"]
    assert cuda.names() == ["synchronize", *inside, "synchronize"]
    assert cuda.calls[5][1] == pytest.approx(0.0005 * Cuda.HERTZ, abs=1)


def test_what_is_flushed_is_four_caches_of_numbers_that_are_not_zero(cuda):
    clock = made(cuda)
    assert clock.flushed.numel() * clock.flushed.element_size() == 4 * 4096
    assert bool((clock.flushed != 0).all())
    assert clock.flushed.unique().numel() > 1000


def test_cuda_clock_spins_longer_where_the_host_is_slow(cuda, monkeypatch):
    clock, host = made(cuda), Time(look=0)
    monkeypatch.setattr(clocks.time, "perf_counter", host)

    def slow():
        host.now += 0.002
        cuda.launch(0.001)()

    clock.seconds([slow, slow])
    spins = [call[1] / Cuda.HERTZ for call in cuda.calls if call[0] == "spin"]
    assert spins == pytest.approx([HIDE, 0.003], rel=1e-5)
    assert clock.exposed == 1

    def waits():
        host.now += 1.0

    clock.seconds([waits, waits, waits])
    spins = [call[1] / Cuda.HERTZ for call in cuda.calls if call[0] == "spin"]
    assert spins[-1] == pytest.approx(LONGEST_HIDE, rel=1e-5)
    assert clock.exposed == 3


def test_clock_for_a_device():
    assert isinstance(clocks.clock_for("cpu"), CpuClock)


# Ceilings


class Counted(CpuClock):
    """A clock to which every launch takes the same time."""

    def __init__(self, seconds):
        super().__init__()
        self.each, self.launches = seconds, 0

    def seconds(self, launches, *, delay=0.0):
        self.launches += len(launches)
        for launch in launches[:1]:
            launch()
        return [self.each] * len(launches)


def test_ceilings_from_known_times(monkeypatch):
    from conformance.benchmarks import ceilings

    monkeypatch.setitem(ceilings.PRODUCT_SIZE, "cpu", 100)
    monkeypatch.setitem(ceilings.COPIED_BYTES, "cpu", 4000)
    found = measure_ceilings("cpu", Counted(0.5), ["float32", "bfloat16"])
    assert found.product == {"float32": 4e6, "bfloat16": 4e6}
    assert found.copy == 16000
    assert found.launch > 0
    assert Ceilings(**found.as_json()) == found


# Counters


def running(workload, method):
    return Running(workload, method, "cpu", seed=0, ring=2)


@pytest.mark.parametrize(
    ("workload", "method"),
    [
        (TINY, Reference().attention),
        (TINY, TorchSDPA().attention),
        (prefill(32, 32, (4, 2), 16, True, "float32", kind="train"), TorchSDPA().attention),
        (DENSE, Reference().experts),
        (DENSE, TorchGroupedExperts().experts),
        (FULL, TorchFlex().attention),
    ],
    ids=["reference", "sdpa", "train", "experts", "grouped", "flex"],
)
def test_counters_are_the_same_in_every_run(workload, method):
    one = running(workload, method)
    first = counters(one)
    assert counters(one) == first
    assert counters(running(workload, method)) == first
    assert all(isinstance(value, (int, str)) for value in first.values())
    assert first["launches"] > 0
    assert first["peak_bytes"] >= 2 * 4 * 32 * 16


def test_an_added_launch_and_its_memory_are_counted():
    plain = counters(running(FULL, TorchSDPAMath().attention))

    def more(q, k, v):
        return TorchSDPAMath().attention(q, k, v) + 1

    found = counters(running(FULL, more))
    size = 2 * 4 * 32 * 16 * 4
    assert found["launches"] == plain["launches"] + 1
    scalars = 64  # torch may make a tensor of the number 1
    assert size <= found["allocated_bytes"] - plain["allocated_bytes"] <= size + scalars
    assert found["flops"] == plain["flops"] == FULL.work().flops


def test_an_added_product_is_counted():
    plain = counters(running(FULL, TorchSDPAMath().attention))

    def more(q, k, v):
        q @ k.mT
        return TorchSDPAMath().attention(q, k, v)

    assert counters(running(FULL, more))["flops"] == plain["flops"] * 3 // 2


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (TorchSDPA().attention, "flash"),
        (TorchSDPAMath().attention, "math"),
        (Reference().attention, "other"),
    ],
)
def test_the_backend_that_ran_is_named(method, name):
    wide = prefill(64, 32, (4, 4), 16, False, "float32")
    assert counters(running(wide, method))["backend"] == name


@pytest.mark.parametrize(
    ("kernels", "name"),
    [
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3"], "cudnn"),
        (["void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>"], "flash"),
        (["fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)"], "efficient"),
        (["triton_tem_fused_0"], "triton"),
        (["void cutlass::device_kernel<at::cuda::detail::GroupProblemShape>"], "grouped_mm"),
        (["vectorized_elementwise_kernel", "nvjet_tst_128x256_64x4"], "other"),
        (["triton_poi_fused_0", "cudnn_sdpa"], "cudnn+triton"),
    ],
)
def test_kernels_of_a_gpu_are_named(kernels, name):
    assert counting.backend(kernels) == name


def test_peak_of_allocations_and_releases():
    assert counting.peak([100, 50, -100, 20]) == 150
    assert counting.peak([]) == 0


def test_compiled_code_counts_graphs_and_breaks():
    def attention(q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return out * 1

    compiled = torch.compile(attention, backend="eager")
    broken = running(FULL, compiled)
    assert {"graphs": 2, "graph_breaks": 1}.items() <= counters(broken).items()
    assert counters(broken) == counters(broken)
    simple = torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend="eager")
    assert {"graphs": 1, "graph_breaks": 0}.items() <= counters(running(FULL, simple)).items()
    assert "graphs" not in counters(running(FULL, TorchSDPA().attention))
    torch._dynamo.reset()


def test_every_workload_is_compiled_however_many_there_are():
    """torch gives up on a function after a few shapes: eight, by default."""
    compiled = torch.compile(
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend="eager", dynamic=False
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (8, 16, 24, 32):
            last = running(prefill(length, length, (2, 2), 8, False, "float32"), compiled)
            last.launch(0)
        assert counters(last)["graphs"] == 1
    torch._dynamo.reset()


class CompiledKernel:
    """Stands for Triton's class of this name."""

    def __init__(self, name, registers, spills, shared):
        self.name, self.n_regs, self.n_spills = name, registers, spills
        self.metadata = SimpleNamespace(shared=shared)


def test_resources_of_the_triton_kernels_that_ran():
    loaded = [
        CompiledKernel("mine", 128, 0, 4096),
        CompiledKernel("mine_too", 64, 8, 8192),
        CompiledKernel("another", 255, 99, 1 << 20),
        object(),
    ]
    assert counting.triton_resources(loaded, {"mine", "mine_too", "memset"}) == {
        "triton_registers": 128,
        "triton_spills": 8,
        "triton_shared_bytes": 8192,
    }
    assert counting.triton_resources(loaded, {"cudnn"}) == {}


def test_counters_on_a_pretended_gpu(monkeypatch):
    """Kernels and not copies are launches, and memory is the allocator's."""

    class Profiled:
        def __init__(self, name, device):
            self.named, self.on = name, device

        def name(self):
            return self.named

        def device_type(self):
            return self.on

    events = [
        Profiled("cudaLaunchKernel", "DeviceType.CPU"),
        Profiled("pytorch_flash::flash_fwd_kernel", "DeviceType.CUDA"),
        Profiled("elementwise_kernel", "DeviceType.CUDA"),
        Profiled("Memcpy DtoD (Device -> Device)", "DeviceType.CUDA"),
        Profiled("Memset (Device)", "DeviceType.CUDA"),
        Profiled("Torch annotation", "DeviceType.CPU"),
        Profiled("Torch annotation", "DeviceType.CUDA"),
    ]
    keys = [f"allocated_bytes.all.{part}" for part in ("allocated", "current", "peak")]
    before, after = dict(zip(keys, (1000, 500, 500))), dict(zip(keys, (1900, 700, 1300)))
    stats = iter([before, after] * 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: next(stats))
    monkeypatch.setattr(
        counting,
        "profile",
        lambda **options: nullcontext(
            SimpleNamespace(
                profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))
            )
        ),
    )
    expected = {
        "launches": 2,
        "allocated_bytes": 900,
        "peak_bytes": 800,
        "backend": "flash",
    }
    assert counting.on_cuda(lambda: None) == expected
    events[:] = events[:1]  # the driver's profiling interface is not there
    assert counting.on_cuda(lambda: None) == {"allocated_bytes": 900, "peak_bytes": 800}
