"""Many processes share one cache: each shard is fetched once, the limit holds, and SIGKILL leaves nothing half."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain.data.shards import Dataset
from tests.faulty_server import Fault, FaultyServer

READER = """
import random, sys, zlib
from pathlib import Path
from bigtrain.data.cache import Cache
from bigtrain.data.folders import Places
from bigtrain.data.remote import Policy
from bigtrain.data.shards import Dataset

place, folder, max_bytes, seed, rounds = sys.argv[1:]
dataset = Dataset.open(place, places=Places(Cache(Path(folder), max_bytes=int(max_bytes)), Policy(20, 3, 0.05)))
print("open", flush=True)
firsts = [0]
for shard in dataset.index.shards:
    firsts.append(firsts[-1] + shard.num_documents)
found = {}
for _ in range(int(rounds)):
    for shard in random.Random(seed).sample(range(len(firsts) - 1), len(firsts) - 1):
        for document in range(firsts[shard], firsts[shard + 1]):
            found[document] = zlib.crc32(dataset.tokens(document).tobytes())
print(sum(document * crc for document, crc in found.items()), len(found), flush=True)
"""


@pytest.fixture
def server(built: Path) -> Iterator[FaultyServer]:
    with FaultyServer(built / "train") as server:
        yield server


@pytest.fixture
def expected(built: Path) -> str:
    dataset = Dataset.open(built / "train")
    crcs = [zlib.crc32(dataset.tokens(document).tobytes()) for document in range(len(dataset))]
    return f"{sum(document * crc for document, crc in enumerate(crcs))} {len(crcs)}"


def reader(
    server: FaultyServer, cache: Path, *, max_bytes: int = 1 << 30, seed: int = 0, rounds: int = 1
) -> subprocess.Popen[str]:
    arguments = [server.url, str(cache), str(max_bytes), str(seed), str(rounds)]
    return subprocess.Popen(
        [sys.executable, "-c", READER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out.split("\n")[1]


def whole_files(cache: Path) -> list[Path]:
    files = [path for path in cache.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name)]
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    return files


def test_processes_fetch_each_file_once(server: FaultyServer, tmp_path: Path, expected: str) -> None:
    processes = [reader(server, tmp_path / "cache") for _ in range(4)]
    assert [result(process) for process in processes] == [expected] * 4
    asked = Counter(request.path for request in server.log)
    assert asked.pop("/index.json") == 4
    assert set(asked.values()) == {1} and len(asked) == 1 + 2 * len(list(server.folder.glob("*.tar")))
    assert len(whole_files(tmp_path / "cache")) == len(asked)


def test_a_limit_that_forces_eviction(server: FaultyServer, tmp_path: Path, expected: str) -> None:
    tars = [path.stat().st_size for path in server.folder.glob("*.tar")]
    always = sum(path.stat().st_size for path in server.folder.iterdir()) - sum(tars)
    limit = always + 3 * max(tars)
    assert len(tars) > 6
    processes = [reader(server, tmp_path / "cache", max_bytes=limit, seed=seed, rounds=3) for seed in range(4)]
    assert [result(process) for process in processes] == [expected] * 4
    asked = Counter(request.path for request in server.log if request.path.endswith(".tar"))
    assert max(asked.values()) > 1, "nothing was evicted"
    # The last fetch made room for itself; what others held at that moment may be too much until the next one.
    assert result(reader(server, tmp_path / "cache", max_bytes=limit)) == expected
    whole_files(tmp_path / "cache")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit


def test_killed_in_the_middle_of_a_download(server: FaultyServer, tmp_path: Path, expected: str) -> None:
    cache = tmp_path / "cache"
    server.fail("shard-000000.tar", Fault(stall_after=5_000))
    killed = reader(server, cache, seed=3)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        parts = [path for path in cache.glob("*.part") if path.stat().st_size == 5_000] if cache.exists() else []
        if parts:
            break
        time.sleep(0.02)
    waits = reader(server, cache, seed=3)  # it finds the download on its way, and waits
    assert waits.stdout and waits.stdout.readline() == "open\n"
    time.sleep(0.3)
    assert len(server.requests("shard-000000.tar")) == 1 and waits.poll() is None
    tar = hashlib.sha256((server.folder / "shard-000000.tar").read_bytes()).hexdigest()
    assert parts[0].name.startswith(tar) and not (cache / tar).exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    out, errors = waits.communicate(timeout=60)
    assert out.strip() == expected, errors
    assert [request.range for request in server.requests("shard-000000.tar")] == [None, "bytes=5000-"]
    assert len(whole_files(cache)) == len(list(cache.iterdir())) - 1  # beside .lock
