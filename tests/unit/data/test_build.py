from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import build as building
from bigtrain.data import encoding, sides, tokenising, writing
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.shard_format import Index
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.verify import verify

from .conftest import make_texts, write_jsonl

SPLITS = ("train", "valid")


def texts_of(dataset: Dataset, tokenizer: Tokenizer) -> list[str]:
    found: list[str] = []
    for document in range(len(dataset)):
        tokens = dataset.tokens(document).tolist()
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        found.append(tokenizer.decode(tokens[1:-1]))
    return found


def small_build(out: Path, texts: list[str], tokenizer: Tokenizer, **options: object) -> Path:
    lines = write_jsonl(out.parent / f"{out.name}.jsonl", texts)
    made = BuildOptions([str(lines)], **options)  # pyright: ignore[reportArgumentType]
    build(made, tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    return out


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_holds_every_document_once_byte_for_byte(built: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    found = [text for split in SPLITS for text in texts_of(Dataset.open(built / split), tokenizer)]
    assert Counter(found) == Counter(texts)


def test_index_tells_the_truth(built: Path, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        dataset = Dataset.open(built / split)
        index = dataset.index
        documents = texts_of(dataset, tokenizer)
        assert len(index.shards) > 1
        assert index.num_documents == len(documents) == len(dataset)
        assert index.text_bytes == sum(len(text.encode()) for text in documents)
        assert index.num_tokens == sum(len(dataset.tokens(document)) for document in range(len(dataset)))
        assert dataset.num_tokens_of_documents().tolist() == [len(dataset.tokens(d)) for d in range(len(dataset))]
        assert (index.dtype, index.vocab_size) == ("<u2", tokenizer.vocab_size)
        assert index.made["seed"] == 3
        assert dataset.tokenizer.fingerprint == tokenizer.fingerprint == index.tokenizer
        assert verify(built / split, progress=False) == []


def test_drops_are_counted(built: Path) -> None:
    assert Dataset.open(built / "train").index.dropped == {
        "empty": 2,
        "field 'text' is not text": 1,
        "no field 'text'": 1,
        "not JSON": 1,
        "not UTF-8": 2,
    }


def test_metadata_name_the_source(built: Path, texts: list[str], tokenizer: Tokenizer) -> None:
    dataset = Dataset.open(built / "train")
    for document in (0, 1, len(dataset) - 1):
        key, metadata = dataset.describe(document)
        text = tokenizer.decode(dataset.tokens(document)[1:-1].tolist())
        assert key.startswith(f"{document:09d}-")
        assert metadata["text_bytes"] == len(text.encode())
        path, _, line = metadata["source"].partition(":")
        if line:
            assert json.loads(Path(path).read_text(encoding="utf-8").split("\n")[int(line) - 1])["text"] == text
        else:
            assert Path(path).read_bytes().decode() == text


def test_part_of_a_document(built: Path) -> None:
    dataset = Dataset.open(built / "train")
    whole = dataset.tokens(5)
    assert dataset.tokens(5, 2, 4).tolist() == whole[2:4].tolist()
    assert dataset.tokens(5, 1).tolist() == whole[1:].tolist()
    assert dataset.tokens(5, 3, 10**9).tolist() == whole[3:].tolist()
    assert dataset.tokens(5, 3, 3).tolist() == []
    with pytest.raises(IndexError):
        dataset.tokens(len(dataset))
    with pytest.raises(ValueError, match="read-only"):
        whole[0] = 1


def test_plain_tar_reads_the_same(built: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(built / "train")
    for shard in dataset.index.shards:
        subprocess.run(["tar", "-xf", str(dataset.path / shard.file), "-C", str(tmp_path)], check=True)
    arrays = [np.load(path, allow_pickle=False) for path in sorted(tmp_path.glob("*.tokens.npy"))]
    assert len(arrays) == len(dataset) == len(list(tmp_path.glob("*.json")))
    for document, array in enumerate(arrays):
        assert np.array_equal(array, dataset.tokens(document))


def test_webdataset_reads_the_same(built: Path) -> None:
    import webdataset

    dataset = Dataset.open(built / "valid")
    urls = [str(dataset.path / shard.file) for shard in dataset.index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())  # pyright: ignore
    assert len(samples) == len(dataset)
    for document, sample in enumerate(samples):
        assert np.array_equal(sample["tokens.npy"], dataset.tokens(document))
        assert (sample["__key__"], sample["json"]) == dataset.describe(document)


def test_tars_carry_no_trace_of_the_machine(built: Path) -> None:
    with tarfile.open(built / "train" / "shard-000000.tar") as tar:
        assert {(member.mtime, member.uname, member.gname, member.uid) for member in tar} == {(0, "", "", 0)}


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers(
    built: Path, inputs: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "BATCH_RECORDS", 7)
    options = BuildOptions(inputs, held_out=0.2, seed=3, shard_tokens=1000)
    build(options, tokenizer=tokenizer, out=tmp_path / "again", num_workers=2, progress=False)
    assert content(tmp_path / "again") == content(built)


def test_the_seed_shuffles_and_leaves_the_sides(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = make_texts(60)
    first, second = (
        {split: texts_of(Dataset.open(out / split), tokenizer) for split in SPLITS}
        for out in (small_build(tmp_path / f"seed{seed}", texts, tokenizer, seed=seed, held_out=0.3) for seed in (0, 1))
    )
    for split in SPLITS:
        assert first[split] != second[split]
        assert sorted(first[split]) == sorted(second[split])
    assert first["train"] != sorted(first["train"], key=texts.index)


def test_copies_never_straddle_the_sides(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = make_texts(40) * 3
    out = small_build(tmp_path / "copies", texts, tokenizer, held_out=0.4)
    train, valid = (set(texts_of(Dataset.open(out / split), tokenizer)) for split in SPLITS)
    assert not train & valid
    assert len(train) + len(valid) == 40
    assert 8 <= len(valid) <= 24
    extended = small_build(tmp_path / "more", [*make_texts(30, seed=9), *texts], tokenizer, held_out=0.4)
    assert valid <= set(texts_of(Dataset.open(extended / "valid"), tokenizer))


def test_nothing_held_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = small_build(tmp_path / "all", make_texts(5), tokenizer, held_out=0.0)
    assert [path.name for path in out.iterdir()] == ["train"]
    assert len(Dataset.open(out / "train")) == 5


def test_large_vocabularies_take_four_bytes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [building.token_dtype(size) for size in (4096, 65536, 65537)] == ["<u2", "<u2", "<u4"]
    texts = make_texts(10)
    narrow = small_build(tmp_path / "narrow", texts, tokenizer, held_out=0.0) / "train"
    monkeypatch.setattr(building, "token_dtype", lambda vocab_size: "<u4")
    wide = small_build(tmp_path / "wide", texts, tokenizer, held_out=0.0) / "train"
    assert verify(wide, progress=False) == []
    assert texts_of(Dataset.open(wide), tokenizer) == texts_of(Dataset.open(narrow), tokenizer)
    assert Dataset.open(wide).tokens(0).dtype == np.uint32


def test_refuses_a_folder_that_is_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    small_build(tmp_path / "out", make_texts(5), tokenizer, held_out=0.0)
    with pytest.raises(UserError, match="out is already there"):
        small_build(tmp_path / "out", make_texts(5), tokenizer, held_out=0.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        (
            {"field": "body"},
            r"no document is left. Dropped: 5 no field 'body' \(such as .*/out.jsonl:1\); data.prepare.json_field ",
        ),
    ],
)
def test_bad_options_leave_nothing_behind(
    tokenizer: Tokenizer, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        small_build(tmp_path / "out", make_texts(5), tokenizer, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(("few", "num_lanes"), [(["one"], 1), (["same", "same"], 1), (["a", "b", "c"], 3)])
def test_too_few_documents_leave_nothing_behind(
    tokenizer: Tokenizer, tmp_path: Path, few: list[str], num_lanes: int
) -> None:
    lines = str(write_jsonl(tmp_path / "few.jsonl", few))
    with pytest.raises(UserError, match=f"too few documents: {len(few)}, of which"):
        build(BuildOptions([lines]), tokenizer=tokenizer, out=tmp_path / "out", num_workers=0, num_lanes=num_lanes)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]


def test_a_build_that_breaks_off_leaves_no_data_set_and_goes_on(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_index", broken)
        with pytest.raises(UserError) as caught:
            small_build(tmp_path / "out", make_texts(5), tokenizer, held_out=0.0)
    assert str(caught.value) == (
        "cannot write somewhere: No space left on device. What is done is kept: the same command goes on with it."
    )
    assert not (tmp_path / "out").exists()
    out = small_build(tmp_path / "out", make_texts(5), tokenizer, held_out=0.0)
    assert sorted(texts_of(Dataset.open(out / "train"), tokenizer)) == make_texts(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.jsonl"]


def test_long_documents_are_tokenised_in_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The tokens are those of the whole: the parts are cut where no piece reaches over."""
    size = encoding.MAX_PART_CHARACTERS
    words = "\n".join(make_texts(1_000))
    assert len(list(encoding.parts(words, tokenizer))) > 5
    dense = "\u4e2d\U0001f600\u2581" * (size // 2)
    out = small_build(tmp_path / "long", [words, dense, "short", words + " " * size + "x"], tokenizer, held_out=0.0)
    dataset = Dataset.open(out / "train")
    found = texts_of(dataset, tokenizer)
    assert sorted(found) == sorted([words, dense, "short", words + " " * size + "x"])
    whole = [tokenizer.bos_id, *tokenizer.encode(words), tokenizer.eos_id]
    assert dataset.tokens(found.index(words)).tolist() == whole
    assert [sides.hash_of(text.encode()) for text in found] == [
        int(dataset.describe(document)[0].partition("-")[2], 16) for document in range(4)
    ]


def test_index_refuses_what_it_does_not_know() -> None:
    for text, words in {
        "[]": "not the index",
        '{"format": "bigtrain shards", "version": 99}': "version 99",
        '{"format": "bigtrain shards", "version": 1}': "lacks or adds a field",
        '{"format": "bigtrain shards", "version": 1, "shards": [], "x": 1}': "lacks or adds a field",
    }.items():
        with pytest.raises(ValueError, match=words):
            Index.from_json(text)


def test_the_sides_are_the_same_for_ever() -> None:
    """Held-out text of one version must not become training text of the next, on any machine."""
    texts = [f"text {number}" for number in range(40)]
    hashes = np.array([sides.hash_of(text.encode()) for text in texts], np.uint64)
    assert np.flatnonzero(sides.held_out(hashes, 0.1)).tolist() == GOLDEN_HELD_OUT


GOLDEN_HELD_OUT = [4, 35]
