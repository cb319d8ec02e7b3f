"""A tokenizer as the files that Transformers' AutoTokenizer opens without remote code, with the same ids for a text.

A sentencepiece model becomes a tokenizer.json. What makes the ids the same:

- The file has spaces as spaces. sentencepiece writes U+2581 for a space, and so do most converted files; then a real
  U+2581 is a space to them. Here it is no piece, and falls to its three bytes, as `SentencePieceTokenizer` spells it.
- BPE. sentencepiece merges the neighbours whose joined piece has the best score, the left ones first. `tokenizers`
  merges listed pairs by their place in the list. One pair a piece, the best piece first, is the same: while a piece
  comes together, no merge crosses its ends, so it comes together in any text as it does alone, and from the same two
  parts in the end. `_last_pair` finds them.
- Unigram. `tokenizers` takes the name of a special token or of a byte ("</s>", "<0x0A>") in a text for that piece, as
  it knows no kinds of pieces. So these get a score that no text of theirs is worth; where the name has a character
  that is no piece, the text is cut around that character, which is always a token of its own.
- `split_special_tokens` is set: a text that spells a special token is text, as everywhere in bigtrain.

Not the same: unigram sums scores in fp32 in sentencepiece and in fp64 in `tokenizers`. Where two ways to cut a text are
that close, either may be taken. Only the sum differs, by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from bigtrain.config.errors import UserError
from bigtrain.data.hf_format import byte_piece
from bigtrain.data.sentencepiece_tokenizer import SPACE
from bigtrain.data.tokenizer import BESIDE, HUGGING_FACE, SENTENCEPIECE, TIKTOKEN, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_KINDS = {4: "user-defined", 5: "unused"}
_UNIGRAM, _BPE = 1, 2


def hf_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json. Raises UserError for a tokenizer that cannot be written as them."""
    if SENTENCEPIECE in tokenizer.files:
        content = json.dumps(_Model(tokenizer).as_json(), ensure_ascii=False).encode()
    elif TIKTOKEN in tokenizer.files:
        raise UserError(
            f"tokenizer {tokenizer.name}: a tiktoken file. Transformers opens a tokenizer.json, whose patterns are of "
            "another kind. Name one that you trust with --tokenizer, or leave it out with --no-tokenizer."
        )
    else:
        content = tokenizer.files[HUGGING_FACE]
    names = {token: name for name, token in tokenizer.specials.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    config |= {f"{role}_token": f"<{role}>" for role in ("unk", "pad") if f"<{role}>" in tokenizer.specials}
    return {HUGGING_FACE: content, BESIDE[HUGGING_FACE]: (json.dumps(config, indent=2) + "\n").encode()}


class _Model:
    """What a sentencepiece model file says."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for settings other than those that `tokenizer_training` sets."""
        from sentencepiece import sentencepiece_model_pb2

        self._name, self._bos = tokenizer.name, tokenizer.piece(tokenizer.bos_id)
        self._bos_id = tokenizer.bos_id
        proto = cast(Any, sentencepiece_model_pb2).ModelProto.FromString(tokenizer.files[SENTENCEPIECE])
        self._kind = proto.trainer_spec.model_type
        self._pieces = [(str(p.piece), float(p.score), int(p.type)) for p in proto.pieces]
        self._check(proto)
        self._scores = {_spaced(piece): score for piece, score, kind in self._pieces if kind == _NORMAL}
        self._names = [piece for piece, _, kind in self._pieces if kind != _NORMAL]
        self._check_pieces()

    def as_json(self) -> dict[str, Any]:
        """The tokenizer.json."""
        begin = {"SpecialToken": {"id": self._bos, "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                _added(token, piece) for token, (piece, _, kind) in enumerate(self._pieces) if _named(kind)
            ],
            "normalizer": None,
            "pre_tokenizer": self._cuts() if self._kind == _UNIGRAM else None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin, text],
                "pair": [begin, text, second],
                "special_tokens": {self._bos: {"id": self._bos, "ids": [self._bos_id], "tokens": [self._bos]}},
            },
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": self._unigram() if self._kind == _UNIGRAM else self._bpe(),
        }

    def _bpe(self) -> dict[str, Any]:
        pairs = {piece: _last_pair(piece, self._scores) for piece in self._scores if len(piece) > 1}
        order = sorted(pairs, key=lambda piece: -self._scores[piece])
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {_key(piece, kind): token for token, (piece, _, kind) in enumerate(self._pieces)},
            "merges": [pairs[piece] for piece in order if pairs[piece]],
        }

    def _unigram(self) -> dict[str, Any]:
        known = [sum(self._scores[letter] for letter in name) for name in self._names if set(name) <= self._letters]
        never = min(known, default=0.0) - 1.0
        return {
            "type": "Unigram",
            "unk_id": next(token for token, (_, _, kind) in enumerate(self._pieces) if kind == _UNKNOWN),
            "vocab": [[_key(piece, kind), score if kind == _NORMAL else never] for piece, score, kind in self._pieces],
            "byte_fallback": True,
        }

    def _cuts(self) -> dict[str, Any] | None:
        """Around a character of each name that is no piece."""
        letters = sorted({min(set(name) - self._letters) for name in self._names if not set(name) <= self._letters})
        if not letters:
            return None
        cuts = [
            {"type": "Split", "pattern": {"String": letter}, "behavior": "Isolated", "invert": False}
            for letter in letters
        ]
        return {"type": "Sequence", "pretokenizers": cuts}

    @property
    def _letters(self) -> set[str]:
        return {piece for piece in self._scores if len(piece) == 1}

    def _check(self, proto: Any) -> None:
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        other: list[str] = []
        if self._kind not in (_UNIGRAM, _BPE):
            other.append(f"its model_type is {self._kind}, not unigram or BPE")
        if normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv:
            other.append(f"it normalises text ({normalizer.name or 'rules of its own'})")
        for name in ("add_dummy_prefix", "remove_extra_whitespaces"):
            if getattr(normalizer, name):
                other.append(f"it has {name}")
        if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
            other.append("it treats spaces in another way")
        if not trainer.byte_fallback or {p for p, _, kind in self._pieces if kind == _BYTE} != _BYTES:
            other.append("it has no piece for each byte")
        other += [
            f"it has {_KINDS[kind]} pieces" for kind in sorted({kind for _, _, kind in self._pieces} & _KINDS.keys())
        ]
        if other:
            self._refuse(other)

    def _check_pieces(self) -> None:
        other: list[str] = []
        if lost := {letter for piece in self._scores for letter in piece} - self._letters:
            other.append(f"{min(lost)!a} is in its pieces, and no piece")
        if alone := [name for name in self._names if len(name) == 1]:
            other.append(f"its special token {alone[0]!a} is one character")
        long = [score for piece, score in self._scores.items() if len(piece) > 1]
        if self._kind == _BPE and len(set(long)) != len(long):
            other.append("two of its pieces have one score")
        if len(self._scores.keys() | set(self._names)) != len(self._pieces):
            other.append("two of its pieces are alike but for spaces")
        if other:
            self._refuse(other)

    def _refuse(self, reasons: Sequence[str]) -> None:
        raise UserError(
            f"tokenizer {self._name}: {', and '.join(reasons)}, which tools/tokenizer.py train never makes, and which "
            "a tokenizer.json of it might get wrong. Name one that you trust with --tokenizer, or leave it out with "
            "--no-tokenizer."
        )


_BYTES = {byte_piece(byte) for byte in range(256)}


def _last_pair(piece: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """The two parts from which sentencepiece's BPE makes a piece, None where it never does."""
    parts = list(piece)
    while len(parts) > 2:
        joined = [(scores.get(left + right), -place) for place, (left, right) in enumerate(pairwise(parts))]
        there = [(score, place) for score, place in joined if score is not None]
        if not there:
            return None
        place = -max(there)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _named(kind: int) -> bool:
    return kind in (_CONTROL, _UNKNOWN)


def _added(token: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": name, **flags, "special": True}


def _key(piece: str, kind: int) -> str:
    return _spaced(piece) if kind == _NORMAL else piece


def _spaced(piece: str) -> str:
    return piece.replace(SPACE, " ")
