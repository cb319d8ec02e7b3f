"""tools/bench/checkpoint.py at toy size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/bench, which is a folder of scripts, as they import each other."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / "checkpoint.py"), *arguments], capture_output=True, text=True)


@pytest.mark.filterwarnings("ignore")
def test_every_load_brings_back_what_was_saved(bench: Any, tmp_path: Path) -> None:
    contenders, state = bench("checkpoint_contenders"), bench("checkpoint_state")
    shapes = state.shapes_for(1)
    for name, (is_flat, save) in contenders.SAVES.items():
        (tmp_path / name).mkdir()
        save(state.State(shapes, 0, 1, is_flat).fill(), tmp_path / name)
    for name, (is_flat, source, load) in contenders.LOADS.items():
        found = state.State(shapes, 0, 1, is_flat)
        with pytest.raises(ValueError, match="was not loaded"):
            found.check()
        load(found, tmp_path / source)
        found.check()
        assert source in contenders.SAVES, name


@pytest.mark.filterwarnings("ignore")
def test_what_is_saved_behind_the_training_is_there(bench: Any, tmp_path: Path) -> None:
    contenders, state = bench("checkpoint_contenders"), bench("checkpoint_state")
    shapes = state.shapes_for(1)
    for name, (is_flat, start) in contenders.ASYNC.items():
        (tmp_path / name).mkdir()
        running = state.State(shapes, 0, 1, is_flat).fill()
        pending = start()(running, tmp_path / name)
        running.clear()  # training goes on
        pending.result()
        found = state.State(shapes, 0, 1, is_flat)
        (contenders.load_ours if name == "ours" else contenders.load_dcp)(found, tmp_path / name)
        found.check()


@pytest.mark.filterwarnings("ignore")
def test_what_is_resharded_is_what_was_saved(bench: Any, tmp_path: Path) -> None:
    contenders, state = bench("checkpoint_contenders"), bench("checkpoint_state")
    shapes = state.shapes_for(1)
    for folder in ("ours", "new"):
        (tmp_path / folder).mkdir()
    contenders.save_ours(state.State(shapes, 0, 1, True).fill(), tmp_path / "ours")
    for name, reshard in contenders.RESHARDS.items():
        reshard(tmp_path / "ours", tmp_path / "new" / name)
        found = state.State(shapes, 0, 1, True)
        contenders.load_ours(found, tmp_path / "new" / name)
        found.check()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ranks_hold_every_element_once(bench: Any, world: int) -> None:
    state = bench("checkpoint_state")
    shapes = state.shapes_for(1)
    whole = state.State(shapes, 0, 1, True).num_bytes
    for is_flat in (True, False):
        assert sum(state.State(shapes, rank, world, is_flat).num_bytes for rank in range(world)) == whole


def test_the_model_is_the_one_that_it_says(bench: Any) -> None:
    import math

    count = sum(map(math.prod, bench("checkpoint_state").shapes_for(205_000_000).values()))
    assert count == pytest.approx(205e6, rel=0.01)


def test_the_names_are_those_of_the_contenders(bench: Any) -> None:
    main, contenders = bench("checkpoint"), bench("checkpoint_contenders")
    assert {part: list(names) for part, names in main.PARTS.items()} == {
        part: list(names) for part, names in contenders.PARTS.items()
    }
    for name, (_, source, _) in contenders.LOADS.items():
        assert main.SOURCES.get(name, name) == source


def test_an_unknown_contender_or_too_small_a_disk_is_refused() -> None:
    unknown = run("--only", "save:nothing")
    assert unknown.returncode == 2
    assert "error: --only save:nothing: choose of save, load, async, reshard, save:raw" in unknown.stderr
    full = run("--params", "1e15", "--dir", "/tmp")
    assert full.returncode == 2
    assert "the bench needs" in full.stderr and "Traceback" not in full.stderr


def test_the_table_says_what_is_wanted(bench: Any) -> None:
    save = {"seconds_s": 2.0, "cpu_s": 1.0, "left_s": 0.0, "peak_bytes": 3e6, "num_bytes": 4e9}
    lines = {"raw": [save, save], "ours": [save | {"seconds_s": 1.0}, save | {"seconds_s": 4.0}]}
    found = {"load_before": 0.1, "load_after": 0.2, "figures": {"1": {"save": lines}}}
    text = bench("checkpoint_tables").tables(found)
    assert "ours of a raw fsynced write: 1.25 (0.50 to 2.00); wanted: at least 0.8" in text


@pytest.mark.slow
def test_it_runs_on_two_ranks(tmp_path: Path) -> None:
    only = "save:ours,load:dcp-of-ours,async:ours"
    arguments = ["--params", "1", "--ranks", "2", "--rounds", "1", "--baseline", "0.1", "--only", only]
    ended = run(*arguments, "--dir", str(tmp_path), "--json", str(tmp_path / "figures.json"))
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]["2"]
    assert {part: list(lines) for part, lines in figures.items()} == {
        "save": ["ours"],
        "load": ["dcp-of-ours"],
        "async": ["ours"],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "what it wrote is removed"
    assert "async, 2 ranks" in ended.stdout
