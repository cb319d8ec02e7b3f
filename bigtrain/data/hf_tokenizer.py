"""Hugging Face's tokenizer.json, read by the library that defines it (`tokenizers`). No code of a model is run.

What is added to it: the bytes that each token stands for and the ends of a document (`hf_format`), and that no text
becomes a special token. Truncation, padding and dropout, which a file may ask for, are off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data import document_ends, hf_format
from bigtrain.data.document_ends import Ends
from bigtrain.data.tokenizer import BESIDE, HUGGING_FACE, Tokenizer, empty_table, gave_up, halved

_UNCOMMON = ["\x00", "\u2fd5", "\U0010fffd"]


class HuggingFaceTokenizer(Tokenizer):
    """BPE or unigram, over bytes or over letters with byte fallback."""

    kind = "Hugging Face tokenizer.json"

    def __init__(self, content: bytes, config: bytes | None = None, name: str = "tokenizer") -> None:
        """`content` of tokenizer.json, `config` of tokenizer_config.json where there is one. Raises UserError for what
        the library refuses, for tokens that do not stand for bytes, and where no token ends a document."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a core, not a thread in each
        told, self._hf = _open(content, name)
        self._alphabet, unknown = told.alphabet, told.unknown
        self._vocabulary = vocabulary = self._hf.get_vocab(with_added_tokens=True)
        added = self._hf.get_added_tokens_decoder()
        self._text_tokens = {token: kept.content for token, kept in added.items() if not kept.special}
        specials = {kept.content: token for token, kept in added.items() if kept.special}
        ends, config = _ends(told, config, specials, vocabulary, name)
        if unknown in (ends.bos, ends.eos) and not self._alphabet.is_complete(vocabulary):
            raise UserError(
                f"tokenizer {name}: it writes {unknown} for what it does not know, which would end a document. Use one "
                "with byte fallback, or with an unknown token of its own."
            )
        for text in (ends.bos, ends.eos, unknown):
            if text in vocabulary:
                specials[text] = vocabulary[text]
        super().__init__(
            name,
            {HUGGING_FACE: content} | ({BESIDE[HUGGING_FACE]: config} if config else {}),
            bytes_of=self._table(set(specials.values()), name),
            specials=dict(sorted(specials.items(), key=lambda item: item[1])),
            bos_id=vocabulary[ends.bos],
            eos_id=vocabulary[ends.eos],
        )
        self._unknown_id = vocabulary.get(unknown) if unknown else None
        self._is_special = np.zeros(self.vocab_size, np.bool_)
        self._is_special[list(specials.values())] = True
        try:
            self.encode_batch(_UNCOMMON)
        except Exception as error:
            raise UserError(f"tokenizer {name}: it fails on characters that it does not know: {error}") from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            return self._encode_batch(texts)
        except BaseException as error:  # a panic in Rust is no Exception
            if not gave_up(error):
                raise
            return [halved(lambda part: self._encode_batch([part])[0], text) for text in texts]

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [np.array(encoding.ids, np.int32) for encoding in encodings]
        for number, (text, ids) in enumerate(zip(texts, found, strict=True)):
            if self._is_special[ids].any() or (self._alphabet.has_byte_pieces and "<0x" in text):
                found[number] = np.array(self._encode_as_text(text), np.int32)
        return found

    def _encode_as_text(self, text: str) -> list[int]:
        """A model that knows no kinds of pieces takes "</s>" or "<0x0A>" in a text for the pieces of that name, where
        they are in its vocabulary (unigram does). Those are spelled. The unknown piece stays where it is one."""
        encoding = self._hf.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for token, piece, (start, stop) in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True):
            is_name = text[start:stop] == piece and (self._is_special[token] or piece.startswith("<0x"))
            must_go = self._is_special[token] and token != self._unknown_id
            ids += self._spell(piece) if is_name or must_go else [token]
        return ids

    def _spell(self, text: str) -> list[int]:
        pieces = self._alphabet.spell(text, self._vocabulary)
        ids = [self._vocabulary.get(piece, self._unknown_id) for piece in pieces]
        return [token for token in ids if token is not None]

    def _table(self, specials: set[int], name: str) -> list[bytes]:
        """The bytes of each id; none for ids that the file leaves out."""
        table = empty_table(max(self._vocabulary.values(), default=0), name)
        for piece, token in self._vocabulary.items():
            if token not in specials:
                added = self._text_tokens.get(token)
                table[token] = self._alphabet.bytes_of(piece) if added is None else added.encode()
        return table

    def _probes(self) -> Sequence[str]:
        return [*super()._probes(), *(f"x {text} x" for text in list(self._text_tokens.values())[:20])]


def _open(content: bytes, name: str) -> tuple[hf_format.Told, Any]:
    """What the file says, and the library's tokenizer."""
    import tokenizers

    try:
        file = json.loads(content)
        told = hf_format.told(file)  # first: the library ends the process over some files that this refuses
        opened = tokenizers.Tokenizer.from_buffer(content)
        if file["model"].get("dropout"):  # the same text gives the same tokens
            file["model"]["dropout"] = None
            opened = tokenizers.Tokenizer.from_str(json.dumps(file))
    except BaseException as error:  # the library raises no narrower one, and panics
        if not (isinstance(error, Exception) or gave_up(error)):
            raise
        raise UserError(f"tokenizer {name}: not a tokenizer.json that can be used: {error}") from error
    opened.no_truncation()
    opened.no_padding()
    opened.encode_special_tokens = True  # as the text that they are
    return told, opened


def _ends(
    told: hf_format.Told,
    config: bytes | None,
    specials: Mapping[str, int],
    vocabulary: Mapping[str, int],
    name: str,
) -> tuple[Ends, bytes | None]:
    """The ends of a document, and the configuration to keep: only where the ends are not those that tokenizer.json
    gives alone, and only that, so that a chat template makes no other tokenizer."""
    beside = f"{Path(name).stem}_config.json" if name.endswith(".json") else BESIDE[HUGGING_FACE]
    begin, end = (text if text in vocabulary else None for text in (told.begin, told.end))
    alone = document_ends.find(specials, begin, end)
    bos = eos = None
    if config is not None:
        where = f"tokenizer {name}: {beside}"
        try:
            values = json.loads(config)
            bos, eos = document_ends.named(values, vocabulary, where)
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        if "bos_token" in values and bos is None and eos is not None:
            bos = eos
    ends = document_ends.find(specials, bos or begin, eos or end)
    if ends is None:
        raise document_ends.unknown(name, specials, f"{beside} beside it")
    return ends, None if ends == alone else json.dumps(ends.as_json()).encode()
