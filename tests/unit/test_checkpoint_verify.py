"""verify finds whatever was done to a checkpoint, and names it."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest
from bigtrain.checkpoint.manifest import INDEX
from bigtrain.checkpoint.reader import read_index, tensors_in
from bigtrain.checkpoint.reshard import plan, reshard
from bigtrain.checkpoint.stored import Chunk
from bigtrain.checkpoint.verify import uncovered, verify
from tests.unit.checkpoints import commit_again, flip, main, place_of, save, tensors

EMBEDDING = "weight.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "checkpoints", tensors())


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def test_one_that_is_whole(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(saved)]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and said.err == ""
    assert "whole: 4 files, 45 tensors" in said.out
    others = (manifest.MANIFEST, manifest.COMMITTED)
    assert verify(saved).num_bytes == sum(path.stat().st_size for path in saved.iterdir() if path.name not in others)


def test_progress_is_what_is_read(saved: Path) -> None:
    told: list[int] = []
    verify(saved, progress=told.append)
    numbers = sum(tensor.nbytes for tensor in tensors().values())
    assert sum(told) == verify(saved).num_bytes + numbers


def damage(checkpoint: Path, how: str) -> None:
    file, at = place_of(checkpoint, EMBEDDING)
    match how:
        case "number":
            flip(file, at + 200)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100_000])
        case "missing":
            file.unlink()
        case "index":
            flip(checkpoint / INDEX, 300)
        case "state":
            (checkpoint / "state.json").write_text("{}")
        case "tokenizer":
            flip(checkpoint / "tokenizer.model", 2)
        case "unknown":
            (checkpoint / "stray").touch()
        case "marker":
            (checkpoint / folders.COMMITTED).unlink()
        case "manifest":
            flip(checkpoint / manifest.MANIFEST, 1000)
        case "no manifest":
            (checkpoint / manifest.MANIFEST).unlink()
        case _:
            raise ValueError(how)


DAMAGE = [
    ("number", {f"{EMBEDDING}: its numbers have changed", "__0_0.distcp: its bytes have changed"}),
    ("truncated", {"__0_0.distcp: it has 1,3"}),
    ("missing", {"__0_0.distcp: the file is missing, manifest.json says 1,"}),
    ("index", {".metadata: its bytes have changed", ".metadata: no tensor was read"}),
    ("state", {"state.json: it has 2 bytes, manifest.json says "}),
    ("tokenizer", {"tokenizer.model: its bytes have changed"}),
    ("unknown", {"stray: manifest.json does not know it"}),
    ("marker", {"COMMITTED: it is missing, so this checkpoint was never committed"}),
    ("manifest", {"manifest.json: it is not the one that was committed"}),
    ("no manifest", {"manifest.json: it cannot be read: No such file"}),
]


@pytest.mark.parametrize(("how", "expected"), DAMAGE)
def test_damage_is_found_and_named(
    checkpoint: Path, how: str, expected: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint, how)
    assert main(["verify", str(checkpoint)]) == 1
    said = capsys.readouterr()
    assert "damaged" in said.out and "Traceback" not in said.err
    for each in expected:
        assert f"{checkpoint}: {each}" in said.err, said.err
    if how in ("number", "truncated", "missing", "state", "tokenizer", "unknown", "marker"):
        assert said.err.count("\n") == len(expected), said.err


def test_one_line_for_all_that_a_file_has_lost(tmp_path: Path) -> None:
    """Of a checkpoint in two files."""
    whole = save(tmp_path / "a", tensors())
    halves = reshard(plan(whole, num_files=2), tmp_path / "b")
    ends = {
        name: [chunk.start + chunk.length for chunk in tensor.chunks if chunk.file == "__1_0.distcp"]
        for name, tensor in tensors_in(halves).items()
    }
    file = halves / "__1_0.distcp"
    size, kept = file.stat().st_size, file.stat().st_size // 3
    os.truncate(file, kept)
    for found_bytes in (kept, 0):
        lost = sorted(name for name, places in ends.items() if any(end > found_bytes for end in places))
        (problem,) = verify(halves).problems
        first = sorted(lost, key=lambda name: (not name.startswith("weight."), name))[:3]
        assert problem.endswith(f", so {len(lost)} tensors cannot be read: {', '.join(first)} and {len(lost) - 3} more")
        what = f"it has {kept:,} bytes" if found_bytes else "the file is missing"
        assert problem.startswith(f"__1_0.distcp: {what}, manifest.json says {size:,} bytes, so ")
        assert 3 < len(lost) < len(ends)
        assert len(verify(halves, files_only=True).problems) == 1
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["number", "truncated", "missing", "index", "manifest"])
def test_files_alone_are_enough_to_find_it(checkpoint: Path, how: str) -> None:
    damage(checkpoint, how)
    assert verify(checkpoint, files_only=True).problems


def test_a_number_that_changed_before_it_was_hashed_as_a_file(checkpoint: Path) -> None:
    """The file is what its hash says; only the tensor's own hash tells."""
    file, at = place_of(checkpoint, EMBEDDING)
    flip(file, at + 200)
    commit_again(checkpoint)
    assert verify(checkpoint, files_only=True).problems == []
    (problem,) = verify(checkpoint).problems
    assert problem.startswith(f"{EMBEDDING}: its numbers have changed")


def test_tensors_that_the_index_and_the_manifest_do_not_share(checkpoint: Path) -> None:
    def change(fields: dict[str, dict[str, dict[str, object]]]) -> None:
        fields["tensors"]["weight.more"] = fields["tensors"].pop(EMBEDDING)
        fields["tensors"]["weight.output_layer.weight"]["shape"] = [210, 128]

    commit_again(checkpoint, change)
    problems = "\n".join(verify(checkpoint).problems)
    assert "weight.more: the index .metadata does not know it" in problems
    assert f"{EMBEDDING}: manifest.json does not know it" in problems
    assert "weight.output_layer.weight: it is float32 (420, 64), manifest.json says float32 (210, 128)" in problems


def test_chunks_that_overlap(checkpoint: Path) -> None:
    """Two halves of which one lies over the other add up, and cover half."""
    index = read_index(checkpoint)
    meta: Any = index.state_dict_metadata[EMBEDDING]
    whole = index.storage_data[MetadataIndex(EMBEDDING, torch.Size([0, 0]), 0)]
    half = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([210, 64]))
    other = ChunkStorageMetadata(torch.Size([1, 0]), torch.Size([210, 64]))
    meta.chunks[:] = [half, other]
    index.storage_data[MetadataIndex(EMBEDDING, torch.Size([1, 0]), 1)] = whole
    (checkpoint / INDEX).write_bytes(pickle.dumps(index))
    commit_again(checkpoint)
    assert verify(checkpoint).problems == [f"{EMBEDDING}: its chunks at (0, 0) and (1, 0) overlap"]


def test_coverage() -> None:
    def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Chunk:
        return Chunk(offsets, sizes, "f", 0, 0)

    quarters = tuple(chunk((row, column), (2, 3)) for row in (0, 2) for column in (0, 3))
    assert uncovered((4, 6), quarters) == ""
    assert uncovered((), (chunk((), ()),)) == ""
    assert "overlap" in uncovered((), (chunk((), ()), chunk((), ())))
    assert "overlap" in uncovered((4, 6), (*quarters[:3], chunk((1, 3), (2, 3))))
    assert "outside" in uncovered((4, 6), (*quarters[:3], chunk((2, 4), (2, 3))))
    assert "outside" in uncovered((4, 6), (chunk((0,), (24,)),))
    assert "outside" in uncovered((4, 6), (chunk((-1, 0), (4, 6)),))


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_a_hostile_index_runs_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it comes with a manifest that knows it."""
    (checkpoint / INDEX).write_bytes(pickle.dumps(_Attack(checkpoint / "owned")))
    commit_again(checkpoint)
    assert main(["verify", str(checkpoint)]) == 1
    assert main(["inspect", str(checkpoint), "--tensors"]) == 2
    assert main(["reshard", str(checkpoint), str(checkpoint.parent / "new")]) == 2
    assert "must not name" in capsys.readouterr().err
    assert not (checkpoint / "owned").exists() and not (checkpoint.parent / "new").exists()


def test_no_flipped_bit_of_the_index_is_unpickled(checkpoint: Path) -> None:
    """One may ask a pickle for more memory than there is."""
    good = (checkpoint / INDEX).read_bytes()
    for position in range(0, len(good), 97):
        flip(checkpoint / INDEX, position)
        with pytest.raises(manifest.DamagedCheckpoint, match="its bytes have changed"):
            tensors_in(checkpoint)
        (checkpoint / INDEX).write_bytes(good)


def test_all_checkpoints_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20):
        save(tmp_path / "checkpoints", {"weight.a": torch.ones(4)}, step=step)
    assert main(["verify", str(tmp_path), "--all"]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    flip(tmp_path / "checkpoints" / "step-00000010" / "state.json", 5)
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["verify", str(tmp_path), "--all"]) == 1
    assert "step-00000010: state.json: its bytes" in capsys.readouterr().err
    aside = folders.set_aside(tmp_path / "checkpoints" / "step-00000010")
    assert main(["verify", str(aside)]) == 1


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["verify", str(tmp_path / "step-00000001")]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 2 and "no committed checkpoint" in said and "there is no such folder" in said
