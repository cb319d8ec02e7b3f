"""inspect says what is in a checkpoint, as far as it can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import describe
from bigtrain.checkpoint import folder as folders
from tests.unit.checkpoints import flip, main, save, tensors


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(tmp_path / "run" / "checkpoints", {"weight.a": torch.ones(2, 3)}, step=100, loss=None)
    save(tmp_path / "run" / "checkpoints", tensors(), step=300)
    return tmp_path / "run"


def test_what_a_person_sees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run, run / "checkpoints" / "latest", run / "checkpoints" / "step-00000300"):
        assert main(["inspect", str(path)]) == 0
        lines = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
        parameters = sum(tensor.numel() for tensor in tensors().values()) // 3
        assert lines["step"].endswith(" 300")
        assert lines["parameters"].endswith(f" {parameters:,}")
        assert lines["held-out loss"].endswith(" 4.2500 nats a token")
        assert "4,800 sequences consumed of 256 tokens, 1,228,800 in all" in lines["data"]
        assert "2 layers, width 64, 8 heads (4 key/value)" in lines["model"] and "trained in bf16" in lines["model"]
        assert f"15 tensors, {parameters * 4 / 1000:.0f} kB, float32" in lines["weights"]
        assert "exp_avg" in lines and "exp_avg_sq" in lines
        assert "in 6 files, tensors written by rank 0" in lines["on disk"]
        assert "bigtrain 0.1.0, torch 2.13.0" in lines["written by"]
        assert not lines["committed"].endswith("COMMITTED")
        assert ("step-00000100" in lines) == (path == run)


def test_what_a_program_sees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    newest = run / "checkpoints" / "step-00000300"
    assert found["folder"] == str(newest) and found["committed"] and found["step"] == 300
    assert found["num_sequences"] == 4800 and found["loss"] == 4.25 and not found["weights_only"]
    assert found["files"] == {path.name: path.stat().st_size for path in newest.iterdir()}
    assert found["kinds"]["exp_avg"]["num_tensors"] == 15
    assert set(found["tensors"]) == set(tensors())
    assert [each["step"] for each in found["checkpoints"]] == [100, 300]
    assert found["problems"] == [] and found["ranks"] == [0]


def test_the_tensors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--tensors"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    known = json.loads((run / "checkpoints" / "step-00000300" / "manifest.json").read_bytes())["tensors"]
    for name, tensor in tensors().items():
        row = next(row for row in rows if row[:1] == [name])
        assert row[1:] == [*" x ".join(map(str, tensor.shape)).split(), "float32", known[name]["hash"], "1"]


def test_all_that_lies_in_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    for step in (310, 320):
        save(root, {"weight.a": torch.ones(2, 3)}, step=step)
    (root / "step-00000310" / folders.COMMITTED).unlink()
    folders.set_aside(root / "step-00000320")
    folders.partial_of(root, 330).mkdir()
    assert main(["inspect", str(run)]) == 0
    said = capsys.readouterr().out
    notes = {line.split()[0]: line for line in said.splitlines() if "step-" in line.split(" ")[0]}
    assert list(notes) == [
        "step-00000100",
        "step-00000300",
        "step-00000310",
        "damaged-step-00000320",
        ".step-00000330.partial",
    ]
    endings = ("kB", "latest", "not committed", "damaged", "left by a kill")
    assert [line.endswith(end) for line, end in zip(notes.values(), endings, strict=True)] == [True] * 5, said
    assert "4.2500" in notes["step-00000300"] and "4.2500" not in notes["step-00000100"]


def test_one_that_was_never_committed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step-00000300"
    (newest / folders.COMMITTED).unlink()
    assert main(["inspect", str(newest)]) == 0
    assert "no: there is no COMMITTED" in capsys.readouterr().out
    assert main(["inspect", str(run)]) == 0
    assert "step           100" in capsys.readouterr().out
    assert main(["diff", str(newest), str(run)]) == 2
    assert "it was never committed (no COMMITTED in it); use an older one" in capsys.readouterr().err


def test_a_damaged_one_shows_what_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step-00000300"
    state = (newest / "state.json").read_bytes()
    (newest / "state.json").write_bytes(b"[" + state[1:])
    assert main(["inspect", str(newest)]) == 1
    said = capsys.readouterr()
    assert "parameters" in said.out and said.err.startswith("problem: ") and "state.json cannot be read" in said.err
    flip(newest / "manifest.json", 100)
    assert main(["inspect", str(newest)]) == 1
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "tokenizer.model"])
def test_a_file_that_is_missing_or_cut_off(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step-00000300"
    file = newest / name
    whole = file.stat().st_size
    for found, damage in (
        (f"it has {whole - 3:,} bytes", lambda: os.truncate(file, whole - 3)),
        ("the file is missing", file.unlink),
    ):
        damage()
        assert main(["inspect", str(run)]) == 1
        said = capsys.readouterr()
        assert said.err == f"problem: checkpoint {newest}: {name}: {found}, manifest.json says {whole:,} bytes\n"
        assert "parameters" in said.out
        assert main(["inspect", str(run), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["problems"] == [said.err.removeprefix("problem: ").rstrip()]


def test_one_of_weights_that_were_imported(tmp_path: Path) -> None:
    made = save(
        tmp_path, {"weight.a": torch.ones(3)}, step=0, weights_only=True, imported={"from": "huggingface"}, cursor=None
    )
    lines = describe.lines(describe.describe(made))
    assert "step           0, imported from huggingface, weights only" in lines
    assert not any(line.startswith("data") for line in lines)


@pytest.mark.parametrize("path", ["nowhere", "step-00000001", "file"])
def test_what_is_no_checkpoint(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["inspect", str(tmp_path / path)]) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and said.err.startswith(f"error: checkpoint {tmp_path / path}: ") and said.err.count("\n") == 1
    )


def test_sizes() -> None:
    assert [describe.size(n) for n in (0, 999, 1000, 12_345_678, 2.4e9, 1.5e12)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "12.3 MB",
        "2.4 GB",
        "1,500 GB",
    ]


@pytest.mark.parametrize("command", [["inspect"], ["diff", "RUN"]])
def test_it_answers_without_torch(run: Path, command: list[str]) -> None:
    arguments = [str(run) if each == "RUN" else each for each in command]
    program = f"""
import runpy, sys
sys.argv = ["checkpoint.py", *{arguments}, {str(run)!r}]
try:
    runpy.run_path("tools/checkpoint.py", run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.stdout.endswith("0 False\n"), done.stdout + done.stderr
