"""The command's exit status where it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain import launch
from bigtrain.config.schema import Config
from bigtrain.config.status import COME_BACK, CRASHED, STOPPED
from bigtrain.launching import attempts


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "compose", interrupted)
    assert launch.main([]) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("status", "runs"), [(COME_BACK, 1), (STOPPED, 1), (143, 1), (CRASHED, 2)])
def test_what_stops_a_run_stops_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, runs: int
) -> None:
    """A run that fails does not."""
    started: list[str] = []

    def train(config: Config) -> int:
        started.append(config.run.name)
        return status

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_prepare", lambda _: 0)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    monkeypatch.setattr(attempts, "train", train)
    assert launch.main(["--multirun", "run.seed=1,2", "run.name=s", "cluster.device=cpu"]) == status
    assert len(started) == runs
