"""tools/drill.py from end to end, with cells that no other test has: faults that meet a real run in a phase of it.

Hangs and crashes in a step are in test_failures.py, signals in test_train.py and slurm/, data that are passed over in
tests/distributed/test_rewind.py. `make drill` runs all cells.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools import drill
from tools.faults import check
from tools.faults.runs import Run, can_mount

pytestmark = pytest.mark.slow
CELLS = {
    "usr2:build": 2,
    "kill-0:rename": 1,
    "kill-launcher:update": 2,
    "exception:save": 1,
    "nan:between": 1,
    "full-disk:rename": 2,
}
"""And how often each is launched."""


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The exit status, and the folder with all runs, drill.json and drill.html."""
    folder = tmp_path_factory.mktemp("drill")
    cells = [cell for cell in CELLS if not cell.startswith("full-disk") or can_mount(folder)]
    files = ["--json", str(folder / "drill.json"), "--page", str(folder / "drill.html")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        return drill.main(["--only", ",".join(cells), "--keep", *files]), folder


@pytest.fixture
def two(drilled: tuple[int, Path], tmp_path: Path) -> tuple[Run, Run]:
    """Two uninterrupted runs; the first is a copy that may be spoiled."""
    (work,) = drilled[1].glob("bigtrain-drill-*")
    shutil.copytree(work / "uninterrupted-1", tmp_path / "copy", symlinks=True)
    return Run(tmp_path / "copy" / "run", tmp_path / "copy"), Run(work / "uninterrupted-2" / "run", work)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_lost(drilled: tuple[int, Path], cell: str) -> None:
    record = json.loads((drilled[1] / "drill.json").read_text())
    found = {each["cell"]: each for each in record["cells"]}
    if cell not in found:
        pytest.skip("no right to mount a tmpfs here")
    assert found[cell]["passes"], found[cell]["problems"]
    assert found[cell]["launches"] == CELLS[cell]


def test_the_tool_says_so(drilled: tuple[int, Path]) -> None:
    status, folder = drilled
    record = json.loads((folder / "drill.json").read_text())
    assert status == 0 and record["passes"], record["outcome"]
    assert record["outcome"].startswith(f"{len(record['cells'])} of {len(record['cells'])} cells pass")
    page = (folder / "drill.html").read_text()
    assert page.startswith("<!doctype html>") and "kill-launcher" in page and "class=bad" not in page


def loses_a_line(run: Run) -> None:
    path = run.run_dir / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"train", "step": 5,' not in line))


def has_a_line_twice(run: Run) -> None:
    path = run.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + next(line for line in path.read_text().splitlines(True) if '"train"' in line))


def has_another_last_bit(run: Run) -> None:
    path = run.run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    (step,) = [each for each in records if (each["kind"], each.get("step")) == ("train", 5)]
    step["grad_norm"] *= 1 + 2**-52
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


def ends_elsewhere(run: Run) -> None:
    shutil.rmtree(run.run_dir / "checkpoints" / "step-00000012")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (loses_a_line, "metrics.jsonl has train records of steps [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12], not"),
        (has_a_line_twice, "metrics.jsonl has the train records of steps [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1]"),
        (has_another_last_bit, "step 5: train grad_norm is "),
        (ends_elsewhere, "tensors at the end are not the reference's"),
    ],
)
def test_a_difference_is_found(two: tuple[Run, Run], spoil: Callable[[Run], Any], words: str) -> None:
    ours, other = two
    assert list(check.differences(ours, other)) == []
    spoil(ours)
    assert any(words in problem for problem in check.differences(ours, other))


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert drill.main(["--only", "kill-1:lunch", "--list"]) == 2
    assert capsys.readouterr().err == "error: --only kill-1:lunch: there is no such cell. --list shows all.\n"
    assert drill.main(["--only", "kill-*:save", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"kill-{who}:save" for who in ("0", "1", "launcher")
    ]
    (tmp_path / "file").touch()
    assert drill.main(["--json", str(tmp_path / "file" / "x"), "--only", "nan:forward"]) == 2
    assert "cannot be written" in capsys.readouterr().err
