"""Output that nobody reads any more ends nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.telemetry.streams import tolerant


@pytest.mark.parametrize("arguments", [["--keys"], ["--cfg", "job"], ["no.such.key=1"]])
def test_a_launcher_whose_pipe_is_closed_ends_as_ever(arguments: list[str]) -> None:
    """As behind a `tee` that was killed. A sweep would not start its next run."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bigtrain.launch", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=writing, timeout=60)
    os.close(writing)
    assert done.returncode == (2 if "=" in arguments[0] else 0)


def test_a_file_that_did_not_take_a_line_takes_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may say EIO and work again."""
    with (tmp_path / "job.out").open("w") as file:
        stream = tolerant(file)

        def refuse(text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as broken:
            broken.setattr(stream, "_stream", _With(file, refuse))
            stream.write("lost\n")
        stream.write("kept\n")
    assert (tmp_path / "job.out").read_text() == "kept\n"


def test_a_full_disk_is_not_hidden() -> None:
    with open("/dev/full", "w") as full:
        stream = tolerant(full)
        stream.write("text")
        with pytest.raises(OSError, match="No space left"):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # else closing it raises, too


class _With:
    """A file with another `write`."""

    def __init__(self, file: object, write: object) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)
