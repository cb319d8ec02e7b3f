"""The command's exit status where its user presses Ctrl-C."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain import launch


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "compose", interrupted)
    assert launch.main([]) == 130
    assert capfd.readouterr() == ("", "")
