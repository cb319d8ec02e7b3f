"""tools/layouts.py from end to end: exit status, files, and that a fault is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import PoolFactory, RankError, RankPool
from tools import layouts
from tools.certificate import oracle
from tools.certificate.compare import Trajectory

Tool = Callable[..., tuple[int, dict[str, Any], str, str]]
LOSES = "decoder.layers.3.mlp.linear_fc2.weight"


@pytest.fixture
def tool(pool: PoolFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Runs two steps; gives the exit status, the JSON, stdout and stderr."""

    def of(names: str, *others: str, pool: PoolFactory = pool) -> tuple[int, dict[str, Any], str, str]:
        files = [tmp_path / "new" / name for name in ("layouts.json", "layouts.html")]
        places = ["--json", str(files[0]), "--page", str(files[1])]
        status = layouts.main(["--layouts", names, "--steps", "2", *places, *others], pool)
        written = capsys.readouterr()
        assert files[1].read_text().startswith("<!doctype html>")
        return status, json.loads(files[0].read_text()), written.out, written.err

    return of


def test_layouts_that_agree(tool: Tool, pool: PoolFactory) -> None:
    status, record, out, err = tool("z3-d2,z1-p1v2,z1-t2s")
    assert status == 0, out + err
    assert record["holds"] and record["complete"] and record["documents_are_apart"]
    assert [row["verdict"].partition(":")[0] for row in record["layouts"]] == ["ok", "refused", "ok"]
    assert 0 < record["layouts"][0]["gradient"] < 1e-5
    assert record["model"]["num_layers"] == 9
    assert "oracle: Transformers' Llama, 2 steps" in out
    assert "2 of 3 layouts compute the oracle's run; 1 refused before any rank started" in out
    assert pool(2).pids(), "the session's ranks stay open"


def test_a_fault_is_found_and_named(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient of the second step is off by 1e-3 of its norm."""
    expect = oracle.expect

    def off(*arguments: Any) -> Trajectory:
        expected = expect(*arguments)
        first, second = expected.gradients
        return replace(expected, gradients=[first, {**second, LOSES: second[LOSES] * 1.001}])

    monkeypatch.setattr(oracle, "expect", off)
    status, record, out, _ = tool("z2-d2", "--strict")
    assert status == 1
    assert record["layouts"][0]["verdict"].startswith(f"DEVIATES, step 2: gradient of {LOSES} by 1.0e-03")
    assert "1 DEVIATE" in out


def test_an_overflow_is_named(tool: Tool) -> None:
    status, record, *_ = tool("z1,z3", "precision=fp16", "precision.initial_loss_scale=1e10")
    assert status == 1
    assert all("step 1 was skipped (overflow" in row["verdict"] for row in record["layouts"])


def test_ranks_that_fail_leave_their_report(tool: Tool, pool: PoolFactory) -> None:
    class Broken(RankPool):
        def run(self, *_: Any, **__: Any) -> list[Any]:
            raise RankError("2 of 2 ranks failed\nRuntimeError: planted\n---- rank 1 wrote\nits last words")

    status, record, _, err = tool("z1-d2", pool=lambda world: pool(world) if world == 1 else Broken(world))
    assert status == 1
    assert record["layouts"][0]["verdict"] == "FAILED: 2 of 2 ranks failed; RuntimeError: planted"
    assert record["layouts"][0]["report"].endswith("its last words")
    assert err.endswith("its last words\n")


def test_an_interrupted_run_keeps_what_it_certified(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = layouts.run

    def interrupted(layout: Any, *arguments: Any) -> layouts.Row:
        if layout.zero == 2:
            raise KeyboardInterrupt
        return run(layout, *arguments)

    monkeypatch.setattr(layouts, "run", interrupted)
    status, record, out, _ = tool("z1,z2")
    assert status == 130
    assert [row["verdict"] for row in record["layouts"]] == ["ok"]
    assert not record["complete"] and not record["holds"]
    assert "INCOMPLETE, 1 not run: 1 of 1 layouts" in out
