"""A save that is killed at any of its acts on the disk, or meets a full one, leaves the newest committed one loadable.

Each case is a process of its own that ends itself with SIGKILL before its n-th act: every fsync, rename, link, deletion
and file that is made. The cases go through all of them, until a save survives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest, store
from bigtrain.checkpoint.manifest import DamagedCheckpoint
from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.errors import UserError
from bigtrain.distributed.sharding import Shard
from tests.unit.checkpoints import commit_again

SHAPE = (40, 50)
ACTS = ("fsync", "rename", "symlink", "unlink", "rmdir", "open", "mkdir")
FIRST_ACTS_OF_A_SAVE = 12
"""Fewer would mean that the acts are not seen."""


def fragments(step: int) -> list[Fragment]:
    shard = Shard.of("w", SHAPE, dim=None, rank=0, size=1)
    flat = torch.full((SHAPE[0] * SHAPE[1],), float(step))
    return [Fragment(shard, 0, {"weight": flat, "exp_avg": flat + 0.5}, owned=True)]


def save(root: Path, step: int, keep: int = 1) -> None:
    store.save(root, step, fragments(step), {"format": folders.FORMAT, "step": step}, keep=folders.Keep(keep))


def load(folder: Path) -> float:
    """The value that fills the checkpoint's tensors; its hashes are checked on the way."""
    empty = fragments(0)
    store.load(folder, empty)
    value = empty[0].tensors["weight"][0].item()
    assert bool((empty[0].tensors["weight"] == value).all() and (empty[0].tensors["exp_avg"] == value + 0.5).all())
    return value


def in_a_child(work: Callable[[], None]) -> int:
    """The child's exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(number: int) -> None:
    """From here on, this process kills itself before its `number`-th act on the disk."""
    left = [number]

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def before(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        return before

    for name in ACTS:
        setattr(os, name, counted(getattr(os, name)))


def save_killed_before(root: Path, step: int, number: int) -> None:
    kill_before(number)
    save(root, step)


def test_a_kill_at_any_act_leaves_the_newest_committed_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for number in range(1000):
        before = folders.committed(tmp_path)
        status = in_a_child(partial(save_killed_before, tmp_path, 2, number))
        newest = folders.newest(tmp_path)
        assert newest is not None and load(newest) == folders.step_of(newest), f"killed before act {number}"
        latest = folders.resolve(tmp_path / "latest")
        assert latest in (newest, *before), f"latest is not durable, killed before act {number}"
        load(latest)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > FIRST_ACTS_OF_A_SAVE
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["latest", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("knows_the_room", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk_fails_the_save_and_leaves_the_one_before(
    small_disk: Path, knows_the_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not knows_the_room:
        enough = shutil.disk_usage("/")._replace(free=10**15)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: enough)
    save(small_disk, 1, keep=5)
    (small_disk / "other").write_bytes(bytes(256 * 1024 - 12_288 - room_of(small_disk / "step-00000001")))
    words = "GB free" if knows_the_room else "No space left on device"
    with pytest.raises(store.SaveError, match=f"the checkpoint of step 2 was not saved: .*{words}"):
        save(small_disk, 2, keep=5)
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "other", "step-00000001"]
    assert load(folders.resolve(small_disk / "latest")) == 1
    (small_disk / "other").unlink()
    save(small_disk, 3, keep=5)
    assert load(folders.resolve(small_disk / "latest")) == 3


def test_a_disk_that_is_full_once_all_but_the_marker_is_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A marker that is there, and empty, would count."""
    save(small_disk, 1, keep=5)
    sync = folders.sync

    def filled(path: Path) -> None:
        sync(path)
        if path == small_disk and folders.path_of(small_disk, 2).exists():
            with contextlib.suppress(OSError), (small_disk / "other").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    monkeypatch.setattr(folders, "sync", filled)
    with pytest.raises(store.SaveError, match="No space left on device"):
        save(small_disk, 2, keep=5)
    assert (small_disk / "other").exists()
    assert folders.committed(small_disk) == [folders.path_of(small_disk, 1)]
    assert not folders.path_of(small_disk, 2).exists()


def room_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir())


# damage


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "element": (lambda made: flip(made / "__0_0.distcp", 4000), r"weight\.w is not what was saved: its hash is \w{16}"),
    "cut file": (lambda made: cut(made / "__0_0.distcp"), r"__0_0\.distcp: it has 5,000 bytes, manifest\.json"),
    "no file": (lambda made: (made / "__0_0.distcp").unlink(), r"__0_0\.distcp: the file is missing"),
    "tokenizer too": (
        lambda made: [cut(made / "__0_0.distcp"), (made / "t.model").unlink()],
        r"__0_0\.distcp: it has 5,000 bytes, .* bytes$",
    ),
    "no index": (lambda made: (made / ".metadata").unlink(), r"its index \.metadata cannot be read"),
    "another index": (
        lambda made: (made / ".metadata").write_bytes(b"\x80\x04K\x01."),
        r"\.metadata .*bytes have changed",
    ),
    "no manifest": (lambda made: (made / "manifest.json").unlink(), r"manifest\.json cannot be read"),
    "manifest": (lambda made: flip(made / "manifest.json", 40), r"manifest\.json is not the one that was committed"),
    "a digit of the state": (
        lambda made: (made / "state.json").write_text(
            (made / "state.json").read_text().replace('"step": 1', '"step": 7')
        ),
        r"state\.json has changed since it was saved",
    ),
    "state": (lambda made: (made / "state.json").write_text("{"), r"state\.json cannot be read"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_seen_when_it_is_loaded(tmp_path: Path, damage: Damage, words: str) -> None:
    state = {"format": folders.FORMAT, "step": 1}
    store.save(tmp_path, 1, fragments(1), state, files={"t.model": b"pieces"})
    made = folders.path_of(tmp_path, 1)
    damage(made)
    with pytest.raises(DamagedCheckpoint, match=words):
        load(made)


def test_a_file_that_no_load_needs_is_no_damage(tmp_path: Path) -> None:
    store.save(
        tmp_path, 1, fragments(1), {"format": folders.FORMAT, "step": 1}, files={"t.model": b"p", "u.json": b"p"}
    )
    made = folders.path_of(tmp_path, 1)
    (made / "t.model").unlink()
    (made / "u.json").write_bytes(b"")
    load(made)
    assert manifest.problems(made).damage == [] and len(manifest.problems(made).beside) == 2


@pytest.mark.parametrize("damage", ["cut file", "no file"])
def test_a_file_that_ends_while_it_is_read_is_damage_too(tmp_path: Path, damage: str) -> None:
    """Who reads the weights alone does not look at sizes first."""
    save(tmp_path, 1)
    made = folders.path_of(tmp_path, 1)
    DAMAGES[damage][0](made)
    with pytest.raises(DamagedCheckpoint, match=r"it cannot be read: .*__0_0\.distcp"):
        store.load_weights(made, fragments(0))


def test_two_pieces_that_swapped_places_are_seen(tmp_path: Path) -> None:
    """Files whose bytes are all right and in the wrong place: a hash of each file alone would not tell."""
    save(tmp_path, 1)
    made = folders.path_of(tmp_path, 1)
    index = pickle.loads((made / ".metadata").read_bytes())
    first, second = index.storage_data
    index.storage_data[first], index.storage_data[second] = index.storage_data[second], index.storage_data[first]
    (made / ".metadata").write_bytes(pickle.dumps(index))
    commit_again(made)  # as if it had been saved so
    with pytest.raises(DamagedCheckpoint, match=r"is not what was saved"):
        load(made)


@pytest.mark.parametrize("file", ["../other", "/etc/passwd", ".."])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    made = folders.path_of(tmp_path, 1)
    index = pickle.loads((made / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = file
    (made / ".metadata").write_bytes(pickle.dumps(index))
    commit_again(made)  # as if it had been saved so
    with pytest.raises(DamagedCheckpoint, match="outside of the checkpoint"):
        load(made)


@pytest.mark.parametrize("act", ["preadv", "open"])
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path: Path, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is called damaged is put aside; the next try may read this one."""
    save(tmp_path, 1)

    def stale(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    if act == "preadv":
        monkeypatch.setattr(os, act, stale)
    else:
        monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UserError, match=r"cannot be read.*Stale file handle") as caught:
        load(folders.path_of(tmp_path, 1))
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(CheckpointException):
        load(folders.path_of(tmp_path, 1))


def test_a_save_counts_once_it_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without links, and where the older ones cannot be deleted."""
    save(tmp_path, 1)

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(folders, "superseded", refuse)
    save(tmp_path, 2)
    assert folders.newest(tmp_path) == folders.path_of(tmp_path, 2)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Names that look like a checkpoint's, in the folder of checkpoints."""
    names = ["step-by-step-notes", "step-00000008.copying", ".step-notes", "damaged-step-00000001"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-00000010").symlink_to(tmp_path / "step-by-step-notes")
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "step-00000009", "step-00000010", "step-00000001", "latest"]
    )


def test_a_link_that_leads_nowhere_means_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-00000002")
    assert folders.resolve(tmp_path / "latest") == folders.path_of(tmp_path, 1)


def test_one_under_another_name_is_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folders.path_of(tmp_path, 1).rename(tmp_path / "mine")
    assert load(folders.resolve(tmp_path / "mine")) == 1
