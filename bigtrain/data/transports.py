"""One transfer of one file, from where on it is asked for: over HTTP, from S3, from a command. No retries: remote.py.

Whatever goes wrong is Broken (it may work the next time) or Refused (it will not). Their messages are our own: those of
the libraries hold whole URLs, with the secrets in them.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from bigtrain.config import locations
from bigtrain.config.locations import Location

BLOCK_BYTES = 1 << 18
_RETRIED_STATUS = {408, 425, 429}
_CHANGED_STATUS = {412, 416}
_COMMAND_SAID_BYTES = 300


class Broken(Exception):
    """A transfer that failed, and may work the next time."""

    def __init__(self, why: str, *, start_over: bool = False, wait_s: float = 0.0) -> None:
        """`start_over`: what came so far is of no use. `wait_s`: the server asks for so much patience, in seconds."""
        super().__init__(why)
        self.start_over, self.wait_s = start_over, wait_s


class Refused(Exception):
    """A transfer that will not work the next time either."""

    def __init__(self, why: str, *, missing: bool = False) -> None:
        """`missing`: there is no such file."""
        super().__init__(why)
        self.missing = missing


@dataclass(frozen=True)
class Transfer:
    """Bytes on their way."""

    start: int
    """Offset in the file of the first byte: what was asked for, or 0."""
    total: int | None
    """Size of the whole file in bytes, where the source tells it."""
    validator: str | None
    """Names this content of the file: with it, a later transfer goes on only where the file is still the same."""
    read: Callable[[], bytes]
    """The next bytes, as soon as there are some; none at the end."""


Open = Callable[[int, "str | None"], AbstractContextManager[Transfer]]
"""(first byte, validator or None) -> the transfer of a file from there on."""


def opener(location: Location, file: str, timeout_s: float) -> Open:
    """How a file of this folder is transferred. `timeout_s` limits connecting, and waiting for the next byte.

    Raises UserError where an environment variable that the place names is not set."""
    place = locations.join(location, file)
    if location.kind == "pipe":
        return lambda start, validator: _from_command(place, location.name, timeout_s)
    if location.kind == "s3":
        bucket, _, key = place.removeprefix("s3://").partition("/")
        return lambda start, validator: _from_s3(bucket, key, start, validator, timeout_s)
    parts = urlsplit(place)
    user, at, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    looked_up = (locations.look_up(unquote(name)), locations.look_up(unquote(password)))
    url = parts._replace(netloc=host, query=locations.look_up(parts.query)).geturl()
    return lambda start, validator: _from_http(url, looked_up if at else None, start, validator, timeout_s)


def _status_error(status: int, *, resuming: bool, wait_s: float = 0.0) -> Broken | Refused:
    if resuming and status in _CHANGED_STATUS:
        return Broken(f"the file changed (HTTP {status})", start_over=True)
    if status in _RETRIED_STATUS or status >= 500:
        return Broken(f"HTTP {status}", wait_s=wait_s)
    words = {404: ": no such file", 410: ": no such file", 401: ": not allowed", 403: ": not allowed"}
    return Refused(f"HTTP {status}{words.get(status, '')}", missing=status in (404, 410))


# HTTP ---------------------------------------------------------------------------------------------------------------

_sessions = threading.local()


def _session() -> Any:
    """A session of this thread: one connection serves many files. Proxies and ~/.netrc are as the environment says."""
    import requests

    if not hasattr(_sessions, "own"):
        _sessions.own = requests.Session()
        _sessions.own.headers.update({"User-Agent": "bigtrain", "Accept-Encoding": "identity"})
    return _sessions.own


@contextlib.contextmanager
def _from_http(
    url: str, auth: tuple[str, str] | None, start: int, validator: str | None, timeout_s: float
) -> Iterator[Transfer]:
    headers = {"Range": f"bytes={start}-"} if start else {}
    if start and validator:
        headers["If-Range"] = validator
    with contextlib.ExitStack() as open_response:
        with _own_words(timeout_s):
            response = open_response.enter_context(
                _session().get(url, auth=auth, headers=headers, stream=True, timeout=timeout_s)
            )
        began, total = _range(response.status_code, response.headers, start, validator)

        def read() -> bytes:
            with _own_words(timeout_s):
                return response.raw.read1(BLOCK_BYTES, decode_content=False) or b""

        yield Transfer(began, total, _validator(response.headers), read)


def _range(status: int, headers: Mapping[str, str], start: int, validator: str | None) -> tuple[int, int | None]:
    """(first byte, size of the whole file or None) of what the server sends."""
    if status not in (200, 206):
        wait = headers.get("Retry-After", "")
        raise _status_error(status, resuming=start > 0, wait_s=float(wait) if wait.isdecimal() else 0.0)
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise Refused(f"the server sends it with Content-Encoding {encoding[:20]!r}, and it was asked not to")
    if status == 200:
        length = headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise Broken("the server sent another range than it was asked for", start_over=True)
    if validator and validator.startswith('"') and headers.get("ETag", validator) != validator:
        raise Broken("the file changed (another ETag)", start_over=True)
    return start, int(match[2]) if match[2] != "*" else None


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range takes: an ETag that is not weak, or the date."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified")


@contextlib.contextmanager
def _own_words(timeout_s: float) -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _translated(error, timeout_s) from None


def _translated(error: BaseException, timeout_s: float) -> Broken | Refused:
    """By the type of what lies under it, since the text of such an error holds the URL."""
    chain = _causes(error)
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Refused(f"the server's certificate is not valid: {cause.verify_message}")
    names = [type(cause).__name__ for cause in chain]
    if any("ConnectTimeout" in name for name in names):
        return Broken(f"no connection within {timeout_s:g} s")
    if any("Timeout" in name for name in names):
        return Broken(f"nothing came for {timeout_s:g} s")
    if any(name in ("InvalidURL", "TooManyRedirects", "InvalidProxyURL", "InvalidSchema") for name in names):
        return Refused(f"it cannot be asked for ({names[0]})")
    for cause in chain:
        if isinstance(cause, OSError) and cause.strerror:
            return Broken(cause.strerror)
    return Broken(f"the connection broke ({names[-1]})")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and everything that led to it, in the ways in which requests and urllib3 keep it."""
    found: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        at = pending.pop(0)
        if isinstance(at, BaseException) and at not in found:
            found.append(at)
            pending += [getattr(at, "reason", None), *at.args, at.__cause__, at.__context__]
    return found


# S3 -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _from_s3(bucket: str, key: str, start: int, validator: str | None, timeout_s: float) -> Iterator[Transfer]:
    """Credentials, region and endpoint come from the environment, as for every program that uses boto."""
    from fsspec.asyn import sync

    options = {"Range": f"bytes={start}-"} if start else {}
    if start and validator:
        options["IfMatch"] = validator
    with _s3_words(start > 0, timeout_s):
        system, reply = _get_object({"Bucket": bucket, "Key": key, **options}, timeout_s)
    body = reply["Body"]
    ranged = re.fullmatch(rf"bytes {start}-\d+/(\d+)", reply.get("ContentRange", ""))
    began, total = (start, int(ranged[1])) if ranged else (0, int(reply["ContentLength"]))

    def read() -> bytes:
        with _s3_words(True, timeout_s):
            return cast(bytes, sync(system.loop, body.read, BLOCK_BYTES, timeout=timeout_s))

    try:
        yield Transfer(began, total, reply.get("ETag"), read)
    finally:
        body.close()


def _get_object(request: dict[str, str], timeout_s: float) -> tuple[Any, Any]:
    """(file system, reply). Without any credentials the bucket is asked for as what it then has to be: public."""
    from botocore.exceptions import NoCredentialsError
    from s3fs import S3FileSystem

    # The number of attempts is remote.py's matter, for every kind of place alike.
    config = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
    for anonymous in (False, True):
        system = S3FileSystem(anon=anonymous, config_kwargs=config, use_listings_cache=False)
        system.retries = 1
        try:
            return system, system.call_s3("get_object", **request)
        except NoCredentialsError:
            continue
        except PermissionError:
            if anonymous:
                why = "the environment has no S3 credentials (AWS_ACCESS_KEY_ID, ...), and it is not public"
                raise Refused(why) from None
            raise
    raise AssertionError("an anonymous request needs no credentials")


@contextlib.contextmanager
def _s3_words(resuming: bool, timeout_s: float) -> Iterator[None]:
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError, PartialCredentialsError, ProfileNotFound

    try:
        yield
    except (OSError, BotoCoreError, aiohttp.ClientError, ClientError, TimeoutError) as error:
        for cause in _causes(error):
            if isinstance(cause, ClientError):
                status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
                code = str(cause.response.get("Error", {}).get("Code", ""))
                found = _status_error(status, resuming=resuming)
                if isinstance(found, Refused) and re.fullmatch(r"[A-Za-z]{1,60}", code):
                    found = Refused(f"{found} ({code})", missing=found.missing)
                raise found from None
        if isinstance(error, (PartialCredentialsError, ProfileNotFound)):
            raise Refused(f"the S3 credentials of the environment cannot be used ({type(error).__name__})") from None
        raise _translated(error, timeout_s) from None


# Commands -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _from_command(command: str, name: str, timeout_s: float) -> Iterator[Transfer]:
    """Runs it in a shell, as webdataset does. It is of the user's own config; the file's name in it is harmless."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise Broken(f"the command cannot be started: {error.strerror}") from None
        assert process.stdout
        out, ready = process.stdout.fileno(), select.poll()
        ready.register(out)

        def read() -> bytes:
            if not ready.poll(timeout_s * 1000):
                raise Broken(f"the command printed nothing for {timeout_s:g} s")
            if block := os.read(out, BLOCK_BYTES):
                return block
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise Broken(f"the command printed its last and did not end within {timeout_s:g} s") from None
            if status:
                why = f"the command ended with exit status {status}{_tail(said, command, name)}"
                raise Refused(why) if status in (126, 127) else Broken(why)
            return b""

        try:
            yield Transfer(0, None, None, read)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own: the whole pipeline ends
            process.stdout.close()
            process.wait()


def _tail(said: Any, command: str, name: str) -> str:
    """The end of what a command wrote to stderr, without the words of it that are not shown, and without secrets."""
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - 2 * _COMMAND_SAID_BYTES))
    text = " ".join(locations.redacted(said.read().decode(errors="replace")).split())
    hidden = [word.strip("'\"") for word in command.split() if word not in name]
    hidden += [os.environ.get(variable, "") for variable in locations.variables(command)]
    for word in sorted(hidden, key=len, reverse=True):
        if len(word) >= 4:
            text = text.replace(word, "***")
    return f": {text[-_COMMAND_SAID_BYTES:]}" if text else ""
