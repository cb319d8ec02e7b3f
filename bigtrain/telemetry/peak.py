"""How much arithmetic the hardware could do: the denominator of MFU.

For a GPU that the table knows, it is the datasheet's dense figure (no 2:4 sparsity). For anything else, CPUs above
all, it is measured: the fastest of the matrix products that fit into a twentieth of a second.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

# Part of the name that the driver reports, and dense TFLOP/s in bf16, tf32 and fp32. The first match counts, so a
# longer name stands before a shorter one that it contains.
_DATASHEET: tuple[tuple[str, float, float, float], ...] = (
    # https://resources.nvidia.com/en-us-blackwell-architecture
    ("GB200", 2500, 1250, 80),
    ("B200", 2250, 1100, 75),
    # https://www.nvidia.com/en-us/data-center/h200/
    ("H200 NVL", 835.5, 417.5, 60),
    ("H200", 989.5, 494.5, 67),
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    ("H100 NVL", 835.5, 417.5, 60),
    ("GH200", 989.5, 494.5, 67),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/gtcs22/data-center/h100/PB-11133-001_v01.pdf
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989.5, 494.5, 67),
    # https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf
    ("A100", 312, 156, 19.5),
    # https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf
    ("A40", 149.7, 74.8, 37.4),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    ("L40S", 362.05, 183, 91.6),
    # https://www.nvidia.com/en-us/data-center/l4/
    ("L4", 121, 60, 30.3),
)


@dataclass(frozen=True)
class Peak:
    """The most FLOP/s that one rank's device can do."""

    flops_per_second: float
    source: str
    """Where the number is from, for people to read: "datasheet, dense bf16" or "measured GEMM peak, fp32"."""


def device_peak(device: torch.device, dtype: torch.dtype, *, ranks_on_machine: int = 1, seconds: float = 0.05) -> Peak:
    """The peak of `device` for products of `dtype`, for this rank's part of the machine.

    Where it is measured, this takes about `seconds` and uses the threads that torch uses. On a CPU with fewer cores
    than ``ranks_on_machine`` times these threads, the rank's part is cut to its share of the cores: the sum over the
    ranks is what the machine can do. Ranks of one machine call it at the same time, as they also train at the same
    time."""
    if device.type == "cuda":
        # Off unless asked for: torch's fp32 products do not use the tensor cores.
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = datasheet_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)
        if known is not None:
            return known
        sizes, share = (4096, 8192), 1.0
    else:
        sizes = (512, 1024)
        share = min(1.0, len(os.sched_getaffinity(0)) / (ranks_on_machine * torch.get_num_threads()))
    fastest = max(_measure_gemm(device, dtype, size, seconds / len(sizes)) for size in sizes)
    return Peak(fastest * share, f"measured GEMM peak, {_name(dtype)}")


def datasheet_peak(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> Peak | None:
    """What the maker says of the device, or None where the table does not know it (a slice of a GPU, MIG, included).
    `tf32`: products of fp32 run as tf32."""
    if dtype not in (torch.bfloat16, torch.float32) or "MIG" in device_name:
        return None
    words = device_name.replace("-", " ").split()
    for name, bf16_tflops, tf32_tflops, fp32_tflops in _DATASHEET:
        if all(word in words for word in name.split()):
            if dtype == torch.bfloat16:
                return Peak(bf16_tflops * 1e12, "datasheet, dense bf16")
            if tf32:
                return Peak(tf32_tflops * 1e12, "datasheet, dense tf32")
            return Peak(fp32_tflops * 1e12, "datasheet, fp32")
    return None


def _measure_gemm(device: torch.device, dtype: torch.dtype, size: int, seconds: float) -> float:
    """FLOP/s of the fastest of the `size` x `size` products that are done on `device` in about `seconds`. The fastest,
    because whatever else runs on the machine only makes one slower."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    deadline = time.perf_counter() + seconds
    fastest_s = float("inf")
    warm = False
    while fastest_s == float("inf") or time.perf_counter() < deadline:
        begin = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first product also pays for threads, buffers and the choice of a kernel.
        if warm:
            fastest_s = min(fastest_s, time.perf_counter() - begin)
        warm = True
    return 2.0 * size**3 / fastest_s


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype).removeprefix("torch."))
