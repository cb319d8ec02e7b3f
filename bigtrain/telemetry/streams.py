"""Standard output that may lose whoever reads it."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast


class _Tolerant:
    """A stream whose reader may go: a terminal that is closed, the other end of a pipe. It says nothing more then, and
    training goes on, or is saved first where the same has sent SIGHUP. A line that a file does not take is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._read_by_nobody():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._read_by_nobody():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _read_by_nobody(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            if not stat.S_ISREG(os.fstat(self._stream.fileno()).st_mode):  # a file may work again
                nobody = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nobody, self._stream.fileno())
                os.close(nobody)


def tolerant(stream: TextIO) -> TextIO:
    """The stream, which ends nothing when nobody reads it any more. A full disk still raises."""
    return stream if isinstance(stream, _Tolerant) else cast("TextIO", _Tolerant(stream))


@contextmanager
def tolerant_output() -> Generator[None]:
    """So are sys.stdout and sys.stderr meanwhile."""
    with ExitStack() as both:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            both.enter_context(redirect(tolerant(stream)))
            both.callback(tolerant(stream).flush)  # at the end of the process it would be an error
        yield
