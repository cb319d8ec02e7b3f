from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import readers
from bigtrain.data.readers import Drop


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/skip/d.txt", ".hidden/e.txt", "sub/.f.txt", "__pycache__/g.pyc"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def size_of(record: readers.Record) -> int:
    assert isinstance(record.raw, bytes)
    return len(record.raw)


def names(paths: list[str], root: Path) -> list[str]:
    return [str(Path(path).relative_to(root)) for path in paths]


def test_finds_files_folders_and_globs_once_each(tree: Path) -> None:
    assert names(readers.find_files([str(tree)]), tree) == ["a.txt", "b.txt", "sub/c.txt", "sub/skip/d.txt"]
    found = readers.find_files([str(tree / "b.txt"), str(tree / "**" / "*.txt")])
    assert names(found, tree) == ["b.txt", "a.txt", "sub/c.txt", "sub/skip/d.txt"]


@pytest.mark.parametrize("pattern", ["sub/*", "*/sub/*", "{tree}/sub/*"])
def test_excludes(tree: Path, pattern: str) -> None:
    found = readers.find_files([str(tree)], [pattern.format(tree=tree)])
    assert names(found, tree) == ["a.txt", "b.txt"]


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert readers.find_files([str(tmp_path / "a[1].txt")]) == [str(tmp_path / "a[1].txt")]


def test_nothing_found_is_an_error(tree: Path) -> None:
    with pytest.raises(UserError, match=r"input '.*nothing\*': no such file"):
        readers.find_files([str(tree / "a.txt"), str(tree / "nothing*")])
    with pytest.raises(UserError, match="4 files found, all excluded"):
        readers.find_files([str(tree)], ["*.txt"])


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines(tmp_path: Path, packed: bool) -> None:
    values = [{"body": "one\r\n"}, {"body": "zwei \u4e2d \u2028 x"}]
    content = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    records = list(readers.read_records([str(path)], "text"))
    assert [readers.text_of(record, "body") for record in records] == ["one\r\n", "zwei \u4e2d \u2028 x"]
    assert [record.source for record in records] == [f"{path}:1", f"{path}:2"]
    assert sum(record.num_bytes for record in records) <= path.stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "no field 'text'"),
        (b'{"body": "x"}', "no field 'text'"),
        (b'{"text": null}', "field 'text' is not text"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n"}', "empty"),
        (b"  ", "empty"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_drops_say_why(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(line + b"\n")
    (record,) = readers.read_records([str(tmp_path / "x.jsonl")], "text")
    with pytest.raises(Drop) as dropped:
        readers.text_of(record, "text")
    assert str(dropped.value) == reason


def test_a_file_is_kept_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"a\r\nb\rc\n\x00")
    (record,) = readers.read_records([str(tmp_path / "x.txt")], "text")
    assert readers.text_of(record, "text") == "a\r\nb\rc\n\x00"


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: b"\x00" + raw])
def test_unreadable_files_are_named(tmp_path: Path, damage) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"text": "x"}\n' * 1000)))
    with pytest.raises(UserError, match=r"input .*x\.jsonl\.gz: cannot be read"):
        list(readers.read_records([str(path)], "text"))


PARAGRAPHS = "".join(f"Paragraph {number}.\nIt has lines.\n\n" for number in range(20_000))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (PARAGRAPHS, "\n\n"),
        (PARAGRAPHS.replace("\n", "\r\n"), "\r\n\r\n"),
        ("A line.\n" * 50_000, "\n"),
        ("word " * 100_000, " "),
        ("\u4e2d\U0001f600" * 60_000, ""),
        ("x" * 300_000, ""),
    ],
    ids=["blank lines", "CRLF", "lines", "words", "characters", "one word"],
)
def test_a_large_file_is_cut_and_nothing_is_lost(tmp_path: Path, text: str, end: str) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes(text.encode())
    records = list(readers.read_records([str(path)], "text"))
    texts = [readers.text_of(record, "text") for record in records]
    assert "".join(texts) == text
    assert all(part.endswith(end) for part in texts[:-1])
    size = path.stat().st_size
    assert 128 <= len(records) <= 260 and max(map(size_of, records)) <= size // 128
    assert sum(record.num_bytes for record in records) == size
    line = int(records[9].source.rpartition(":")[2])
    assert line == 1 + "".join(texts[:9]).count("\n")


def test_pieces_of_a_very_large_file_are_at_most_64_kib(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(b"A line.\n" * (2 << 20))
    sizes = [size_of(record) for record in readers.read_records([str(tmp_path / "input.txt")], "text")]
    assert set(sizes) == {64 << 10} and sum(sizes) == 16 << 20


@pytest.mark.parametrize("bad", [b"\xe9", b"\xe4\xb8"])
def test_a_large_file_that_is_no_utf_8_is_dropped_as_a_whole(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "binary").write_bytes(bytes(3_000_000) + bad)
    (record,) = readers.read_records([str(tmp_path / "binary")], "text")
    assert record.num_bytes == 3_000_000 + len(bad)
    with pytest.raises(Drop, match="not UTF-8"):
        readers.text_of(record, "text")
