"""What is left of a rank that failed, in files: they are read when nobody answers any more.

    RUN/logs/ranks/rank-N.json     where rank N runs: host, process
    RUN/logs/crash/rank-N.json     the exception that ended it
    RUN/logs/hang/rank-N.json      where it was when the watchdog looked (rank-N.txt: the same for people)
    RUN/logs/hang/verdict.json     who hung, and who waited for it
    RUN/logs/ends/                 how the process of each rank ended, where Slurm started it (rank-N.START.json)

Ranks write and launchers read. An earlier start of the run leaves files too; each says of which start it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bigtrain.telemetry.metrics import METRICS_FILE, encode

SPOKEN_FOR = "BIGTRAIN_LAUNCHER_SPEAKS"
"""Variable that a launcher sets which says itself, as its last line, why the run failed, and writes the crash event."""
_OF_A_START = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)
_OF_A_LOST_PEER = re.compile(
    "connection (was )?(closed|reset|refused)|broken pipe|closed by (remote )?peer|remote process exited|"
    "socket timeout|communicator was aborted|failed to recv|failed to send|"
    "connection timed out|no route to host|timed out waiting|application timeout caused pair closure|"
    "unhandled system error|waiting for clients|collective operation timeout|timed out in blocking wait|nccl timeout|"
    "wait timeout after|timeout waiting for key",
    re.IGNORECASE,
)
"""Not "client socket has timed out": that one never had a peer, and names the address where it looked for one."""


def start_of(environment: Mapping[str, str] = os.environ) -> str:
    """A name for this start of all ranks: the same on each and in what started them, and another after a restart.

    Not so where another launcher gives all starts one address and port (`starts_have_names`)."""
    values = "\n".join(f"{name}={environment.get(name, '')}" for name in _OF_A_START)
    return hashlib.sha256(values.encode()).hexdigest()[:12]


def starts_have_names(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `start_of` is another one for every start: our own launchers see to that, by a port of its own. A
    PyTorchJob of Kubernetes gives all starts one address, port and id, and a person may start torchrun twice, also
    inside of one Slurm job: who reads there goes by the time as well."""
    return bool(environment.get(SPOKEN_FOR))


def place_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / "ranks" / f"rank-{rank}.json"


def crash_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / "crash" / f"rank-{rank}.json"


def hang_file(run_dir: Path, name: str) -> Path:
    return run_dir / "logs" / "hang" / name


def end_file(run_dir: Path, rank: int, start: str) -> Path:
    return run_dir / "logs" / "ends" / f"rank-{rank}.{start}.json"


def ends(run_dir: Path, start: str, world: int) -> list[dict[str, Any]]:
    """How the ranks have ended, of which it is known."""
    found = (read_json(end_file(run_dir, rank, start), start) for rank in range(world))
    return [record for record in found if record is not None]


def ends_seen(run_dir: Path, start: str) -> list[Path]:
    """The files of those: one look at the folder, however many ranks there are. To list it is to open it, so NFS too
    shows what other machines have written."""
    return list((run_dir / "logs" / "ends").glob(f"rank-*.{start}.json"))


def write_end(run_dir: Path, rank: int, start: str, fields: Mapping[str, Any]) -> None:
    """Keep how the process of a rank ended. A disk that takes nothing must not hide the end itself."""
    with contextlib.suppress(OSError):
        write_json(end_file(run_dir, rank, start), {"start": start, "rank": rank, "time": time.time(), **fields})


def forget_ends(run_dir: Path, rank: int) -> None:
    """Remove what earlier starts of this rank have left there."""
    for path in (run_dir / "logs" / "ends").glob(f"rank-{rank}.*.json"):
        path.unlink(missing_ok=True)


def stamp(run_dir: Path) -> tuple[int, int]:
    """Size and time of metrics.jsonl: another one when something was written."""
    try:
        found = (run_dir / METRICS_FILE).stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_json(path: Path, start: str) -> dict[str, Any] | None:
    """What was written there in this start, on any machine; None where nothing was.

    NFS keeps it for up to a minute that a name is not there, whoever has written it meanwhile. Opening the folder makes
    it ask again."""
    try:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            os.close(os.open(path.parent, os.O_RDONLY))
            text = path.read_text(encoding="utf-8")
        found: Any = json.loads(text)
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) and found.get("start") == start else None


def write_crash(run_dir: Path, rank: int, error: BaseException, text: str, *, step: int) -> dict[str, Any]:
    """Keep the exception that ends this rank. `text`: its traceback; `step`: what the rank was in."""
    record: dict[str, Any] = {
        "start": start_of(),
        "rank": rank,
        "time": time.time(),
        "step": step,
        "error": type(error).__name__,
        "message": first_line(error),
        "lost_peer": blames_a_peer(error),
        "traceback": text,
    }
    write_json(crash_file(run_dir, rank), record)
    return record


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:2000]


def named(crash: Mapping[str, Any]) -> str:
    """rank 1: ValueError: the message"""
    message = f": {crash['message']}" if crash["message"] else ""
    return f"rank {crash['rank']}: {crash['error']}{message}"


def blames_a_peer(error: BaseException) -> bool:
    """Whether it only says that another rank is gone (gloo, NCCL): then the cause is to be found there."""
    module = type(error).__module__.partition(".")[0]
    is_of_torch = isinstance(error, RuntimeError) and (type(error) is RuntimeError or module == "torch")
    return is_of_torch and _OF_A_LOST_PEER.search(str(error)) is not None


def append_event(run_dir: Path, name: str, **fields: Any) -> None:
    """An event line in metrics.jsonl from outside of its recorder, which is dead or stuck. A line that it was cut off
    in stays as it is, by itself."""
    record = {"kind": "event", "name": name, **fields}
    file = os.open(run_dir / METRICS_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        is_cut = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, (b"\n" if is_cut else b"") + encode(record))
    finally:
        os.close(file)
