"""The command line of a command without Hydra: ``key=value``, typed by the fields of a dataclass.

A mistake is one line on stderr and exit status 2. No torch: ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bigtrain.config.errors import UserError, exit_status

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)

Rule = tuple[str, bool, str]
"""(key, whether its value is sound, what it takes)."""
_WORDS = {"true": True, "false": False}
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def run(argv: Sequence[str], help_text: str, command: Callable[[list[str]], int]) -> int:
    """The exit status of `command(argv)`: as `exit_status` says. Prints `help_text` where that is asked for."""
    if {"-h", "--help"} & set(argv):
        print(help_text.strip())
        return 0
    return exit_status(lambda: command(list(argv)))


def joined(argv: Sequence[str], flag: str) -> list[str]:
    """`argv` with ``--flag VALUE`` as one argument ``--flag=VALUE``. Raises UserError where the value is missing."""
    found: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument == flag:
            value = next(rest, None)
            if value is None:
                raise UserError(f"{flag} is the last argument: it takes a value")
            argument = f"{flag}={value}"
        found.append(argument)
    return found


def parse(
    kind: type[T],
    argv: Iterable[str],
    *,
    command: str,
    aliases: Mapping[str, str] | None = None,
    rules: Callable[[T], Iterable[Rule]] = lambda _: (),
) -> T:
    """The settings that `argv` gives, as a `kind`; a field without a default must be given. `command` is what errors
    call it, `aliases`: other names of keys.

    Raises UserError for what is no key=value, an unknown key, or a value of another type or that `rules` refuse."""
    kinds = {field.name: str(field.type) for field in fields(kind)}
    values: dict[str, Any] = {}
    for argument in argv:
        name, equals, value = argument.partition("=")
        key = (aliases or {}).get(name, name)
        if key in kinds and not equals:
            raise UserError(f"{argument!r} has no value: write {name}=VALUE")
        if key not in kinds:
            near = get_close_matches(key, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(kinds)}"
            raise UserError(f"{argument!r} is no setting of {command}{hint}")
        values[key] = _value(key, value, kinds[key])
    for field in fields(kind):
        if field.default is MISSING and field.name not in values:
            raise UserError(f"{field.name}=... is missing. --help tells more.")
    found = kind(**values)
    for key, is_sound, words in rules(found):
        if not is_sound:
            raise UserError(f"{key}={getattr(found, key)!s:.80}: it takes {words}")
    return found


def _value(key: str, value: str, kind: str) -> Any:
    try:
        value.encode()  # what is no UTF-8 arrives as half of a surrogate pair
        if kind == "bool":
            return _WORDS[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except UnicodeEncodeError as error:
        raise UserError(f"{key}={value!a}: it is no UTF-8") from error
    except (ValueError, KeyError) as error:
        raise UserError(f"{key}={value}: it takes {_NAMES[kind]}") from error


class _Place(Protocol):
    """What every command that loads a model takes."""

    @property
    def tensor(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...


def place_rules(given: _Place, *dtypes: str) -> list[Rule]:
    """The rules of where and in which numbers a model runs; `dtypes`: choices besides the number formats."""
    formats = ("fp32", "bf16", "fp16", *dtypes)
    return [
        ("tensor", given.tensor >= 1, "1 or more"),
        ("device", given.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
        ("dtype", given.dtype in formats, f"{', '.join(formats[:-1])} or {formats[-1]}"),
    ]
