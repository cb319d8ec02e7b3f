"""sentencepiece models: those that we train, and those that others did."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from bigtrain.config.errors import UserError
from bigtrain.data import tokenizer_training as training
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer import Tokenizer

from . import foreign
from .conftest import TRICKY, make_texts


def pieces_of(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(token) for token in range(processor.vocab_size())]


RANDOM = random.Random(0)
BASE64 = base64.encodebytes(RANDOM.randbytes(6000)).decode()
CHINESE = "".join(RANDOM.choices([chr(0x4E00 + number) for number in range(60)], k=6000))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("text", "vocab_size"), [(BASE64, 328), (CHINESE, 322), (CHINESE + " x", 322)])
def test_text_without_spaces_still_gives_a_tokenizer_of_them(kind: str, text: str, vocab_size: int) -> None:
    """U+2581 stands for the space in a model: where the text has no space, or few, it must be there all the same."""
    made = SentencePieceTokenizer(training.train([text], vocab_size=vocab_size, kind=kind))
    for back in (text, *TRICKY):
        assert made.decode(made.encode(back)) == back


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_reproducible(kind: str, texts: list[str]) -> None:
    """Sampled and with special tokens, in this process and in another."""
    options = {"vocab_size": 340, "kind": kind, "specials": ["<|user|>"], "seed": 5, "sample_bytes": 15_000}
    model = training.train(texts, **options)  # type: ignore[arg-type]
    program = (
        "import sys, json, hashlib; from bigtrain.data.tokenizer_training import train; "
        "texts, options = json.load(sys.stdin); print(hashlib.sha256(train(texts, **options)).hexdigest())"
    )
    told = json.dumps([texts, options])
    other = subprocess.run([sys.executable, "-c", program], input=told, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(model).hexdigest()
    assert training.train(texts, **{**options, "seed": 6}) != model  # type: ignore[arg-type]


def test_sample_is_bounded_seeded_and_spread() -> None:
    chunks = [f"{number:06d}" + "x" * 94 for number in range(1000)]
    sample = training._sample(chunks, 20_000, seed=1)
    assert sample == training._sample(iter(chunks), 20_000, seed=1) != training._sample(chunks, 20_000, seed=2)
    assert sum(map(len, sample)) == 20_000
    assert sample == sorted(sample)
    places = [int(chunk[:6]) for chunk in sample]
    assert 400 < np.mean(places) < 600
    assert training._sample(chunks, 10**9, seed=1) == chunks


def test_chunks_keep_all_text() -> None:
    text = "".join(make_texts(40)) + "y" * 7001 + "\r\n\n"
    chunks = list(training._chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= 2000


def test_saved_file_loads(tokenizer: Tokenizer, model: bytes, tmp_path: Path) -> None:
    training.save(model, tmp_path / "deep" / "t.model")
    loaded = Tokenizer.load(tmp_path / "deep" / "t.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.model"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("vocab_size", "words"), [(50_000, "too large"), (20, "too small")])
def test_unfit_vocab_size_is_named(kind: str, vocab_size: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"vocab_size {vocab_size} is {words} .* at (most|least) \d+"):
        training.train(["hello world, hello again\n" * 5], vocab_size=vocab_size, kind=kind)


def test_no_text_is_an_error() -> None:
    with pytest.raises(UserError, match="no text"):
        training.train([], vocab_size=300)


def test_bytes_of_special_and_byte_pieces(tokenizer: Tokenizer, model: bytes) -> None:
    sizes, pieces = tokenizer.bytes_of_tokens(), pieces_of(model)
    assert sizes.shape == (tokenizer.vocab_size,)
    assert tokenizer.specials == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    assert sizes[:4].tolist() == [0, 0, 0, 0]
    byte_pieces = [token for token, piece in enumerate(pieces) if re.fullmatch("<0x..>", piece)]
    assert len(byte_pieces) == 256
    assert all(sizes[token] == 1 for token in byte_pieces)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_special_tokens_stay_whole_and_no_text_becomes_one(kind: str, texts: list[str]) -> None:
    names = ["<|user|>", "<|a, b|>", "\u00e9nd", "two words"]
    told = [*texts, *(f"text with {name} in it" for name in names for _ in range(50))]
    made = SentencePieceTokenizer(training.train(told, vocab_size=410, kind=kind, specials=names))
    assert made.vocab_size == 410 and [made.specials[name] for name in names] == [4, 5, 6, 7]
    text = "".join(names)
    assert not set(made.encode(text)) & {4, 5, 6, 7} and made.decode(made.encode(text)) == text
    assert made.encode(text, specials=True) == [4, 5, 6, 7]
    asked = made.encode("x<|user|>y</s>", specials=True)
    assert [token for token in asked if token < 8] == [4, 2] and made.decode(asked) == "xy"
    assert made.bytes_of_tokens()[:8].sum() == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([""], "'' cannot be: it is empty"),
        (["</s>"], "'</s>' cannot be: it is a token already"),
        (["<0x0A>"], "'<0x0A>' cannot be: it is a token already"),
        (["<x>", "<y>", "<x>"], "'<x>' is there twice"),
    ],
)
def test_names_that_cannot_be(names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        training.train(["text"], vocab_size=300, specials=names)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_digit_is_a_token(kind: str, texts: list[str]) -> None:
    years = [f"in {year} it was 2024, 1999, 1000000\n" for year in range(1900, 2100)]
    model = training.train([*texts, *years], vocab_size=400, kind=kind)
    with_digits = [piece for piece in pieces_of(model) if re.search(r"\d", piece) and not re.fullmatch("<0x..>", piece)]
    assert sorted(with_digits) == list("0123456789")
    made = SentencePieceTokenizer(model)
    assert [made.piece(token) for token in made.encode("20240")] == list("20240")


def test_the_ends_where_a_model_lacks_one() -> None:
    without_begin = SentencePieceTokenizer(foreign.sentencepiece_model(make_texts(30), vocab_size=310, bos_id=-1))
    assert without_begin.bos_id == without_begin.eos_id >= 0
    with pytest.raises(UserError, match=r"it has no </s> to end a document. Train it with one"):
        SentencePieceTokenizer(foreign.sentencepiece_model(make_texts(30), vocab_size=310, eos_id=-1))


def test_a_model_of_others_is_used_as_it_is() -> None:
    model = foreign.sentencepiece_model(make_texts(60), vocab_size=315)
    made, theirs = SentencePieceTokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [made.encode(text) for text in TRICKY] == [theirs.encode(text) for text in TRICKY]
    for text in make_texts(5, seed=3):
        ids = made.encode(text)
        assert made.decode(ids) == theirs.decode(ids)
