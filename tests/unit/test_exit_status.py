"""What a command makes of a mistake and of Ctrl-C."""

from __future__ import annotations

import pytest

from bigtrain.config.errors import UserError, exit_status


def raising(error: BaseException) -> int:
    raise error


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: 7) == 7
    assert exit_status(lambda: raising(UserError("no such file"))) == 2
    assert exit_status(lambda: raising(KeyboardInterrupt()), "stopped; it goes on") == 130
    assert exit_status(lambda: raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: no such file\nstopped; it goes on\n"
    with pytest.raises(ZeroDivisionError):  # a defect of ours is no mistake of the user
        exit_status(lambda: 1 // 0)
