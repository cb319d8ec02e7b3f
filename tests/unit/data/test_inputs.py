"""Inputs by URL, from a real HTTP server that fails in the ways in which servers fail."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import inputs, readers
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

from .conftest import make_texts, write_jsonl
from .test_build import texts_of

TEXTS = make_texts(60)


class Server(SimpleHTTPRequestHandler):
    """Serves a folder. A path that begins with /fail/KIND/N fails N times in that way first."""

    failures: ClassVar[Counter[str]] = Counter()
    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        if not self.path.startswith("/fail/"):
            super().do_GET()
            return
        _, _, kind, number, name = self.path.split("/", 4)
        self.failures[self.path] += 1
        if self.failures[self.path] > int(number):
            self.path = f"/{name}"
            super().do_GET()
        elif kind.isdigit():
            self.send_error(int(kind))
        elif kind == "stall":
            self._head(1000)
            time.sleep(3)
        elif kind == "cut":
            self._head(1000)
            self.wfile.write(b"x" * 500)
        self.close_connection = True

    def do_HEAD(self) -> None:
        if self.path.startswith("/fail/"):
            self.path = f"/{self.path.split('/', 4)[4]}"
        super().do_HEAD()

    def _head(self, size: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.flush()

    def end_headers(self) -> None:
        if self.path.endswith(".gz"):  # as Apache does with AddEncoding
            self.send_header("Content-Encoding", "gzip")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served" / "more").mkdir(parents=True)
    write_jsonl(tmp_path / "served" / "a.jsonl", TEXTS[:20])
    write_jsonl(tmp_path / "served" / "more" / "c.jsonl", TEXTS[40:])
    packed = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[20:40]).encode()
    (tmp_path / "served" / "b.jsonl.gz").write_bytes(gzip.compress(packed))
    return tmp_path / "served"


@pytest.fixture
def url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(inputs, "WAITS_S", (0.01, 0.02, 0.04))
    monkeypatch.setattr(inputs, "STALL_S", 0.5)
    Server.failures.clear()
    Server.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def texts_in(names: list[str]) -> list[str]:
    files = readers.find_files(names)
    return [readers.text_of(record, "text") for record in readers.read_records(files, "text")]


def test_files_by_name(url: str, folder: Path) -> None:
    names = [f"{url}/a.jsonl", f"{url}/b.jsonl.gz", f"{url}/more/c.jsonl?download=1"]
    assert texts_in(names) == TEXTS
    assert readers.total_bytes(names) == sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
    record = next(iter(readers.read_records(names, "text")))
    assert record.source == f"{url}/a.jsonl:1"


def test_globs_and_folders_of_a_server_that_lists(url: str) -> None:
    assert readers.find_files([f"{url}/*.jsonl*"]) == [f"{url}/a.jsonl", f"{url}/b.jsonl.gz"]
    assert readers.find_files([f"{url}/**/*.jsonl"]) == [f"{url}/a.jsonl", f"{url}/more/c.jsonl"]
    assert texts_in([f"{url}/"]) == TEXTS
    with pytest.raises(UserError, match=r"input 'http://.*/\*\.txt': no such file or folder, and no file matches"):
        readers.find_files([f"{url}/*.txt"])


def test_a_build_from_urls_is_that_of_the_files(url: str, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found: list[list[str]] = []
    for number, start in enumerate((url, str(folder))):
        options = BuildOptions([f"{start}/a.jsonl", f"{start}/b.jsonl.gz", f"{start}/more/c.jsonl"], held_out=0)
        out = tmp_path / f"out{number}"
        build(options, tokenizer=tokenizer, out=out, num_workers=0, progress=False)
        found.append(texts_of(Dataset.open(out / "train"), tokenizer))
    assert found[0] == found[1] and sorted(found[0]) == sorted(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0", "out1", "served"]


@pytest.mark.parametrize("kind", ["500", "503", "429", "cut", "stall"])
def test_failures_that_pass_are_tried_again(url: str, kind: str) -> None:
    assert texts_in([f"{url}/fail/{kind}/2/a.jsonl"]) == TEXTS[:20]


@pytest.mark.parametrize(
    ("path", "reason", "tries"),
    [
        ("fail/500/99/a.jsonl", r"the server answers 500 \(tried 4 times\)", 4),
        ("fail/stall/99/a.jsonl", r".*[Tt]imeout.* \(tried 4 times\)", 4),
        ("fail/cut/99/a.jsonl", r".* \(tried 4 times\)", 4),
        ("fail/403/99/a.jsonl", "the server answers 403", 1),
        ("nothing.jsonl", "it is not there", 1),
    ],
)
def test_failures_that_stay_are_one_clear_error(url: str, path: str, reason: str, tries: int) -> None:
    with pytest.raises(UserError, match=rf"^input {url}/{path}: cannot be fetched: {reason}\. Check the address"):
        texts_in([f"{url}/{path}"])
    assert Server.requests[f"/{path}"] == tries


def test_a_file_that_is_not_there_is_known_before_anything_is_read(
    url: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = BuildOptions([f"{url}/a.jsonl", f"{url}/nothing.jsonl"])
    with pytest.raises(UserError, match=r"nothing\.jsonl: cannot be fetched: the server answers 404"):
        build(options, tokenizer=tokenizer, out=tmp_path / "out", num_workers=0)
    assert Server.requests["/a.jsonl"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WAITS_S", (0.01,))
    with pytest.raises(UserError, match=r"input http://127\.0\.0\.1:9/x: cannot be fetched: .*\(tried 2 times\)"):
        texts_in(["http://127.0.0.1:9/x"])


def test_a_protocol_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"input nowhere://x: cannot be fetched: Protocol not known: nowhere"):
        readers.find_files(["nowhere://x"])


def test_other_protocols() -> None:
    """What any file system of fsspec does: S3 is one."""
    store = fsspec.filesystem("memory")
    for number, text in enumerate(TEXTS[:4]):
        store.pipe(f"/bucket/web/part{number % 2}/{number}.txt", text.encode())
    store.pipe("/bucket/web/.hidden", b"x")
    names = [f"memory:///bucket/web/part{number % 2}/{number}.txt" for number in (0, 2, 1, 3)]
    assert [name.replace("memory:///", "memory://") for name in readers.find_files(["memory://bucket/web"])] == [
        name.replace("memory:///", "memory://") for name in names
    ]
    assert texts_in(["memory://bucket/web/part?/*.txt"]) == [TEXTS[number] for number in (0, 2, 1, 3)]
    assert texts_in(["memory://bucket/web/part1/3.txt"]) == [TEXTS[3]]
    store.rm("/bucket", recursive=True)


def test_a_version_tells_contents_apart(url: str, folder: Path) -> None:
    before = inputs.stat([f"{url}/a.jsonl", str(folder / "a.jsonl")])
    assert before == inputs.stat([f"{url}/a.jsonl", str(folder / "a.jsonl")])
    os.utime(folder / "a.jsonl", (1, 1))
    after = inputs.stat([f"{url}/a.jsonl", str(folder / "a.jsonl")])
    assert all(
        old.version != new.version and old.size_bytes == new.size_bytes for old, new in zip(before, after, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("https://me:secret@host/a.jsonl", "https://host/a.jsonl"),
        ("https://host/a?part=1&X-Amz-Signature=secret", "https://host/a?part=1&X-Amz-Signature=..."),
        ("https://host/a?access_token=secret&b=2", "https://host/a?access_token=...&b=2"),
        ("s3://bucket/a@b.jsonl", "s3://bucket/a@b.jsonl"),
        ("some/path@x?token=1", "some/path@x?token=1"),
    ],
)
def test_secrets_of_urls_are_not_written_down(name: str, shown: str) -> None:
    assert inputs.without_secrets(name) == shown
    assert BuildOptions([name]).to_dict()["inputs"] == [shown]
