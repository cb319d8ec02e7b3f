"""The exported tokenizer: AutoTokenizer's ids are those of sentencepiece itself, for any text."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from bigtrain.config.errors import UserError
from bigtrain.data import tokenizer_training as training
from bigtrain.data.hf_files import hf_files
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer import Tokenizer, from_files
from tests.unit.data.conftest import TRICKY, make_texts

NAMES = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<|user|>",
    "<0x0A>",
    "<0xE2>",
    "<",
    "0",
    ">",
    "\u2581",
    " ",
    "  ",
    "in",
    "\n",
]


def random_texts(count: int, seed: int) -> list[str]:
    """Bytes as Latin-1 and as damaged UTF-8, all of Unicode, few letters that merge in many ways, names of pieces."""
    rng = random.Random(seed)
    kinds = [
        lambda n: rng.randbytes(n).decode("latin-1"),
        lambda n: rng.randbytes(n).decode("utf-8", errors="replace"),
        lambda n: "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(n)),
        lambda n: "".join(rng.choices("abx  \n", k=n)),
        lambda n: "".join(rng.choices(NAMES, k=n)),
    ]
    return [kinds[number % len(kinds)](rng.randint(0, 120)) for number in range(count)]


def opened(files: dict[str, bytes], folder: Path, *, model_type: str = "llama") -> Any:
    """AutoTokenizer of a folder with a model beside it, as an export has."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


def few_letters() -> list[str]:
    """A language in which a piece has many ways to come together."""
    rng = random.Random(5)
    return ["".join(rng.choices("ab ", weights=[5, 3, 1], k=400)) for _ in range(60)]


CORPORA = {"words": (make_texts(150), 420), "few letters": (few_letters(), 600)}


def trained(corpus: str, kind: str, *, specials: Sequence[str] = ("<|user|>",)) -> SentencePieceTokenizer:
    texts, size = CORPORA[corpus]
    smaller = {"words": 330, "few letters": 330}[corpus]
    size = size if kind == "bpe" else smaller
    return SentencePieceTokenizer(training.train(texts, vocab_size=size, kind=kind, specials=specials))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_bpe_gives_the_same_ids_for_every_text(corpus: str, model_type: str, tmp_path: Path) -> None:
    ours = trained(corpus, "bpe")
    theirs = opened(hf_files(ours), tmp_path, model_type=model_type)
    for text in [*TRICKY, *make_texts(20, seed=1), *few_letters(), *random_texts(600, seed=2)]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), repr(text)


def test_the_tokenizer_of_the_other_tests(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    theirs = opened(hf_files(tokenizer), tmp_path)
    for text in [*texts, *TRICKY]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.encode(text) == [tokenizer.bos_id, *ids]
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("corpus", CORPORA)
def test_unigram_differs_only_where_two_cuts_are_as_good(corpus: str, tmp_path: Path) -> None:
    """sentencepiece adds n scores to a sum s in fp32: each addition of either cut is off by s / 2^24 at most."""
    ours = trained(corpus, "unigram")
    sp = sentencepiece.SentencePieceProcessor(model_proto=ours.files["tokenizer.model"])
    scores = np.array([sp.get_score(token) for token in range(sp.vocab_size())])
    theirs = opened(hf_files(ours), tmp_path)
    texts = [*TRICKY, *make_texts(20, seed=1), *few_letters(), *random_texts(600, seed=2)]
    different = 0
    for text in texts:
        mine, other = ours.encode(text), theirs.encode(text, add_special_tokens=False)
        if mine != other:
            different += 1
            sums = [float(scores[ids].sum()) for ids in (mine, other)]
            assert abs(sums[0] - sums[1]) <= 2 * max(len(mine), len(other)) * abs(sums[0]) * 2**-24, repr(text)
        assert ours.decode(other) == text
    assert different < len(texts) / 20


@pytest.mark.parametrize("missing", ["<", "0", "x", "|"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_names_of_pieces_are_text(kind: str, missing: str, tmp_path: Path) -> None:
    """Also where the vocabulary has not all of their letters."""
    texts = [text.replace(missing, "") for text in [*make_texts(150), "< > / | s u k p d a e r 0 1 2 x A F" * 40]]
    ours = SentencePieceTokenizer(training.train(texts, vocab_size=330, kind=kind, specials=["<|user|>"]))
    theirs = opened(hf_files(ours), tmp_path)
    for name in NAMES:
        for text in (name, name * 2, f"a{name}b", f" {name} ", f"<{name}>"):
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert not set(theirs.encode("<s></s><|user|>", add_special_tokens=False)) & set(ours.specials.values())


def test_special_names_are_tokens_where_asked_for(tmp_path: Path) -> None:
    ours = trained("words", "bpe")
    theirs = opened(hf_files(ours), tmp_path)
    found = theirs.encode("<|user|>def", add_special_tokens=False, split_special_tokens=False)
    assert found == ours.encode("<|user|>def", specials=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 3)
    assert theirs.decode([1, *ours.encode("def"), 2], skip_special_tokens=True) == "def"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_bigtrain_reads_it_back(kind: str) -> None:
    ours = trained("words", kind)
    back = from_files(hf_files(ours), "back")
    assert (back.vocab_size, back.bos_id, back.eos_id) == (ours.vocab_size, ours.bos_id, ours.eos_id)
    for text in TRICKY[:-1]:
        assert back.encode(text) == ours.encode(text)
    assert np.array_equal(back.bytes_of_tokens(), ours.bytes_of_tokens())
    assert hf_files(back) == hf_files(ours)


def test_a_tokenizer_json_stays_as_it_is() -> None:
    content = hf_files(trained("words", "bpe"))["tokenizer.json"].replace(b'"version": "1.0"', b'"version":  "1.0"')
    assert hf_files(from_files({"tokenizer.json": content}, "x"))["tokenizer.json"] == content


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_dummy_prefix": True}, "it has add_dummy_prefix"),
        ({"remove_extra_whitespaces": True}, "it has remove_extra_whitespaces"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)"),
        ({"byte_fallback": False}, "no piece for each byte"),
        ({"user_defined_symbols": ["zz"]}, "it has user-defined pieces"),
        ({"model_type": "word"}, "its model_type is 3"),
        ({"control_symbols": ["\u00a7"]}, "one character"),
        ({"treat_whitespace_as_suffix": True}, "spaces in another way"),
    ],
)
def test_other_sentencepiece_models_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    wanted = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "hard_vocab_limit": False, "minloglevel": 2,
    } | settings  # fmt: skip
    prefix = tmp_path / "m"
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(make_texts(99)), model_prefix=str(prefix), **wanted)
    tokenizer = SentencePieceTokenizer(prefix.with_suffix(".model").read_bytes(), "m")
    with pytest.raises(UserError, match=message):
        hf_files(tokenizer)
