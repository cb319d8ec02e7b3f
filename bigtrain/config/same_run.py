"""Whether a run can go on from the checkpoint of another config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.config import frozen
from bigtrain.config.schema import Config

_MAY_DIFFER = {"model.name", "model.attention_dropout", "model.hidden_dropout", "model.init_std", "model.max_positions"}
"""Settings of a model that change neither a tensor nor what is computed from them (learned positions are a tensor)."""


def difference(config: Config, saved: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key that makes it another model or optimizer, with the value that was saved and that of `config`.

    `saved`: settings by group, as state.json has them; what is not there differs in nothing."""
    wanted = frozen.as_dict(config)
    keys = [("model", name) for name in wanted["model"]] + [("optim", "name")]
    for group, name in keys:
        value = saved.get(group, {}).get(name)
        if f"{group}.{name}" not in _MAY_DIFFER and value is not None and value != wanted[group][name]:
            return f"{group}.{name}", value, wanted[group][name]
    return None
