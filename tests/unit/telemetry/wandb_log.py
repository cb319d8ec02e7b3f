"""Reads a .wandb file: a header of 7 bytes, then LevelDB's log format with protobuf records.

W&B's own reader is in its Go program. The format: https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import importlib
import struct
import time
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 32768
_FULL, _FIRST, _LAST = 1, 2, 4


def read_wandb(path: Path) -> list[Any]:
    """The records of the file, as wandb's Record messages."""
    proto: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data = path.read_bytes()
    assert data[:4] in (b"", b":W&B")
    at, payload, records = 7, b"", []
    while at + 7 <= len(data):
        left_in_block = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length:
            break
        at += 7 + length
        payload = piece if kind in (_FULL, _FIRST) else payload + piece
        if kind in (_FULL, _LAST):
            records.append(proto.Record.FromString(payload))
    return records


def read_finished(path: Path, timeout_s: float = 30.0) -> list[Any]:
    """The records, once the last is there: W&B's service may write them a moment after `finish` has returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        records = read_wandb(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{path} has no exit record after {timeout_s:.0f} s"
        time.sleep(0.05)


def history(records: list[Any]) -> list[dict[str, str]]:
    """The logged rows: field names to JSON, without W&B's own fields."""
    rows: list[dict[str, str]] = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


def logged_config(records: list[Any]) -> str:
    """All config values that were logged, as JSON."""
    updates: list[str] = []
    for record in records:
        if record.WhichOneof("record_type") == "run":
            updates += [f"{item.key}: {item.value_json}" for item in record.run.config.update]
    return "\n".join(updates)
