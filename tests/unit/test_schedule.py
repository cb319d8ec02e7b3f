"""Learning rate schedules against torch's own."""

from __future__ import annotations

import pytest
import torch

from bigtrain.config.schema import ScheduleConfig
from bigtrain.optim.schedule import share_of_peak

STEPS, WARMUP = 50, 10


def curve(name: str, **settings: float) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=WARMUP, min_ratio=0.1, **settings)
    return [share_of_peak(step, STEPS, config) for step in range(STEPS)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warms_up_to_the_peak(name: str) -> None:
    assert curve(name)[:WARMUP] == pytest.approx([(i + 1) / WARMUP for i in range(WARMUP)])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_ends_at_the_minimum(name: str) -> None:
    assert curve(name)[-1] == pytest.approx(0.1)
    assert min(curve(name)[WARMUP:]) == pytest.approx(0.1)


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=0.1)
    expected = []
    for _ in range(STEPS - WARMUP):
        optimizer.step()
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert curve("cosine")[WARMUP:] == pytest.approx(expected)


def test_linear_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS - WARMUP)
    expected = []
    for _ in range(STEPS - WARMUP):
        optimizer.step()
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert curve("linear")[WARMUP:] == pytest.approx(expected)


def test_wsd_stays_then_decays() -> None:
    shares = curve("wsd", decay_fraction=0.2)
    assert shares[WARMUP:40] == [1.0] * 30
    assert shares[40:] == sorted(shares[40:], reverse=True)
    assert shares[40] < 1.0


def test_constant_stays() -> None:
    assert set(curve("constant")[WARMUP:]) == {1.0}


def test_no_warmup() -> None:
    assert share_of_peak(0, 10, ScheduleConfig(warmup_steps=0)) < 1.0
