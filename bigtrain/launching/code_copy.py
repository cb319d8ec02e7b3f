"""A copy of the package beside a run that starts later: RUN/code/bigtrain, and where it comes from in RUN/code/git.txt.

A job waits in its queue for hours and is queued again for days. It runs the code of the launch, whatever becomes of the
checkout meanwhile: the scripts in launchers/ and that of launching/slurm_script.py put the copy in front of any other.

A run on this machine gets none. Its ranks start at once, from the files that the command itself has just imported, and
its stack traces name the files that one edits. --freeze makes one: who freezes a run starts it later.

Only Python files are copied, which is all that the package has: no presets (config.yaml has every value), no data, and
nothing else that lies about in a checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import bigtrain
from bigtrain.config.errors import UserError

CODE = "code"
GIT = "git.txt"
MAX_DIFF_BYTES = 1 << 20
PACKAGE = Path(bigtrain.__file__).resolve().parent


def copy_code(folder: Path, package: Path = PACKAGE) -> None:
    """Make `folder` a copy of the package, all of it or nothing; one that is the same already stays untouched, but a
    link to one (`link_code`) is replaced, by what will not change with the other's.

    Raises UserError where it cannot be written."""
    if same_code(folder, package) and not folder.is_symlink():
        return
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        for path, content in _files(package).items():
            target = aside / package.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (aside / GIT).write_text(origin(package), encoding="utf-8")
        if os.path.lexists(folder):
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: the code cannot be copied there: {error.strerror}. Choose another run.dir."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _remove(old)


def link_code(link: Path, code: Path) -> None:
    """Make `link` name the copy `code` of another folder, in place of what is there."""
    _remove(link)
    link.symlink_to(os.path.relpath(code, link.parent))


def same_code(folder: Path, package: Path = PACKAGE) -> bool:
    """Whether `folder` is a copy of the package as it is now."""
    return (folder / GIT).is_file() and _files(folder / package.name) == _files(package)


def origin(package: Path) -> str:
    """Where the package comes from, as text: of a git checkout the commit, and what in the package is not committed."""
    text = f"bigtrain {bigtrain.__version__} from {package}\n"
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return text + "not in a git checkout\n"
    commit = _git(package, "log", "-1", "--format=commit %H%n%cI  %s") or "no commit yet\n"
    status, diff = (
        _git(package, "status", "--short", "--", "."),
        _git(package, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", ".") or "",
    )
    if not status:
        return f"{text}{commit}nothing in the package differs from it\n"
    cut = "" if len(diff) <= MAX_DIFF_BYTES else f"\nonly the first {MAX_DIFF_BYTES} characters\n"
    return f"{text}{commit}not committed:\n{status}\n{diff[:MAX_DIFF_BYTES]}{cut}"


def _files(package: Path) -> dict[Path, bytes]:
    """Content of every Python file of a package, by its path there."""
    paths = (path.relative_to(package) for path in package.rglob("*.py") if path.is_file())
    return {path: (package / path).read_bytes() for path in paths if not any(part[0] == "." for part in path.parts)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers; None where it does not: no git, no checkout, one of another user."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=30,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
