"""tokenizer.json, against Transformers and what files of well-known models have in them."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bigtrain.config.errors import UserError
from bigtrain.data.hf_tokenizer import HuggingFaceTokenizer
from bigtrain.data.tokenizer import Tokenizer

from . import foreign
from .conftest import TRICKY, make_texts

TEXTS = [*make_texts(130), *TRICKY]


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    return foreign.byte_level(TEXTS, specials=[foreign.END, "<|user|>"])


@pytest.fixture(scope="module")
def byte_fallback() -> dict[str, Any]:
    return foreign.byte_fallback(TEXTS)


def state_of(part: Any) -> Any:
    """A part of a tokenizer as it stands in the file."""
    return json.loads(part.__getstate__())


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def as_llama3(file: dict[str, Any]) -> dict[str, Any]:
    """Its splitting, whole words from the vocabulary, and a template behind byte-level processing."""
    from tokenizers import Regex

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    template = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    return {
        **file,
        "model": {**file["model"], "ignore_merges": True},
        "pre_tokenizer": state_of(split),
        "post_processor": state_of(processors.Sequence([processors.ByteLevel(trim_offsets=False), template])),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "spaced_gpt2", "normalised"])
def test_the_ids_are_those_of_transformers(
    name: str, byte_level: dict[str, Any], byte_fallback: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    file = {
        "gpt2": byte_level,
        "llama2": byte_fallback,
        "llama3": as_llama3(byte_level),
        "spaced_gpt2": {**byte_level, "pre_tokenizer": state_of(pre_tokenizers.ByteLevel(add_prefix_space=True))},
        "normalised": {**byte_level, "normalizer": state_of(normalizers.NFKC())},
    }[name]
    (tmp_path / "tokenizer.json").write_bytes(foreign.dump(file))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True)
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text in [*TRICKY, *make_texts(20, seed=4), f"x{foreign.END}y<|user|> </s>"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        strips = name != "spaced_gpt2"  # its decoder leaves the space that it adds
        assert ours.decode(ids, at_start=strips) == theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_what_a_file_asks_for_beyond_the_ids_is_off(byte_level: dict[str, Any]) -> None:
    """Truncation, padding, dropout and a template: the text would lose its end, or its sense, silently."""
    asking = foreign.dump(
        {**as_llama3(byte_level), "model": {**byte_level["model"], "dropout": 0.5}},
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": foreign.END,
        },
    )
    plain = HuggingFaceTokenizer(foreign.dump({**as_llama3(byte_level), "model": byte_level["model"]}))
    made = HuggingFaceTokenizer(asking)
    for text in TEXTS:
        assert made.encode(text) == plain.encode(text)


def test_names_that_stand_in_the_vocabulary_are_spelled_in_a_text() -> None:
    """A unigram model knows no kinds of pieces: it takes </s> and <0x0A> in a text for those."""
    file = foreign.unigram(TEXTS)
    made = HuggingFaceTokenizer(foreign.dump(file))
    text = "a </s><s> b <0x0A>\n<unk> \U0001f4a9"
    plain = made._hf.encode(text, add_special_tokens=False).tokens
    assert {"</s>", "<0x0A>", "<unk>"} <= set(plain), "the library does so"
    pieces = [made._hf.id_to_token(token) for token in made.encode(text)]
    assert made.decode(made.encode(text)) == text
    assert not {"</s>", "<s>", "<unk>"} & set(pieces) and "<0x0A>" not in pieces and "<0xF0>" in pieces


def test_tokens_that_a_file_adds_as_text_are_text(byte_level: dict[str, Any]) -> None:
    """GPT-NeoX has runs of spaces, Qwen has <tool_call>: no special tokens, so they stand for their own text."""
    size = len(byte_level["model"]["vocab"])
    added = [
        {"id": size + 5, "content": "\n\n\t\u00e9", "special": False},
        {"id": size + 9, "content": "<tool_call>", "special": False},
    ]
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file = {**byte_level, "added_tokens": [*byte_level["added_tokens"], *({**token, **rest} for token in added)]}
    made = HuggingFaceTokenizer(foreign.dump(file))
    text = "x\n\n\t\u00e9y <tool_call>"
    ids = made.encode(text)
    found = {made.piece(token): token for token in ids}
    assert {"\n\n\t\u00e9", "<tool_call>"} <= found.keys()
    assert made.decode(ids) == text and made.bytes_of_tokens()[ids].sum() == len(text.encode())
    assert made.vocab_size == max(found.values()) + 1 and made.caveat is None
    strips = {**file, "added_tokens": [{**token, "lstrip": not token["special"]} for token in file["added_tokens"]]}
    assert "'x <tool_call> x' comes back as 'x<tool_call> x'" in str(HuggingFaceTokenizer(foreign.dump(strips)).caveat)


def test_an_end_that_a_file_adds_as_text(byte_level: dict[str, Any]) -> None:
    """Special by its use only: no text may become it all the same."""
    (first, *rest) = byte_level["added_tokens"]
    file = {**byte_level, "added_tokens": [{**first, "special": False}, *rest]}
    made = HuggingFaceTokenizer(foreign.dump(file), json.dumps({"eos_token": foreign.END}).encode())
    text = f"a{foreign.END}b"
    ids = made.encode(text)
    assert made.eos_id not in ids and made.decode(ids) == text
    assert made.bytes_of_tokens()[made.eos_id] == 0


def with_specials(file: dict[str, Any], *names: str) -> dict[str, Any]:
    """The file with these special tokens instead of its own."""
    (first, *_) = file["added_tokens"]
    size = max(file["model"]["vocab"].values()) + 1
    added = [{**first, "id": size + place, "content": name} for place, name in enumerate(names)]
    return {**file, "added_tokens": added}


def wrapped(single: str, *names: str) -> dict[str, Any]:
    return state_of(processors.TemplateProcessing(single=single, special_tokens=[(name, 7) for name in names]))


@pytest.mark.parametrize(
    ("specials", "post_processor", "config", "expected"),
    [
        (["<|endoftext|>"], None, None, ("<|endoftext|>", "<|endoftext|>")),
        (["<|endoftext|>", "<|padding|>"], None, None, ("<|endoftext|>", "<|endoftext|>")),
        (["<unk>", "<s>", "</s>"], None, None, ("<s>", "</s>")),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], None, None, ("<|begin_of_text|>", "<|end_of_text|>")),
        (["[A]", "[B]"], wrapped("[A] $A [B]", "[A]", "[B]"), None, ("[A]", "[B]")),
        (["[A]", "[B]"], wrapped("$A [B]", "[B]"), None, ("[B]", "[B]")),
        (["[CLS]", "[SEP]"], {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]}, None, None),
        (["[ONLY]"], None, None, ("[ONLY]", "[ONLY]")),
        (["[A]"], {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 0]}, None, ("[A]", "[A]")),
        (["<s>", "</s>"], None, {"bos_token": None, "eos_token": "</s>"}, ("</s>", "</s>")),
        (["<s>", "</s>", "[E]"], None, {"eos_token": "[E]", "chat_template": "x"}, ("<s>", "[E]")),
        (["[A]", "[B]"], None, {"bos_token": {"content": "[A]"}, "eos_token": {"content": "[B]"}}, ("[A]", "[B]")),
        (["[A]", "[B]"], wrapped("[A] $A", "[A]"), {"eos_token": "[B]"}, ("[A]", "[B]")),
    ],
)
def test_the_ends_of_a_document(
    byte_level: dict[str, Any],
    specials: list[str],
    post_processor: dict[str, Any] | None,
    config: dict[str, Any] | None,
    expected: tuple[str, str] | None,
    tmp_path: Path,
) -> None:
    file = {**with_specials(byte_level, *specials), "post_processor": post_processor}
    (tmp_path / "tokenizer.json").write_bytes(foreign.dump(file))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = Tokenizer.load(tmp_path)
    found = {token: name for name, token in made.specials.items()}
    assert (found[made.bos_id], found[made.eos_id]) == (expected or ("[CLS]", "[SEP]"))
    (tmp_path / "kept").mkdir()
    made.save(tmp_path / "kept")
    again = Tokenizer.load(tmp_path / "kept")
    assert (again.bos_id, again.eos_id, again.fingerprint) == (made.bos_id, made.eos_id, made.fingerprint)


def test_the_configuration_counts_only_where_it_says_something(byte_level: dict[str, Any]) -> None:
    content = foreign.dump(with_specials(byte_level, "<s>", "</s>", "[E]"))
    alone = HuggingFaceTokenizer(content)
    assert alone.fingerprint == hashlib.sha256(content).hexdigest()
    same = HuggingFaceTokenizer(content, json.dumps({"eos_token": "</s>", "chat_template": "..."}).encode())
    assert same.fingerprint == alone.fingerprint and list(same.files) == ["tokenizer.json"]
    other, again = (
        HuggingFaceTokenizer(content, json.dumps({"eos_token": "[E]", **more}).encode()) for more in ({}, {"x": 1})
    )
    assert other.fingerprint == again.fingerprint != alone.fingerprint


@pytest.mark.parametrize(
    ("specials", "config", "words"),
    [
        (
            ["[A]", "[B]"],
            None,
            'which token ends a document? There are [A], [B]. Write {"eos_token": NAME} to ',
        ),
        ([], None, "which token ends a document? It has no special tokens."),
        (["[A]"], b'{"eos_token": "[C]"}', "tokenizer_config.json: eos_token is '[C]', which is no token of it"),
        (["[A]"], b'{"eos_token": 7}', "eos_token is 7, which is no token of it"),
        (["[A]"], b"[1]", "tokenizer_config.json cannot be read"),
        (["[A]"], b'{"eos', "tokenizer_config.json cannot be read"),
    ],
)
def test_no_end_that_can_be_told(
    byte_level: dict[str, Any], specials: list[str], config: bytes | None, words: str
) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        HuggingFaceTokenizer(foreign.dump(with_specials(byte_level, *specials)), config)


def test_the_configuration_is_named_after_the_file(byte_level: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.json").write_bytes(foreign.dump(with_specials(byte_level, "[A]", "[B]")))
    with pytest.raises(UserError, match=r"Write .* to own_config\.json beside it"):
        Tokenizer.load(tmp_path / "own.json")
    (tmp_path / "own_config.json").write_text('{"eos_token": "[B]"}')
    made = Tokenizer.load(tmp_path / "own.json")
    assert made.bos_id == made.eos_id == made.specials["[B]"]


def test_an_unknown_token_must_not_end_documents(byte_fallback: dict[str, Any]) -> None:
    vocabulary = {piece: token for piece, token in byte_fallback["model"]["vocab"].items() if piece != "<0x0A>"}
    model = {**byte_fallback["model"], "vocab": vocabulary, "unk_token": "</s>"}
    with pytest.raises(UserError, match=r"it writes </s> for what it does not know, which would end a document"):
        HuggingFaceTokenizer(foreign.dump(byte_fallback, model=model))
    complete = {**byte_fallback["model"], "unk_token": "</s>"}
    HuggingFaceTokenizer(foreign.dump(byte_fallback, model=complete))


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (decoders.WordPiece(), "its decoder is WordPiece, so a token does not stand for certain bytes"),
        (decoders.BPEDecoder(), "its decoder is BPEDecoder"),
        (None, "it has no decoder"),
    ],
)
def test_tokens_that_are_no_bytes_are_refused(byte_level: dict[str, Any], decoder: Any, words: str) -> None:
    file = foreign.dump(byte_level, decoder=decoder and state_of(decoder), pre_tokenizer=None)
    with pytest.raises(UserError, match=re.escape(words)):
        HuggingFaceTokenizer(file)


@pytest.mark.parametrize("mark", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_of_pieces_are_refused(byte_level: dict[str, Any], mark: str) -> None:
    with pytest.raises(UserError, match=f"its model has {mark}='##'"):
        HuggingFaceTokenizer(foreign.dump(byte_level, model={**byte_level["model"], mark: "##"}))


def test_a_missing_decoder_is_told_by_what_makes_the_pieces(byte_level: dict[str, Any]) -> None:
    made = HuggingFaceTokenizer(foreign.dump(byte_level, decoder=None))
    assert [made.decode(made.encode(text)) for text in TRICKY] == TRICKY


@pytest.mark.parametrize("content", [b"{}", b"{", b"[]", b'{"model": {}}', b"\xff\xfe", b""])
def test_damaged_files_are_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"t\.json: not a tokenizer\.json that can be used"):
        HuggingFaceTokenizer(content, name="t.json")


def places_of(part: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a file that a value stands at, of long parts the first."""
    inside = list(part.items() if isinstance(part, dict) else enumerate(part)) if isinstance(part, dict | list) else []
    for key, value in inside[:9]:
        yield (*path, key)
        yield from places_of(value, (*path, key))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "unigram"])
def test_a_file_that_is_changed_anywhere_works_or_is_refused(name: str, byte_level: dict[str, Any]) -> None:
    """Never a traceback, and never the end of the process: the library aborts over some prefixes of pieces."""
    file = {"byte_level": as_llama3(byte_level)}.get(name) or getattr(foreign, name)(make_texts(40))
    outcomes: Counter[str] = Counter()
    for path in places_of(file):
        for value in (None, "", "\u00e9x", 7, -1, [], {}):
            changed = copy.deepcopy(file)
            functools.reduce(lambda part, key: part[key], path[:-1], changed)[path[-1]] = value
            try:
                made = HuggingFaceTokenizer(foreign.dump(changed))
                made.decode(made.encode("a </s> \u00e9 \U0010fffd"))
                outcomes["works"] += 1
            except UserError:
                outcomes["refused"] += 1
    assert outcomes["works"] > 50 and outcomes["refused"] > 50


def test_an_id_that_no_vocabulary_has(byte_level: dict[str, Any]) -> None:
    vocabulary = {**byte_level["model"]["vocab"], "zz": 4_000_000_000}
    with pytest.raises(UserError, match="it has the id 4000000000: not below 16,777,216"):
        HuggingFaceTokenizer(foreign.dump(byte_level, model={**byte_level["model"], "vocab": vocabulary}))


def test_a_text_that_is_too_much_for_the_pattern(byte_level: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oniguruma gives up on ten million spaces, in a panic; here on 1,000, to be quick."""
    made = HuggingFaceTokenizer(foreign.dump(byte_level))

    class PanicException(BaseException):
        pass

    class Library:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> Any:
            if any(" " * 1000 in text for text in texts):
                raise PanicException("retry-limit-in-match over")
            return theirs.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    theirs = made._hf
    monkeypatch.setattr(made, "_hf", Library())
    texts = ["short", "long" + " " * 5000 + "x" * 300 + "\u00e9"]
    assert [made.decode(ids.tolist()) for ids in made.encode_batch(texts)] == texts
    assert made.encode_batch(texts)[0].tolist() == theirs.encode("short").ids
    assert isinstance(models.BPE(), models.Model)
