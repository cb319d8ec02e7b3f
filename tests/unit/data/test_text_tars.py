"""Raw text: tars that plain `tar` wrote, streamed in an order that does not depend on who reads it."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.config.errors import UserError
from bigtrain.config.schema import DataConfig, SourceConfig
from bigtrain.data import encoding, ledger, text_lanes, text_tars
from bigtrain.data.audit import audit
from bigtrain.data.faults import BadDocument, Faults
from bigtrain.data.loader import StepBatch, batches
from bigtrain.data.order import Cursor, Order, Source, training_order
from bigtrain.data.passed_over import Window
from bigtrain.data.shards import Dataset
from bigtrain.data.tar_scan import Sample, scan
from bigtrain.data.text_lanes import Position, TextLanes
from bigtrain.data.text_tars import TextTars
from bigtrain.data.tokenizer import Tokenizer

from .conftest import TRICKY, load_tool, make_texts

S, LANES = 24, 4
TEXTS = [*make_texts(70), *(text for text in TRICKY if text.strip()), "a long one " * 400]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars by plain tar: .txt, .json with other members beside them, and long names."""
    root = tmp_path_factory.mktemp("text")
    parts = [TEXTS[:30], TEXTS[30:55], TEXTS[55:]]
    for number, texts in enumerate(parts):
        files = root / f"files-{number}"
        for place, text in enumerate(texts):
            name = f"{place:04d}" if number < 2 else "deep/" * 30 + "x" * 90 + f"{place:04d}"
            path = files / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if number == 1:
                path.with_suffix(".json").write_text(json.dumps({"text": text, "url": "https://host/"}))
                path.with_suffix(".cls").write_text("7")
            else:
                path.write_bytes(text.encode())
        command = ["tar", "--sort=name", "-C", str(files), "-cf", str(root / f"web-{number}.tar"), "."]
        subprocess.run(command, check=True)
    return root


@pytest.fixture
def tars(folder: Path, tokenizer: Tokenizer) -> TextTars:
    return TextTars.open(str(folder), tokenizer)


def lanes_of(tars: TextTars, num_lanes: int = LANES, seed: int = 3, faults: Faults | None = None) -> TextLanes:
    return TextLanes(tars, seed=seed, num_lanes=num_lanes, sequence_length=S, faults=faults)


def order_of(*data: TextTars | Dataset, num_lanes: int = LANES, max_bad_fraction: float = 0.0) -> Order:
    sources = [Source(each) for each in data]
    return Order(sources, seed=3, num_lanes=num_lanes, sequence_length=S, max_bad_fraction=max_bad_fraction)


def stream(tars: TextTars, lanes: TextLanes, lane: int, rows: int) -> np.ndarray:
    """The lane's tokens as its sequences show them. Each overlaps the next in one token."""
    windows = [
        np.concatenate([tars.tokens(p.document, p.start, p.start + p.count) for p in lanes.pieces(lane, row)])
        for row in range(rows)
    ]
    assert all(len(window) == S + 1 for window in windows)
    assert all(one[-1] == other[0] for one, other in itertools.pairwise(windows))
    return np.concatenate([window[:-1] for window in windows])


@pytest.mark.parametrize("num_lanes", [1, 4, 20])
def test_every_document_once_an_epoch(tars: TextTars, tokenizer: Tokenizer, num_lanes: int) -> None:
    """Byte for byte what was put into the tars."""
    lanes = lanes_of(tars, num_lanes)
    found: Counter[bytes] = Counter()
    for lane in range(num_lanes):
        tokens = stream(tars, lanes, lane, 8_000 // num_lanes)
        parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
        texts = [tokenizer.decode_bytes(part[1:-1].tolist()) for part in parts]
        whole = Counter(texts[:-1])
        epochs = min(whole.values())
        assert epochs > 1 and set(whole.values()) <= {epochs, epochs + 1}
        found.update(set(texts[:-1]))
    assert found == Counter({text.encode(): 1 for text in TEXTS})


def test_the_order_is_drawn_anew(tars: TextTars) -> None:
    lanes = lanes_of(tars)
    for row in range(2000):
        lanes.pieces(1, row)
    firsts = [[int(d) for tar in range(3) for d in lanes._documents(1, epoch, tar)] for epoch in range(3)]
    assert sorted(firsts[0]) == sorted(firsts[1]) == sorted(firsts[2])
    assert firsts[0] != firsts[1] != firsts[2]
    other = lanes_of(tars, seed=4)
    assert [other.pieces(0, row) for row in range(50)] != [lanes_of(tars).pieces(0, row) for row in range(50)]


def test_it_goes_on_from_a_position_without_reading_what_came_before(
    tars: TextTars, folder: Path, tokenizer: Tokenizer
) -> None:
    lanes = lanes_of(tars)
    for row in range(500):
        lanes.pieces(2, row)
    kept = text_lanes.from_json(json.loads(json.dumps(text_lanes.to_json(lanes.positions))))
    expected = [lanes.pieces(2, row) for row in range(500, 560)]
    fresh = TextTars.open(str(folder), tokenizer)
    again = lanes_of(fresh)
    again.restore(kept)
    assert [again.pieces(2, row) for row in range(500, 501)] == expected[:1]
    assert len(fresh._tars) == 1 and len(fresh._tokens) < 4
    assert [again.pieces(2, row) for row in range(501, 560)] == expected[1:]
    assert again.pieces(2, 510) == expected[10], "an earlier one, too"


@pytest.mark.parametrize("with_shards", [False, True])
def test_batches_do_not_depend_on_ranks_workers_or_stops(
    folder: Path, built: Path, tokenizer: Tokenizer, with_shards: bool
) -> None:
    def order() -> Order:
        return order_of(
            TextTars.open(str(folder), tokenizer), *([Dataset.open(built / "train")] if with_shards else [])
        )

    def read(order: Order, start: Cursor, steps: int, data_size: int, num_workers: int) -> tuple[np.ndarray, Cursor]:
        rows = np.zeros((steps, 8, S), np.int64)
        positions: dict[str, dict[int, Position]] = {}
        cursor = start
        for rank in range(data_size):
            mine = order_again(order, start)
            found = batches(
                mine,
                data_rank=rank,
                data_size=data_size,
                global_batch_size=8,
                micro_batch_size=1,
                start=start,
                num_workers=num_workers,
            )
            for step, batch in enumerate(itertools.islice(found, steps)):
                rows[step, rank::data_size] = np.concatenate([m.tokens_BS.numpy() for m in batch.microbatches])
                cursor = batch.cursor
            for name, lanes in cursor.positions.items():
                mine_only = {lane: at for lane, at in lanes.items() if lane % data_size == rank}
                positions.setdefault(name, {}).update(mine_only)
            found.close()  # pyright: ignore[reportAttributeAccessIssue]
        whole = Cursor(cursor.num_sequences, cursor.order, cursor.mixture, positions)
        return rows, Cursor.from_dict(json.loads(json.dumps(whole.to_dict())))

    def order_again(_: Order, start: Cursor) -> Order:
        fresh = order()
        fresh.go_on_from(start)
        return fresh

    start = order().start()
    expected, _ = read(order(), start, 40, 1, 0)
    for data_size, num_workers in [(2, 0), (4, 3), (1, 2)]:
        first, cursor = read(order(), start, 17, data_size, num_workers)
        rest, _ = read(order(), cursor, 23, 4 // data_size, num_workers)
        assert np.array_equal(np.concatenate([first, rest]), expected)


def test_1024_lanes_fit_into_a_mebibyte(tars: TextTars) -> None:
    lanes = {lane: Position(10**9, 10**4, 10**5, 10**6, 10**8) for lane in range(1024)}
    assert len(json.dumps(text_lanes.to_json(lanes))) < 1 << 20


def test_too_few_documents(tars: TextTars) -> None:
    lanes = lanes_of(tars, num_lanes=64)
    with pytest.raises(UserError, match=r"lane \d+ of data\.num_lanes=64 has no documents"):
        for lane in range(64):
            lanes.pieces(lane, 0)


def test_the_same_code_as_a_build(tars: TextTars, tokenizer: Tokenizer) -> None:
    documents = [tar << 32 | sample for tar in range(3) for sample in range(tars.num_documents(tar))]
    assert sorted(tars.tokens(document).tobytes() for document in documents) == sorted(
        encoding.encode(tokenizer, text).tobytes() for text in TEXTS
    )


# How a source is named


@pytest.mark.parametrize("path", ["", "/web-0.tar", "/web-{0..2}.tar", "/*.tar", "/web-{0,1,2}.tar"])
def test_names(folder: Path, tokenizer: Tokenizer, path: str) -> None:
    assert text_tars.is_text(f"{folder}{path}")
    expected = ["web-0.tar"] if path == "/web-0.tar" else ["web-0.tar", "web-1.tar", "web-2.tar"]
    assert TextTars.open(f"{folder}{path}", tokenizer).files == expected


def test_what_is_no_text(built: Path, tmp_path: Path) -> None:
    assert not text_tars.is_text(str(built / "train"))
    assert not text_tars.is_text(str(built))
    assert not text_tars.is_text(str(tmp_path / "nowhere"))
    assert not text_tars.is_text("s3://bucket/folder")
    assert text_tars.is_text("s3://bucket/folder/web-{000..127}.tar")
    assert text_tars.is_text("pipe:cat {file}/web-{000..127}.tar")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("web-7.tar", "no such file"),
        ("web-{5..7}.tar", r"web-5\.tar: no such file"),
        ("*.tar.gz", "no such file"),
        ("packed.tar.gz", "is packed. Unpack it"),
    ],
)
def test_names_that_lead_nowhere(folder: Path, tokenizer: Tokenizer, path: str, words: str) -> None:
    (folder / "packed.tar.gz").write_bytes(b"")
    try:
        if "*" in path:
            (folder / "packed.tar.gz").unlink()
        with pytest.raises(UserError, match=words):
            TextTars.open(str(folder / path), tokenizer)
    finally:
        (folder / "packed.tar.gz").unlink(missing_ok=True)


def test_best_fit_needs_sizes(folder: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(train=[SourceConfig(str(folder))], num_lanes=4, pack="best_fit")
    with pytest.raises(UserError, match=r"data\.pack=best_fit needs the sizes .* Set data\.pack=concat"):
        training_order(data, seed=0, sequence_length=8, tokenizer=tokenizer)


# Damage


def tar_of(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), kind
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def scanned(raw: bytes) -> list[Sample]:
    return scan(np.frombuffer(raw, np.uint8))


GOOD = tar_of({f"{n}.txt": f"document {n} ".encode() * 60 for n in range(9)})


@pytest.mark.parametrize(
    ("raw", "good", "reason"),
    [
        (GOOD, 9, None),
        (GOOD[:13824], 9, "its end is missing"),
        (GOOD[:2600], 1, "cut short in it"),
        (GOOD[:1100], 0, "cut short in it"),
        (b"", 0, "it has not even an end"),
        (b"nonsense" * 200, 0, "damaged here"),
        (bytes(10240), 0, None),
        (GOOD[: 3 * 1536 + 100] + b"\xff" + GOOD[3 * 1536 + 101 :], 3, "damaged here"),
        (GOOD + GOOD, 9, "damaged here"),
        (tar_of({"../../etc/x.txt": b"x", "b.txt": b"b"}), 1, "its name leaves its folder"),
        (tar_of({"/etc/x.txt": b"x", "b.txt": b"b"}), 1, "its name leaves its folder"),
        (tar_of({"a.txt": b""}, tarfile.SYMTYPE), 0, "it is a link"),
        (tar_of({"a.jpg": b"x", "b.txt": b"b"}), 1, "neither .txt nor .json"),
        (tar_of({"a.jpg": b"x", "a.txt": b"b", "a.json": b"{}"}), 1, None),
        (tar_of({"a.b/c.x.txt": b"x", "a.b/d.txt": b"b"}), 1, "neither .txt nor .json"),
    ],
)
def test_what_a_scan_finds(raw: bytes, good: int, reason: str | None) -> None:
    found = scanned(raw)
    assert sum(not sample.reason for sample in found) == good
    reasons = [sample.reason for sample in found if sample.reason]
    assert len(reasons) == (reason is not None)
    assert reason is None or reason in reasons[0]
    assert sum(sample.size for sample in found) <= len(raw)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_crash_or_hang_it(data: st.DataObject, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Cut, flipped, grown: documents of text, or bad ones with a reason; and what it gives decodes to text."""
    raw = bytearray(GOOD[:8192] + GOOD[-10240:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        stop = data.draw(st.sampled_from([at, at + 1, at + 40, len(raw)]))
        raw[at:stop] = data.draw(
            st.binary(max_size=40) | st.sampled_from([GOOD[:512], b"\xff" * 12, b"\x80" + b"\xff" * 11])
        )
    (tmp_path / "x.tar").write_bytes(raw)
    tars = TextTars.open(str(tmp_path / "x.tar"), tokenizer)
    faults = Faults(1.0)
    lanes = TextLanes(tars, seed=0, num_lanes=1, sequence_length=8, faults=faults)
    try:
        for row in range(300):
            for piece in lanes.pieces(0, row):
                tokens = tars.tokens(piece.document)
                assert tokens[0] == tokenizer.bos_id and tokens[-1] == tokenizer.eos_id
                assert tokens.max() < tokenizer.vocab_size
                tokenizer.decode_bytes(tokens.tolist()).decode()
    except UserError as error:
        assert "has no documents" in str(error)
    assert len({each.sample for each in faults.take()}) <= len(tars._tar(0).samples)


BAD = {
    "utf8.txt": b"caf\xe9 au lait",
    "empty.txt": b"",
    "blank.txt": b" \n\t ",
    "json.json": b"{not json",
    "field.json": b'{"body": "x"}',
    "number.json": b'{"text": 7}',
    "surrogate.json": b'{"text": "\\ud800"}',
}


def test_bad_documents_stop_the_run_and_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, content in BAD.items():
        (tmp_path / "x.tar").write_bytes(tar_of({"a.txt": b"good", name: content}))
        order = order_of(TextTars.open(str(tmp_path / "x.tar"), tokenizer), num_lanes=1)
        key = name.split(".")[0]
        with pytest.raises(UserError, match=rf"x\.tar: x\.tar: sample {key}: .*\. To skip .* data\.max_bad_fraction="):
            order.sequence(0)


def test_bad_documents_are_skipped_and_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = {f"{n}.txt": f"good {n} ".encode() * 50 for n in range(20)}
    (tmp_path / "x.tar").write_bytes(tar_of({**good, **BAD}))
    order = order_of(TextTars.open(str(tmp_path / "x.tar"), tokenizer), num_lanes=2, max_bad_fraction=0.01)
    seen = set()
    for number in range(1000):
        seen.update(piece.document for piece in order.sequence(number).pieces)
    assert seen == set(range(20))
    skipped = order.faults.take()
    assert sorted(each.sample for each in skipped) == sorted(name.split(".")[0] for name in BAD)
    assert len({each.reason for each in skipped}) >= 4 and order.faults.take() == ()


def test_too_many_bad_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of({"a.txt": b"good", **{f"{n}.txt": b"\xff" * 400 for n in range(90)}}))
    order = order_of(TextTars.open(str(tmp_path / "x.tar"), tokenizer), num_lanes=1, max_bad_fraction=0.1)
    order.sequence(0)
    with pytest.raises(UserError, match=r"bytes of .* are bad, more than data\.max_bad_fraction=0\.1"):
        order.allow(order.faults.take())


# What was fed


def test_the_audit_of_raw_text(folder: Path, tokenizer: Tokenizer) -> None:
    def fed(steps: int) -> list[ledger.Entry]:
        order = order_of(TextTars.open(str(folder), tokenizer))
        entries: list[ledger.Entry] = []
        for step in range(steps):
            for rank in range(2):
                entry = ledger.Entry(step + 1, 8 * step, 8, rank, 2, "")
                digest = ledger.digest(order.sequence(number).tokens for number in entry.sequences)
                entries.append(ledger.Entry(step + 1, 8 * step, 8, rank, 2, digest))
        return entries

    found = audit(order_of(TextTars.open(str(folder), tokenizer)), fed(400))
    assert found.problems == []
    (epochs,) = found.epochs.values()
    assert len(epochs) > 2 and epochs[0] == (len(TEXTS), 0)

    class Skipping(Order):
        def pieces(self, number: int):  # type: ignore[no-untyped-def]
            return super().pieces(number + LANES * (number >= 200))

    skipping = Skipping([Source(TextTars.open(str(folder), tokenizer))], seed=3, num_lanes=LANES, sequence_length=S)
    problems = audit(skipping, fed(400)).problems
    assert any("is not what the order says" in problem for problem in problems)
    assert any("is not whole in epoch 0" in problem for problem in problems)


@pytest.mark.parametrize("workers", [0, 2])
def test_going_back_and_past_a_window(folder: Path, tokenizer: Tokenizer, workers: int) -> None:
    """As a run does whose numbers went wrong: the same order goes on from an earlier cursor, and passes over what it
    had read. Against a loader that reads all."""

    def opened() -> Order:
        return order_of(TextTars.open(str(folder), tokenizer))

    def loaded(order: Order, start: Cursor, count: int, windows: list[Window], workers: int) -> list[StepBatch]:
        loader = batches(
            order, data_rank=0, data_size=1, global_batch_size=4, micro_batch_size=2, start=start,
            num_workers=workers, passed_over=windows,
        )  # fmt: skip
        found = list(itertools.islice(loader, count))
        loader.close()  # type: ignore[attr-defined]
        return found

    whole = opened()
    every = loaded(whole, whole.start(), 30, [], 0)
    order = opened()
    saved = loaded(order, order.start(), 10, [], workers)[3].cursor
    window = Window(16, 40, from_step=10, to_step=4, reason="a spike")
    order.go_on_from(saved)
    found = loaded(order, order.cursor(saved.num_sequences), 12, [window], workers)
    assert [batch.digest for batch in found] == [batch.digest for batch in every[10:22]]
    again = opened()
    again.go_on_from(Cursor.from_dict(json.loads(json.dumps(found[4].cursor.to_dict()))))
    later = loaded(again, again.cursor(found[4].cursor.num_sequences), 7, [window], workers)
    assert [batch.digest for batch in later] == [batch.digest for batch in found[5:]]


def test_the_tool_reads_what_others_wrote(folder: Path, tokenizer: Tokenizer) -> None:
    tool = load_tool("batches")
    order = order_of(TextTars.open(str(folder), tokenizer))
    piece = order.pieces(0)[0]
    line = tool.told(order, piece)
    assert f"{folder}/{order.datasets[0].file_of(piece.document)}: document {piece.document}" in line


def test_inspect_and_verify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = load_tool("shards")
    assert tool.main(["verify", str(folder)]) == 0
    assert f"{len(TEXTS):,} documents of 3 tars can be used" in capsys.readouterr().out
    assert tool.main(["inspect", f"{folder}/web-{{0..1}}.tar", "--characters", "20"]) == 0
    said = capsys.readouterr().out
    assert "2 tars of raw text" in said and "55 documents" in said and "web-0.tar, sample 0000:" in said
    (tmp_path / "x.tar").write_bytes(tar_of({"a.txt": b"good", **BAD}))
    assert tool.main(["verify", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "1 documents of 1 tars can be used" in said.out and "2 bad documents: empty" in said.out
    assert f"bad: data {tmp_path}: x.tar: sample json: not JSON." in said.err


def test_tokens_beyond_the_vocabulary(built: Path, tmp_path: Path) -> None:
    """An index that was made for them lets them pass; a model would look up rows that it does not have."""
    import shutil

    shutil.copytree(built / "train", tmp_path / "train")
    path = tmp_path / "train" / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "vocab_size": 100}))
    with pytest.raises(UserError, match="tokens beyond the vocabulary's 100"):
        Dataset.open(tmp_path / "train").tokens(0)


# What it keeps and lets go


def test_tars_are_told_by_content_and_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Tars are padded, so sizes agree easily; and names do."""
    for name, text in {"web": b"one", "code": b"two"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").write_bytes(tar_of({"a.txt": text}))
    web, code = (TextTars.open(str(tmp_path / name), tokenizer) for name in ("web", "code"))
    assert web.size_bytes == code.size_bytes and web.fingerprint != code.fingerprint
    (tmp_path / "web").rename(tmp_path / "moved")
    assert TextTars.open(str(tmp_path / "moved"), tokenizer).fingerprint == web.fingerprint
    places = ["s3://bucket/web/{0..9}.tar", "s3://bucket/code/{0..9}.tar", "https://h/web/{0..9}.tar?sig=$SIGNATURE"]
    assert len({TextTars.open(place.split("?")[0], tokenizer).fingerprint for place in places}) == 3


def test_the_documents_of_all_lanes_are_kept(tars: TextTars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes take turns; where their documents are more than the limit, each would be tokenised for every sequence."""
    monkeypatch.setattr(text_tars, "_KEPT_TOKENS_BYTES", 100)
    lanes, counted = lanes_of(tars, 8), Counter[int]()
    really = tars._tokenize

    def counting(document: int) -> tuple[np.ndarray, int]:
        counted[document] += 1
        return really(document)

    monkeypatch.setattr(tars, "_tokenize", counting)
    for row in range(6):
        for lane in range(8):
            for piece in lanes.pieces(lane, row):
                tars.tokens(piece.document, piece.start, piece.start + piece.count)
    begun = {document for document in counted}
    assert sum(counted.values()) <= 2 * len(begun), counted
    assert tars._held_bytes <= 100 + sum(len(tars.tokens(document)) * 2 for document in tars._in_use.values())


def test_a_bad_document_holds_no_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of({f"{n}.txt": b"\xff" * 1_000_000 for n in range(40)}))
    tars = TextTars.open(str(tmp_path / "x.tar"), tokenizer)
    tracemalloc.start()
    for document in range(40):
        for _ in range(2):
            with pytest.raises(BadDocument, match=f"sample {document}: not UTF-8"):
                tars.tokens(document)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2_000_000


def test_the_end_waits_for_nothing(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tar that is still on its way, and is not wanted any more."""
    tars = TextTars.open(str(folder), tokenizer)
    order = order_of(tars)
    steps = batches(
        order, data_rank=0, data_size=1, global_batch_size=4, micro_batch_size=1, start=order.start(), num_workers=2
    )
    next(steps)
    began, released = threading.Event(), threading.Event()

    def stalls(shard: int) -> None:
        began.set()
        released.wait(30)

    assert tars._opener is not None
    monkeypatch.setattr(tars._opener, "_work", stalls)
    tars._opener.wanted.put(0)
    assert began.wait(5)
    start = time.monotonic()
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - start < 5
    released.set()
    assert tars._pool is None and len(tars.tokens(0)) > 2, "it can still be read"
