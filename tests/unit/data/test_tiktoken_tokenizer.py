"""tiktoken's files, against tiktoken."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken_ext.openai_public
from tiktoken.load import load_tiktoken_bpe

from bigtrain.config.errors import UserError
from bigtrain.data.tiktoken_tokenizer import KNOWN, TiktokenTokenizer
from bigtrain.data.tokenizer import Tokenizer

from . import foreign
from .conftest import TRICKY, make_texts

TEXTS = [*make_texts(130), *TRICKY]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return foreign.ranks(TEXTS)


@pytest.mark.parametrize("encoding", KNOWN)
def test_the_ids_are_those_of_tiktoken(
    encoding: str, ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep a copy elsewhere
    file = tmp_path / "own.tiktoken"
    file.write_bytes(foreign.tiktoken_file(ranks))
    end = len(ranks) + 7
    settings = {"pattern": KNOWN[encoding].pattern, "special_tokens": {foreign.END: end, "<|x|>": end - 2}}
    (tmp_path / "own.tiktoken.json").write_text(json.dumps(settings))
    theirs = tiktoken.Encoding(
        "own",
        pat_str=KNOWN[encoding].pattern,
        mergeable_ranks=load_tiktoken_bpe(str(file)),
        special_tokens=settings["special_tokens"],
    )
    ours = Tokenizer.load(file)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_vocab, end, end)
    for text in [*TRICKY, *make_texts(20, seed=4), f"x{foreign.END}y<|x|>"]:
        ids = theirs.encode_ordinary(text)
        assert ours.encode(text) == ids
        assert ours.decode_bytes(ids) == theirs.decode_bytes(ids)
    pieces = [theirs.decode_single_token_bytes(token) for token in range(len(ranks))]
    assert ours.bytes_of_tokens()[: len(ranks)].tolist() == list(map(len, pieces))
    assert ours.bytes_of_tokens()[len(ranks) :].sum() == 0


@pytest.mark.parametrize("name", KNOWN)
def test_known_encodings_are_as_tiktoken_has_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})  # no download
    theirs = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS[name]()
    known = KNOWN[name]
    assert (known.pattern, dict(known.special_tokens)) == (theirs["pat_str"], theirs["special_tokens"])
    if "explicit_n_vocab" in theirs:
        assert known.num_ranks == theirs["explicit_n_vocab"] - len(known.special_tokens)


def many_ranks(number: int, skip: int = -1) -> bytes:
    """As many as a published file has, of random bytes."""
    draw, pieces = random.Random(0), dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(pieces) < number:
        pieces[draw.randbytes(4)] = None
    ids = [place + (place >= skip >= 0) for place in range(number)]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in zip(pieces, ids, strict=True))


@pytest.mark.parametrize(("name", "skip"), [("r50k_base", -1), ("p50k_base", 50256), ("cl100k_base", -1)])
def test_a_file_by_the_name_of_a_known_encoding_needs_nothing_beside_it(name: str, skip: int, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.tiktoken"
    file.write_bytes(many_ranks(KNOWN[name].num_ranks or 0, skip))
    made = Tokenizer.load(file)
    assert made.specials == dict(KNOWN[name].special_tokens) and made.eos_id == made.specials["<|endoftext|>"]
    assert made.encode(f"a{foreign.END}") != [*made.encode("a"), made.eos_id]

    named = tmp_path / "mine.bpe"
    named.write_bytes(file.read_bytes())
    (tmp_path / "mine.bpe.json").write_text(json.dumps({"encoding": name}))
    assert Tokenizer.load(named).fingerprint == made.fingerprint
    (tmp_path / "kept").mkdir()
    made.save(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "tokenizer.tiktoken",
        "tokenizer.tiktoken.json",
    ]
    assert Tokenizer.load(tmp_path / "kept").fingerprint == made.fingerprint

    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-9]))
    with pytest.raises(UserError, match=rf"{name}\.tiktoken: it has \d+ ranks, the encoding of that name \d+"):
        Tokenizer.load(file)


def test_the_settings_are_part_of_the_fingerprint(ranks: dict[bytes, int]) -> None:
    content = foreign.tiktoken_file(ranks)

    def made(**more: Any) -> TiktokenTokenizer:
        return TiktokenTokenizer(content, foreign.tiktoken_settings(ranks, **more))

    assert made().fingerprint == made().fingerprint == made(eos_token=foreign.END).fingerprint, (
        "not how they are written"
    )
    assert made(bos_token="<|fim|>").fingerprint != made().fingerprint
    assert made(bos_token="<|fim|>").bos_id == len(ranks) + 3
    assert made(pattern=r"\w+|\W").fingerprint != made().fingerprint


def test_a_pattern_that_leaves_text_out_is_told(ranks: dict[bytes, int]) -> None:
    made = TiktokenTokenizer(foreign.tiktoken_file(ranks), foreign.tiktoken_settings(ranks, pattern=r"\w+"))
    assert "' x' comes back as 'x'" in str(made.caveat)


@pytest.mark.parametrize("text", [" " * 1_100_000 + "x", "x" + " " * 1_100_000 + "y\u00e9" * 5])
def test_a_text_that_is_too_much_for_the_pattern(ranks: dict[bytes, int], text: str) -> None:
    made = TiktokenTokenizer(foreign.tiktoken_file(ranks), foreign.tiktoken_settings(ranks))
    with pytest.raises(ValueError, match="Regex error"):
        made._encoding.encode(text, disallowed_special=())
    assert made.decode(made.encode(text)) == text


SETTINGS = {"pattern": foreign.PATTERN, "special_tokens": {foreign.END: 1000}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, 't.tiktoken.json beside it is missing. Write {"pattern": "...", "special_tokens": '),
        ("{", "t.tiktoken.json beside it cannot be read"),
        ("[]", "cannot be read: it is no JSON object"),
        ({}, "pattern is None: the regular expression"),
        ({**SETTINGS, "pattern": "("}, "its pattern '(' cannot be used"),
        ({"pattern": "x"}, "special_tokens is None: names and ids"),
        ({**SETTINGS, "special_tokens": {"<x>": "7"}}, "'<x>' has the id '7'"),
        ({**SETTINGS, "special_tokens": {"<x>": True}}, "'<x>' has the id True"),
        ({**SETTINGS, "special_tokens": {"<x>": 5}}, "the id 5 is of "),
        ({**SETTINGS, "special_tokens": {"<x>": 10**12}}, "it has the id 1000000000000: not below"),
        ({**SETTINGS, "special_tokens": {"<x>": 1000, "<y>": 1001}}, "which token ends a document? There are <x>, <y>"),
        ({**SETTINGS, "eos_token": "<z>"}, "eos_token is '<z>', which is no token of it"),
        ({**SETTINGS, "specials": {}}, "has specials; the keys are"),
        ({"encoding": "cl100k"}, "encoding is 'cl100k'; there are r50k_base"),
    ],
)
def test_settings_that_are_refused(settings: Any, words: str, ranks: dict[bytes, int], tmp_path: Path) -> None:
    (tmp_path / "t.tiktoken").write_bytes(foreign.tiktoken_file(ranks))
    if settings is not None:
        content = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "t.tiktoken.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        Tokenizer.load(tmp_path / "t.tiktoken")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"%%% 700\n", "line 421 is no piece in base64 and its rank: b'%%% 700'"),
        (b"YWI=\n", "line 421 is no piece"),
        (b"YWI= -1\n", "line 421 is no piece"),
        (b"YWI= 7\n", "the id 7 is of "),
    ],
)
def test_damaged_ranks_are_refused(line: bytes, words: str, ranks: dict[bytes, int]) -> None:
    content = foreign.tiktoken_file({piece: rank for piece, rank in ranks.items() if piece != b"ab"})
    assert content.count(b"\n") == 420
    with pytest.raises(UserError, match=re.escape(words)):
        TiktokenTokenizer(content + line, foreign.tiktoken_settings(ranks))


def test_every_byte_must_have_a_rank(ranks: dict[bytes, int]) -> None:
    fewer = {piece: rank for piece, rank in ranks.items() if piece not in (b"\x07", b"\xff")}
    with pytest.raises(UserError, match="2 of the 256 bytes have no rank, as byte 0x07"):
        TiktokenTokenizer(foreign.tiktoken_file(fewer), foreign.tiktoken_settings(ranks))
