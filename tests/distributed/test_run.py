"""How a run ends on its ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import CheckpointConfig, Config, ParallelConfig
from tests.distributed.harness import PoolFactory, patched
from tests.integration.runs import build_shards, committed, config_of, records


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


def fails_behind_a_save(config: Config, error: Exception) -> str:
    """On a rank: the whole run, which meets `error` when it asks for step 3's batch, while step 2 is being saved."""
    from bigtrain.checkpoint import store
    from bigtrain.telemetry.console import Console
    from bigtrain.trainer import peers
    from bigtrain.trainer import run as running
    from bigtrain.trainer import saver as savers
    from bigtrain.trainer.watchdog import Watchdog

    agreed, save = peers.agreed, store.save

    def two(*arguments: Any) -> Iterator[Any]:
        for number, batch in enumerate(agreed(*arguments), start=1):
            if number == 3:
                raise error
            yield batch

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.0)
        return save(*arguments, **options)

    with (
        patched(running, "stop", lambda: None),  # the harness does that
        patched(peers, "agreed", two),
        patched(store, "save", slow),
        patched(savers, "LAST_SAVE_S", 0.0),
    ):
        try:
            running.run(config, Path(config.run.dir), Console(enabled=False), Watchdog())
        except type(error) as raised:
            return str(raised)
    return ""


def test_an_error_of_all_ranks_waits_for_the_save_under_way(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    from bigtrain.config.errors import UserError

    base = config_of(tmp_path / "run", data)
    wanted = replace(base, parallel=ParallelConfig(zero_stage=1), checkpoint=CheckpointConfig(interval=2))
    frozen.save(wanted, wanted.run.dir)
    assert pool(2).run(fails_behind_a_save, wanted, UserError("bad data")) == ["bad data"] * 2
    assert committed(Path(wanted.run.dir)) == [2]
    assert [each["step"] for each in records(Path(wanted.run.dir), "event") if each["name"] == "checkpoint"] == [2]
