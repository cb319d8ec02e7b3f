"""The copy of the package that a job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.launching.code_copy import GIT, PACKAGE, copy_code, link_code, origin, same_code


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """In a git checkout of its own, with one file changed, one new, and things beside that are nobody's business."""
    folder = tmp_path / "checkout" / "pack"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/one.py"):
        (folder / name).write_text(f"WHERE = {name!r}\n", encoding="utf-8")
    git(folder, "init", "-q", "..")
    git(folder, "add", "..")
    git(folder, "-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "-qm", "the first")
    (folder / "inner" / "one.py").write_text("CHANGED = True\n", encoding="utf-8")
    (folder / "new.py").write_text("NEW = True\n", encoding="utf-8")
    (folder / "weights.bin").write_bytes(b"0" * 1000)
    (folder.parent / ".env").write_text("WANDB_API_KEY=s3cr3t", encoding="utf-8")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.py").write_text("", encoding="utf-8")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, text=True).stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_python_files_and_where_they_come_from(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "code"
    copy.parent.mkdir()
    copy_code(copy, package)
    python = {"__init__.py", "new.py", "inner/__init__.py", "inner/one.py"}
    assert files(copy) == {GIT, *(f"pack/{name}" for name in python)}
    assert (copy / "pack" / "inner" / "one.py").read_text() == "CHANGED = True\n"
    told = (copy / GIT).read_text()
    commit = git(package, "rev-parse", "HEAD").strip()
    assert f"commit {commit}" in told and "?? new.py" in told
    assert "+CHANGED = True" in told and "s3cr3t" not in told
    assert [path.name for path in copy.parent.iterdir()] == ["code"]


def test_outside_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("", encoding="utf-8")
    assert "not in a git checkout" in origin(tmp_path / "pack")


def test_a_changed_package_replaces_the_copy_and_an_equal_one_leaves_it(package: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    copy_code(copy, package)
    (copy / "pack" / "__pycache__").mkdir()  # a job's
    inode = copy.stat().st_ino
    copy_code(copy, package)
    assert copy.stat().st_ino == inode and same_code(copy, package)
    (package / "new.py").unlink()
    assert not same_code(copy, package)
    copy_code(copy, package)
    assert not (copy / "pack" / "new.py").exists() and not (copy / "pack" / "__pycache__").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkout", "code"]


def test_a_link_to_the_copy_of_a_sweep_is_replaced_not_followed(package: Path, tmp_path: Path) -> None:
    sweep, run = tmp_path / "sweep", tmp_path / "run" / "code"
    run.parent.mkdir()
    copy_code(sweep, package)
    link_code(run, sweep)
    assert os.readlink(run) == "../sweep"
    before = files(sweep)
    copy_code(run, package)
    assert not run.is_symlink() and files(sweep) == before == files(run)


def test_a_folder_that_cannot_be_written(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied there"):
        copy_code(tmp_path / "file" / "code", package)


def test_the_copy_is_all_that_the_package_needs(tmp_path: Path) -> None:
    """Every module of a rank, found in the copy and nowhere else, in a folder that has another one."""
    copy, other = tmp_path / "code", tmp_path / "here"
    copy_code(copy)
    (other / "bigtrain").mkdir(parents=True)
    (other / "bigtrain" / "__init__.py").write_text("raise SystemExit('the wrong one')", encoding="utf-8")
    program = (
        "import sys, bigtrain.config, bigtrain.launching.slurm_script, bigtrain.launching.meeting;"
        "import bigtrain.data.prepare;"
        "print({module.__file__.split('/bigtrain/')[0] for name, module in sys.modules.items() "
        "if name.split('.')[0] == 'bigtrain' and module.__file__})"
    )
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=other, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str({str(copy)}), done.stderr
    assert {path.suffix for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts} == {".py"}
