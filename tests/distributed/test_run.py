"""How a run ends on its ranks."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import CheckpointConfig, Config, ParallelConfig
from tests.distributed.harness import PoolFactory, patched
from tests.integration.runs import build_shards, committed, config_of, records, trajectory


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


def signalled(config: Config, batch: int) -> str | None:
    """On a rank: the whole run; rank 1 gets SIGUSR2 behind this batch of those that it evaluates."""
    from bigtrain.engine.engine import Engine
    from bigtrain.telemetry.console import Console
    from bigtrain.trainer import run as running
    from bigtrain.trainer.stopping import SIGNALS
    from bigtrain.trainer.watchdog import Watchdog

    evaluate, done = Engine.evaluate, itertools.count(1)

    def watched(*arguments: Any) -> Any:
        found = evaluate(*arguments)
        if next(done) == batch and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR2)
        return found

    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with patched(running, "stop", lambda: None), patched(Engine, "evaluate", watched):
            return running.run(config, Path(config.run.dir), Console(enabled=False), Watchdog())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_in_an_evaluation(pool: PoolFactory, data: Path, tmp_path: Path) -> None:
    """It is broken off, also the last, and the next start makes up for it: the records are those of a run without."""

    def of(name: str) -> Config:
        base = config_of(tmp_path / name, data)
        found = replace(
            base,
            parallel=ParallelConfig(zero_stage=1),
            train=replace(base.train, num_steps=6),
            eval=replace(base.eval, interval=4, num_batches=3),
        )
        frozen.save(found, found.run.dir)
        return found

    whole, wanted = of("whole"), of("run")
    assert pool(2).run(signalled, whole, 0) == [None] * 2
    run_dir = Path(wanted.run.dir)
    for steps in ([4], [4, 6]):
        assert pool(2).run(signalled, wanted, 1 if steps == [4] else 4) == ["SIGUSR2"] * 2
        assert committed(run_dir) == steps
        assert [each["step"] for each in records(run_dir, "eval")] == steps[:-1], "the last is left out"
        assert not (run_dir / "summary.json").exists()
    assert pool(2).run(signalled, wanted, 0) == [None] * 2
    assert (run_dir / "summary.json").exists() and (run_dir / "report.html").exists()
    assert records(run_dir, "eval") == records(Path(whole.run.dir), "eval")
    assert trajectory(run_dir) == trajectory(Path(whole.run.dir))
