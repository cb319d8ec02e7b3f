"""Shards on S3: moto speaks its protocol, in a process of its own; boto3 puts them there."""

from __future__ import annotations

import hashlib
import io
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.config import Config
from s3fs import S3FileSystem

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.data import remote
from bigtrain.data.cache import Cache
from bigtrain.data.folders import Places
from bigtrain.data.remote import Expected, MissingError, Policy
from bigtrain.data.shards import Dataset
from bigtrain.launching.environment import free_port

POLICY = Policy(timeout_s=5, retries=3, backoff_s=0.05)
LARGE = random.Random(4).randbytes(3_000_000)
OTHER = random.Random(5).randbytes(3_000_000)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
        server.terminate()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client on a bucket called data; the environment is that of a machine which may read it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", config=Config(retries={"total_max_attempts": 1}))
    client.create_bucket(Bucket="data")
    client.put_object(Bucket="data", Key="large", Body=LARGE)
    yield client
    S3FileSystem.clear_instance_cache()


def fetch(file: str, expected: Expected, *, place: str = "s3://data", policy: Policy = POLICY) -> bytes:
    out = io.BytesIO()
    remote.fetch(locations.parse(place), file, out, expected, policy=policy)
    return out.getvalue()


def about(content: bytes) -> Expected:
    return Expected(len(content), len(content), hashlib.sha256(content).hexdigest())


def test_the_same_as_on_the_disk(s3: Any, built: Path, tmp_path: Path) -> None:
    for path in (built / "train").iterdir():
        s3.upload_file(str(path), "data", f"corpus/v1/{path.name}")
    places = Places(Cache(tmp_path / "cache", max_bytes=1 << 30), POLICY)
    here, there = Dataset.open(built / "train"), Dataset.open("s3://data/corpus/v1/", places=places)
    assert len(here.index.shards) > 3
    for document in range(len(here)):
        assert np.array_equal(there.tokens(document), here.tokens(document))
    s3.delete_object(Bucket="data", Key="corpus/v1/index.json")
    with pytest.raises(MissingError, match=r"data s3://data/corpus/v1/: index\.json: HTTP 404: no such file"):
        Dataset.open("s3://data/corpus/v1/", places=places)


def test_the_endpoint_of_s3_goes_before_the_one_of_all(s3: Any, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    S3FileSystem.clear_instance_cache()
    assert fetch("large", about(LARGE)) == LARGE


def test_what_is_not_there(s3: Any) -> None:
    for place in ("s3://data/nowhere", "s3://no-such-bucket"):
        with pytest.raises(MissingError, match=f"data {place}: large: HTTP 404: no such file"):
            fetch("large", about(LARGE), place=place)


def test_no_endpoint(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"large: .*, 2 times in a row") as caught:
        fetch("large", about(LARGE), policy=Policy(2, 1, 0.01))
    assert "hunter22" not in str(caught.value) and "AKIA" not in str(caught.value)


def test_a_public_bucket_needs_no_credentials(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"large: the environment has no S3 credentials .* not public"):
        fetch("large", about(LARGE))
    s3.put_object_acl(Bucket="data", Key="large", ACL="public-read")
    assert fetch("large", about(LARGE)) == LARGE


@dataclass
class Proxy:
    """Between s3fs and moto: cuts or stalls the first connections after so many bytes from the server."""

    upstream: tuple[str, int]
    faults: list[tuple[str, int]]
    ranges: list[str | None] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        fault, limit = self.faults.pop(0) if self.faults else ("", 1 << 60)
        with connection, socket.create_connection(self.upstream) as upstream:
            request = connection.recv(1 << 16)
            match = re.search(rb"(?im)^range: *(\S+)", request)
            self.ranges.append(match[1].decode() if match else None)
            # One request a connection, so that each meets a fault of its own.
            upstream.sendall(
                re.sub(rb"(?im)^connection: *\S+\r\n", b"", request).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            )
            sent = 0
            while sent < limit and (block := upstream.recv(min(1 << 16, limit - sent))):
                connection.sendall(block)
                sent += len(block)
            if fault == "stall":
                self._closing.wait(30)


@pytest.fixture
def proxied(s3: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    host, port = endpoint.removeprefix("http://").split(":")
    with Proxy((host, int(port)), []) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()
        yield proxy


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_broken_transfer_goes_on_where_it_was(proxied: Proxy, fault: str) -> None:
    proxied.faults += [(fault, 1_000_000), (fault, 1_000_000)]
    assert fetch("large", about(LARGE), policy=Policy(1, 3, 0.05)) == LARGE
    first, *rest = proxied.ranges
    starts = [int(re.fullmatch(r"bytes=(\d+)-", each or "")[1]) for each in rest]  # pyright: ignore
    assert first is None and 0 < starts[0] <= 1_000_000 and starts[0] < starts[1] <= 2_000_000


def test_an_object_that_changes_in_between_is_not_spliced(proxied: Proxy, s3: Any) -> None:
    proxied.faults.append(("cut", 1_000_000))
    fetched: list[bytes] = []
    thread = threading.Thread(
        target=lambda: fetched.append(fetch("large", Expected(1 << 24), policy=Policy(5, 3, 1.0)))  # no hash to tell
    )
    thread.start()
    deadline = time.monotonic() + 20
    while proxied.faults and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    s3.put_object(Bucket="data", Key="large", Body=OTHER)
    thread.join(30)
    assert fetched == [OTHER]
    assert proxied.ranges[-1] is None and len(proxied.ranges) == 3
