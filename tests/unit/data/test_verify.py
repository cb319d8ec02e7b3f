"""Each kind of damage is found, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import shard_format
from bigtrain.data.shards import Dataset
from bigtrain.data.verify import verify

from .conftest import load_tool


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        path.chmod(0o755)
    return tmp_path / "copy" / "train"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("shards")


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def place_of(folder: Path, document: int) -> tuple[Path, dict[str, int], str]:
    """(tar, index row, key) of a document of the second shard."""
    dataset = Dataset.open(folder)
    row = dataset.documents_of_shard(1)[document]
    first = dataset.index.shards[0].num_documents
    names = row.dtype.names or ()
    return folder / "shard-000001.tar", {name: int(row[name]) for name in names}, dataset.describe(first + document)[0]


def rewrite_index(folder: Path, **values: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **values}))


def test_a_flipped_bit_in_the_tokens(copy: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tar, row, key = place_of(copy, 3)
    flip(tar, row["tokens_at"] + 2)
    problems = verify(copy, progress=False)
    assert f"{tar}: sha256 differs from the index" in problems
    assert any(f"{tar}: sample {key}: its tokens are not those that were written" in problem for problem in problems)
    assert tool.main(["verify", str(copy.parent)]) == 1
    printed = capsys.readouterr()
    assert str(tar) in printed.err and key in printed.err
    assert "valid: whole" in printed.out


@pytest.mark.parametrize("what", ["header of the sample", "metadata", "padding"])
def test_damage_outside_the_tokens(copy: Path, what: str) -> None:
    tar, row, _ = place_of(copy, 3)
    at = {"header of the sample": row["sample"] + 3, "metadata": row["sample"] + 512, "padding": -5}
    flip(tar, at[what])
    problems = verify(copy, progress=False)
    assert f"{tar}: sha256 differs from the index" in problems
    assert not any("its tokens" in problem for problem in problems)
    if what != "padding":
        assert len(problems) > 1


def test_a_shard_cut_short(copy: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tar, row, key = place_of(copy, 4)
    tar.write_bytes(tar.read_bytes()[: row["tokens_at"] + 4])
    assert any(f"sample {key}: its tokens end at byte" in problem for problem in verify(copy, progress=False))
    with pytest.raises(UserError, match=r"shard-000001\.tar has \d+ bytes, not \d+"):
        Dataset.open(copy)
    assert tool.main(["verify", str(copy)]) == 1


def test_a_shard_missing(copy: Path) -> None:
    (copy / "shard-000001.tar").unlink()
    assert verify(copy, progress=False) == [f"{copy / 'shard-000001.tar'}: missing"]
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing"):
        Dataset.open(copy)


def test_an_index_that_points_elsewhere(copy: Path) -> None:
    path = copy / "shard-000001.idx.npy"
    rows = np.load(path)
    rows["tokens_at"][2] += 2
    np.save(path, rows)
    problems = verify(copy, progress=False)
    assert any("idx.npy: sha256 differs" in problem for problem in problems)
    assert any("the tar and the index differ" in problem for problem in problems)


def test_tokens_beyond_the_vocabulary(copy: Path) -> None:
    rewrite_index(copy, vocab_size=5)
    problems = verify(copy, progress=False)
    assert any("is not below the vocabulary's 5" in problem and "sample 0000" in problem for problem in problems)


def test_wrong_totals_and_tokenizer(copy: Path) -> None:
    rewrite_index(copy, num_tokens=17)
    flip(copy / "tokenizer.model", 100)
    problems = verify(copy, progress=False)
    assert len(problems) == 2
    assert "num_tokens is 17, the shards have" in problems[0]
    assert "not the tokenizer that made the shards" in problems[1]


@pytest.mark.parametrize("content", ["", "{", '{"format": "something else"}'])
def test_an_unreadable_index(copy: Path, content: str) -> None:
    (copy / "index.json").write_text(content)
    (problem,) = verify(copy, progress=False)
    assert "index.json cannot be read" in problem


def test_a_scan_stops_at_a_member_that_does_not_belong(copy: Path) -> None:
    import tarfile

    with tarfile.open(copy / "shard-000000.tar", "a") as tar:
        tar.add(copy / "index.json", arcname="stranger.txt")
    with pytest.raises(ValueError, match="sample stranger"):
        list(shard_format.scan_tar(copy / "shard-000000.tar", "<u2"))


def test_the_tool_shows_and_refuses(built: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["inspect", str(built)]) == 0
    printed = capsys.readouterr().out
    assert "documents" in printed and "first document: 000000000-" in printed
    assert tool.main(["verify", str(built)]) == 0
    assert tool.main(["inspect", str(built.parent)]) == 2
    assert "error: data" in capsys.readouterr().err
