"""A build that is killed, at any moment, goes on and gives the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.config.errors import UserError
from bigtrain.data import build as building
from bigtrain.data import claim, journal, spool, tokenising
from bigtrain.data.build import BuildOptions
from bigtrain.data.tokenizer import Tokenizer

from .conftest import load_tool, make_texts, write_jsonl
from .test_build import content

OPTIONS = {"held_out": 0.2, "seed": 3, "shard_tokens": 800}
NUM_FILES = 3


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small corpus has many commits."""
    monkeypatch.setattr(tokenising, "BATCH_RECORDS", 4)
    monkeypatch.setattr(spool, "COMMIT_BYTES", 1000)


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Three files of documents, some of which are dropped."""
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [*make_texts(14, seed=n), " "]) for n in range(NUM_FILES)]
    return [str(path) for path in files]


def run(corpus: list[str], tokenizer: Tokenizer, out: Path, **more: object) -> list[str]:
    """Build; returns what was said."""
    said: list[str] = []
    arguments = {"num_workers": 0, "progress": False, "say": said.append, **more}
    building.build(BuildOptions(corpus, **OPTIONS), tokenizer=tokenizer, out=out, **arguments)  # pyright: ignore
    return said


@pytest.fixture
def expected(corpus: list[str], tokenizer: Tokenizer, tmp_path: Path) -> dict[str, str]:
    """sha256 of every file of a build that was not interrupted."""
    run(corpus, tokenizer, tmp_path / "whole")
    found = content(tmp_path / "whole")
    assert len([name for name in found if name.startswith("train/shard") and name.endswith(".tar")]) >= 3
    return found


def killed(action: Callable[[], object]) -> bool:
    """Run it in a process of its own, which may kill itself; whether it did."""
    child = multiprocessing.get_context("fork").Process(target=action)
    child.start()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in the place of operation `number` (from 1) of those that change what is on the disk for good."""
    count = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def operation(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return operation

    for name in ("fsync", "replace", "unlink", "truncate", "mkdir", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("chained", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one kill", "many kills"])
def test_killed_at_every_operation(
    corpus: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    chained: bool,
) -> None:
    import webdataset.writer  # noqa: F401  # seconds: once, not in every child

    out = tmp_path / "data" / "out"

    def child(number: int) -> None:
        kill_at(number, monkeypatch)
        run(corpus, tokenizer, out)

    number, kills, said = 0, 0, set[str]()
    while True:
        number += 1
        was_killed = killed(lambda number=number: child(number))
        if was_killed and not out.exists() and not chained:
            said.update(line.partition(": ")[2] for line in run(corpus, tokenizer, out))
        if out.exists():
            assert content(out) == expected, number
            assert len(list(out.parent.glob(".out.building-*"))) <= (1 if was_killed else 0)
        kills += was_killed
        if not was_killed or (chained and out.exists()):
            break
        if not chained:
            shutil.rmtree(out.parent)
    assert kills >= (10 if chained else 50)
    if not chained:
        assert any("goes on with a build that was stopped: all" in line for line in said)
        assert any("of the inputs)" in line for line in said)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("file", ["commits", "spool", "documents", "shards", "build.json"])
def test_what_a_crash_tore_is_not_used(
    corpus: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    share: float,
) -> None:
    """As after a power cut: any of the files is shorter than it was, or gone."""
    folder = stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    path = folder / file
    os.truncate(path, int(path.stat().st_size * share))
    if not share:
        path.unlink()
    run(corpus, tokenizer, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def stopped(
    corpus: list[str], tokenizer: Tokenizer, out: Path, monkeypatch: pytest.MonkeyPatch, after: str = "shards"
) -> Path:
    """The folder of a build that broke off: with some shards written, or ("commits") with some documents tokenised."""
    real, count = journal.Journal.append, 0

    def append(self: journal.Journal, entry: journal.Entry) -> None:
        nonlocal count
        count += self._path.name == after
        if count == 3:
            raise KeyboardInterrupt
        real(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tokenizer, out)
    (folder,) = claim.begun(out)
    return folder


def test_tells_what_it_goes_on_with(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(corpus, tokenizer, tmp_path / "out", monkeypatch, after="commits")
    (line,) = run(corpus, tokenizer, tmp_path / "out")
    assert line.startswith(f"{tmp_path}/out: goes on with a build that was stopped: ")
    assert line.endswith("% of the inputs)")
    shutil.rmtree(tmp_path / "out")
    stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    (line,) = run(corpus, tokenizer, tmp_path / "out")
    assert line == (
        f"{tmp_path}/out: goes on with a build that was stopped: all 42 documents are tokenised, 2 shards are written"
    )


def test_what_is_done_is_not_done_again(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    tar = folder / "out" / "train" / "shard-000000.tar"
    before, inode = (folder / "spool").read_bytes(), tar.stat().st_ino
    for path in corpus:  # its size and time stay: nobody reads it again
        stat = os.stat(path)
        Path(path).write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen: list[bytes] = []
    real = claim.discard
    monkeypatch.setattr(claim, "discard", lambda path: (seen.append((path / "spool").read_bytes()), real(path)))
    run(corpus, tokenizer, tmp_path / "out")
    assert seen == [before]
    assert (tmp_path / "out" / "train" / "shard-000000.tar").stat().st_ino == inode


@pytest.mark.parametrize("after", ["commits", "shards"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_input_that_changed_is_read_again(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int, after: str
) -> None:
    """Such as one that was repaired: what lies before it is kept, nothing of its old content is."""
    stopped(corpus, tokenizer, tmp_path / "out", monkeypatch, after=after)
    write_jsonl(Path(corpus[changed]), make_texts(20, seed=9))
    (line,) = run(corpus, tokenizer, tmp_path / "out")
    assert line.endswith(f"; {corpus[changed]} and what follows is read again, for it has changed")
    assert (": 0 documents" in line) == (changed == 0)
    run(corpus, tokenizer, tmp_path / "anew")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


@pytest.mark.parametrize("after", ["commits", "shards"])
@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_folder_of_inputs_that_grew_or_shrank(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, after: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", make_texts(14, seed=number))
    stopped([str(folder)], tokenizer, tmp_path / "out", monkeypatch, after=after)
    if change == "one more":
        write_jsonl(folder / "9.jsonl", make_texts(14, seed=9))
    else:
        (folder / "2.jsonl").unlink()
    run([str(folder)], tokenizer, tmp_path / "out")
    run([str(folder)], tokenizer, tmp_path / "anew")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_shards_of_more_inputs_are_not_used_for_fewer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a commit stands at the very end of the fewer inputs, from the time before the others came."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", make_texts(30))
    stopped([str(folder)], tokenizer, tmp_path / "out", monkeypatch)
    write_jsonl(folder / "1.jsonl", make_texts(30, seed=1))
    stopped([str(folder)], tokenizer, tmp_path / "out", monkeypatch)
    (folder / "1.jsonl").unlink()
    run([str(folder)], tokenizer, tmp_path / "out")
    run([str(folder)], tokenizer, tmp_path / "anew")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_a_file_that_cannot_be_read_can_be_repaired(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, expected: dict[str, str]
) -> None:
    import gzip

    good = gzip.compress(Path(corpus[1]).read_bytes(), mtime=0)
    packed = Path(f"{corpus[1]}.gz")
    packed.write_bytes(good[: len(good) // 2])
    files = [corpus[0], str(packed), corpus[2]]
    with pytest.raises(
        UserError, match=r"1.jsonl.gz: cannot be read: .*What is done is kept: the same command goes on"
    ):
        run(files, tokenizer, tmp_path / "out")
    packed.write_bytes(good)
    (line,) = run(files, tokenizer, tmp_path / "out")
    assert "goes on" in line and ": 0 documents" not in line
    run(files, tokenizer, tmp_path / "anew")
    assert content(tmp_path / "out") == content(tmp_path / "anew")


def test_builds_with_other_options_are_never_mixed(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(OPTIONS, "seed", 4)
        other = stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    said = run(corpus, tokenizer, tmp_path / "out")
    assert said == [
        f"{tmp_path}/out: {other} was begun with other options; it is not used, and goes when this build is done"
    ]
    assert content(tmp_path / "out") == expected
    assert claim.begun(tmp_path / "out") == []


def test_every_option_counts(corpus: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    options = [
        BuildOptions(corpus),
        BuildOptions(corpus[:2]),
        BuildOptions(corpus, exclude=["x"]),
        BuildOptions(corpus, field="body"),
        BuildOptions(corpus, held_out=0.1),
        BuildOptions(corpus, seed=1),
        BuildOptions(corpus, shard_tokens=7),
    ]
    identities = [{"version": 1, "tokenizer": "a", **option.to_dict()} for option in options]
    identities.append({**identities[0], "tokenizer": "b"})
    assert len({claim.folder_of(tmp_path / "out", identity) for identity in identities}) == len(identities)


def test_fresh_discards_what_was_begun(
    corpus: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setitem(OPTIONS, "seed", 4)
        with pytest.raises(ValueError):  # two are begun now
            stopped(corpus, tokenizer, tmp_path / "out", monkeypatch)
    assert run(corpus, tokenizer, tmp_path / "out", fresh=True) == []
    assert content(tmp_path / "out") == expected


def test_two_builds_of_one_folder_at_once(
    corpus: list[str], tokenizer: Tokenizer, model: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.model").write_bytes(model)
    with claim.locked(tmp_path / "out"):
        with pytest.raises(claim.Busy, match=rf"out is being built at this moment by process {os.getpid()} on "):
            run(corpus, tokenizer, tmp_path / "out")
        command = ["build", *corpus, "--tokenizer", str(tmp_path / "t.model"), "--out", str(tmp_path / "out")]
        assert load_tool("shards").main([*command, "--workers", "0"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}/out is being built at this moment")
        run(corpus, tokenizer, tmp_path / "another")
    run(corpus, tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_the_lock_goes_with_its_process(corpus: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    def hold() -> None:
        with claim.locked(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(hold)
    assert (tmp_path / ".out.lock").exists()
    run(corpus, tokenizer, tmp_path / "out")
    assert not (tmp_path / ".out.lock").exists()


DRIVER = """
import sys
from bigtrain.data import spool, tokenising
spool.COMMIT_S, tokenising.BATCH_RECORDS = 0.0, 4
sys.path.insert(0, sys.argv.pop(1))
import shards
if __name__ == "__main__":
    sys.exit(shards.main())
"""


@pytest.mark.slow
def test_the_command_killed_from_outside(
    corpus: list[str], tokenizer: Tokenizer, model: bytes, tmp_path: Path, expected: dict[str, str]
) -> None:
    """The command with its worker processes: kill -9 while it tokenises, and again while it writes shards."""
    (tmp_path / "t.model").write_bytes(model)
    (tmp_path / "driver.py").write_text(DRIVER)
    out = tmp_path / "out"
    options = ["--held-out", "0.2", "--seed", "3", "--shard-tokens", "800", "--workers", "2"]
    tools = str(Path(__file__).parents[3] / "tools")
    command = [sys.executable, str(tmp_path / "driver.py"), tools, "build", *corpus, "--out", str(out)]
    command += ["--tokenizer", str(tmp_path / "t.model"), *options]
    for lines, name in ((2, "commits"), (1, "shards")):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_for(lambda lines=lines, name=name: num_lines(out, name) >= lines)
        workers = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda workers=workers: not any(map(is_alive, workers)))
        assert not out.exists() and num_lines(out, name) >= lines
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "goes on with a build that was stopped: all 42 documents are tokenised" in done.stdout
    assert content(out) == expected
    assert not list(tmp_path.glob(".*"))


def num_lines(out: Path, name: str) -> int:
    return sum(path.read_bytes().count(b"\n") for folder in claim.begun(out) for path in folder.glob(name))


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
