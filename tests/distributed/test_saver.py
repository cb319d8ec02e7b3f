"""Saving behind the training, and going on from the newest checkpoint that is whole."""

from __future__ import annotations

import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.schema import CheckpointConfig, Config, WatchdogConfig
from tests.distributed import small
from tests.distributed.harness import PoolFactory, RankError


def config(**checkpoint: Any) -> Config:
    return replace(small.config(zero_stage=3), checkpoint=CheckpointConfig(**checkpoint))


def started(config: Config, run_dir: Path) -> tuple[Any, Any]:
    """On a rank: an engine and its saver."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine
    from bigtrain.trainer.saver import Saver

    return Engine(config, start(config)), Saver(config, run_dir, {"tokenizer.model": b"t"})


def cursor_at(step: int) -> Any:
    from bigtrain.data.mixture import Mixture, Stage
    from bigtrain.data.order import Cursor

    return Cursor(small.GLOBAL_BATCH * step, "order", Mixture([Stage(0, {"data": Fraction(1)})], 8))


def weights_of(engine: Any) -> small.Pieces:
    from bigtrain.engine import state

    return small.pieces(state.fragments(engine), "weight")


def save_and_go_on(config: Config, run_dir: Path) -> tuple[small.Pieces, list[Any], list[str]]:
    """On a rank: the weights when the save was called, how the saves ended, and what happened in which order. No save
    is written before the steps behind the first are taken."""
    from bigtrain.checkpoint import folder, store

    engine, saver = started(config, run_dir)
    small.take_steps(engine, 0, 2)
    saved, log, may_write, save = weights_of(engine), [], threading.Event(), store.save

    def held_up(root: Path, step: int, *arguments: Any, **options: Any) -> Any:
        may_write.wait(60)
        try:
            return save(root, step, *arguments, **options)
        finally:
            log.append(f"{step} written")

    store.save = held_up
    try:
        saver.save(engine, 2, cursor_at(2), loss=1.5)
        log.append(f"2 called, {len(saver.finished())} finished, {len(folder.committed(saver.root))} committed")
        small.take_steps(engine, 2, 1)
        threading.Timer(0.5, may_write.set).start()
        saver.save(engine, 3, cursor_at(3))
        log.append("3 called")
        ends = saver.finished() + saver.wait()
    finally:
        store.save = save
    return saved, ends, log


def test_training_goes_on_while_a_save_is_written(pool: PoolFactory, tmp_path: Path) -> None:
    from tests.torch_reader import weights_by_torch

    ranks = pool(2).run(save_and_go_on, config(keep=5), tmp_path)
    saved = small.assemble([pieces for pieces, *_ in ranks])
    written = weights_by_torch(tmp_path / "checkpoints" / "step-00000002")
    assert all(torch.equal(written[name], saved[name]) for name in saved), "the steps behind the save changed it"
    for _, ends, log in ranks:
        assert log[:2] == ["2 called, 0 finished, 0 committed", "2 written"], "the second save waits for the first"
        assert sorted(log[2:]) == ["3 called", "3 written"]
        assert [(end.step, end.error) for end in ends] == [(2, ""), (3, "")]
        assert ends[0].stall_s < ends[0].seconds
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000003"


def save_at_once(config: Config, run_dir: Path) -> list[Any]:
    engine, saver = started(config, run_dir)
    saver.save(engine, 0, cursor_at(0))
    return saver.finished()


def test_without_async_a_save_is_durable_when_it_returns(pool: PoolFactory, tmp_path: Path) -> None:
    for (end,) in pool(2).run(save_at_once, config(async_=False), tmp_path):
        assert end.seconds == end.stall_s > 0 and not end.error


def without_memory(config: Config, run_dir: Path, poor: int) -> tuple[str, bool]:
    """On a rank: what is told where rank `poor` has no memory for a copy, and whether a save is durable at once."""
    from bigtrain.trainer import saver as savers

    engine, saver = started(config, run_dir)
    free = savers.free_host_bytes
    if engine.runtime.topology.rank == poor:
        savers.free_host_bytes = lambda: 1000
    try:
        told = saver.reserve(engine)
    finally:
        savers.free_host_bytes = free
    saver.save(engine, 1, cursor_at(1))
    (end,) = saver.finished()
    return told, end.stall_s == end.seconds and not end.error


def test_where_one_rank_has_no_memory_for_a_copy_all_wait_for_their_saves(pool: PoolFactory, tmp_path: Path) -> None:
    for told, is_durable in pool(2).run(without_memory, config(), tmp_path, 1):
        assert "rank 1 would take 0.0 GB for it, 0.0 GB are free" in told
        assert is_durable


def fail_on_one_rank(config: Config, run_dir: Path, failing: int) -> tuple[list[str], list[int]]:
    """On a rank: how three saves ended, of which the second meets a full disk on rank `failing`, and the steps whose
    files this rank deleted."""
    import errno

    from bigtrain.checkpoint import folder
    from bigtrain.checkpoint.direct_file import DirectFile

    engine, saver = started(config, run_dir)
    write, drop, dropped = DirectFile.write, folder.drop_partial, []

    def noted(root: Path, step: int) -> None:
        dropped.append(step)
        drop(root, step)

    def full(self: Any, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver.save(engine, 1, cursor_at(1))
    ends = saver.wait()
    folder.drop_partial = noted
    if engine.runtime.topology.rank == failing:
        DirectFile.write = full  # type: ignore[method-assign]
    try:
        saver.save(engine, 2, cursor_at(2))
        small.take_steps(engine, 0, 1)
        ends += saver.wait()
    finally:
        DirectFile.write = write  # type: ignore[method-assign]
        folder.drop_partial = drop
    saver.save(engine, 3, cursor_at(3))
    return [end.error for end in ends + saver.wait()], dropped


def test_a_full_disk_of_one_rank_fails_the_save_of_all_and_the_next_succeeds(pool: PoolFactory, tmp_path: Path) -> None:
    ranks = pool(2).run(fail_on_one_rank, config(keep=9), tmp_path, 1)
    for (first, second, third), _ in ranks:
        assert (first, third) == ("", "")
        assert second == "the checkpoint of step 2 was not saved: rank 1: No space left on device"
    assert [dropped for _, dropped in ranks] == [[2], []], "who commits cleans up; another might delete what it commits"
    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert there == ["latest", "step-00000001", "step-00000003"]


def save_some(config: Config, run_dir: Path, steps: int) -> None:
    engine, saver = started(config, run_dir)
    for step in range(1, steps + 1):
        small.take_steps(engine, step - 1, 1)
        saver.save(engine, step, cursor_at(step))
        saver.wait()


def resume(config: Config, run_dir: Path) -> tuple[int, int, list[Any], list[float]]:
    """On a rank: step and sequences that the run goes on from, what was passed over, and the next loss."""
    from bigtrain.trainer.saver import checkpoints_to_resume

    engine, saver = started(replace(config, run=replace(config.run, seed=99)), run_dir)
    step, cursor = saver.load(engine, checkpoints_to_resume(config, run_dir))
    return step, cursor.num_sequences, saver.fallbacks, small.take_steps(engine, step, 1)


def damage(path: Path, *, cut: bool) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(byte ^ 1 for byte in content[middle : middle + 2000])  # beyond any header
    path.write_bytes(content[:2000] if cut else content)


@pytest.mark.parametrize("cut", [False, True], ids=["flipped bits", "cut file"])
def test_a_damaged_newest_one_is_passed_over(pool: PoolFactory, tmp_path: Path, cut: bool) -> None:
    """Its damage is in the part of rank 1; no rank goes on alone."""
    wanted = config(keep=9)
    pool(2).run(save_some, wanted, tmp_path, 3)
    (step, _, none, _), _ = pool(2).run(resume, wanted, tmp_path)
    assert step == 3 and not none
    checkpoints = tmp_path / "checkpoints"
    damage(checkpoints / "step-00000003" / "__1_0.distcp", cut=cut)
    (checkpoints / "step-00000002" / "state.json").write_text("{")
    for step, sequences, passed_over, _ in pool(2).run(resume, wanted, tmp_path):
        assert (step, sequences) == (1, small.GLOBAL_BATCH)
        assert [each.folder.name for each in passed_over] == ["damaged-step-00000003", "damaged-step-00000002"]
        assert "step-00000003: " in passed_over[0].reason and "state.json" in passed_over[1].reason
    assert (checkpoints / "latest").resolve().name == "step-00000001"
    damage(checkpoints / "step-00000001" / "__0_0.distcp", cut=cut)
    with pytest.raises(RankError, match=r"step-00000001: .*There is no older one that is whole"):
        pool(2).run(resume, wanted, tmp_path)
    assert (checkpoints / "step-00000001").is_dir(), "the last one stays where it is"


def test_a_file_that_no_rank_reads_costs_no_step(pool: PoolFactory, tmp_path: Path) -> None:
    wanted, checkpoints = config(keep=9), tmp_path / "checkpoints"
    pool(2).run(save_some, wanted, tmp_path, 2)
    (checkpoints / "step-00000002" / "tokenizer.model").unlink()
    assert [(step, passed_over) for step, _, passed_over, _ in pool(2).run(resume, wanted, tmp_path)] == [(2, [])] * 2


def test_a_file_of_another_size_that_is_put_back(pool: PoolFactory, tmp_path: Path) -> None:
    """Of two ranks, rank 1's: the first looks for all. The checkpoint is whole again."""
    wanted, checkpoints = config(keep=9), tmp_path / "checkpoints"
    pool(2).run(save_some, wanted, tmp_path, 1)
    part = checkpoints / "step-00000001" / "__1_0.distcp"
    content = part.read_bytes()
    part.unlink()
    there_is_none = r"step-00000001: __1_0.distcp: the file is missing, .* There is no older one that is whole"
    with pytest.raises(RankError, match=there_is_none):
        pool(2).run(resume, wanted, tmp_path)
    part.write_bytes(content)
    assert [step for step, *_ in pool(2).run(resume, wanted, tmp_path)] == [1, 1]


def test_another_model_is_no_damage(pool: PoolFactory, tmp_path: Path) -> None:
    pool(2).run(save_some, config(keep=9), tmp_path, 2)
    for change in ({"ffn_hidden_size": 96}, {"num_layers": 1}, {"rope_theta": 500.0}):  # the last two would fit
        other = replace(config(), model=replace(small.LLAMA, **change))
        with pytest.raises(RankError, match=f"step-00000002: it is of another run: model.{next(iter(change))} is "):
            pool(2).run(resume, other, tmp_path)
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def timeouts(config: Config, run_dir: Path) -> dict[str, float]:
    """On a rank: seconds that a collective of each process group may take."""
    import torch.distributed as dist

    from bigtrain.config.derive import collective_timeout_s
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine
    from bigtrain.trainer.saver import Saver

    Engine(config, start(config, timeout_s=collective_timeout_s(config.watchdog)))
    Saver(config, run_dir, {})
    every = dist.distributed_c10d._world.pg_map
    return {each.group_desc: each._get_backend(torch.device("cpu")).options._timeout.total_seconds() for each in every}


def test_no_group_gives_up_before_the_watchdog(pool: PoolFactory, tmp_path: Path) -> None:
    wanted = replace(config(async_=True), watchdog=WatchdogConfig(step_s=9000.0, factor=2.0))
    (found,) = pool(1).run(timeouts, wanted, tmp_path)
    unused = "EXPERT_DATA_PARALLEL_GROUP_GLOO"
    assert {"default_pg", "MODEL_PARALLEL_GROUP", "checkpoint", unused} < found.keys()
    assert all(seconds > 18000 for name, seconds in found.items() if name != unused), found
