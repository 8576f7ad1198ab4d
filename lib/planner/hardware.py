"""Accelerators as their makers describe them, and this machine as it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lib import tracking
from lib.errors import ConfigError, ResourceError, nearest

GIB = 2**30
# Of a GPU's memory: the rest is lost to fragments of the caching allocator. Of a host's: the system's own.
USABLE = 0.92
THIS = "this"


@dataclass(frozen=True)
class Accelerator:
    """What computes. Rates are of one direction and in bytes or operations a second; 0 stands for not known."""

    name: str
    memory: float
    """Bytes that torch reports as the device's total; of the whole host without a GPU."""
    flops: float
    """Dense matrix products, in 16 bits unless it is a processor that lacks bf16."""
    bandwidth: float
    """Of its memory."""
    link: float
    """To the other accelerators of its host."""
    pcie: float
    """To the host's memory."""
    gpu: bool = True

    @property
    def usable(self) -> float:
        return USABLE * self.memory


def _accelerator(
    name: str, memory_gib: float, tflops: float, bandwidth: float, link: float, pcie: float
) -> Accelerator:
    return Accelerator(name, memory_gib * GIB, tflops * 1e12, bandwidth * 1e9, link * 1e9, pcie * 1e9)


# NVIDIA's data sheets (SXM forms): dense bf16 (T4: fp16, it has no bf16) without sparsity, memory bandwidth, NVLink's
# bandwidth of one direction (PCIe's where there is none), PCIe x16. Memory is what torch.cuda reports, below the nominal.
ACCELERATORS = {
    a.name: a
    for a in (
        _accelerator("t4", 14.6, 65, 300, 16, 16),
        _accelerator("l4", 22.0, 121, 300, 32, 32),
        _accelerator("a10g", 22.0, 70, 600, 32, 32),
        _accelerator("a100-40", 39.4, 312, 1555, 300, 32),
        _accelerator("a100-80", 79.1, 312, 2039, 300, 32),
        _accelerator("h100", 79.1, 989, 3350, 450, 64),
        _accelerator("h200", 139.7, 989, 4800, 450, 64),
    )
}


def accelerator(name: str, *, on_gpu: bool = False, measured: bool = False) -> Accelerator:
    """The accelerator of this name; `this` is the present machine.

    Raises ConfigError with the nearest known name.
    """
    if name == THIS:
        return this_machine(on_gpu=on_gpu, measured=measured)
    if name not in ACCELERATORS:
        known = [*ACCELERATORS, THIS]
        raise ConfigError(
            f"plan.accelerator: no accelerator {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )
    return ACCELERATORS[name]


def this_machine(*, on_gpu: bool = False, measured: bool = False) -> Accelerator:
    """The present machine: its first GPU, or its processors and memory.

    Rates are measured on request only, which takes some seconds; else they are 0. Raises ResourceError
    when a GPU is asked for and torch sees none.
    """
    if not on_gpu:
        device, memory = "cpu", host_memory()
    else:
        import torch

        if not torch.cuda.is_available():
            raise ResourceError(
                "training.gpus_per_worker asks for a GPU and this machine has none; set it to 0, or name "
                "the cluster's GPU with plan.accelerator"
            )
        device, memory = "cuda", float(torch.cuda.get_device_properties(0).total_memory)
    flops, bandwidth = _measure(device) if measured else (0.0, 0.0)
    # Workers of one host without GPUs meet in its memory: each byte is written once and read once.
    return Accelerator(THIS, memory, flops, bandwidth, bandwidth / 2, bandwidth / 2, gpu=on_gpu)


def host_memory() -> float:
    """Bytes of memory that this process may use: the machine's, or its container's when that has less."""
    limits = [float(psutil.virtual_memory().total)]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # absent, or `max`
            limits.append(float(Path(file).read_text()))
    return min(limits)


def _measure(device: str) -> tuple[float, float]:
    """Operations a second of a large matrix product in the number format that the device trains in, and bytes a
    second of a copy, on all cores."""
    import torch

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])  # the first warms up

    size = 8192 if device == "cuda" else 3072
    half = device == "cuda" or tracking.cpu_precision() == "bf16"
    a = torch.randn(size, size, dtype=torch.bfloat16 if half else torch.float32, device=device)
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    product = seconds(lambda: a @ a)
    copied = seconds(lambda: target.copy_(source))
    return 2 * size**3 / product, 2 * source.numel() * source.element_size() / copied
