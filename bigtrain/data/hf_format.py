"""What a tokenizer.json says and the `tokenizers` library does not tell: which bytes a token is, which are at the ends.

Pure functions over the parsed file. Its parts nest: a decoder or a post-processor is one step, or a Sequence of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

File = Mapping[str, Any]
"""The parsed tokenizer.json."""
SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_UNDERSTOOD = {"ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace"}


def _byte_letters() -> list[str]:
    """GPT-2's letter for each of the 256 bytes: itself where it is printable Latin-1, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}


class Alphabet:
    """How the pieces of a vocabulary stand for bytes."""

    def __init__(self, file: File) -> None:
        """Raises ValueError, with the reason, for a file whose pieces do not stand for bytes one by one."""
        for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
            if file["model"].get(mark):
                marked = f"its model has {mark}={file['model'][mark]!r}"
                raise ValueError(f"{marked}, so a token does not stand for certain bytes of text")
        steps = list(_steps(file.get("decoder"), "decoders"))
        if not steps:  # then the library would join pieces with spaces; what made them tells what they stand for
            made = _steps(file.get("pre_tokenizer"), "pretokenizers")
            steps = [step for step in made if step["type"] in ("ByteLevel", "Metaspace")]
        kinds = {step["type"] for step in steps}
        if not steps or kinds - _UNDERSTOOD:
            what = f"its decoder is {', '.join(sorted(kinds - _UNDERSTOOD))}" if steps else "it has no decoder"
            raise ValueError(f"{what}, so a token does not stand for certain bytes of text")
        self.is_byte_level = "ByteLevel" in kinds
        self.has_byte_pieces = "ByteFallback" in kinds
        self._replaced: list[tuple[str, str]] = []
        for step in steps:
            if step["type"] == "Replace":
                if "String" not in step["pattern"]:
                    raise ValueError(f"its decoder replaces {step['pattern']}, which is no plain text")
                self._replaced.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Metaspace":
                self._replaced.append((step["replacement"], " "))

    def bytes_of(self, piece: str) -> bytes:
        """The bytes of text that a piece of the vocabulary stands for."""
        if self.is_byte_level:
            known = [_BYTE_OF_LETTER.get(letter) for letter in piece]
            return piece.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if self.has_byte_pieces and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self._replaced:
            piece = piece.replace(old, new)
        return piece.encode()

    def spell(self, text: str, vocabulary: Mapping[str, int]) -> list[str]:
        """Pieces for `text`, the shortest that there are: a letter each, or a byte each."""
        if self.is_byte_level:
            return [BYTE_LETTERS[byte] for byte in text.encode()]
        pieces: list[str] = []
        for letter in text:
            for old, new in self._replaced:
                letter = old if letter == new else letter
            pieces += [letter] if letter in vocabulary else [byte_piece(byte) for byte in letter.encode()]
        return pieces

    def is_complete(self, vocabulary: Mapping[str, int]) -> bool:
        """Whether there is a piece for every byte, so that nothing is unknown."""
        needed = BYTE_LETTERS if self.is_byte_level else [byte_piece(byte) for byte in range(256)]
        return (self.is_byte_level or self.has_byte_pieces) and all(piece in vocabulary for piece in needed)


def byte_piece(byte: int) -> str:
    return f"<0x{byte:02X}>"


@dataclass(frozen=True)
class Told:
    """What a file says."""

    alphabet: Alphabet
    begin: str | None
    """Special token that the file's template puts before a text."""
    end: str | None
    """And behind it."""
    unknown: str | None
    """Piece that stands for what the vocabulary does not cover."""


def told(file: Any) -> Told:
    """Raises an Exception for what is no tokenizer.json, or for one whose tokens do not stand for bytes."""
    if not isinstance(file, dict) or not isinstance(file.get("model"), dict):
        raise ValueError("it has no model")
    begin, end = _template(file)
    return Told(Alphabet(file), begin, end, _unknown(file["model"]))


def _template(file: File) -> tuple[str | None, str | None]:
    for step in _steps(file.get("post_processor"), "processors"):
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return str(step["cls"][0]), str(step["sep"][0])
        if step["type"] == "TemplateProcessing":
            parts = ["" if "Sequence" in part else part["SpecialToken"]["id"] for part in step["single"]]
            text = parts.index("")
            names = [str(step["special_tokens"][part]["tokens"][0]) if part else "" for part in parts]
            return next(iter(names[:text]), None), next(iter(names[text + 1 :]), None)
    return None, None


def _unknown(model: Mapping[str, Any]) -> str | None:
    if isinstance(model.get("unk_id"), int):  # unigram
        return str(model["vocab"][model["unk_id"]][0])
    return str(model["unk_token"]) if model.get("unk_token") else None


def _steps(part: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[inner]:
        yield from _steps(step, inner)
