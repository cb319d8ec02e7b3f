"""The frozen file of a run: RUN/config.yaml, written once at launch and read by every rank."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from bigtrain.config import keys
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config

FILE = "config.yaml"


def save(config: Config, run_dir: str | Path) -> Path:
    """Write RUN/config.yaml, aside and renamed, so that no reader sees half of it. Makes the folder."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(to_yaml(config), encoding="utf-8")
    os.replace(aside, path)
    return path


def to_yaml(config: Config) -> str:
    """The content of config.yaml: every value, interpolations resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(as_dict(config))))


def as_dict(config: Config) -> dict[str, Any]:
    """Every value by group and key, as users write them."""
    groups: dict[str, Any] = dataclasses.asdict(config)
    for group, values in groups.items():
        if isinstance(values, dict):
            groups[group] = {keys.public(name): item for name, item in cast("dict[str, Any]", values).items()}
    return groups


def load(run_dir: str | Path) -> Config:
    """Read RUN/config.yaml. Raises UserError where it is missing, or holds what this version does not know."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(run_dir) / FILE
    try:
        values = OmegaConf.load(path)
        merged = OmegaConf.merge(writable_schema(), values)
        return to_config(merged)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. A run's folder gets it from `python -m bigtrain.launch`.") from error
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(f"{path}: this version cannot read it: {first_line(error)}. Start another run.name.") from error


def writable_schema() -> Any:
    """The schema as an OmegaConf node. A frozen dataclass makes it read-only at every level; composing writes to it."""
    from omegaconf import DictConfig, OmegaConf

    node = OmegaConf.structured(Config)
    pending: list[Any] = [node]
    while pending:
        at = pending.pop()
        if isinstance(at, DictConfig):
            OmegaConf.set_readonly(at, None)
            _rename(at, keys.public)
            pending += [at._get_node(name) for name in at]  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    return node


def to_config(node: Any) -> Config:
    """The dataclasses of a composed node, interpolations resolved."""
    from omegaconf import DictConfig, OmegaConf

    node = copy.deepcopy(node)
    for group in node:
        if isinstance(node._get_node(group), DictConfig):
            _rename(node._get_node(group), keys.attribute)
    return cast(Config, OmegaConf.to_object(node))


def _rename(node: Any, new_name: Callable[[str], str]) -> None:
    """Give the entries of an OmegaConf node other names. (It has no words for that.)"""
    for name in [name for name in node._content if new_name(name) != name]:
        child = node._content.pop(name)
        child._metadata.key = new_name(name)
        node._content[new_name(name)] = child


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _escaped(value: Any) -> Any:
    """`value` with every ``${`` made literal: the file is resolved, nothing in it is evaluated when it is read."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_escaped(item) for item in cast(list[Any], value)]
    return value
