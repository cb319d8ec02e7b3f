"""Every key of the schema with its type, default and documentation, read from the schema itself.

The help text, the error messages and the docs are made from this, so none of them can drift from the schema.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import keyword
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bigtrain.config import schema


@dataclass(frozen=True)
class Key:
    """One setting."""

    path: str
    """Dotted, as on the command line."""
    type: Any
    """The annotation, resolved."""
    default: Any
    choices: tuple[str, ...]
    """What a text value may be; empty: anything."""
    words: tuple[str, ...]
    """What may stand in place of a number."""
    group: type
    """The dataclass that has it."""

    @property
    def doc(self) -> str:
        """The string under the field, on one line; may be empty."""
        return _field_docs(self.group).get(self.path.rsplit(".", 1)[-1], "")

    @property
    def kind(self) -> str:
        """The type in words."""
        if self.choices:
            return " | ".join(self.choices)
        if self.words:
            return " or ".join([_in_words(typing.get_args(self.type)[0]), *self.words])
        return _in_words(self.type)

    @property
    def is_whole_number(self) -> bool:
        return self.type is int or int in typing.get_args(self.type)

    @property
    def form(self) -> str:
        """How a list or a mapping is written on the command line; empty for other types."""
        origin, arguments = typing.get_origin(self.type), typing.get_args(self.type)
        if origin is list and dataclasses.is_dataclass(arguments[0]):
            return f"'{self.path}=[{{{dataclasses.fields(arguments[0])[0].name}: ...}}]'"
        return {list: f"'{self.path}=[...]'", dict: f"'{self.path}={{name: ...}}'"}.get(origin, "")


def public(name: str) -> str:
    """What users call a field: ``async_`` in the schema is ``async``, which Python keeps for itself."""
    return name.removesuffix("_")


def attribute(path: str) -> str:
    """The dotted path of attributes of a key."""
    return ".".join(f"{name}_" if keyword.iskeyword(name) else name for name in path.split("."))


@functools.cache
def all_keys() -> tuple[Key, ...]:
    """Every leaf of `schema.Config`, in the schema's order."""
    return tuple(_keys_of(schema.Config, ""))


@functools.cache
def by_path() -> dict[str, Key]:
    return {key.path: key for key in all_keys()}


def find(path: str) -> Key | None:
    """The key that `path` sets or reaches into (``data.train.0.weight`` reaches into ``data.train``)."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        key = by_path().get(".".join(parts[:length]))
        if key is not None:
            return key if _fits_inside(key.type, parts[length:]) else None
    return None


def groups() -> tuple[str, ...]:
    """The top-level names that hold keys: model, data, ..."""
    return tuple(dict.fromkeys(key.path.split(".")[0] for key in all_keys() if "." in key.path))


def nearest(wrong: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `wrong`, best first: the same leaf elsewhere, then close spellings."""
    known = list(known)
    leaf = wrong.rsplit(".", 1)[-1]
    same_leaf = [name for name in known if name != wrong and name.rsplit(".", 1)[-1] == leaf]
    spelled = difflib.get_close_matches(wrong, known, n=count, cutoff=0.6)
    close_leaves = difflib.get_close_matches(leaf, [name.rsplit(".", 1)[-1] for name in known], n=count, cutoff=0.75)
    by_leaf = [name for name in known if name.rsplit(".", 1)[-1] in close_leaves]
    return list(dict.fromkeys([*same_leaf, *spelled, *by_leaf]))[:count]


def _keys_of(cls: type, prefix: str) -> Iterable[Key]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        path = prefix + public(field.name)
        if dataclasses.is_dataclass(hint):
            yield from _keys_of(typing.cast(type, hint), path + ".")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        choices, words = (tuple(field.metadata.get(name, ())) for name in ("choices", "words"))
        yield Key(path, hint, default, choices, words, cls)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string literal that follows each annotated field of the class's source, by what users call it."""
    definition = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    name = ""
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = public(node.target.id)
        elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[name] = " ".join(str(node.value.value).split())
            name = ""
    return docs


def _fits_inside(hint: Any, rest: list[str]) -> bool:
    """Whether the path `rest` leads somewhere inside a value of type `hint`."""
    if not rest:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        return len(rest) == 1
    if origin is list and rest[0].isdigit():
        return _fits_inside(arguments[0], rest[1:])
    if dataclasses.is_dataclass(hint):
        inner = typing.get_type_hints(hint).get(rest[0])
        return inner is not None and _fits_inside(inner, rest[1:])
    return False


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(_in_words(argument) for argument in arguments)
    if origin is list:
        return f"a list, each {_in_words(arguments[0])}"
    if origin is dict:
        return "name: text pairs"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return words.get(hint, str(hint))
