"""Shards behind a URL or a command are the shards on the disk: the same tokens, and one clear error otherwise."""

from __future__ import annotations

import io
import json
import resource
import shutil
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.config.schema import (
    CacheConfig,
    Config,
    DataConfig,
    ModelConfig,
    RemoteConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from bigtrain.data import prepare
from bigtrain.data.cache import Cache
from bigtrain.data.folders import Places, allow_open_files, check_room
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.data.loader import batches
from bigtrain.data.order import Order, Source
from bigtrain.data.remote import MissingError, Policy
from bigtrain.data.shards import Dataset
from bigtrain.data.text_tars import TextTars
from bigtrain.data.tokenizer import Tokenizer
from tests.faulty_server import Fault, FaultyServer

from .conftest import load_tool

QUICK = Policy(timeout_s=0.5, retries=2, backoff_s=0.01)


@pytest.fixture
def server(built: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(built, tmp_path / "served")
    with FaultyServer(tmp_path / "served") as server:
        yield server


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(Cache(tmp_path / "cache", max_bytes=1 << 30), QUICK)


def tar_bytes(dataset: Dataset) -> int:
    return max(shard.size_bytes for shard in dataset.index.shards)


def fetched(server: FaultyServer) -> list[str]:
    return [request.path for request in server.log if request.path.endswith(".tar")]


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_the_same_as_on_the_disk(built: Path, server: FaultyServer, places: Places, kind: str) -> None:
    place = f"{server.url}/train" if kind == "http" else f"pipe:cat '{server.folder}/train/{{file}}'"
    here, there = Dataset.open(built / "train"), Dataset.open(place, places=places)
    assert there.index == here.index and there.fingerprint == here.fingerprint and there.is_remote
    assert there.tokenizer.files == here.tokenizer.files
    assert np.array_equal(there.num_tokens_of_documents(), here.num_tokens_of_documents())
    for document in np.random.default_rng(0).permutation(len(here)).tolist():
        assert np.array_equal(there.tokens(document), here.tokens(document))
        assert np.array_equal(there.tokens(document, 2, 5), here.tokens(document, 2, 5))
        assert there.describe(document) == here.describe(document)
    if kind == "http":
        asked = [request.path for request in server.log]
        assert len(asked) == len(set(asked)) == 2 + 2 * len(here.index.shards)


def test_shards_come_at_their_first_use_and_only_then(server: FaultyServer, places: Places) -> None:
    dataset = Dataset.open(f"{server.url}/train", places=places)
    assert fetched(server) == []
    for document in (0, 1):
        dataset.tokens(document)
    assert fetched(server) == ["/train/shard-000000.tar"]
    dataset.tokens(len(dataset) - 1)
    assert len(fetched(server)) == 2
    again = Dataset.open(f"{server.url}/train", places=Places(Cache(places.cache.folder, max_bytes=1 << 30), QUICK))
    again.tokens(0)
    assert len(fetched(server)) == 2


def test_a_cache_of_few_shards_serves(built: Path, server: FaultyServer, places: Places) -> None:
    here = Dataset.open(built / "train")
    limit = 4 * tar_bytes(here) + 20_000
    places = Places(Cache(places.cache.folder, max_bytes=limit), QUICK)
    there = Dataset.open(f"{server.url}/train", places=places)
    for document in range(len(here)):
        assert np.array_equal(there.tokens(document), here.tokens(document))
    assert len(here.index.shards) > 6 and len(fetched(server)) == len(here.index.shards)
    assert sum(path.stat().st_size for path in places.cache.folder.iterdir()) <= limit


def order_of(dataset: Dataset) -> Order:
    return Order([Source(dataset)], seed=5, num_lanes=4, sequence_length=24)


def take(order: Order, count: int, num_workers: int) -> list[torch.Tensor]:
    steps = batches(
        order,
        data_rank=1,
        data_size=2,
        global_batch_size=8,
        micro_batch_size=4,
        start=order.start(),
        num_workers=num_workers,
    )
    found = [next(steps).microbatches[0].tokens_BS for _ in range(count)]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_batches(built: Path, server: FaultyServer, places: Places, num_workers: int) -> None:
    here = take(order_of(Dataset.open(built / "train")), 30, 0)
    there = take(order_of(Dataset.open(f"{server.url}/train", places=places)), 30, num_workers)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_shards_of_later_steps_are_fetched_ahead(server: FaultyServer, places: Places) -> None:
    order = order_of(Dataset.open(f"{server.url}/train", places=places))
    dataset = order.datasets[0]
    assert isinstance(dataset, Dataset)

    def shards_of(num_steps: int) -> set[str]:
        pieces = [piece for step in range(num_steps) for piece in order.pieces(2 * step + 1)]
        return {f"/train/{dataset.index.shards[dataset.shard_of(piece.document)].file}" for piece in pieces}

    steps = batches(
        order, data_rank=1, data_size=2, global_batch_size=2, micro_batch_size=1, start=order.start(), num_workers=1
    )
    next(steps)
    ahead = max(shard.num_tokens for shard in dataset.index.shards) // (2 * 24)
    deadline = time.monotonic() + 10
    while not shards_of(ahead) <= set(fetched(server)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(shards_of(ahead)) > len(shards_of(3))  # what one worker reads by itself
    assert shards_of(ahead) <= set(fetched(server)) <= shards_of(ahead + 4)


def test_a_shard_that_is_missing(server: FaultyServer, places: Places) -> None:
    (server.folder / "train" / "shard-000000.tar").unlink()
    dataset = Dataset.open(f"{server.url}/train", places=places)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            dataset.tokens(0)
        assert str(caught.value) == f"data {server.url}/train: shard-000000.tar: HTTP 404: no such file."
    with pytest.raises(UserError, match="HTTP 404"):
        take(order_of(dataset), 30, 2)


def test_a_shard_that_is_damaged(server: FaultyServer, places: Places) -> None:
    tar = server.folder / "train" / "shard-000000.tar"
    raw = bytearray(tar.read_bytes())
    raw[2000] ^= 1
    tar.write_bytes(raw)
    with pytest.raises(UserError, match=r"train: shard-000000\.tar: its sha256 is not that of the index"):
        Dataset.open(f"{server.url}/train", places=places).tokens(0)


def test_what_is_damaged_or_missing_at_the_opening(server: FaultyServer, places: Places) -> None:
    with pytest.raises(
        MissingError, match=r"index\.json: HTTP 404: no such file\. .*is it train/ or valid/ in there\?"
    ):
        Dataset.open(server.url, places=places)
    (server.folder / "train" / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(UserError, match=r"tokenizer\.model: its sha256 is not"):
        Dataset.open(f"{server.url}/train", places=places)
    (server.folder / "train" / "shard-000001.idx.npy").unlink()
    shutil.rmtree(places.cache.folder)
    with pytest.raises(UserError, match=r"shard-000001\.idx\.npy: HTTP 404"):
        Dataset.open(f"{server.url}/train", places=places)
    server.fail("train/index.json", *[Fault(status=500)] * 9)
    with pytest.raises(UserError, match=r"index\.json: HTTP 500, 3 times in a row"):
        Dataset.open(f"{server.url}/train", places=places)


BAD = [
    {"shards.0.file": "../../../../etc/passwd"},
    {"shards.1.file": "/etc/passwd"},
    {"shards.0.file": "http://elsewhere/x.tar"},
    {"shards.0.file": ""},
    {"shards.0.file": "$(touch pwned)"},
    {"shards.1.documents_file": "../x.idx.npy"},
    {"shards.0.file": 7},
    {"shards.0.sha256": "../../x"},
    {"shards.0.documents_sha256": "0" * 63},
    {"shards.0.size_bytes": "12"},
    {"shards.0.num_documents": -1},
    {"tokenizer": "0" * 63 + "/"},
    {"num_documents": 1.5},
    {"dtype": "O"},
    {"vocab_size": True},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_an_index_that_leads_astray(server: FaultyServer, places: Places, change: dict[str, Any]) -> None:
    path = server.folder / "train" / "index.json"
    index = json.loads(path.read_text())
    ((key, value),) = change.items()
    *parts, name = key.split(".")
    at = index
    for part in parts:
        at = at[int(part) if part.isdigit() else part]
    at[name] = value
    path.write_text(json.dumps(index))
    asked = len(server.log)
    for place in (server.folder / "train", f"{server.url}/train", f"pipe:cat {server.folder}/train/{{file}}"):
        with pytest.raises(UserError, match=r"data .*train.*: index\.json cannot be read: (its|it names the file) "):
            Dataset.open(place, places=places)
    assert [request.path for request in server.log[asked:]] == ["/train/index.json"]
    assert not places.cache.folder.exists() and not Path("pwned").exists()


def test_a_place_that_is_none(places: Places) -> None:
    with pytest.raises(UserError, match=r"data gs://bucket/x: gs:// is not known"):
        Dataset.open("gs://bucket/x", places=places)


def test_a_cache_below_a_few_shards_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000_000_000)
    check_room(cache, [[2_000_000_000] * 50, [400_000_000] * 3], 700_000_000)
    with pytest.raises(UserError, match=r"data\.cache\.max_gb=10 is too small .* Set it to 10\.2 or more"):
        check_room(cache, [[2_000_000_000] * 50, [500_000_000] * 3], 700_000_000)


def test_more_files_than_the_usual_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        allow_open_files(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024
        allow_open_files(2000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2000
        with pytest.raises(UserError, match=r"ulimit -Hn"):
            allow_open_files(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def config(server: FaultyServer, tmp_path: Path) -> Config:
    data = DataConfig(
        train=[SourceConfig(f"{server.url}/train?$DATA_QUERY")],
        valid=[SourceConfig(f"pipe:cat {server.folder}/valid/{{file}}")],
        num_lanes=8,
        cache=CacheConfig(dir=str(tmp_path / "cache"), max_gb=0.1),
        remote=RemoteConfig(timeout_s=2, retries=0),
    )
    tokenizer = TokenizerConfig(f"{server.url}/train?$DATA_QUERY/tokenizer.model")
    return Config(
        model=ModelConfig(vocab_size=420), data=data, tokenizer=tokenizer, train=TrainConfig(sequence_length=24)
    )


def test_a_launch_opens_it_as_its_ranks_do(
    config: Config, server: FaultyServer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_QUERY", "sig=secret")
    lines = prepare.check(config)
    assert lines[0].startswith("train: ") and lines[2].startswith("valid: ")
    assert {request.query for request in server.log} == {"sig=secret"}
    monkeypatch.delenv("DATA_QUERY")
    with pytest.raises(UserError, match="environment variable DATA_QUERY is not set"):
        prepare.check(config)


def test_evaluation_sets_may_be_remote(
    config: Config, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_QUERY", "sig=secret")
    piped = replace(config.data.valid[0], set="piped")
    fetched = SourceConfig(f"{server.url}/valid?$DATA_QUERY", set="fetched")
    data = replace(config.data, valid=[piped, fetched])
    sets = held_out(data, sequence_length=24)
    assert [dataset.is_remote for each in sets.values() for dataset in each.datasets] == [True, True]
    here = HeldOut([Dataset.open(Path(server.folder) / "valid")], sequence_length=24).predicted_tokens()
    assert {name: each.predicted_tokens().tolist() for name, each in sets.items()} == dict.fromkeys(
        ("piped", "fetched"), here.tolist()
    )
    lines = prepare.check(replace(config, data=data))
    assert [line.split(":")[0] for line in lines if line.startswith("valid")] == ["valid piped", "valid fetched"]
    assert "secret" not in "".join(lines)


def test_inspect_takes_a_url(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tool = load_tool("shards")
    assert tool.main(["inspect", server.url]) == 0
    printed = capsys.readouterr().out
    assert f"{server.url}/train" in printed and f"{server.url}/valid" in printed and "first document" in printed
    assert tool.main(["inspect", f"{server.url}/nowhere"]) == 2
    assert "HTTP 404: no such file" in capsys.readouterr().err
    assert tool.main(["verify", server.url]) == 2
    assert "verify reads a folder on a disk" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_raw_text(server: FaultyServer, places: Places, tokenizer: Tokenizer, kind: str) -> None:
    """Fetched when it is due, once, also over a connection that breaks; a tar that is not there is told of."""
    folder = server.folder / "text"
    folder.mkdir(exist_ok=True)
    texts = [f"document {number} " * 20 for number in range(30)]
    for tar in range(3):
        with tarfile.open(folder / f"{tar}.tar", "w") as out:
            for number, text in enumerate(texts[tar::3]):
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = len(text)
                out.addfile(info, io.BytesIO(text.encode()))
    place = f"{server.url}/text" if kind == "http" else f"pipe:cat {folder}/{{file}}"
    tars = TextTars.open(f"{place}/{{0..2}}.tar", tokenizer, places=places)
    documents = [tar << 32 | number for tar in range(3) for number in range(tars.num_documents(tar))]
    found = {tokenizer.decode(tars.tokens(document).tolist()) for document in documents}
    assert found == set(texts)
    if kind == "http":
        assert sorted(fetched(server)) == ["/text/0.tar", "/text/1.tar", "/text/2.tar"]
    missing = TextTars.open(f"{place}/{{7..9}}.tar", tokenizer, places=places)
    with pytest.raises(UserError, match=r"7\.tar"):
        missing.tokens(0)
