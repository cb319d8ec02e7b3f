"""What each rank of a contender of tools/bench/checkpoint.py runs: one save, load or run of saves, measured."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOY_PARAMETERS = 1
"""The smallest model that there is: what is run once before the clock starts."""
ASYNC_SAVES = 3
"""The first takes memory and is left out."""


def contend(options: argparse.Namespace) -> dict[str, float]:
    """One rank of a contender."""
    import torch.distributed as dist

    part, _, name = options.label.partition(":")
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    return {"save": bench_save, "load": bench_load, "async": bench_async, "reshard": bench_reshard}[part](name, options)


def bench_save(name: str, options: argparse.Namespace) -> dict[str, float]:
    from checkpoint_contenders import SAVES

    is_flat, save = SAVES[name]
    toy, out = fresh(options.dir / "toy"), fresh(options.dir / name)
    save(state_of(TOY_PARAMETERS, is_flat).fill(), toy)
    state = state_of(options.params, is_flat).fill()
    settle()
    figures = timed(lambda: save(state, out))
    begin = time.perf_counter()
    os.sync()
    figures["left_s"] = time.perf_counter() - begin
    return figures | {"num_bytes": total(state.num_bytes)}


def bench_load(name: str, options: argparse.Namespace) -> dict[str, float]:
    from checkpoint_contenders import LOADS, SAVES

    is_flat, source, load = LOADS[name]
    toy, folder = fresh(options.dir / "toy"), options.dir / source
    saved_is_flat, save = SAVES[source]
    save(state_of(TOY_PARAMETERS, saved_is_flat).fill(), toy)
    barrier()
    load(state_of(TOY_PARAMETERS, is_flat), toy)
    state = state_of(options.params, is_flat)
    figures: dict[str, float] = {"num_bytes": total(state.num_bytes)}
    for how, prepare in (("cold", drop_from_page_cache), ("warm", read_through)):
        state.clear()
        settle()
        prepare(folder)
        found = timed(lambda: load(state, folder))
        figures |= {f"{how}_s": found["seconds_s"], f"{how}_cpu_s": found["cpu_s"], f"{how}_peak": found["peak_bytes"]}
        state.check()
    return figures


def bench_async(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the saves behind the first; the peak is of the first one, which takes the memory."""
    import torch
    from checkpoint_contenders import ASYNC

    is_flat, start = ASYNC[name]
    save, toy = start(), fresh(options.dir / "toy")
    start()(state_of(TOY_PARAMETERS, is_flat).fill(), toy).result()
    state = state_of(options.params, is_flat).fill()
    target = torch.zeros(state.num_bytes // 4)
    target.fill_(1)
    step = Steps()
    peak, saves = 0.0, []
    for _ in range(ASYNC_SAVES):
        out = fresh(options.dir / "async")
        settle()
        copy_s = statistics.median(_seconds(lambda: state.copy_to(target)) for _ in range(3))
        step_s = step.seconds_each(options.baseline)
        barrier()
        before = reset_peak()
        begin = time.perf_counter()
        pending = save(state, out)
        stall_s = time.perf_counter() - begin
        done, background_s = step.until(pending)
        pending.result()
        peak = peak or highest(resident("VmHWM") - before)
        lost_s = max(background_s - done * step_s, 0.0)
        saves.append({"copy_s": copy_s, "stall_s": stall_s, "lost_s": lost_s, "behind_s": background_s})
        saves[-1] |= {"share_of_speed": done * step_s / background_s, "stall_of_copy": stall_s / copy_s}
        barrier()
        del pending
        gc.collect()
    found = {key: highest(statistics.median(each[key] for each in saves[1:])) for key in saves[0]}
    first = {"first_stall_s": saves[0]["stall_s"]}
    return found | first | {"peak_bytes": peak, "num_bytes": total(state.num_bytes)}


class Steps:
    """A stand-in for training: matrix products and a pass over memory, on all threads."""

    def __init__(self) -> None:
        import torch

        self._x, self._w = torch.randn(256, 1024), torch.randn(1024, 1024) / 32
        self._moments = torch.zeros(1 << 22)

    def __call__(self) -> None:
        import torch

        x = self._x
        for _ in range(8):
            x = torch.tanh(x @ self._w)
        self._moments.mul_(0.9).add_(x.sum())

    def seconds_each(self, seconds: float) -> float:
        self()
        begin, count = time.perf_counter(), 0
        while (took := time.perf_counter() - begin) < seconds or not count:
            self()
            count += 1
        return took / count

    def until(self, pending: Future[Any]) -> tuple[int, float]:
        """Steps, and seconds, until `pending` is done."""
        begin, count = time.perf_counter(), 0
        while not pending.done():
            self()
            count += 1
        return count, time.perf_counter() - begin


def bench_reshard(name: str, options: argparse.Namespace) -> dict[str, float]:
    from checkpoint_contenders import RESHARDS, SAVES

    source, toy, out = options.dir / "ours", fresh(options.dir / "toy"), fresh(options.dir / "resharded")
    is_flat, save = SAVES["ours"]
    save(state_of(TOY_PARAMETERS, is_flat).fill(), toy)
    RESHARDS[name](toy, out / "toy")
    settle()
    read_through(source)
    figures = timed(lambda: RESHARDS[name](source, out / "new"))
    return figures | {"num_bytes": total(state_of(options.params, True).num_bytes)}


def state_of(num_parameters: int, is_flat: bool) -> Any:
    from checkpoint_state import State, shapes_for

    return State(shapes_for(num_parameters), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), is_flat)


def timed(act: Callable[[], None]) -> dict[str, float]:
    """Seconds until all ranks are done, processor seconds of all, and the highest extra memory of one."""
    barrier()
    before, begin, cpu = reset_peak(), time.perf_counter(), time.process_time()
    act()
    cpu = time.process_time() - cpu
    barrier()
    seconds = time.perf_counter() - begin
    return {"seconds_s": seconds, "cpu_s": total(cpu), "peak_bytes": highest(resident("VmHWM") - before)}


def settle() -> None:
    """Nothing left to write or to collect."""
    gc.collect()
    os.sync()
    barrier()


def fresh(folder: Path) -> Path:
    """An empty folder, for all ranks."""
    if int(os.environ["RANK"]) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    barrier()
    return folder


@contextmanager
def _opened(folder: Path) -> Iterator[list[int]]:
    """The files below it, on rank 0."""
    paths = [path for path in folder.rglob("*") if path.is_file()] if int(os.environ["RANK"]) == 0 else []
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def drop_from_page_cache(folder: Path) -> None:
    with _opened(folder) as descriptors:
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(folder: Path) -> None:
    memory = bytearray(8 << 20)
    with _opened(folder) as descriptors:
        for descriptor in descriptors:
            while os.readv(descriptor, [memory]):
                pass


def reset_peak() -> int:
    """Bytes resident now; VmHWM begins here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def highest(mine: float) -> float:
    return max(_of_all(mine))


def total(mine: float) -> float:
    return sum(_of_all(mine))


def _of_all(mine: float) -> list[float]:
    import torch.distributed as dist

    if not dist.is_initialized():
        return [mine]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


def _seconds(act: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    act()
    return time.perf_counter() - begin
