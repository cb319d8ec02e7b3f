"""Shards behind a real nginx."""

from __future__ import annotations

import hashlib
import io
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.data import remote
from bigtrain.data.cache import Cache
from bigtrain.data.folders import Places
from bigtrain.data.remote import Expected, Policy
from bigtrain.data.shards import Dataset
from tests.integration.nginx import BINARY, PASSWORD, USER, WHY_SKIPPED, Nginx

pytestmark = pytest.mark.skipif(BINARY is None, reason=WHY_SKIPPED)
POLICY = Policy(timeout_s=5, retries=5, backoff_s=0.1)
LARGE = random.Random(3).randbytes(2_500_000)


@pytest.fixture(scope="module")
def root(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and valid/, and a large file."""
    root = tmp_path_factory.mktemp("root") / "data"
    shutil.copytree(built, root)
    (root / "large").write_bytes(LARGE)
    return root


@pytest.fixture
def nginx(root: Path, tmp_path: Path) -> Iterator[Nginx]:
    with Nginx(root, tmp_path / "nginx") as nginx:
        yield nginx


@pytest.mark.parametrize("path", ["train", "private/train", "moved/train"])
def test_the_same_as_on_the_disk(
    nginx: Nginx, root: Path, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDS_USER", USER)
    monkeypatch.setenv("SHARDS_PASSWORD", PASSWORD)
    url = nginx.url.replace("//", "//$SHARDS_USER:$SHARDS_PASSWORD@") if path.startswith("private") else nginx.url
    places = Places(Cache(tmp_path / "cache", max_bytes=1 << 30), POLICY)
    here, there = Dataset.open(root / "train"), Dataset.open(f"{url}/{path}", places=places)
    assert len(here.index.shards) > 3
    for document in range(len(here)):
        assert np.array_equal(there.tokens(document), here.tokens(document))


def test_netrc_gives_the_password(nginx: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(Cache(tmp_path / "cache", max_bytes=1 << 30), POLICY)
    with pytest.raises(UserError, match=r"index\.json: HTTP 401: not allowed"):
        Dataset.open(f"{nginx.url}/private/train", places=places)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(Dataset.open(f"{nginx.url}/private/train", places=places))


def test_a_server_that_is_started_again_in_the_middle(nginx: Nginx) -> None:
    out = io.BytesIO()
    expected = Expected(len(LARGE), len(LARGE), hashlib.sha256(LARGE).hexdigest())
    place = locations.parse(f"{nginx.url}/slow")
    fetch = threading.Thread(target=remote.fetch, args=(place, "large", out, expected), kwargs={"policy": POLICY})
    fetch.start()
    deadline = time.monotonic() + 20
    while out.getbuffer().nbytes < 500_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    nginx.stop()
    time.sleep(0.3)
    nginx.start()
    fetch.join(30)
    assert out.getvalue() == LARGE
    (rest,) = [line.split() for line in nginx.log() if " 206 " in line]
    assert rest[0] == "/slow/large" and int(rest[2].strip('"').removeprefix("bytes=").rstrip("-")) >= 500_000
    assert int(rest[3]) < len(LARGE) - 500_000 + 1


def test_by_curl_as_webdataset_users_write_it(nginx: Nginx, root: Path, tmp_path: Path) -> None:
    places = Places(Cache(tmp_path / "cache", max_bytes=1 << 30), Policy(timeout_s=5, retries=0))
    there = Dataset.open(f"pipe:curl -sfL {nginx.url}/moved/train/{{file}}", places=places)
    assert np.array_equal(there.tokens(5), Dataset.open(root / "train").tokens(5))
    with pytest.raises(UserError, match=r"index\.json: the command ended with exit status 22"):
        Dataset.open(f"pipe:curl -sfL {nginx.url}/nowhere/{{file}}", places=places)
