"""Training a sentencepiece tokenizer that loses nothing: `sentencepiece_tokenizer` says what makes it exact."""

from __future__ import annotations

import heapq
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from bigtrain.config.errors import UserError
from bigtrain.data.sentencepiece_tokenizer import SPACE

# Training text beyond this is sampled. Measured on Python sources, 2 cores, 4096 pieces: bpe 2 s and unigram 47 s for
# 12 MB (unigram 9 s for 4 MB); the vocabulary hardly changes with more.
SAMPLE_BYTES = {"bpe": 64 << 20, "unigram": 4 << 20}
# Characters: chunks of several lines let it learn ")\n" and ":\n": 3.50 bytes a token instead of 3.28 by lines.
_CHUNK_CHARACTERS = 2000
_RESERVED = ("<unk>", "<s>", "</s>", "<pad>")


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    kind: str = "bpe",
    specials: Sequence[str] = (),
    seed: int = 0,
    sample_bytes: int | None = None,
) -> bytes:
    """Train a tokenizer on documents; returns the content of its model file, the same for the same arguments.

    `kind` is bpe or unigram. Each of `specials` is one token, which no text becomes; they count in `vocab_size`. Every
    digit is a token of its own. Memory is bounded: beyond `sample_bytes` of text (default: SAMPLE_BYTES of the kind) a
    uniform sample of its pieces, drawn by `seed`, is kept. Raises UserError for names that cannot be special tokens,
    and where the text is too little for `vocab_size`, or `vocab_size` too small for the text.
    """
    _check_specials(specials)
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
            required_chars=SPACE,  # a text may have no space
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=list(specials),
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


def _check_specials(names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not name or name in _RESERVED or re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            raise UserError(f"the special token {name!r} cannot be: it is " + ("a token already" if name else "empty"))
        if name in names[:place]:
            raise UserError(f"the special token {name!r} is there twice")


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
