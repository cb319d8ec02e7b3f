"""Files of tokenizers that others made: small ones, trained here by the libraries that define the formats."""

from __future__ import annotations

import base64
import copy
import io
import json
from collections.abc import Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END = "<|endoftext|>"


def byte_level(texts: Sequence[str], *, vocab_size: int = 420, specials: Sequence[str] = (END,)) -> dict[str, Any]:
    """tokenizer.json as of GPT-2: byte-level BPE, and one special token."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return json.loads(made.to_str())


def byte_fallback(texts: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json as of Llama 2: BPE over letters with byte pieces, a space before each text, <s> by a template."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
        limit_alphabet=100,
        show_progress=False,
        max_token_length=12,
    )
    made.train_from_iterator(texts, trainer)
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _without_added_bytes(json.loads(made.to_str()))


def unigram(texts: Sequence[str]) -> dict[str, Any]:
    """tokenizer.json as of T5, with byte pieces: it takes </s> in a text for the token, and drops a first space."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    file = _without_added_bytes(json.loads(made.to_str()))
    file["model"]["byte_fallback"] = True
    return file


def _without_added_bytes(file: dict[str, Any]) -> dict[str, Any]:
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in BYTE_PIECES]
    return file


def dump(file: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**copy.deepcopy(file), **changes}).encode()


def ranks(texts: Sequence[str]) -> dict[bytes, int]:
    """tiktoken's ranks of a byte-level BPE."""
    letters = bytes_of_letters()
    vocabulary = byte_level(texts, specials=())["model"]["vocab"]
    return {bytes(letters[letter] for letter in piece): rank for piece, rank in vocabulary.items()}


def bytes_of_letters() -> dict[str, int]:
    """GPT-2's letter for each byte, asked of transformers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


def tiktoken_settings(ranks: dict[bytes, int], **more: Any) -> bytes:
    return json.dumps(
        {"pattern": PATTERN, "special_tokens": {END: len(ranks), "<|fim|>": len(ranks) + 3}, **more}
    ).encode()


def sentencepiece_model(texts: Sequence[str], **options: Any) -> bytes:
    """A model trained with sentencepiece's own defaults, but for `options`."""
    model = io.BytesIO()
    settings = {"vocab_size": 420, "minloglevel": 2, "byte_fallback": True, **options}
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(texts), model_writer=model, **settings)
    return model.getvalue()
