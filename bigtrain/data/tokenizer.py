"""A sentencepiece tokenizer that loses nothing: ``decode(encode(x)) == x`` for any text, byte for byte.

What makes it exact: no normalisation, no dummy prefix, no removed whitespace, and one byte piece for each of the 256
bytes, for whatever the vocabulary does not cover (newlines in rare places, tabs, emoji). One character is left:
sentencepiece writes a space as U+2581 inside and cannot tell a real U+2581 from it, so `encode` spells that one in byte
pieces, and `decode` joins the bytes of the pieces itself.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from bigtrain.config.errors import UserError

_SPACE = "\u2581"
# What a tokenizer that normalises or has no byte pieces does not give back: a ligature, a roman numeral, repeated and
# outer spaces, control characters, a combining accent, an emoji.
_PROBE = " \ufb01 \u2163  a\tb\r\n\x00e\u0301 \u4e2d\U0001f600 "

# Training text beyond this is sampled. Measured on Python sources, 2 cores, 4096 pieces: bpe 2 s and unigram 47 s for
# 12 MB (unigram 9 s for 4 MB); the vocabulary hardly changes with more.
SAMPLE_BYTES = {"bpe": 64 << 20, "unigram": 4 << 20}
# Characters: chunks of several lines let it learn ")\n" and ":\n": 3.50 bytes a token instead of 3.28 by lines.
_CHUNK_CHARACTERS = 2000


class Tokenizer:
    """A sentencepiece model, and what the rest of the project asks of it."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model` is the content of a model file, `name` what errors call it. Raises UserError for one that is no
        sentencepiece model, has no beginning or end of document, or changes text."""
        self.model = model
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer {name}: not a sentencepiece model") from error
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id: int = self._sp.bos_id()
        self.eos_id: int = self._sp.eos_id()
        self.pad_id: int = self._sp.pad_id()
        """-1 where the model has none."""
        self._bytes = [self._bytes_of(token) for token in range(self.vocab_size)]
        self._space_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(f"tokenizer {name}: it has no <s> or no </s> to separate documents. Train it with both.")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(
                f"tokenizer {name}: it does not give back the text that it gets: it normalises, adds a space, or has "
                "no byte fallback. Train one with tools/tokenizer.py."
            )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model file. Raises UserError where it is missing or unfit."""
        try:
            return Tokenizer(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise UserError(f"tokenizer {path}: {error.strerror}. Train one with tools/tokenizer.py.") from error

    @property
    def fingerprint(self) -> str:
        """sha256 of the model file, in hex. Shards and checkpoints name their tokenizer by it."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without begin or end of document."""
        if _SPACE not in text:
            return self._sp.encode(text)
        ids: list[int] = []
        for part in re.split(f"({_SPACE})", text):
            ids += self._space_ids if part == _SPACE else self._sp.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; special ids stand for none. An id beyond the vocabulary gives U+FFFD: a
        model's embedding may have more rows than the tokenizer has pieces."""
        size, pieces = self.vocab_size, self._bytes
        return b"".join(pieces[token] if 0 <= token < size else b"\xef\xbf\xbd" for token in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids. Bytes that are no UTF-8, as where a cut falls into a character, show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def piece(self, token: int) -> str:
        """The piece as sentencepiece spells it."""
        return self._sp.id_to_piece(token)

    def bytes_of_tokens(self) -> np.ndarray:
        """int32[vocab_size]: the bytes of text that each id stands for; 0 for specials. Summed over any cut of a
        document it is the size of that cut, so bits a byte = sum of nll in nats / (ln 2 x sum of these)."""
        return np.array([len(piece) for piece in self._bytes], dtype=np.int32)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._sp.id_to_piece(token)
        if self._sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if self._sp.is_control(token) or self._sp.is_unknown(token):
            return b""
        return piece.replace(_SPACE, " ").encode()


def train(
    texts: Iterable[str], *, vocab_size: int, kind: str = "bpe", seed: int = 0, sample_bytes: int | None = None
) -> bytes:
    """Train a tokenizer on documents; returns the content of its model file, the same for the same arguments.

    `kind` is bpe or unigram. Memory is bounded: beyond `sample_bytes` of text (default: SAMPLE_BYTES of the kind) a
    uniform sample of its pieces, drawn by `seed`, is kept. Raises UserError where the text is too little for
    `vocab_size`, or `vocab_size` too small for the text.
    """
    if sample_bytes is not None and sample_bytes < 1:
        raise UserError(f"the sample is {sample_bytes} bytes: at least 1")
    chunks = _sample((chunk for text in texts for chunk in _chunks(text)), sample_bytes or SAMPLE_BYTES[kind], seed)
    if not chunks:
        raise UserError("the tokenizer has no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            required_chars=_SPACE,  # a text may have no space
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=8 * _CHUNK_CHARACTERS,
            num_threads=16,  # written into the model file: the same on every machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_why(error, vocab_size)) from error
    return model.getvalue()


def save(model: bytes, path: str | os.PathLike[str]) -> None:
    """Write a model file, aside and renamed, so that no reader sees half of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_bytes(model)
    os.replace(aside, target)


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of whole lines of about _CHUNK_CHARACTERS; a longer line is cut."""
    chunk: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size and size + len(line) > _CHUNK_CHARACTERS:
            yield "".join(chunk)
            chunk, size = [], 0
        while len(line) > _CHUNK_CHARACTERS:
            yield line[:_CHUNK_CHARACTERS]
            line = line[_CHUNK_CHARACTERS:]
        chunk.append(line)
        size += len(line)
    if size:
        yield "".join(chunk)


def _sample(chunks: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """The chunks, or where they are more than `limit_bytes` a uniform sample of them, in their order.

    Each chunk draws a number; those with the smallest stay, as many as fit. Memory never holds more than the limit."""
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap: the largest draw first
    size, smallest_dropped = 0, 2.0
    for place, chunk in enumerate(chunks):
        number = draw()
        if number >= smallest_dropped:
            continue
        heapq.heappush(kept, (-number, place, chunk))
        size += len(chunk.encode())
        while size > limit_bytes and len(kept) > 1:
            dropped, _, gone = heapq.heappop(kept)
            size -= len(gone.encode())
            smallest_dropped = min(smallest_dropped, -dropped)
    return [chunk for _, chunk in sorted((place, chunk) for _, place, chunk in kept)]


def _why(error: RuntimeError, vocab_size: int) -> str:
    """sentencepiece's reason for refusing a vocabulary size, as something to act on."""
    message = str(error)
    if most := re.search(r"value <= (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too large for this text: at most {most[1]}, or give it more text"
    if need := re.search(r"smaller than required_chars.*? (\d+) vs (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too small for the characters of this text: at least {need[2]}"
    return f"sentencepiece could not train a tokenizer of {vocab_size} pieces on this text: {message.strip()}"


def describe(tokenizer: Tokenizer, sample: str) -> list[tuple[str, str]]:
    """(name, value) rows for a person: what `tools/tokenizer.py inspect` prints."""
    sizes = tokenizer.bytes_of_tokens()
    ids = tokenizer.encode(sample)
    longest: Sequence[int] = np.argsort(-sizes, kind="stable")[:8].tolist()
    return [
        ("pieces", f"{tokenizer.vocab_size:,}"),
        ("fingerprint", tokenizer.fingerprint),
        ("begin, end, pad", f"{tokenizer.bos_id}, {tokenizer.eos_id}, {tokenizer.pad_id}"),
        ("longest pieces", " ".join(repr(tokenizer.piece(token)) for token in longest)),
        ("sample", repr(sample)),
        ("its pieces", " ".join(repr(tokenizer.piece(token)) for token in ids)),
        ("its size", f"{len(sample.encode())} bytes, {len(ids)} tokens"),
    ]
