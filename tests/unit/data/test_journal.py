from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.data.journal import Journal, write_whole


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    journal = Journal(tmp_path / "journal")
    for number in range(3):
        journal.append({"number": number, "name": "a\nb \u4e2d"})
    journal.close()
    return (tmp_path / "journal").read_bytes()


def numbers(path: Path) -> list[int]:
    journal = Journal(path)
    journal.close()
    return [entry["number"] for entry in journal.entries]


def test_torn_anywhere_and_written_on(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "journal"
    ends = [index + 1 for index, byte in enumerate(written) if byte == ord("\n")]
    for size in range(len(written) + 1):
        path.write_bytes(written[:size])
        whole = sum(end <= size for end in ends)
        journal = Journal(path)
        assert [entry["number"] for entry in journal.entries] == list(range(whole))
        journal.append({"number": 9})
        journal.close()
        assert numbers(path) == [*range(whole), 9]


def test_a_damaged_line_and_all_behind_it_are_not_there(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "journal"
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        assert numbers(path) == list(range(written[:place].count(b"\n")))


def test_keeps_the_first_entries_only(tmp_path: Path, written: bytes) -> None:
    journal = Journal(tmp_path / "journal")
    journal.keep(1)
    journal.append({"number": 7})
    journal.close()
    assert numbers(tmp_path / "journal") == [0, 7]


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two\n"):
        write_whole(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
