"""The tokens of a whole document, the same in a build and in a stream."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from bigtrain.data.tokenizer import Tokenizer

PART_CHARACTERS, MAX_PART_CHARACTERS = 1 << 14, 1 << 18
"""A long document is tokenised in parts: as a whole, sentencepiece takes over 100 bytes of memory a character, and
2.6 times as long for 6 MB."""
_BEGINS_WITH_A_SPACE = re.compile(r" \S")
_BETWEEN_WORDS = re.compile(r"(?<=[^\W_]) (?=\S)")


def token_dtype(vocab_size: int) -> str:
    """How tokens are stored: two bytes each where the vocabulary fits, else four."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """[BOS] + ids + [EOS] of a document, in the `token_dtype` of the tokenizer."""
    return encode_pair(tokenizer, None, text)[0]


def encode_pair(tokenizer: Tokenizer, prompt: str | None, text: str) -> tuple[np.ndarray, int]:
    """([BOS] + ids + [EOS] of a document, in the `token_dtype` of the tokenizer; how many of them are its prompt, BOS
    counted: 0 where it has none)."""
    dtype = token_dtype(tokenizer.vocab_size)
    asked = [ids for _, ids in encode_parts(tokenizer, prompt or "", dtype)]
    answered = [ids for _, ids in encode_parts(tokenizer, text, dtype, goes_on=bool(prompt))]
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    return np.concatenate([bos, *asked, *answered, eos]), 0 if prompt is None else 1 + sum(map(len, asked))


def encode_parts(
    tokenizer: Tokenizer, text: str, dtype: str, *, goes_on: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids) of each part of a document, without its begin and end.

    `goes_on`: the text stands behind a prompt. A tokenizer that puts a space before a document puts one between the two
    unless the text begins with one."""
    for number, part in enumerate(parts(text, tokenizer)):
        is_part = number or (goes_on and _BEGINS_WITH_A_SPACE.match(part))
        ids = tokenizer.encode_part(part) if is_part else tokenizer.encode_batch([part])[0]
        yield part, ids.astype(dtype)


def parts(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The text in parts of some PART_CHARACTERS, cut before a space between a letter or digit and a word: no token of a
    usual vocabulary reaches over that place, so the tokens are those of the text as a whole. Where there is none for
    MAX_PART_CHARACTERS it is cut behind a line or anywhere; the text is the same in any case. A tokenizer that adds a
    space to what it encodes can take parts of the first kind only."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = len(text) if tokenizer.adds_a_space else start + MAX_PART_CHARACTERS
        place = _BETWEEN_WORDS.search(text, start + PART_CHARACTERS, stop)
        if not place and tokenizer.adds_a_space:
            break
        end = place.start() if place else _end_of_line(text, start + PART_CHARACTERS, stop)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:] if start else text


def _end_of_line(text: str, first: int, stop: int) -> int:
    return text.rfind("\n", first, stop) + 1 or stop
