"""Peaks: the datasheet where the device is known, a measurement where it is not."""

from __future__ import annotations

import time

import pytest
import torch

from bigtrain.telemetry.peak import datasheet_peak, device_peak


@pytest.mark.parametrize(
    ("name", "bf16_tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
    ],
)
def test_names_that_drivers_report(name: str, bf16_tflops: float) -> None:
    peak = datasheet_peak(name, torch.bfloat16)
    assert peak is not None
    assert peak.flops_per_second == pytest.approx(bf16_tflops * 1e12)
    assert peak.source == "datasheet, dense bf16"


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10G", "Some GPU", ""])
def test_unknown_devices_are_not_guessed(name: str) -> None:
    assert datasheet_peak(name, torch.bfloat16) is None


def test_fp32_is_tf32_only_where_that_is_on() -> None:
    plain = datasheet_peak("NVIDIA A100-SXM4-80GB", torch.float32)
    tf32 = datasheet_peak("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True)
    assert plain is not None and tf32 is not None
    assert (plain.flops_per_second, tf32.flops_per_second) == (19.5e12, 156e12)
    assert datasheet_peak("NVIDIA A100-SXM4-80GB", torch.float64) is None


def test_a_cpu_is_measured() -> None:
    begin = time.perf_counter()
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 5
    assert peak.source == "measured GEMM peak, fp32"
    # No CPU core is slower than 1 GFLOP/s, no CPU faster than 100 TFLOP/s.
    assert 1e9 < peak.flops_per_second < 1e14


def test_ranks_that_outnumber_the_cores_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.telemetry.peak._measure_gemm", lambda *_: 100e9)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    for ranks, share in ((1, 1.0), (2, 1.0), (4, 0.5)):
        peak = device_peak(torch.device("cpu"), torch.float32, ranks_on_machine=ranks)
        assert peak.flops_per_second == 100e9 * share
