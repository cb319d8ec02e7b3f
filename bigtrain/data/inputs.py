"""Inputs that are not on this machine: http(s)://, s3:// and whatever else fsspec opens.

A file is downloaded as a whole before it is read, the next one meanwhile, and removed behind its last document. So
every format works from everywhere, and a broken transfer never reaches a reader. Failures that may pass (a server's
500, a time-out, a lost connection) are tried again, waiting longer each time.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bigtrain.config.errors import UserError

T = TypeVar("T")
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Between one try and the next, each give or take a half."""
STALL_S = 60.0
"""A server that sends nothing for so long has failed."""
_AT_ONCE = 16
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(r"(?i)([?&][^=&]*(?:sig|token|key|credential|secret|password)[^=&]*=)[^&]*")
_PASSING_STATUS = {408, 425, 429}


@dataclass(frozen=True)
class Stat:
    """What tells one content of an input from another without reading it."""

    size_bytes: int
    """0 where a server does not tell."""
    version: str
    """Time of the last change, or the server's ETag."""


def is_url(name: str) -> bool:
    return bool(_SCHEME.match(name))


def without_secrets(name: str) -> str:
    """The name as it may stand in an index that others read: no user, password or signature."""
    if not is_url(name):
        return name
    scheme, _, rest = name.partition("://")
    host, slash, path = rest.partition("/")
    return _SECRET.sub(r"\1...", f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def without_query(name: str) -> str:
    """The name up to ``?``: its end tells the format."""
    return urlsplit(name).path if name.startswith(("http://", "https://")) else name


def find(url: str) -> list[str]:
    """The files that a URL names: itself, those that match it as a glob, or those of a folder, in the order of their
    names. Over HTTP a folder ends in / and is what the links of its page tell. Raises UserError where it cannot be
    asked for."""

    def attempt() -> list[str]:
        filesystem, path = _open(url)
        if any(letter in url for letter in ("*" if _is_http(url) else "*?[")):
            found = [name for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"]
        elif url.endswith("/") or (not _is_http(url) and filesystem.isdir(path)):
            found = filesystem.find(path)
        else:
            return [url]
        return [filesystem.unstrip_protocol(name) for name in sorted(found) if not _is_hidden(name)]

    return _tried(url, attempt)


def _is_hidden(name: str) -> bool:
    last = name.rpartition("/")[2]
    return not last or last.startswith(".")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def stat(names: Sequence[str]) -> list[Stat]:
    """Size and version of each input. Raises UserError for one that is not there."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        remote = iter(pool.map(_stat_url, filter(is_url, names)))
        return [next(remote) if is_url(name) else _stat_file(name) for name in names]


def _stat_file(name: str) -> Stat:
    try:
        found = os.stat(name)
    except OSError as error:
        raise UserError(f"input {name}: cannot be read: {error.strerror}") from error
    return Stat(found.st_size, str(found.st_mtime_ns))


def _stat_url(url: str) -> Stat:
    def attempt() -> Stat:
        filesystem, path = _open(url)
        info = filesystem.info(path)
        marks = (info.get(name) for name in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "updated"))
        return Stat(info.get("size") or 0, str(next((mark for mark in marks if mark), "")))

    return _tried(url, attempt)


def local_paths(names: Sequence[str], scratch: Path | None = None) -> Generator[str]:
    """For each input a path to read it at, until the next one is asked for. Raises UserError for one that cannot be
    downloaded."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_folder(scratch)) if any(map(is_url, names)) else ""
        coming: Future[str] | None = None
        for number, name in enumerate(names):
            path = (coming or _begun(name, folder, number)).result()
            coming = _begun(names[number + 1], folder, number + 1) if number + 1 < len(names) else None
            yield path
            if is_url(name):
                os.unlink(path)


def _folder(scratch: Path | None) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="inputs-", dir=scratch, ignore_cleanup_errors=True)


def _begun(name: str, folder: str, number: int) -> Future[str]:
    """The path of an input, at once or when it is downloaded."""
    path: Future[str] = Future()
    if not is_url(name):
        path.set_result(name)
        return path

    def download() -> None:
        target = os.path.join(folder, str(number))
        try:
            _tried(name, lambda: _download(name, target))
            path.set_result(target)
        except BaseException as error:
            path.set_exception(error)

    # Not a pool's thread: those would hold up the end of the program until a slow server has answered.
    threading.Thread(target=download, daemon=True, name=f"download {number}").start()
    return path


def _download(url: str, target: str) -> None:
    filesystem, path = _open(url)
    filesystem.get_file(path, target)
    size, found = filesystem.info(path).get("size"), os.path.getsize(target)
    if size is not None and size != found:
        raise OSError(f"{found:,} of {size:,} bytes came")


def _open(url: str) -> tuple[Any, str]:
    """The file system and the path in it."""
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp

        # The bytes as they lie there: a .gz must not arrive unpacked. And no limit on the whole time, on stalls only.
        wait = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
        options = {
            "headers": {"Accept-Encoding": "identity"},
            "client_kwargs": {"timeout": wait, "auto_decompress": False},
        }
    return url_to_fs(url, **options)


def _tried(url: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, tried again while a failure may pass. Raises UserError after the last try."""
    name = without_secrets(url)
    for number, wait in enumerate([*WAITS_S, None], start=1):
        try:
            return attempt()
        except ImportError as error:
            raise UserError(f"input {name}: {error}") from error
        except Exception as error:  # each protocol's library has errors of its own
            if wait is None or not _may_pass(error):
                times = f" (tried {number} times)" if number > 1 else ""
                raise UserError(
                    f"input {name}: cannot be fetched: {_why(error)}{times}. Check the address, the network and the "
                    "access rights, or leave it out (--exclude)."
                ) from error
        time.sleep(wait * random.uniform(0.5, 1.5))
    raise AssertionError("not reached: the last try returns or raises")


def _may_pass(error: BaseException) -> bool:
    if (status := _status(error)) is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # so fsspec reports a lost connection
        return _may_pass(error.__cause__)
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ValueError)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, as aiohttp or botocore tell it."""
    response = getattr(error, "response", None)
    known = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = known or getattr(error, "status", None)
    if isinstance(status, int):
        return status
    return _status(error.__cause__) if error.__cause__ is not None else None


def _why(error: BaseException) -> str:
    if (status := _status(error)) is not None:
        return f"the server answers {status}"
    if isinstance(error, FileNotFoundError):
        return _why(error.__cause__) if error.__cause__ is not None else "it is not there"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
