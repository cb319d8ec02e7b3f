"""An HTTP server that does what servers do on a bad day, as told: it stalls, cuts off, answers 500, changes its files.

It knows ranges, If-Range and ETags, by RFC 9110 and not by what bigtrain asks for, and logs every request.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    status: int | None = None
    """Answer with this status, and nothing else."""
    headers: tuple[tuple[str, str], ...] = ()
    """More headers; one of ours is replaced."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send nothing more after so many bytes of the body, and keep the connection open."""
    trickle: bool = False
    """A byte every 20 ms."""
    ignore_range: bool = False
    """Send the whole file, whatever was asked for."""
    wrong_range: bool = False
    """Send another range than was asked for."""
    ignore_if_range: bool = False
    """Send the range of the file as it is now, though it changed."""
    replace: bytes | None = None
    """From this request on the file is this."""


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    path: str
    """Without the query string."""
    query: str
    range: str | None
    if_range: str | None
    authorization: str | None
    status: int


@dataclass
class FaultyServer:
    """Serves a folder. A context manager."""

    folder: Path
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    """By file: the faults of its next requests, one each."""
    log: list[Request] = field(default_factory=list)
    etags: bool = True

    def __enter__(self) -> FaultyServer:
        self.closing = threading.Event()
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, file: str, *faults: Fault) -> None:
        self.faults[file].extend(faults)

    def requests(self, file: str) -> list[Request]:
        return [request for request in list(self.log) if request.path == f"/{file}"]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            name = path.lstrip("/")
            fault = server.faults[name].popleft() if server.faults[name] else Fault()
            file = server.folder / name
            if fault.replace is not None:
                file.write_bytes(fault.replace)
            status = fault.status or (200 if file.is_file() else 404)
            content = file.read_bytes() if status == 200 else b""
            first, asked = 0, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if status == 200 and asked and not fault.ignore_range:
                if_range = self.headers.get("If-Range")
                if if_range is None or if_range == etag(content) or fault.ignore_if_range:
                    first = max(0, int(asked[1]) - 7) if fault.wrong_range else int(asked[1])
                    status = 206 if first < len(content) else 416
            entry = Request(
                path,
                query,
                self.headers.get("Range"),
                self.headers.get("If-Range"),
                self.headers.get("Authorization"),
                status,
            )
            server.log.append(entry)
            self._answer(status, first, content, fault)

        def _answer(self, status: int, first: int, content: bytes, fault: Fault) -> None:
            body = content[first:] if status in (200, 206) else b""
            headers = {"Content-Length": str(len(body))}
            if status in (200, 206) and server.etags:
                headers["ETag"] = etag(content)
            if status == 206:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self.send_response(status)
            for name, value in {**headers, **dict(fault.headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self._send(body, fault)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _send(self, body: bytes, fault: Fault) -> None:
            if fault.trickle:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if server.closing.wait(0.02):
                        return
            limits = [limit for limit in (fault.cut_after, fault.stall_after) if limit is not None]
            self.wfile.write(body[: min(limits, default=len(body))])
            self.wfile.flush()
            if fault.stall_after is not None:
                server.closing.wait(60)
            if limits:
                self.close_connection = True
                time.sleep(0)

    return Handler
