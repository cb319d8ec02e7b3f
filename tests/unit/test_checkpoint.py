"""Checkpoint folders and files, on one process."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest, reader
from bigtrain.config.errors import UserError


def make(root: Path, step: int) -> Path:
    partial = folders.partial_of(root, step)
    partial.mkdir(parents=True)
    (partial / "data").write_text("x")
    return folders.commit(root, step, {"format": folders.FORMAT, "step": step}, {"tokenizer.model": b"t"})


def test_a_commit_is_the_newest_and_says_its_state(tmp_path: Path) -> None:
    make(tmp_path, 5)
    made = make(tmp_path, 40)
    assert made.name == "step-00000040"
    assert folders.newest(tmp_path) == made
    assert folders.state_of(made)["step"] == 40
    assert (made / "tokenizer.model").read_bytes() == b"t"
    assert folders.step_of(made) == 40


def test_without_its_marker_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    old, new = make(tmp_path, 1), make(tmp_path, 2)
    (new / folders.COMMITTED).unlink()
    assert folders.newest(tmp_path) == old
    with pytest.raises(UserError, match="never committed"):
        folders.resolve(new)


def test_a_commit_replaces_what_a_kill_left(tmp_path: Path) -> None:
    left = folders.path_of(tmp_path, 3)
    left.mkdir(parents=True)
    (left / "half").touch()
    there = sorted(p.name for p in make(tmp_path, 3).iterdir())
    assert there == ["COMMITTED", "data", "manifest.json", "state.json", "tokenizer.model"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    folders.prune(tmp_path, folders.Keep(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "latest").resolve() == tmp_path / "step-00000003"


def test_what_a_kill_left_goes_before_the_next_save(tmp_path: Path) -> None:
    (folders.partial_of(tmp_path, 4) / "deep").mkdir(parents=True)
    assert folders.prepare(tmp_path, 5, 0) == folders.partial_of(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == [".step-00000005.partial"]


def test_a_disk_without_room_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"the checkpoint of step 5 takes 1e\+12 GB"):
        folders.prepare(tmp_path, 5, 10**21)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        (folders.Keep(2), {10, 20, 30}),
        (folders.Keep(1), {10, 20, 30, 40}),
        (folders.Keep(1, every=20), {10, 30}),
        (folders.Keep(1, best=1), {10, 30, 40}),
        (folders.Keep(1, best=2), {10, 30}),
        (folders.Keep(9), set()),
        (folders.Keep(1, best=4), {30}),
        (folders.Keep(0), {10, 20, 30, 40}),
    ],
)
def test_what_is_superseded(keep: folders.Keep, gone: set[int]) -> None:
    there = [(10, 2.5), (20, 1.4), (30, math.nan), (40, 1.5), (50, None)]
    assert folders.superseded(there, keep) == gone


def test_the_best_are_known_by_what_they_noted(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        folders.prepare(tmp_path, step, 0)
        folders.commit(tmp_path, step, {"format": folders.FORMAT, "step": step, "loss": loss})
    folders.prune(tmp_path, folders.Keep(1, best=1))
    assert [folders.step_of(p) for p in folders.committed(tmp_path)] == [2, 4]


def test_one_that_is_put_aside_does_not_count(tmp_path: Path) -> None:
    old, new = make(tmp_path, 1), make(tmp_path, 2)
    aside = folders.set_aside(new)
    assert aside.name == "damaged-step-00000002"
    assert folders.committed(tmp_path) == [old]
    assert folders.resolve(tmp_path / "latest") == old


def test_a_manifest_that_changed_is_seen(tmp_path: Path) -> None:
    made = make(tmp_path, 1)
    assert manifest.read(made).files["tokenizer.model"].size_bytes == 1
    content = (made / manifest.MANIFEST).read_text()
    (made / manifest.MANIFEST).write_text(content.replace('"size_bytes": 1,', '"size_bytes": 2,', 1))
    with pytest.raises(manifest.DamagedCheckpoint, match="not the one that was committed"):
        manifest.read(made)


def test_resolve_takes_a_run_or_its_checkpoints(tmp_path: Path) -> None:
    made = make(tmp_path / "checkpoints", 7)
    assert folders.resolve(tmp_path) == folders.resolve(tmp_path / "checkpoints") == folders.resolve(made) == made
    for missing in (tmp_path / "nothing", tmp_path / "step-00000001"):
        with pytest.raises(UserError, match=missing.name):
            folders.resolve(missing)
    carried = made.rename(tmp_path / "mine")
    (carried / folders.STATE).unlink()
    assert folders.resolve(carried) == carried, "what it has lost is told by who reads it"


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', "{"])
def test_a_state_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    made = make(tmp_path, 1)
    (made / folders.STATE).write_text(content)
    with pytest.raises(UserError, match=r"state\.json"):
        folders.state_of(made)


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_a_hostile_index_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Attack(tmp_path / "owned")))
    with pytest.raises(pickle.UnpicklingError, match="must not name"):
        reader.read_index(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(pickle.UnpicklingError, match="holds a dict"):
        reader.read_index(tmp_path)


def test_dcps_own_index_is_read(tmp_path: Path) -> None:
    """An index that torch itself wrote, with all that it puts in."""
    import torch.distributed.checkpoint as dcp

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(1)}
    dcp.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    assert {name: (each.shape, each.dtype) for name, each in reader.tensors_in(tmp_path).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    empty = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(empty, storage_reader=reader.SafeReader(tmp_path), no_dist=True)
    assert all(torch.equal(empty[name], tensor) for name, tensor in tensors.items())


def test_state_is_json(tmp_path: Path) -> None:
    assert json.loads((make(tmp_path, 1) / folders.STATE).read_text())["format"] == folders.FORMAT
