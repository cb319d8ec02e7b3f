"""tiktoken's files: a rank a line for each piece of bytes, and beside it what the file does not say.

FILE.json beside FILE has the pattern that splits a text into words, and the special tokens:

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}, "eos_token": "<|endoftext|>"}

or names an encoding of OpenAI's, {"encoding": "cl100k_base"}. A file by the name of an encoding (cl100k_base.tiktoken)
needs none. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data import document_ends
from bigtrain.data.document_ends import Ends
from bigtrain.data.tokenizer import BESIDE, TIKTOKEN, Tokenizer, empty_table, halved

_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
_LETTER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    _LETTER + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    + _LETTER + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """What a file of ranks does not say."""

    pattern: str
    special_tokens: Mapping[str, int]
    num_ranks: int | None = None
    """Pieces that the file must have."""


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
KNOWN = {
    "r50k_base": Encoding(_R50K, {"<|endoftext|>": 50256}, 50256),
    "p50k_base": Encoding(_R50K, {"<|endoftext|>": 50256}, 50280),
    "cl100k_base": Encoding(_CL100K, {"<|endoftext|>": 100257, **_FIM, "<|endofprompt|>": 100276}, 100256),
    "o200k_base": Encoding(_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, 199998),
}
"""OpenAI's encodings, as the package tiktoken has them."""


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE."""

    kind = "tiktoken"

    def __init__(self, content: bytes, settings: bytes | None = None, name: str = "tokenizer") -> None:
        """`content` of the file of ranks, `settings` of the JSON beside it. Raises UserError where one of them is
        damaged, the pattern is not known, not every byte has a rank, or no token ends a document."""
        import tiktoken

        ranks = dict(_ranks(content, name))
        encoding, ends = _settings(settings, name)
        _check(ranks, encoding, name)
        specials = dict(encoding.special_tokens)
        table = empty_table(max(*ranks.values(), *specials.values()), name)
        for piece, rank in ranks.items():
            table[rank] = piece
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=encoding.pattern, mergeable_ranks=ranks, special_tokens=specials
            )
        except ValueError as error:
            raise UserError(f"tokenizer {name}: its pattern {encoding.pattern!r} cannot be used: {error}") from error
        kept = {"pattern": encoding.pattern, "special_tokens": specials, **ends.as_json()}
        super().__init__(
            name,
            {TIKTOKEN: content, BESIDE[TIKTOKEN]: json.dumps(kept, indent=1, sort_keys=True).encode()},
            bytes_of=table,
            specials=specials,
            bos_id=specials[ends.bos],
            eos_id=specials[ends.eos],
        )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [halved(self._encode, text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        """Where the pattern gives up, this raises a ValueError, and `encode_ordinary` ends in a panic."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


def _ranks(content: bytes, name: str) -> Iterator[tuple[bytes, int]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            if not rank.isdigit():
                raise ValueError
            yield base64.b64decode(piece, validate=True), int(rank)
        except ValueError as error:  # binascii.Error is one
            raise UserError(
                f"tokenizer {name}: line {number} is no piece in base64 and its rank: {line[:60]!r}"
            ) from error


def _settings(content: bytes | None, name: str) -> tuple[Encoding, Ends]:
    """What the JSON beside the file says, or the name of the file."""
    where = f"tokenizer {name}: {Path(name).name}.json beside it"
    if content is None:
        encoding = KNOWN.get(Path(name).stem)
        if encoding is None:
            raise UserError(
                f'{where} is missing. Write {{"pattern": "...", "special_tokens": {{"<|endoftext|>": 50256}}}} to it, '
                f'or {{"encoding": NAME}} with one of {", ".join(KNOWN)}.'
            )
        values = {}
    else:
        values = _read(content, where)
        encoding = _encoding(values, where)
    bos, eos = document_ends.named(values, encoding.special_tokens, where)
    ends = document_ends.find(encoding.special_tokens, bos, eos)
    if ends is None:
        raise document_ends.unknown(name, encoding.special_tokens, f"{Path(name).name}.json")
    return encoding, ends


def _read(content: bytes, where: str) -> dict[str, object]:
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    known = {"encoding", "pattern", "special_tokens", "bos_token", "eos_token"}
    if other := sorted(values.keys() - known):
        raise UserError(f"{where} has {', '.join(other)}; the keys are {', '.join(sorted(known))}")
    return values


def _encoding(values: Mapping[str, object], where: str) -> Encoding:
    base = None
    if "encoding" in values:
        base = KNOWN.get(str(values["encoding"]))
        if base is None:
            raise UserError(f"{where}: encoding is {values['encoding']!r}; there are {', '.join(KNOWN)}")
    pattern = values.get("pattern", base.pattern if base else None)
    specials = values.get("special_tokens", base.special_tokens if base else None)
    if not isinstance(pattern, str) or not pattern:
        raise UserError(f"{where}: pattern is {pattern!r}: the regular expression that splits text into words")
    if not isinstance(specials, Mapping) or not specials:
        raise UserError(f'{where}: special_tokens is {specials!r}: names and ids, as {{"<|endoftext|>": 50256}}')
    if bad := [name for name, id_ in specials.items() if not name or type(id_) is not int or id_ < 0]:
        raise UserError(f"{where}: special_tokens: {bad[0]!r} has the id {specials[bad[0]]!r}: a whole number from 0")
    return Encoding(pattern, specials, base.num_ranks if base else None)


def _check(ranks: Mapping[bytes, int], encoding: Encoding, name: str) -> None:
    """That every byte has a piece, and every id one meaning."""
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"tokenizer {name}: {len(missing)} of the 256 bytes have no rank, as byte {missing[0]:#04x}")
    if encoding.num_ranks not in (None, len(ranks)):
        raise UserError(
            f"tokenizer {name}: it has {len(ranks)} ranks, the encoding of that name {encoding.num_ranks}. Is it "
            f"whole? For another encoding, write {Path(name).name}.json beside it."
        )
    pieces: dict[int, object] = {}
    for piece, token in [*ranks.items(), *encoding.special_tokens.items()]:
        if token in pieces:
            raise UserError(f"tokenizer {name}: the id {token} is of {pieces[token]!r} and of {piece!r}")
        pieces[token] = piece
