"""sentencepiece models.

Those of `tokenizer_training` lose nothing: ``decode(encode(x)) == x`` for any text, byte for byte. What makes them
exact: no normalisation, no dummy prefix, no removed whitespace, and one byte piece for each of the 256 bytes, for
whatever the vocabulary does not cover (newlines in rare places, tabs, emoji). One character is left: sentencepiece
writes a space as U+2581 inside and cannot tell a real U+2581 from it, so `encode_batch` spells that one in byte pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import sentencepiece

from bigtrain.config.errors import UserError
from bigtrain.data.tokenizer import SENTENCEPIECE, Tokenizer

SPACE = "\u2581"
_SPACED = "  x \t\n y "


class SentencePieceTokenizer(Tokenizer):
    """BPE or unigram."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model` is the content of a model file, `name` what errors call it. Raises UserError for one that is no
        sentencepiece model, or has no end of document."""
        self._sp = sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("the file is empty")
            sp.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"tokenizer {name}: not a sentencepiece model, tokenizer.json or tiktoken file") from error
        eos_id, tokens = sp.eos_id(), range(sp.vocab_size())
        if eos_id < 0:
            raise UserError(
                f"tokenizer {name}: it has no </s> to end a document. Train it with one: tools/tokenizer.py train does."
            )
        super().__init__(
            name,
            {SENTENCEPIECE: model},
            bytes_of=[_bytes_of(sp, token) for token in tokens],
            specials={sp.id_to_piece(token): token for token in tokens if sp.is_control(token) or sp.is_unknown(token)},
            bos_id=eos_id if sp.bos_id() < 0 else sp.bos_id(),
            eos_id=eos_id,
        )
        self._space_ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        keeps_spaces = self.decode_bytes(sp.encode(_SPACED), at_start=False) == _SPACED.encode()
        self._spells_space = keeps_spaces and all(map(sp.is_byte, self._space_ids))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = [np.array(ids, np.int32) for ids in self._sp.encode(list(texts), num_threads=1)]
        for number, text in enumerate(texts):
            if SPACE in text and self._spells_space:
                found[number] = np.array(self._encode_space(text), np.int32)
        return found

    def _encode_space(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({SPACE})", text):
            ids += self._space_ids if part == SPACE else self._sp.encode(part)
        return ids


def _bytes_of(sp: sentencepiece.SentencePieceProcessor, token: int) -> bytes:
    piece = sp.id_to_piece(token)
    if sp.is_byte(token):
        return bytes([int(piece[3:5], 16)])
    if sp.is_control(token) or sp.is_unknown(token):
        return b""
    return piece.replace(SPACE, " ").encode()
