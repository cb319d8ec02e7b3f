"""Files by their content, within a limit of bytes."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.errors import UserError
from bigtrain.data.cache import Cache

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def name(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


def get(cache: Cache, number: int, *, hold: bool = False, fetched: list[int] | None = None) -> np.ndarray:
    def fill(out: io.FileIO) -> None:
        if fetched is not None:
            fetched.append(number)
        out.write(content(number))

    return cache.map(name(number), fill, reserve_bytes=SIZE, size_bytes=SIZE, hold=hold)


def refuse(out: io.FileIO) -> None:
    raise AssertionError("it is in the cache")


def inside(cache: Cache) -> set[int]:
    there = {path.name for path in cache.folder.iterdir()}
    assert ".lock" in there
    return {number for number in range(256) if name(number) in there}


def test_what_is_fetched_once_is_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache", max_bytes=10 * SIZE)
    found = get(cache, 1)
    assert found.tobytes() == content(1) and not found.flags.writeable
    again = Cache(cache.folder, max_bytes=10 * SIZE).map(
        name(1), refuse, reserve_bytes=SIZE, size_bytes=SIZE, hold=True
    )
    assert again.tobytes() == content(1)
    assert {path.name for path in cache.folder.iterdir()} == {name(1), ".lock"}


def test_an_empty_file(tmp_path: Path) -> None:
    cache, sha256 = Cache(tmp_path, max_bytes=SIZE), hashlib.sha256(b"").hexdigest()
    for fill in (lambda out: None, refuse):
        assert len(cache.map(sha256, fill, reserve_bytes=0, size_bytes=0, hold=False)) == 0


def test_threads_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    cache, fetched = Cache(tmp_path, max_bytes=10 * SIZE), list[int]()
    everybody = threading.Barrier(8)
    found: list[bytes] = []

    def fill(out: io.FileIO) -> None:
        fetched.append(1)
        for at in range(0, SIZE, 100):
            out.write(content(1)[at : at + 100])
            time.sleep(0.01)

    def want() -> None:
        everybody.wait()
        found.append(cache.map(name(1), fill, reserve_bytes=SIZE, size_bytes=SIZE, hold=False).tobytes())

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [content(1)] * 8 and fetched == [1]


def test_what_was_used_least_recently_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=3 * SIZE)
    for number in (1, 2, 3):
        get(cache, number)
        os.utime(tmp_path / name(number), (number, number))
    get(cache, 1)  # used just now
    get(cache, 4)
    assert inside(cache) == {1, 3, 4}
    get(cache, 5)
    assert inside(cache) == {1, 4, 5}


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    cache, other_job = Cache(tmp_path, max_bytes=2 * SIZE), Cache(tmp_path, max_bytes=2 * SIZE)
    used = get(cache, 1)
    part_of_it = used[5:10]
    del used
    for number in (2, 3, 4):
        get(other_job, number)
    assert inside(cache) == {1, 4}
    del part_of_it
    get(other_job, 5)
    assert inside(cache) == {4, 5}


def test_the_limit_is_exceeded_by_what_is_in_use_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2 * SIZE)
    used = [get(cache, number) for number in range(4)]
    assert inside(cache) == {0, 1, 2, 3}
    assert [each.tobytes() for each in used] == [content(number) for number in range(4)]
    del used
    get(cache, 9)
    assert len(inside(cache)) == 2 and 9 in inside(cache)


def test_held_maps_are_given_up_for_space(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=3 * SIZE)
    fetched: list[int] = []
    for number in (1, 2, 3, 4, 5, 4, 5, 5):
        get(cache, number, hold=True, fetched=fetched)
    assert fetched == [1, 2, 3, 4, 5]
    assert inside(cache) <= {3, 4, 5} and {4, 5} <= inside(cache)


def test_few_files_are_held(tmp_path: Path) -> None:
    cache, other_job = Cache(tmp_path, max_bytes=12 * SIZE), Cache(tmp_path, max_bytes=SIZE)
    for number in range(12):
        get(cache, number, hold=True)
    get(other_job, 99)
    assert inside(cache) == {9, 10, 11, 99}


def test_a_cache_that_is_too_small_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path, max_bytes=SIZE)
    for number in (1, 2):
        get(cache, number)
    assert not caplog.messages
    get(cache, 1)
    assert "data.cache.max_gb=1e-06 is too small" in caplog.text


def test_what_a_killed_process_left_is_gone_on_with(tmp_path: Path) -> None:
    cache, seen = Cache(tmp_path, max_bytes=10 * SIZE), list[bytes]()
    (tmp_path / f"{name(1)}.{SIZE}.part").write_bytes(content(1)[:400])

    def fill(out: io.FileIO) -> None:
        seen.append(out.read() or b"")
        out.write(content(1)[400:])

    assert cache.map(name(1), fill, reserve_bytes=SIZE, size_bytes=SIZE, hold=False).tobytes() == content(1)
    assert seen == [content(1)[:400]]


def test_leftovers_count_and_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=2 * SIZE)
    left = tmp_path / f"{name(1)}.{SIZE}.part"
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    get(cache, 2)
    assert left.exists()
    get(cache, 3)
    assert not left.exists() and inside(cache) == {2, 3}


@pytest.mark.parametrize("fails", [UserError("no such file"), OSError(errno.EIO, "broken")])
def test_a_fetch_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path, fails: Exception) -> None:
    cache = Cache(tmp_path, max_bytes=10 * SIZE)

    def fill(out: io.FileIO) -> None:
        out.write(content(1))
        raise fails

    with pytest.raises(UserError):
        cache.map(name(1), fill, reserve_bytes=SIZE, size_bytes=SIZE, hold=False)
    assert inside(cache) == set()
    assert get(cache, 2).tobytes() == content(2)


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10 * SIZE)
    get(cache, 1)
    os.truncate(tmp_path / name(1), 10)
    assert get(cache, 1).tobytes() == content(1)


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    mine = [tmp_path / "thesis.tex", tmp_path / "a.part", tmp_path / name(7).upper(), tmp_path / f"{name(7)}.txt"]
    for path in mine:
        path.write_bytes(bytes(10 * SIZE))
        os.utime(path, (1, 1))
    cache = Cache(tmp_path, max_bytes=2 * SIZE)
    for number in range(5):
        get(cache, number)
    assert all(path.exists() for path in mine) and len(inside(cache)) == 2


def test_a_full_disk(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100 * SIZE)
    get(cache, 1)

    def disk(times: int) -> Callable[[io.FileIO], None]:
        left = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * times

        def fill(out: io.FileIO) -> None:
            if left:
                raise left.pop()
            out.write(content(2))

        return fill

    assert cache.map(name(2), disk(1), reserve_bytes=SIZE, size_bytes=SIZE, hold=False).tobytes() == content(2)
    assert inside(cache) == {2}
    with pytest.raises(UserError, match=r"data\.cache\.dir=.*No space left on device.*Set data\.cache\.dir"):
        cache.map(name(3), disk(9), reserve_bytes=SIZE, size_bytes=SIZE, hold=False)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache\.dir=.*/file/cache: Not a directory"):
        get(Cache(tmp_path / "file" / "cache", max_bytes=SIZE), 1)
