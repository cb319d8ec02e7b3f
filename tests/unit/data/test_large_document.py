"""A document of 200 MB: what it takes of memory, in processes of their own."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

from .conftest import make_texts

pytestmark = pytest.mark.slow
SIZE = 200 << 20
BASE = 350 << 20
"""Python with numpy, torch (through webdataset), pyarrow."""
# VmHWM: what getrusage tells is at least the size of the process that started this one.
READ = """
import re, sys
from pathlib import Path
from bigtrain.data import readers
sizes = [len(record.raw) for record in readers.read_records(sys.argv[1:], "text")]
print(max(sizes), len(sizes), re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def document() -> str:
    """One character beyond U+FFFF: Python then keeps four bytes for each."""
    unit = "\n".join(make_texts(500))
    return "\U0001f600" + (unit * (SIZE // len(unit) + 1))[:SIZE]


def test_the_build(document: str, tokenizer: Tokenizer, model: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(model)
    with (tmp_path / "x.jsonl").open("w") as file:
        for text in ("first", document, "last"):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    tool = str(Path(__file__).parents[3] / "tools" / "shards.py")
    command = [sys.executable, tool, "build", str(tmp_path / "x.jsonl"), "--held-out", "0", "--workers", "1"]
    command += ["--tokenizer", str(tmp_path / "t.model"), "--out", str(tmp_path / "out")]
    reader, worker = peaks_of(psutil.Popen(command, stdout=subprocess.DEVNULL))
    assert reader < 3.5 * SIZE + BASE
    assert worker < 9.5 * SIZE + BASE

    dataset = Dataset.open(tmp_path / "out" / "train")
    number = int(dataset.num_tokens_of_documents().argmax())
    assert len(dataset) == 3 and dataset.describe(number)[1]["text_bytes"] == len(document.encode())
    ids = dataset.tokens(number)[1:-1]
    place = 0
    for start in range(0, len(ids), 1 << 20):  # in blocks: the test has no need of memory either
        part = tokenizer.decode_bytes(ids[start : start + (1 << 20)].tolist())
        decoded = part.decode()
        assert document.startswith(decoded, place)
        place += len(decoded)
    assert place == len(document)


def peaks_of(process: psutil.Popen) -> tuple[int, int]:
    """Largest resident sizes of a process, and of any of its children, in bytes."""
    own = child = 0
    while process.poll() is None:
        try:
            own = max(own, process.memory_info().rss)
            child = max([child, *(each.memory_info().rss for each in process.children())])
        except psutil.Error:
            pass
        time.sleep(0.02)
    assert process.returncode == 0
    return own, child


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.jsonl.zst"])
def test_reading(document: str, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [*make_texts(1000), document]}), path)
    else:
        with gzip.open(path, "wb", 1) if name.endswith("gz") else zstd.open(path, "wb") as file:
            for text in (*make_texts(1000), document):
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    longest, count, peak_kib = map(int, done.stdout.split())
    assert (count, longest >= SIZE) == (1001, True)
    assert peak_kib << 10 < (7 if name == "x.parquet" else 3.5) * SIZE + BASE
