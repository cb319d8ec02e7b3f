"""Plain functions run on gloo ranks that are started once and used by many tests.

    def all_ranks_agree(value: int) -> int:             # at module level: ranks import it by name
        start(...)                                      # sets up torch.distributed from RANK, WORLD_SIZE, MASTER_*
        ...
        return result                                   # pickled back

    def test_it(pool: PoolFactory) -> None:
        assert pool(4).run(all_ranks_agree, 7) == [7, 7, 7, 7]

A rank is a fresh interpreter (never a fork) that imports torch, DeepSpeed and Megatron once, in seconds. What the
harness promises to a function: torch.distributed is not initialised when it begins, and whatever it leaves behind
(process groups, Megatron's and DeepSpeed's globals, environment variables, default dtype) is gone when the next one
begins. Each call has a store of its own, held by the parent as torchrun's agent holds it, so no port is ever raced for.

When a rank raises, `RankError` carries the tracebacks of all ranks. When one hangs, the ranks are asked for
their stacks and killed. In both cases the next call starts fresh ranks. Ranks die with the process that started them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = ("torch", "deepspeed", "megatron.core")
START_TIMEOUT_S = 180.0
GRACE_S = 3.0
"""How long the other ranks may take to say something once one has raised; then they are taken to hang on it."""
STACKS_SIGNAL = signal.SIGQUIT
_LOG_TAIL = 4000


class RankError(AssertionError):
    """A rank raised, died or hung; the message has each rank's traceback and what it wrote last."""


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` in the block: what monkeypatch is for a function that runs on a rank."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class RankPool:
    """`world` processes that run functions as ranks 0 to world - 1. Started by the first `run`."""

    def __init__(self, world: int, *, imports: Sequence[str] = IMPORTS) -> None:
        self.world = world
        self._imports = tuple(imports)
        self._ranks: list[_Rank] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` on every rank and returns the results in the order of ranks.

        Raises RankError where a rank raised, died, or had not returned after `timeout_s` seconds, and ValueError for
        a function that another process cannot import by name.
        """
        import torch.distributed as dist

        request = _encode(function, args, kwargs)
        if not self._ranks:
            self._start()
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for rank in self._ranks:
                rank.send((store.port, request))
            results = self._gather(timeout_s)
            for rank in self._ranks:  # all have returned: none can be waiting for another, so groups may go
                rank.send("clean")
            self._gather(timeout_s)
        except BaseException:
            self.close()
            raise
        return results

    def pids(self) -> list[int]:
        """Process ids of the ranks; empty before the first `run` and after a failure."""
        return [rank.process.pid for rank in self._ranks]

    def close(self) -> None:
        """Kills the ranks and what they started. The next `run` starts new ones."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.kill()

    def _start(self) -> None:
        self._ranks = [_Rank(rank, self.world, self._imports) for rank in range(self.world)]
        try:
            self._gather(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _gather(self, timeout_s: float) -> list[Any]:
        """One answer from each rank. Raises RankError as soon as it is clear that they will not all be good."""
        deadline = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {rank.connection: rank for rank in self._ranks}
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                kind, value = rank.receive()
                if kind == "ok":
                    answers[rank.index] = value
                else:
                    failures[rank.index] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if failures or waiting:
            raise RankError(self._report(answers, failures, list(waiting.values()), timeout_s))
        return [answers[index] for index in range(self.world)]

    def _report(self, done: dict[int, Any], failed: dict[int, str], hung: list[_Rank], timeout_s: float) -> str:
        for rank in hung:
            rank.process.send_signal(STACKS_SIGNAL)
        if hung:
            time.sleep(0.5)
        why = f"{len(failed)} of {self.world} ranks failed" if failed else f"no answer after {timeout_s:g} s"
        lines = [f"{why} (returned: {sorted(done)}, failed: {sorted(failed)}, hung: {[r.index for r in hung]})"]
        for rank in self._ranks:
            if rank.index in failed:
                lines += [f"---- rank {rank.index} failed", failed[rank.index].rstrip()]
            elif rank in hung:
                lines += [f"---- rank {rank.index} hung; its stacks are at the end of its output"]
            if rank.index in failed or rank in hung:
                lines += [f"---- rank {rank.index} wrote", rank.output()[-_LOG_TAIL:].rstrip() or "(nothing)"]
        return "\n".join(lines)


PoolFactory = Callable[[int], RankPool]
"""The `pool` fixture: `pool(world).run(function, ...)`."""


class _Rank:
    """The parent's end of one rank."""

    def __init__(self, index: int, world: int, imports: Sequence[str]) -> None:
        self.index = index
        self.connection, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        paths = [str(ROOT), *(path for path in sys.path if path)]  # as pytest has it: tests are imported by its names
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.harness", str(theirs.fileno()), str(os.getpid()), *imports],
            cwd=ROOT,
            env=_environment(index, world) | {"PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that kill() takes what the rank started with it
        )
        theirs.close()

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has died; receive() says so
            self.connection.send_bytes(pickle.dumps(message))

    def receive(self) -> tuple[str, Any]:
        """("ok", value) or ("error", what went wrong)."""
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return "error", f"the process ended with status {self.process.wait()}"

    def output(self) -> str:
        self._log.flush()
        with open(f"/proc/self/fd/{self._log.fileno()}", "rb") as log:
            return log.read().decode(errors="replace")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()
        self._log.close()


def _environment(rank: int, world: int) -> dict[str, str]:
    """What torchrun would set, on the CPU, with one thread a rank."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if any(name == "lo" for _, name in socket.if_nameindex()) else {}
    return (
        os.environ
        | {name: str(value) for name, value in places.items()}
        | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        | {"PYTHONUNBUFFERED": "1"}
        | loopback
    )


def _encode(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    name = getattr(function, "__qualname__", repr(function))
    if "<" in name or "." in name or getattr(sys.modules.get(function.__module__), name, None) is not function:
        raise ValueError(f"ranks cannot import {name}: give a function at module level")
    return pickle.dumps((function.__module__, name, args, kwargs))


# Below: what runs in a rank.


def _serve(connection: Connection, imports: Sequence[str]) -> None:
    for name in imports:
        importlib.import_module(name)
    gc.freeze()  # half a million objects that no collection need look at again: 0.5 s a call
    connection.send_bytes(pickle.dumps(("ok", None)))
    while True:
        try:
            port, request = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        before = dict(os.environ)
        os.environ["MASTER_PORT"] = str(port)
        try:
            module, name, args, kwargs = pickle.loads(request)
            _reset()
            answer = pickle.dumps(("ok", getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:
            connection.send_bytes(pickle.dumps(("error", traceback.format_exc())))
            signal.pause()  # the parent kills this rank; ending here would break the others' connections first
        connection.send_bytes(answer)
        del answer
        if pickle.loads(connection.recv_bytes()) != "clean":
            raise RuntimeError("the parent and this rank are out of step")
        try:
            _clean()
            os.environ.clear()
            os.environ.update(before)
            connection.send_bytes(pickle.dumps(("ok", None)))
        except BaseException:
            connection.send_bytes(pickle.dumps(("error", traceback.format_exc())))


def _reset() -> None:
    """What a function may rely on, and would otherwise inherit from the last."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)


def _clean() -> None:
    """Drops process groups, and the globals of Megatron and DeepSpeed that hold them."""
    import torch.distributed as dist

    _clean_deepspeed_engines()
    if "megatron.core" in sys.modules:
        _clean_megatron()
    deepspeed_comm = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None and deepspeed_comm.cdb is not None:
        if dist.is_initialized():
            deepspeed_comm.destroy_process_group()  # also forgets the groups in deepspeed.utils.groups
        deepspeed_comm.cdb = None  # type: ignore[attr-defined]
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._release_process_group_references()
        groups.mpu = None  # type: ignore[attr-defined]
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _clean_deepspeed_engines() -> None:
    """Unties ZeRO-3's models from what keeps them alive for ever: hooks on autograd's nodes, a list and a cache. Left
    alone, each keeps its process groups, and their threads poll for the rest of the session."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    engine_class = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
    if offload is None or engine_class is None:
        return
    for found in gc.get_objects():
        if type(found) is engine_class:
            found.destroy()
    coordinator = sys.modules["deepspeed.runtime.zero.partitioned_param_coordinator"].PartitionedParameterCoordinator
    coordinator._PartitionedParameterCoordinator__params_to_release.__closure__[0].cell_contents.cache_clear()
    offload.FWD_MODULE_STACK.clear()
    # modules and parameters are numbered through a process's life, and the ranks of a group compare the numbers
    offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    sys.modules["deepspeed.runtime.zero.partition_parameters"].Init.param_id = 0


def _clean_megatron() -> None:
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    megatron_random._CUDA_RNG_STATE_TRACKER = None
    megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def _die_with(parent: int) -> None:
    """Linux kills this process when the one that started it ends, however it ends."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    _die_with(int(sys.argv[2]))
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    _serve(Connection(int(sys.argv[1])), sys.argv[3:])
