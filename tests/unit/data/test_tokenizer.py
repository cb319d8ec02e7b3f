"""What holds for every kind of tokenizer, with files that the libraries of the formats made."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import folder as folders
from bigtrain.config.errors import UserError
from bigtrain.data import shards
from bigtrain.data import tokenizer_training as training
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer, describe, from_files
from bigtrain.data.verify import verify

from . import foreign
from .conftest import TRICKY, make_texts, write_jsonl

TEXTS = [*make_texts(130), *TRICKY]
SPACE = "\u2581"


def of_sentencepiece(model: bytes) -> Tokenizer:
    return from_files({"tokenizer.model": model}, "sentencepiece")


def of_json(content: bytes, config: bytes | None = None) -> Tokenizer:
    files = {"tokenizer.json": content} | ({"tokenizer_config.json": config} if config else {})
    return from_files(files, "gpt/tokenizer.json")


def of_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    settings = foreign.tiktoken_settings(ranks)
    return from_files({"tokenizer.tiktoken": foreign.tiktoken_file(ranks), "tokenizer.tiktoken.json": settings}, "t")


LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "bpe": lambda: of_sentencepiece(training.train(TEXTS, vocab_size=420)),
    "unigram": lambda: of_sentencepiece(training.train(TEXTS, vocab_size=400, kind="unigram")),
    "json_byte_level": lambda: of_json(foreign.dump(foreign.byte_level(TEXTS))),
    "tiktoken": lambda: of_ranks(foreign.ranks(TEXTS)),
}
"""These give back every text."""
SPACED: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece_as_llama2": lambda: of_sentencepiece(
        foreign.sentencepiece_model(
            TEXTS, vocab_size=380, normalization_rule_name="identity", remove_extra_whitespaces=False
        )
    ),
    "json_as_llama2": lambda: of_json(foreign.dump(foreign.byte_fallback(TEXTS))),
    "json_unigram": lambda: of_json(foreign.dump(foreign.unigram(TEXTS))),
}
"""These put a space before each text, and write a space as U+2581; the last one also drops a first space."""
MADE: dict[str, Tokenizer] = {}


def made(name: str) -> Tokenizer:
    if name not in MADE:
        MADE[name] = (LOSSLESS | SPACED)[name]()
    return MADE[name]


@pytest.fixture(params=[*LOSSLESS, *SPACED])
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    return made(request.param)


def keeps(kind: str, text: str) -> bool:
    """Whether a tokenizer of `kind` can give back `text`."""
    if kind in LOSSLESS:
        return True
    return SPACE not in text and not (kind == "json_unigram" and text.startswith(" "))


def check_round_trip(kind: str, text: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values()), "no text becomes a special token"
    if not keeps(kind, text):
        return
    assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    in_document = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(in_document) == text, "the ends of a document stand for no text"
    at_start, later = tokenizer.bytes_of_tokens(at_start=True), tokenizer.bytes_of_tokens()
    assert at_start[ids[:1]].sum() + later[[*ids[1:], tokenizer.eos_id]].sum() == len(text.encode())
    cut = len(ids) // 2
    assert later[ids[cut:]].sum() == len(tokenizer.decode_bytes(ids[cut:], at_start=False))


@pytest.mark.parametrize("kind", [*LOSSLESS, *SPACED])
@pytest.mark.parametrize("text", ["", *TRICKY])
def test_gives_back_every_byte(kind: str, text: str) -> None:
    check_round_trip(kind, text)


HARD = st.sampled_from(
    [" ", "\n", "\t", SPACE, "x", "</s>", "<s>", foreign.END, "<0x0A>", "<unk>", "\u00e9", "e\u0301"]
)
ANY_TEXT = st.lists(st.one_of(HARD, st.characters(exclude_categories=["Cs"]))).map("".join)


@pytest.mark.parametrize("kind", [*LOSSLESS, *SPACED])
@settings(deadline=None)  # the first one trains a tokenizer
@given(text=ANY_TEXT)
def test_gives_back_any_text(kind: str, text: str) -> None:
    check_round_trip(kind, text)


def test_the_ends_of_a_document_in_a_text_are_text(any_kind: Tokenizer) -> None:
    names = list(any_kind.specials)
    text = f"a{names[-1]}b " + " ".join(names)
    ids = any_kind.encode(text)
    assert any_kind.decode(ids) == text and not set(ids) & set(any_kind.specials.values())
    asked = any_kind.encode(text, specials=True)
    assert [token for token in asked if token in any_kind.specials.values()] == [
        any_kind.specials[name] for name in [names[-1], *names]
    ]


def test_a_batch_is_its_texts(any_kind: Tokenizer) -> None:
    found = any_kind.encode_batch(TRICKY)
    assert [ids.tolist() for ids in found] == [any_kind.encode(text) for text in TRICKY]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}
    assert any_kind.encode_batch([]) == [] and any_kind.encode_batch([""])[0].shape == (0,)


def test_the_files_are_the_tokenizer(any_kind: Tokenizer, tmp_path: Path) -> None:
    paths = any_kind.save(tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    again = Tokenizer.load(tmp_path)
    assert (again.files, again.fingerprint) == (any_kind.files, any_kind.fingerprint)
    assert (again.bos_id, again.eos_id, again.specials) == (any_kind.bos_id, any_kind.eos_id, any_kind.specials)
    assert [again.encode(text) for text in TRICKY] == [any_kind.encode(text) for text in TRICKY]
    if len(paths) == 1:
        assert any_kind.fingerprint == hashlib.sha256(paths[0].read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [*LOSSLESS, *SPACED])
def test_shards_of_every_kind(kind: str, tmp_path: Path) -> None:
    """Built, verified, opened with the tokenizer that lies in them, and refused with another."""
    texts = [text for text in TEXTS if keeps(kind, text) and text.strip()]
    tokenizer, out = made(kind), tmp_path / "out"
    options = BuildOptions([str(write_jsonl(tmp_path / "x.jsonl", texts))], held_out=0)
    build(options, tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    assert verify(out / "train", progress=False) == []
    dataset = Dataset.open(out / "train")
    assert dataset.tokenizer.fingerprint == dataset.index.tokenizer == tokenizer.fingerprint
    documents = [dataset.tokens(number) for number in range(len(dataset))]
    assert sorted(dataset.tokenizer.decode(tokens.tolist()) for tokens in documents) == sorted(texts)
    assert {(int(tokens[0]), int(tokens[-1])) for tokens in documents} == {(tokenizer.bos_id, tokenizer.eos_id)}
    at_start, later = tokenizer.bytes_of_tokens(at_start=True), tokenizer.bytes_of_tokens()
    assert sum(at_start[tokens[1]] + later[tokens[2:]].sum() for tokens in documents) == dataset.index.text_bytes

    other = made(next(name for name in LOSSLESS if name != kind))
    with pytest.raises(UserError, match=rf"{tokenizer.fingerprint}.*{other.fingerprint}"):
        shards.open_all([str(out / "train")], what="data.train", tokenizer=other)

    for name in tokenizer.files:
        file = out / "train" / name
        file.write_bytes(tokenizer.files[name] + b" ")
        assert verify(out / "train", progress=False) == [f"{file}: not the tokenizer that made the shards"]
        file.unlink()
        assert verify(out / "train", progress=False) == [f"{file}: No such file or directory"]
        with pytest.raises(UserError, match=f"{name}: No such file or directory"):
            assert dataset.tokenizer
        file.write_bytes(tokenizer.files[name])


def test_another_file_beside_shards_changes_nothing(tmp_path: Path) -> None:
    file = foreign.byte_level(TEXTS, specials=["</s>", "<|x|>"])
    tokenizer, out = of_json(foreign.dump(file)), tmp_path / "out"
    options = BuildOptions([str(write_jsonl(tmp_path / "x.jsonl", make_texts(9)))], held_out=0)
    build(options, tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    (out / "train" / "tokenizer_config.json").write_text('{"eos_token": "<|x|>"}')
    assert Dataset.open(out / "train").tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match=tokenizer.fingerprint):
        shards.open_all([str(out / "train")], what="data.train", tokenizer=Tokenizer.load(out / "train"))


def test_an_index_names_files_of_tokenizers_only(tmp_path: Path) -> None:
    options = BuildOptions([str(write_jsonl(tmp_path / "x.jsonl", make_texts(9)))], held_out=0)
    build(options, tokenizer=made("bpe"), out=tmp_path / "out", num_workers=0, progress=False)
    file = tmp_path / "out" / "train" / "index.json"
    index = json.loads(file.read_text())
    for bad in ({"../../secret": "0"}, ["tokenizer.model"], 7, {}, {"tokenizer.model": 7}):
        file.write_text(json.dumps({**index, "tokenizer_files": bad}))
        with pytest.raises(UserError, match=r"index\.json cannot be read: its tokenizer_files are"):
            Dataset.open(file.parent)
    file.write_text(json.dumps({**index, "tokenizer_files": {"tokenizer.model": "0" * 64}}))
    assert "not those of the tokenizer" in verify(file.parent, progress=False)[0]


def test_a_checkpoint_holds_it(any_kind: Tokenizer, tmp_path: Path) -> None:
    folders.partial_of(tmp_path, 1).mkdir()
    folder = folders.commit(tmp_path, 1, {"format": folders.FORMAT, "step": 1}, any_kind.files)
    assert Tokenizer.load(folder).fingerprint == any_kind.fingerprint


@pytest.mark.parametrize("kind", [*LOSSLESS, *SPACED])
def test_a_document_in_parts(kind: str) -> None:
    tokenizer, text = made(kind), "def f(x):\n    return  x in range 17\n"
    for cut in (place.start() for place in re.finditer(r"(?<=\w) (?=\S)", text)):
        ids = [*tokenizer.encode(text[:cut]), *tokenizer.encode_part(text[cut:]).tolist()]
        assert tokenizer.decode(ids) == text
        sizes = tokenizer.bytes_of_tokens()[ids].sum()
        assert sizes - tokenizer.adds_a_space == len(text.encode())
    if tokenizer.adds_a_space:
        for part in ("x", "  x", " \nx"):
            with pytest.raises(ValueError, match="not with one space"):
                tokenizer.encode_part(part)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_no_caveat_where_nothing_is_lost(kind: str) -> None:
    assert made(kind).caveat is None


def test_what_is_lost_is_shown() -> None:
    assert r"'\u2581' comes back as ' '" in str(made("json_as_llama2").caveat)
    assert r"' x' comes back as 'x'" in str(made("json_unigram").caveat)
    composed = of_json(foreign.dump(foreign.byte_level(TEXTS), normalizer={"type": "NFC"}))
    assert r"'e\u0301' comes back as '\xe9'" in str(composed.caveat)
    lowered = of_json(foreign.dump(foreign.byte_level(TEXTS), normalizer={"type": "Lowercase"}))
    assert "'X' comes back as 'x'" in str(lowered.caveat)
    default = of_sentencepiece(foreign.sentencepiece_model(TEXTS, vocab_size=380))
    assert "and" in str(default.caveat) and "comes back as" in str(default.caveat)
    without_bytes = foreign.sentencepiece_model(make_texts(50), vocab_size=60, byte_fallback=False)
    assert "'x ' comes back as ''" in str(of_sentencepiece(without_bytes).caveat), "x is not in these texts"


def test_a_cut_in_the_middle_keeps_its_space() -> None:
    tokenizer = made("json_as_llama2")
    assert tokenizer.adds_a_space
    ids = tokenizer.encode("return self")
    assert tokenizer.decode(ids) == "return self"
    assert tokenizer.decode(ids, at_start=False) == " return self", "as a model goes on from a prompt"


@pytest.mark.parametrize("kind", LOSSLESS)
def test_cut_characters_and_foreign_ids_show_as_replacement(kind: str) -> None:
    tokenizer = made(kind)
    ids = tokenizer.encode("\U0001f344")
    assert len(ids) >= 3
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"


def test_a_person_can_read_it(any_kind: Tokenizer) -> None:
    rows = dict(describe(any_kind, "def \u00e9 </s>"))
    assert rows["its size"].startswith("11 bytes, ") and rows["fingerprint"] == any_kind.fingerprint
    assert rows["gives back"] == (any_kind.caveat or "every text that was tried, byte for byte")
    assert rows["document"].endswith(f"({any_kind.eos_id})")


def test_no_kind_needs_torch(tmp_path: Path) -> None:
    for name in ("bpe", "json_byte_level", "tiktoken"):
        (tmp_path / name).mkdir()
        made(name).save(tmp_path / name)
    program = (
        "import sys; from bigtrain.data.tokenizer import Tokenizer; "
        "[Tokenizer.load(path).caveat for path in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, *map(str, tmp_path.iterdir())], check=False).returncode == 0


def test_the_kind_is_told_by_the_content(tmp_path: Path) -> None:
    for name in ("bpe", "json_byte_level", "tiktoken"):
        (content, *more) = made(name).files.values()
        (tmp_path / "some.file").write_bytes(content)
        if more:
            (tmp_path / "some.file.json").write_bytes(more[0])
        assert Tokenizer.load(tmp_path / "some.file").fingerprint == made(name).fingerprint


def test_a_folder_must_have_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder has no tokenizer.model, tokenizer.json or tokenizer.tiktoken"):
        Tokenizer.load(tmp_path)
    for name in ("bpe", "json_byte_level"):
        made(name).save(tmp_path)
    with pytest.raises(UserError, match=re.escape("has tokenizer.model and tokenizer.json. Name the one")):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load(tmp_path / "tokenizer.json").fingerprint == made("json_byte_level").fingerprint


def test_unfit_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model: No such file"):
        Tokenizer.load(tmp_path / "missing.model")
    for content in (b"this is no model", b""):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model: not a sentencepiece model"):
            Tokenizer.load(tmp_path / "bad.model")
