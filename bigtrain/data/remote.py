"""A file of a remote shard folder, fetched whole or not at all.

A transfer that breaks, stalls or is answered by a busy server is tried again, later each time, and goes on where it
was: the source is asked for the rest of the same content only, so a file that changed in between is not spliced. At the
end the size and, where the index knows it, the sha256 must be right.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
import threading
import time
from dataclasses import dataclass

from bigtrain.config.errors import UserError
from bigtrain.config.locations import Location
from bigtrain.data.transports import Broken, Open, Refused, Transfer, opener

LONGEST_WAIT_S = 30.0
_STALLED_BYTES_PER_S = 1024
_PROGRESS_BYTES = 1 << 16
_log = logging.getLogger(__name__)

File = io.FileIO | io.BytesIO
"""Where bytes go; not buffered."""


@dataclass(frozen=True)
class Policy:
    """How patient a fetch is."""

    timeout_s: float = 30.0
    """To connect, and without hardly a byte coming."""
    retries: int = 8
    """Failures in a row, without the transfer getting further, that are forgiven."""
    backoff_s: float = 1.0
    """Pause after the first failure; doubled after each further one, up to LONGEST_WAIT_S."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is fetched."""

    max_bytes: int
    """More than this is an error: no server fills the disk."""
    size_bytes: int | None = None
    sha256: str | None = None


class MissingError(UserError):
    """The source says that it has no such file."""


class Cancelled(Exception):
    """Nobody wants the file any more."""


def fetch(
    location: Location,
    file: str,
    out: File,
    expected: Expected,
    *,
    policy: Policy,
    cancelled: threading.Event | None = None,
) -> None:
    """Write FOLDER/file into `out`, open for reading and writing.

    What is in `out` already is taken for the beginning of the file where `expected.sha256` will prove it. Raises
    UserError where the file is not there (MissingError), is another one than expected, or does not come however often
    it is asked for; Cancelled; OSError where `out` cannot be written.
    """
    name = f"data {location.name}: {file}"
    opened = opener(location, file, policy.timeout_s)
    cancelled = cancelled or threading.Event()
    validator: str | None = None
    failures, furthest = 0, 0
    if not expected.sha256:
        out.truncate(0)
    while True:
        attempt = _Attempt(opened, out, expected, validator, policy.timeout_s, cancelled)
        try:
            attempt.run()
            return
        except Refused as refused:
            raise (MissingError if refused.missing else UserError)(f"{name}: {refused}.") from None
        except Broken as broken:
            validator = attempt.validator
            reached = out.seek(0, io.SEEK_END)
            failures = 1 if reached >= furthest + _PROGRESS_BYTES else failures + 1
            furthest = max(furthest, reached)
            if broken.start_over or not (validator or expected.sha256):
                validator = None
                out.truncate(0)
            if failures > policy.retries:
                times = f"{failures} times in a row" if failures > 1 else "once"
                raise UserError(f"{name}: {broken}, {times} (data.remote.retries={policy.retries}).") from None
            pause = max(min(broken.wait_s, LONGEST_WAIT_S), _pause(failures, policy.backoff_s))
            _log.warning("%s: %s; trying again in %.1f s (%d of %d)", name, broken, pause, failures, policy.retries)
            if cancelled.wait(pause):
                raise Cancelled from None


def read(location: Location, file: str, expected: Expected, *, policy: Policy) -> bytes:
    """A small file, as `fetch` does it."""
    out = io.BytesIO()
    fetch(location, file, out, expected, policy=policy)
    return out.getvalue()


def _pause(failures: int, backoff_s: float) -> float:
    """Seconds; drawn, so that many machines which failed together do not come back together."""
    return random.uniform(0.5, 1.0) * min(LONGEST_WAIT_S, backoff_s * 2.0 ** (failures - 1))


class _Attempt:
    """One try to complete `out`."""

    def __init__(
        self,
        opened: Open,
        out: File,
        expected: Expected,
        validator: str | None,
        timeout_s: float,
        cancelled: threading.Event,
    ) -> None:
        self._open, self._out, self._expected = opened, out, expected
        self._timeout_s, self._cancelled = timeout_s, cancelled
        self.validator = validator
        """Of the content whose beginning is in `out`."""

    def run(self) -> None:
        have = self._out.seek(0, io.SEEK_END)
        if have != self._expected.size_bytes:
            with self._open(have, self.validator if have else None) as transfer:
                self.validator = transfer.validator
                self._out.truncate(transfer.start)
                self._out.seek(transfer.start)
                self._check_size(transfer.total)
                most = self._expected.max_bytes
                if transfer.total is not None and transfer.total > most:
                    raise Refused(f"it has {transfer.total:,} bytes, more than {most:,}: split it into smaller files")
                self._copy(transfer)
        self._check_content()

    def _copy(self, transfer: Transfer) -> None:
        watch = _Watch(self._timeout_s)
        at, limit = transfer.start, self._expected.max_bytes
        while block := transfer.read():
            at += len(block)
            if at > limit:
                raise Broken(f"more than {limit} bytes came", start_over=True)
            _write_all(self._out, block)
            watch.saw(len(block))
            if self._cancelled.is_set():
                raise Cancelled
        if transfer.total is not None and at != transfer.total:
            raise Broken(f"the transfer ended after {at} of {transfer.total} bytes")

    def _check_size(self, size: int | None) -> None:
        wanted = self._expected.size_bytes
        if size is not None and wanted is not None and size != wanted:
            raise Broken(f"it has {size} bytes, and the index says {wanted}", start_over=True)

    def _check_content(self) -> None:
        self._check_size(self._out.seek(0, io.SEEK_END))
        if self._expected.sha256:
            self._out.seek(0)
            if hashlib.file_digest(self._out, "sha256").hexdigest() != self._expected.sha256:
                raise Broken("its sha256 is not that of the index: damaged, or another file", start_over=True)


class _Watch:
    """Bytes must flow: one a minute keeps a connection open for ever."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since, self._bytes = time.monotonic(), 0

    def saw(self, num_bytes: int) -> None:
        """Raises Broken where fewer than _STALLED_BYTES_PER_S came through the last `timeout_s`."""
        self._bytes += num_bytes
        took = time.monotonic() - self._since
        if took < self._timeout_s:
            return
        if self._bytes < _STALLED_BYTES_PER_S * took:
            raise Broken(f"only {self._bytes} bytes came in {took:.0f} s")
        self._since, self._bytes = time.monotonic(), 0


def _write_all(out: File, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[out.write(rest) :]
