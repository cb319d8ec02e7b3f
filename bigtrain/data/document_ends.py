"""Which tokens begin and end a document, where a tokenizer's file does not say it outright.

Files of Hugging Face and tiktoken list special tokens, and leave it to other files, or to code, what each is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.config.errors import UserError

# As tokenizers in use call them, likeliest first.
_BEGIN = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[BOS]")
_END = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]")


@dataclass(frozen=True)
class Ends:
    """Names of special tokens."""

    bos: str
    """Equal to `eos` where the tokenizer has none: the same token at both ends, as GPT-2 was trained."""
    eos: str

    def as_json(self) -> dict[str, str]:
        """As Hugging Face's tokenizer_config.json names them."""
        return {"bos_token": self.bos, "eos_token": self.eos}


def find(specials: Mapping[str, int], bos: str | None = None, eos: str | None = None) -> Ends | None:
    """What is named, else what is known by name, else the only special token; None where no end can be told."""
    begin = bos or next((name for name in _BEGIN if name in specials), None)
    end = eos or next((name for name in _END if name in specials), None)
    if end is None and len(specials) == 1:
        end = next(iter(specials))
    return Ends(begin or end, end) if end else None


def named(values: Mapping[str, object], specials: Mapping[str, int], where: str) -> tuple[str | None, str | None]:
    """(bos, eos) as JSON settings name them, a text or {"content": text}; None for what is not there or null.

    Raises UserError, with `where` the settings are, for a name that no special token has."""
    found: list[str | None] = []
    for key in ("bos_token", "eos_token"):
        value = values.get(key)
        name: object = value.get("content") if isinstance(value, dict) else value
        if name is not None and (not isinstance(name, str) or name not in specials):
            raise UserError(f"{where}: {key} is {name!r}, which is no token of it. {_there(specials)}")
        found.append(name)
    return found[0], found[1]


def unknown(name: str, specials: Mapping[str, int], settings: str) -> UserError:
    """For a tokenizer of which no end of document can be told; `settings` is the file that may name it."""
    return UserError(
        f'tokenizer {name}: which token ends a document? {_there(specials)} Write {{"eos_token": NAME}} to {settings}.'
    )


def _there(specials: Mapping[str, int]) -> str:
    if not specials:
        return "It has no special tokens."
    names = list(specials)
    return f"There are {', '.join(names[:20])}{' and more' if len(names) > 20 else ''}."
