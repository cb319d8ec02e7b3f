"""The command's exit status where it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain import launch
from bigtrain.config.schema import Config
from bigtrain.config.status import COME_BACK, CRASHED, STOPPED, USER_ERROR
from bigtrain.launching import attempts
from bigtrain.launching.local import Ended


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "compose", interrupted)
    assert launch.main([]) == 130
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ended", "runs"),
    [
        (Ended(COME_BACK), 1),
        (Ended(STOPPED), 1),
        (Ended(143), 1),
        (Ended(129), 1),
        (Ended(CRASHED), 2),
        (Ended(USER_ERROR, was_warned=True), 1),  # its last save failed
    ],
)
def test_what_stops_a_run_stops_its_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, runs: int
) -> None:
    """A run that fails does not."""
    started: list[str] = []

    def run(config: Config) -> Ended:
        started.append(config.run.name)
        return ended

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_prepare", lambda _: 0)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    monkeypatch.setattr(attempts, "run", run)
    assert launch.main(["--multirun", "run.seed=1,2", "run.name=s", "cluster.device=cpu"]) == ended.status
    assert len(started) == runs
