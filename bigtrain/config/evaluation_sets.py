"""Held-out data by name: ``data.valid={stdlib: data/stdlib/valid, books: [{path: a}, {path: b}]}``.

The config holds a list of sources, each with the name of its set, so that its type is one and the frozen file reads as
it was written. On the command line a mapping is shorter: it is turned into that list before Hydra sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from bigtrain.config import locations
from bigtrain.config.errors import UserError
from bigtrain.config.schema import SourceConfig

KEY = "data.valid"
_FORM = "A set is a folder of shards, or a list of {path: FOLDER}"


def by_name(sources: Iterable[SourceConfig]) -> dict[str, list[SourceConfig]]:
    """The sources of each set, in the order in which the sets are first named; "" is the only, unnamed one."""
    found: dict[str, list[SourceConfig]] = {}
    for source in sources:
        found.setdefault(source.set, []).append(source)
    return found


def as_list(override: str) -> str:
    """The override ``data.valid={...}`` with the mapping as a list of sources; any other as it is, also one that Hydra
    cannot read. Raises UserError for what is no mapping of names to folders."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, value = override.partition("=")
    if name.lstrip("+") != KEY or not value.lstrip().startswith("{"):
        return override
    try:
        sets: Any = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override
    sources = [source for key, given in sets.items() for source in _sources(str(key), given)]
    return f"{name}={_written(sources)}"


def parse(value: str) -> list[SourceConfig]:
    """The sources that ``data=VALUE`` names: a folder (or a place where shards lie), or what data.valid takes on a
    command line. Raises UserError for anything else."""
    if not value.lstrip().startswith(("{", "[")):
        return [SourceConfig(value)]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    shown = locations.redacted(value)
    try:
        given: Any = OverridesParser.create().parse_override(as_list(f"{KEY}={value}")).value()
    except HydraException as error:
        raise UserError(f"data={shown}: it cannot be read. {_FORM}, in quotes for the shell.") from error
    if not isinstance(given, list) or not given:
        raise UserError(f"data={shown}: {_FORM}.")
    return [_source(each, shown) for each in cast(list[Any], given)]


def _source(given: Any, shown: str) -> SourceConfig:
    """Raises UserError for what is no {path: FOLDER}."""
    found = cast(dict[Any, Any], given) if isinstance(given, dict) else {}
    unknown = [str(key) for key in found if key not in ("path", "set")]
    if unknown or not isinstance(found.get("path"), str):
        what = f"{', '.join(unknown)} means nothing here" if unknown else "a source has no path"
        raise UserError(f"data={shown}: {what}. {_FORM}.")
    return SourceConfig(path=found["path"], set=str(found.get("set", "")))


def _sources(name: str, given: Any) -> list[dict[str, Any]]:
    if name in SourceConfig.__dataclass_fields__:
        raise UserError(f"{KEY}: {name} is no name of a set. Write {KEY}=[{{path: FOLDER}}], or {{NAME: FOLDER}}.")
    sources: list[Any] = [{"path": given}] if isinstance(given, str) else given
    if not isinstance(given, str | list) or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{KEY}: the set {name} is {locations.redacted(_written(given))}. {_FORM}.")
    if not sources:
        raise UserError(f"{KEY}: the set {name} is empty. {_FORM}.")
    return [{**source, "set": name} for source in sources]


def _written(value: Any) -> str:
    """As Hydra's grammar has it, every text in quotes."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        return QuotedString(value, Quote.double).with_quotes()
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, cast(list[Any], value))) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in cast(dict[Any, Any], value).items()) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
