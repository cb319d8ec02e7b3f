"""A key whose name Python keeps for itself is the same word everywhere a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config import frozen, keys
from bigtrain.config.compose import compose
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config


def test_it_is_set_shown_and_frozen_by_its_name(tmp_path: Path) -> None:
    config = compose(["checkpoint.async=false"])
    assert config.checkpoint.async_ is False and Config().checkpoint.async_ is True
    frozen.save(config, tmp_path)
    text = (tmp_path / frozen.FILE).read_text()
    assert "  async: false\n" in text and "async_" not in text
    assert frozen.load(tmp_path) == config
    assert frozen.as_dict(config)["checkpoint"]["async"] is False
    assert "checkpoint.async" in keys.by_path() and "checkpoint.async_" not in keys.by_path()


def test_a_preset_of_ones_own_says_it_too(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.yaml").write_text("interval: 7\nasync: false\n")
    config = compose(["checkpoint=mine"], [tmp_path])
    assert (config.checkpoint.interval, config.checkpoint.async_) == (7, False)


def test_a_wrong_value_names_the_key() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.async takes true or false"):
        compose(["checkpoint.async=sometimes"])
