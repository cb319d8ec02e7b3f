"""Text to tokens and back: what the project asks of a tokenizer, whatever kind of file it comes from.

Each kind is used as it is, and told by its content, whatever its name. In a folder of shards and in a checkpoint it
lies under the name that is proper to it:

    tokenizer.model      sentencepiece; `tokenizer_training` makes one that loses nothing
    tokenizer.json       Hugging Face tokenizers; tokenizer_config.json beside it may name bos_token and eos_token
    tokenizer.tiktoken   tiktoken; tokenizer.tiktoken.json beside it has the pattern and the special tokens

A tokenizer adds no special token, and a text that spells one (``</s>``) is text like any other: what is in a corpus
never ends a document. `bytes_of_tokens` is exact, so bits a byte are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from bigtrain.config.errors import UserError

SENTENCEPIECE, HUGGING_FACE, TIKTOKEN = "tokenizer.model", "tokenizer.json", "tokenizer.tiktoken"
BESIDE = {HUGGING_FACE: "tokenizer_config.json", TIKTOKEN: "tokenizer.tiktoken.json"}
FILES = (SENTENCEPIECE, HUGGING_FACE, TIKTOKEN, *BESIDE.values())
"""Every name under which a file of a tokenizer is kept."""
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_MAX_VOCAB_SIZE = 1 << 24
_REPLACEMENT = "\ufffd".encode()
# What a tokenizer that normalises, strips, or has no piece for every byte does not give back.
_PROBES = (
    *(" x", "x ", "x  y", "\n x\n", "x\ty", "x\r\ny", "\x00", "X", "n't . ,", "\ufb01", "\u2163", "e\u0301"),
    *("\u4e2d", "\U0001f600", "\u2581", "<0x0A>"),
)


class Tokenizer(ABC):
    """What every kind offers. Safe to use from many threads."""

    kind: str
    """In words."""

    def __init__(
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        bytes_of: Sequence[bytes],
        specials: Mapping[str, int],
        bos_id: int,
        eos_id: int,
    ) -> None:
        """`bytes_of`: the bytes of text that each id stands for."""
        self.name = name
        """What errors call it."""
        self.files = dict(files)
        """Its files by their proper names: all that it takes to load it again."""
        self.vocab_size = len(bytes_of)
        """One more than the largest id."""
        self.specials = dict(specials)
        """Ids by name of the tokens that stand for no text."""
        self.bos_id, self.eos_id = bos_id, eos_id
        """Of a document. Equal where the tokenizer has one token for both."""
        self._bytes = list(bytes_of)
        self._names = {token: special for special, token in specials.items()}

    @staticmethod
    def load(path: str | os.PathLike[str], *, first: str = "") -> Tokenizer:
        """The tokenizer at `path`: its file, or a folder with one in it (of shards, a checkpoint, a Hugging Face
        model); of several in a folder the one of the kind `first`. Raises UserError where there is none, or several and
        none of that kind, or it is unfit."""
        try:
            file = _file_at(Path(path), first)
            return read_from(lambda name: (file.parent / name).read_bytes(), file.name, str(file))
        except OSError as error:
            raise UserError(f"tokenizer {path}: {error.strerror}. Train one with tools/tokenizer.py.") from error

    @property
    def fingerprint(self) -> str:
        """Shards and checkpoints name their tokenizer by it (hex)."""
        return fingerprint_of(digests_of(self.files))

    def means_the_same(self, other: Tokenizer) -> bool:
        """Whether each id stands for the same bytes, and the same ids begin and end a document: then text in tokens of
        the one is the same text to the other, which may cut it in other places."""
        ends = (self.bos_id, self.eos_id) == (other.bos_id, other.eos_id)
        return ends and self._bytes == other._bytes and set(self._names) == set(other._names)

    def save(self, folder: Path) -> list[Path]:
        """Write its files, by their proper names; returns where they are."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in self.files]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text (int32), without begin or end of document. On this thread."""

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """The ids of `text`, without begin or end of document. `specials`: the names of special tokens in it are these
        tokens."""
        if not (specials and self.specials):
            return self.encode_batch([text])[0].tolist()
        names = "|".join(re.escape(name) for name in sorted(self.specials, key=len, reverse=True))
        ids: list[int] = []
        for part in filter(None, re.split(f"({names})", text)):
            ids += [self.specials[part]] if part in self.specials else self.encode(part)
        return ids

    def encode_part(self, text: str) -> np.ndarray:
        """The ids (int32) of a part of a document that is not its first. Where the tokenizer `adds_a_space`, the part
        must begin with one space and no other: ValueError otherwise, for a space more would be in the document."""
        if not self.adds_a_space:
            return self.encode_batch([text])[0]
        if not re.match(r" \S", text):
            raise ValueError(f"a part for {self.name} begins with {text[:9]!r}, not with one space")
        return self.encode_batch([text[1:]])[0]

    def decode_bytes(self, ids: Iterable[int], *, at_start: bool = True) -> bytes:
        """The bytes that the ids stand for; special ids stand for none. `at_start`: a document begins with them, so the
        space that some tokenizers put before it is left out. An id beyond the vocabulary gives U+FFFD: a model's
        embedding may have more rows than the tokenizer has pieces."""
        size, pieces = self.vocab_size, self._bytes
        found = b"".join(pieces[token] if 0 <= token < size else _REPLACEMENT for token in ids)
        return found[1:] if at_start and self.adds_a_space and found.startswith(b" ") else found

    def decode(self, ids: Iterable[int], *, at_start: bool = True) -> str:
        """The text of the ids. Bytes that are no UTF-8, as where a cut falls into a character, show as U+FFFD."""
        return self.decode_bytes(ids, at_start=at_start).decode("utf-8", errors="replace")

    def bytes_of_tokens(self, *, at_start: bool = False) -> np.ndarray:
        """int32[vocab_size]: the bytes of text that each id stands for; 0 for specials. `at_start`: as the first of a
        document. Summed over any cut of a document it is the size of that cut, so bits a byte = sum of nll in nats /
        (ln 2 x sum of these)."""
        without = b" " if at_start and self.adds_a_space else b""
        return np.array([len(piece.removeprefix(without)) for piece in self._bytes], dtype=np.int32)

    @cached_property
    def adds_a_space(self) -> bool:
        """Whether it puts a space before a document, as if each began with a word in the middle of a line."""
        back = ((text, b"".join(self._bytes[token] for token in self.encode(text))) for text in ("x", "e", "0"))
        return any(found == f" {text}".encode() for text, found in back)

    @cached_property
    def caveat(self) -> str | None:
        """A line for the user, with examples, where it does not give back every text; None where it does."""
        changed = [(text, back) for text in self._probes() if (back := self.decode(self.encode(text))) != text]
        if not changed:
            return None
        examples = ", ".join(f"{text!a} comes back as {back!a}" for text, back in changed[:3])
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        return (
            f"tokenizer {self.name} changes text: {examples}{more}. The model learns the changed text, and bits a byte "
            "count the bytes of that."
        )

    def piece(self, token: int) -> str:
        """What a token stands for, as a person reads it: its name, or its text, with bytes that are none as \\xNN."""
        return self._names.get(token) or self._bytes[token].decode("utf-8", errors="backslashreplace")

    def _probes(self) -> Sequence[str]:
        return _PROBES


def read_from(read: Callable[[str], bytes], file: str, name: str) -> Tokenizer:
    """The tokenizer in `file` of a folder, of which `read` gives the files by their names and raises FileNotFoundError
    where there is none. `name` is what errors call it. Raises UserError where it is unfit, and what `read` raises."""
    content = read(file)
    kind = _kind_of(content, file)
    files = {kind: content}
    if kind in BESIDE:  # gpt2.json has gpt2_config.json, o200k.tiktoken has o200k.tiktoken.json
        with contextlib.suppress(FileNotFoundError):
            files[BESIDE[kind]] = read(f"{Path(file).stem}_config.json" if kind == HUGGING_FACE else f"{file}.json")
    return from_files(files, name)


def from_files(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer of these `files` (by their proper names); `name` is what errors call it. Raises UserError where
    they are unfit."""
    if HUGGING_FACE in files:
        from bigtrain.data.hf_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files[HUGGING_FACE], files.get(BESIDE[HUGGING_FACE]), name)
    if TIKTOKEN in files:
        from bigtrain.data.tiktoken_tokenizer import TiktokenTokenizer

        return TiktokenTokenizer(files[TIKTOKEN], files.get(BESIDE[TIKTOKEN]), name)
    if SENTENCEPIECE not in files:
        raise UserError(f"tokenizer {name}: there is no {SENTENCEPIECE}, {HUGGING_FACE} or {TIKTOKEN}")
    from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer

    return SentencePieceTokenizer(files[SENTENCEPIECE], name)


def digests_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 of each (hex), by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """Of a tokenizer with files of these sha256: that of the file (hex), or of several the sha256 of theirs."""
    joined = "".join(digests[name] for name in sorted(digests))
    return joined if len(digests) == 1 else hashlib.sha256(joined.encode()).hexdigest()


def halved(encode: Callable[[str], np.ndarray], text: str) -> np.ndarray:
    """``encode(text)``; where a pattern gives up, as on millions of spaces, that of its halves."""
    try:
        return encode(text)
    except BaseException as error:  # a panic in Rust is no Exception
        if len(text) < 2 or not gave_up(error):
            raise
    half = len(text) // 2
    return np.concatenate([halved(encode, text[:half]), halved(encode, text[half:])])


def gave_up(error: BaseException) -> bool:
    return isinstance(error, ValueError) or type(error).__name__ == "PanicException"


def empty_table(largest_id: int, name: str) -> list[bytes]:
    """No bytes for each id up to the largest. Raises UserError where that is no size of a vocabulary."""
    if largest_id >= _MAX_VOCAB_SIZE:
        raise UserError(f"tokenizer {name}: it has the id {largest_id}: not below {_MAX_VOCAB_SIZE:,}")
    return [b""] * (largest_id + 1)


def _file_at(path: Path, first: str) -> Path:
    if not path.is_dir():
        return path
    if first and (path / first).is_file():
        return path / first
    there = [path / name for name in (SENTENCEPIECE, HUGGING_FACE, TIKTOKEN) if (path / name).is_file()]
    if len(there) == 1:
        return there[0]
    if there:
        names = " and ".join(file.name for file in there)
        raise UserError(f"tokenizer {path}: the folder has {names}. Name the one that you mean, as {there[0]}.")
    raise UserError(
        f"tokenizer {path}: the folder has no {SENTENCEPIECE}, {HUGGING_FACE} or {TIKTOKEN}. Name the file, or train a "
        "tokenizer with tools/tokenizer.py."
    )


def _kind_of(content: bytes, name: str) -> str:
    """The proper name of the file."""
    if name.endswith(".json") or content[:64].lstrip().startswith(b"{"):
        return HUGGING_FACE
    return TIKTOKEN if name.endswith(".tiktoken") or _TIKTOKEN_LINE.match(content) else SENTENCEPIECE


def describe(tokenizer: Tokenizer, sample: str, *, specials: bool = False) -> list[tuple[str, str]]:
    """(name, value) rows for a person: what `tools/tokenizer.py inspect` prints. `specials`: as of `encode`."""
    sizes = tokenizer.bytes_of_tokens()
    ids = tokenizer.encode(sample, specials=specials)
    longest: list[int] = np.argsort(-sizes, kind="stable")[:8].tolist()
    named = [f"{name} {token}" for name, token in tokenizer.specials.items()]
    return [
        ("kind", tokenizer.kind),
        ("tokens", f"{tokenizer.vocab_size:,}"),
        ("fingerprint", tokenizer.fingerprint),
        (
            "document",
            f"begins with {_named(tokenizer, tokenizer.bos_id)}, ends with {_named(tokenizer, tokenizer.eos_id)}",
        ),
        ("specials", ", ".join(named[:12]) + (f", and {len(named) - 12} more" if len(named) > 12 else "")),
        ("gives back", tokenizer.caveat or "every text that was tried, byte for byte"),
        ("longest tokens", " ".join(repr(tokenizer.piece(token)) for token in longest)),
        ("sample", repr(sample)),
        ("its tokens", " ".join(repr(tokenizer.piece(token)) for token in ids)),
        ("its size", f"{len(sample.encode())} bytes, {len(ids)} tokens"),
    ]


def _named(tokenizer: Tokenizer, token: int) -> str:
    return f"{tokenizer.piece(token)} ({token})"
