"""Every kind of file gives back every byte, in the same order, and says what is wrong with it."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.config.errors import UserError
from bigtrain.data import formats, readers
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.readers import Drop, Position
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

from .conftest import TRICKY, load_tool, make_texts, write_jsonl

TEXTS = [*make_texts(40), *(text for text in TRICKY if text.strip()), "long " + "\u4e2d\U0001f600 x" * 90_000]
LINES = "".join(json.dumps({"id": 7, "text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
BOOK = "".join(f"Paragraph {number}.\nIt \u2581 has lines \U0001f600.\r\n\r\n" for number in range(9_000)).encode()


def pack_zst(raw: bytes) -> bytes:
    """By Arrow's library, not by the one that reads it."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(raw)
    return sink.getvalue().to_pybytes()


def write_parquet(path: Path, values: Sequence[object], kind: pyarrow.DataType, **options: Any) -> Path:
    table = pyarrow.table({"id": list(range(len(values))), "text": pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, path, row_group_size=7, **options)
    return path


LINE_FILES: dict[str, Callable[[bytes], bytes]] = {
    "x.jsonl": lambda raw: raw,
    "x.jsonl.gz": gzip.compress,
    "x.jsonl.zst": pack_zst,
    "x.json.gz": lambda raw: gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]),
    "x.json.zst": lambda raw: zstd.compress(raw[:1000]) + zstd.compress(raw[1000:]),
}
TEXT_FILES: dict[str, Callable[[bytes], bytes]] = {
    "x.txt": lambda raw: raw,
    "x.txt.gz": gzip.compress,
    "x.txt.zst": pack_zst,
}
COLUMNS = {
    "string": (pyarrow.string(), {"compression": "snappy"}),
    "large_string": (pyarrow.large_string(), {"compression": "zstd"}),
    "binary": (pyarrow.binary(), {"compression": "none", "use_dictionary": False}),
    "dictionary": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), {"compression": "gzip"}),
    "view": (pyarrow.string_view(), {"data_page_version": "2.0"}),
}


def texts_in(path: Path, field: str = "text") -> list[str]:
    return [readers.text_of(record, field) for record in readers.read_records([str(path)], field)]


def tokens_of(path: Path, tokenizer: Tokenizer, out: Path) -> list[list[int]]:
    """Of every document of the shards that are built from a file, in their order."""
    build(BuildOptions([str(path)], held_out=0), tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    dataset = Dataset.open(out / "train")
    return [dataset.tokens(number).tolist() for number in range(len(dataset))]


@pytest.mark.parametrize("name", LINE_FILES)
def test_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(LINE_FILES[name](LINES))
    assert texts_in(path) == TEXTS
    records = list(readers.read_records([str(path)], "text"))
    assert [record.source for record in records] == [f"{path}:{line}" for line in range(1, len(TEXTS) + 1)]
    assert 0 < sum(record.num_bytes for record in records) <= path.stat().st_size


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet(tmp_path: Path, kind: str) -> None:
    dtype, options = COLUMNS[kind]
    path = write_parquet(tmp_path / "x.parquet", TEXTS, dtype, **options)
    assert texts_in(path) == TEXTS
    records = list(readers.read_records([str(path)], "text"))
    assert [record.source for record in records] == [f"{path}:{row}" for row in range(1, len(TEXTS) + 1)]
    assert sum(record.num_bytes for record in records) == path.stat().st_size


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("raw", [BOOK, b"a small one \xe2\x96\x81\r\n"], ids=["large", "small"])
def test_text(tmp_path: Path, name: str, raw: bytes) -> None:
    path, plain = tmp_path / name, tmp_path / "plain.txt"
    plain.write_bytes(raw)
    path.write_bytes(TEXT_FILES[name](raw))
    assert texts_in(path) == texts_in(plain)
    assert "".join(texts_in(path)).encode() == raw
    records = list(readers.read_records([str(path)], "text"))
    assert (len(records) >= 128) == (raw is BOOK)
    assert sum(record.num_bytes for record in records) == path.stat().st_size


def test_all_formats_give_the_same_tokens_which_decode_to_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in LINE_FILES]
    for path in paths:
        path.write_bytes(LINE_FILES[path.name](LINES))
    paths += [
        write_parquet(tmp_path / f"{kind}.parquet", TEXTS, dtype, **options)
        for kind, (dtype, options) in COLUMNS.items()
    ]
    expected = tokens_of(paths[0], tokenizer, tmp_path / "out0")
    assert sorted(tokenizer.decode(tokens[1:-1]) for tokens in expected) == sorted(TEXTS)
    for number, path in enumerate(paths[1:], start=1):
        assert tokens_of(path, tokenizer, tmp_path / f"out{number}") == expected, path.name


@pytest.mark.parametrize("name", [*LINE_FILES, *TEXT_FILES, "x.parquet"])
def test_reading_goes_on_in_the_middle(tmp_path: Path, name: str) -> None:
    first, path = tmp_path / "first.txt", tmp_path / name
    first.write_text("first")
    if name == "x.parquet":
        write_parquet(path, TEXTS, pyarrow.string())
    else:
        path.write_bytes((LINE_FILES | TEXT_FILES)[name](BOOK if name in TEXT_FILES else LINES))
    files = [str(first), str(path), str(first)]
    records = list(readers.read_records(files, "text"))
    for number in (0, 1, 2, 20, len(records) - 2, len(records) - 1):
        assert list(readers.read_records(files, "text", start=records[number].end)) == records[number + 1 :]
    assert list(readers.read_records(files, "text", start=Position(3, 0))) == []


BAD = ["fine", None, "", " \n", "fine too"]


def test_what_is_dropped_is_counted_whatever_the_format(
    model: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.model").write_bytes(model)
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", BAD, pyarrow.string())
    write_parquet(tmp_path / "in" / "b.parquet", [b"fine", b"caf\xe9"], pyarrow.binary())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in BAD).encode() + b'{"text": 7}\n{"no": 1}\nx\n\n'
    for name, pack in LINE_FILES.items():
        (tmp_path / "in" / name).write_bytes(pack(lines))
    (tmp_path / "in" / "y.txt.gz").write_bytes(gzip.compress(b"\xff"))
    (tmp_path / "in" / "z.txt.zst").write_bytes(zstd.compress(b"\xff" * 300_000))
    command = ["build", str(tmp_path / "in"), "--tokenizer", str(tmp_path / "t.model"), "--workers", "0"]
    assert load_tool("shards").main([*command, "--held-out", "0", "--out", str(tmp_path / "out")]) == 0
    expected = {
        "empty": 2 + 5 * 3,
        "field 'text' is not text": 1 + 5 * 2,
        "no field 'text'": 5,
        "not JSON": 5,
        "not UTF-8": 3,
    }
    index = Dataset.open(tmp_path / "out" / "train").index
    assert index.dropped == expected
    assert index.num_documents == 2 + 1 + 5 * 2
    said = capsys.readouterr().out
    assert f"17 empty (such as {tmp_path}/in/a.parquet:3), 11 field 'text' is not text (such as" in said
    assert all(f"{count} {reason} (such as" in said for reason, count in expected.items())


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.txt.zst", "x.parquet"])
@pytest.mark.parametrize("damage", ["cut", "cut late", "flipped", "empty", "other"])
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    content = random.Random(0).randbytes(400_000).hex()
    if name == "x.parquet":
        options = {"compression": "none", "write_page_checksum": True}
        raw = write_parquet(path, [content], pyarrow.string(), **options).read_bytes()
    elif ".zst" in name:  # a flipped byte is seen where a checksum was written, as `zstd` does
        raw = zstd.compress(content.encode(), options={zstd.CompressionParameter.checksum_flag: 1})
    else:
        raw = gzip.compress(content.encode())
    middle = len(raw) // 2
    damaged = {
        "cut": raw[:middle],
        "cut late": raw[:-3],
        "flipped": raw[:middle] + bytes(byte ^ 0x5A for byte in raw[middle : middle + 64]) + raw[middle + 64 :],
        "empty": b"",
        "other": b"PK\x03\x04" + bytes(1000),
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError) as caught:
        list(readers.read_records([str(path)], "text"))
    said = str(caught.value)
    assert said.startswith(f"input {path}: cannot be read: ") and said.endswith(
        "Repair it, or leave it out (--exclude)."
    )
    assert "\n" not in said and len(said) < 400


FUZZED = {name: pack(LINES[:3000]) for name, pack in LINE_FILES.items()} | {
    name: pack(BOOK) for name, pack in TEXT_FILES.items()
}


@pytest.mark.parametrize("name", [*FUZZED, "x.parquet"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_in_a_file_it_is_read_or_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Cut, flipped, grown: documents, drops with a reason, or the one error; never another, and it ends."""
    path = tmp_path / name
    if name == "x.parquet" and name not in FUZZED:
        FUZZED[name] = write_parquet(path, TEXTS[:20], pyarrow.string(), compression="zstd").read_bytes()
    raw = bytearray(FUZZED[name])
    for _ in range(data.draw(st.integers(1, 4))):
        start, stop = sorted(data.draw(st.tuples(st.integers(0, len(raw)), st.integers(0, len(raw)))))
        stop = data.draw(st.sampled_from([stop, min(stop, start + 1), min(stop, start + 40)]))
        raw[start:stop] = data.draw(st.binary(max_size=40))
    path.write_bytes(raw)
    try:
        for record in readers.read_records([str(path)], "text"):
            with contextlib.suppress(Drop):
                assert readers.text_of(record, "text").encode().strip()
    except UserError as error:
        assert str(error).startswith(f"input {path}: ")


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (
            "body",
            r"x.parquet: it has no column 'body'; name one of \['text'\] with --field \(data.prepare.json_field\)",
        ),
        ("id", r"x.parquet: its column 'id' holds int64, not text; name one of \['text'\]"),
    ],
)
def test_a_column_that_is_not_there_or_not_text(tmp_path: Path, field: str, words: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", TEXTS, pyarrow.string())
    with pytest.raises(UserError, match=words):
        texts_in(path, field)


def test_an_empty_parquet_file_has_no_documents(tmp_path: Path) -> None:
    assert texts_in(write_parquet(tmp_path / "x.parquet", [], pyarrow.string())) == []


@pytest.mark.parametrize("name", LINE_FILES)
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_without_an_end_is_dropped(
    tmp_path: Path, name: str, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 1000)
    fits = json.dumps({"text": "x" * 987}).encode() + b"\n"
    assert len(fits) == 1000
    raw = fits + b"y" * 5000 + b"\n" + fits + b"z" * 1000 + end
    (tmp_path / name).write_bytes(LINE_FILES[name](raw))
    records = list(readers.read_records([str(tmp_path / name)], "text"))
    assert [record.source.rpartition(":")[2] for record in records] == ["1", "2", "3", "4"]
    for record, is_kept in zip(records, (True, False, True, False), strict=True):
        if is_kept:
            assert readers.text_of(record, "text") == "x" * 987
        else:
            with pytest.raises(Drop, match="longer than 1,000 bytes"):
                readers.text_of(record, "text")


def test_a_value_that_is_too_long_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_DOCUMENT_BYTES", 1000)
    path = write_parquet(tmp_path / "x.parquet", ["x" * 1000, "x" * 1001], pyarrow.string())
    first, second = readers.read_records([str(path)], "text")
    assert len(readers.text_of(first, "text")) == 1000
    with pytest.raises(Drop, match="longer than 1,000 bytes"):
        readers.text_of(second, "text")


def test_zst_with_a_large_window(tmp_path: Path) -> None:
    """As `zstd --long=28` makes it; a decoder's usual limit is 27."""
    parameter = zstd.CompressionParameter
    options = {int(parameter.window_log): 28, int(parameter.enable_long_distance_matching): 1}
    packer = zstd.ZstdCompressor(options=options)
    (tmp_path / "x.jsonl.zst").write_bytes(packer.compress(LINES) + packer.flush())
    with pytest.raises(zstd.ZstdError):
        zstd.decompress((tmp_path / "x.jsonl.zst").read_bytes())
    assert texts_in(tmp_path / "x.jsonl.zst") == TEXTS


def test_one_long_row_does_not_bring_many_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken so many at a time as take a few MB by their mean size."""
    monkeypatch.setattr(formats, "_PARQUET_BATCH_BYTES", 1 << 20)
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["x" * 100] * 900 + ["".join(make_texts(1)) * 200_000]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    rows = formats._rows_at_once(group, "text")
    assert np.isclose(rows * group.total_byte_size / 901, 1 << 20, rtol=0.1)
    assert len(texts_in(path)) == 901


def test_packed_json_lines_are_told_by_their_name(tmp_path: Path) -> None:
    assert [formats.format_of(name) for name in ("a.jsonl", "a.json.gz", "a.json", "a.txt.zst", "a.gz", "text")] == [
        ".jsonl", ".json.gz", "text", ".txt.zst", "text", "text",
    ]  # fmt: skip
    (write_jsonl(tmp_path / "a.jsonl", ["x"])).rename(tmp_path / "a.json")
    assert texts_in(tmp_path / "a.json") == ['{"text": "x"}\n']
