"""metrics.jsonl: exact numbers, valid JSON, no step twice."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.telemetry.metrics import MetricsFile, encode, read_metrics


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_their_bits(value: float) -> None:
    assert struct.pack("<d", json.loads(encode({"loss": value}))["loss"]) == struct.pack("<d", value)


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.append({"kind": "train", "step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "mfu": None})
    file.append({"kind": "event", "name": "inf", "deep": [{"x": math.nan}]})
    file.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    train, event = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(train["loss"])
    assert (train["grad_norm"], train["lr"], train["mfu"]) == (math.inf, -math.inf, None)
    assert event == {"kind": "event", "name": "inf", "deep": [{"x": "nan"}]}


def test_each_record_is_in_the_file_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for step in (1, 2):
        file.append({"kind": "train", "step": step})
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == step
    file.close()
    file.close()


def test_resume_removes_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b"".join(
        [
            b'{"kind": "train", "step": 1, "loss": 0.1}\n',
            b'{"kind": "event", "name": "no step"}\n',
            b'{"kind": "train", "step": 2, "loss": 0.30000000000000004}\n',
            b'{"kind": "eval", "step": 2, "loss": 0.3}\n',
        ]
    )
    later = b'{"kind": "event", "name": "save", "step": 3}\n{"kind": "train", "step": 3, "loss": 0.2}\n'
    path.write_bytes(kept + later + b'{"kind": "train", "step": 4, "lo')
    file = MetricsFile(path, resume_step=2)
    assert path.read_bytes() == kept
    assert (file.num_removed, file.num_unreadable) == (2, 1)
    file.append({"kind": "train", "step": 3})
    file.close()
    assert [record["step"] for record in read_metrics(path) if record["kind"] == "train"] == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_last_line_without_newline_is_a_cut_line(tmp_path: Path) -> None:
    """A crash can cut a line anywhere, also where what is left happens to parse: 12 of 123."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}')
    MetricsFile(path, resume_step=2).close()
    assert path.read_bytes() == b'{"kind": "train", "step": 1}\n'


def test_starting_afresh_keeps_only_what_names_no_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "eval", "step": 0}\n{"kind": "event", "name": "x"}\n{"kind": "train", "step": 1}\n')
    MetricsFile(path, resume_step=0).close()
    assert path.read_bytes() == b'{"kind": "event", "name": "x"}\n'


def test_nothing_is_rewritten_where_nothing_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n')
    inode = path.stat().st_ino
    MetricsFile(path, resume_step=1).close()
    assert path.stat().st_ino == inode
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"\0" * 50, b"[1]", b"\xff{}", b'{"kind": "train", "step": "3"}', b"{'a': 1}"])
def test_an_unreadable_line_is_left_out_and_removed_on_resume(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n' + line + b'\n{"kind": "train", "step": 2}\n')
    with pytest.warns(UserWarning, match="line 2"):
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
    file = MetricsFile(path, resume_step=9)
    file.close()
    assert (file.num_removed, file.num_unreadable) == (0, 1)
    assert path.read_bytes() == b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n'


def test_reading_while_a_line_is_being_written(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tra')
    assert len(read_metrics(path)) == 1
    assert not recwarn.list
