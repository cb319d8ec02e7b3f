from __future__ import annotations

import base64
import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.config.errors import UserError
from bigtrain.data import tokenizer as tokenizers
from bigtrain.data.tokenizer import Tokenizer

from .conftest import TRICKY, make_texts


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def either(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    return Tokenizer(tokenizers.train(texts, vocab_size=400, kind=request.param))


@pytest.mark.parametrize("text", ["", *TRICKY])
def test_gives_back_every_byte(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    assert either.decode_bytes(ids) == text.encode()
    assert either.decode(ids) == text


@given(text=st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\u2581<s>x"))))
def test_gives_back_any_text(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    assert either.decode_bytes(ids) == text.encode()
    assert not {either.bos_id, either.eos_id, either.pad_id} & set(ids)


@pytest.mark.parametrize("text", [text for text in TRICKY if text])
def test_bytes_of_tokens_add_up_over_any_cut(either: Tokenizer, text: str) -> None:
    sizes = either.bytes_of_tokens()
    ids = np.array(either.encode(text))
    assert sizes[ids].sum() == len(text.encode())
    cut = len(ids) // 2
    assert sizes[ids[:cut]].sum() == len(either.decode_bytes(ids[:cut].tolist()))


def test_bytes_of_special_and_byte_pieces(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.bytes_of_tokens()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert [sizes[token] for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)] == [0, 0, 0]
    byte_pieces = [token for token in range(tokenizer.vocab_size) if tokenizer.piece(token).startswith("<0x")]
    assert len(byte_pieces) == 256
    assert all(sizes[token] == 1 for token in byte_pieces)


def test_cut_characters_and_foreign_ids_show_as_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    assert tokenizer.decode([tokenizer.vocab_size + 5]) == "\ufffd"


RANDOM = random.Random(0)
BASE64 = base64.encodebytes(RANDOM.randbytes(6000)).decode()
CHINESE = "".join(RANDOM.choices([chr(0x4E00 + number) for number in range(60)], k=6000))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("text", "vocab_size"), [(BASE64, 328), (CHINESE, 322), (CHINESE + " x", 322)])
def test_text_without_spaces_still_gives_a_tokenizer_of_them(kind: str, text: str, vocab_size: int) -> None:
    """U+2581 stands for the space in a model: where the text has no space, or few, it must be there all the same."""
    made = Tokenizer(tokenizers.train([text], vocab_size=vocab_size, kind=kind))
    for back in (text, *TRICKY):
        assert made.decode(made.encode(back)) == back


def test_training_is_reproducible(texts: list[str], model: bytes) -> None:
    assert tokenizers.train(texts, vocab_size=420, kind="bpe") == model


def test_sample_is_bounded_seeded_and_spread() -> None:
    chunks = [f"{number:06d}" + "x" * 94 for number in range(1000)]
    sample = tokenizers._sample(chunks, 20_000, seed=1)
    assert sample == tokenizers._sample(iter(chunks), 20_000, seed=1) != tokenizers._sample(chunks, 20_000, seed=2)
    assert sum(map(len, sample)) == 20_000
    assert sample == sorted(sample)
    places = [int(chunk[:6]) for chunk in sample]
    assert 400 < np.mean(places) < 600
    assert tokenizers._sample(chunks, 10**9, seed=1) == chunks


def test_chunks_keep_all_text() -> None:
    text = "".join(make_texts(40)) + "y" * 7001 + "\r\n\n"
    chunks = list(tokenizers._chunks(text))
    assert "".join(chunks) == text
    assert max(map(len, chunks)) <= 2000


def test_saved_file_loads(tokenizer: Tokenizer, model: bytes, tmp_path: Path) -> None:
    tokenizers.save(model, tmp_path / "deep" / "t.model")
    loaded = Tokenizer.load(tmp_path / "deep" / "t.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.model"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("vocab_size", "words"), [(50_000, "too large"), (20, "too small")])
def test_unfit_vocab_size_is_named(kind: str, vocab_size: int, words: str) -> None:
    with pytest.raises(UserError, match=rf"vocab_size {vocab_size} is {words} .* at (most|least) \d+"):
        tokenizers.train(["hello world, hello again\n" * 5], vocab_size=vocab_size, kind=kind)


def test_no_text_is_an_error() -> None:
    with pytest.raises(UserError, match="no text"):
        tokenizers.train([], vocab_size=300)


def test_unfit_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model: No such file"):
        Tokenizer.load(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_bytes(b"this is no model")
    with pytest.raises(UserError, match=r"bad\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        Tokenizer.load(tmp_path / "empty.model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"byte_fallback": True, "vocab_size": 310},
            "does not give back the text",
        ),  # normalises: sentencepiece's default
        ({"vocab_size": 85, "normalization_rule_name": "identity"}, "does not give back the text"),
        ({"byte_fallback": True, "vocab_size": 310, "bos_id": -1}, "it has no <s>"),
    ],
)
def test_lossy_models_are_refused(options: dict[str, object], words: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(make_texts(30)),
        model_writer=model,
        minloglevel=2,
        **options,  # pyright: ignore
    )
    with pytest.raises(UserError, match=words):
        Tokenizer(model.getvalue())
