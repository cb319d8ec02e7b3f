"""Runs on raw text beside shards: stopped, gone on with by other numbers of ranks, with documents that are bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.schema import Config, ParallelConfig, SourceConfig
from tests.integration.runs import HALF, STEPS, build_shards, config_of, records, run, run_well, trajectory

pytestmark = pytest.mark.slow
BATCHES = [sys.executable, str(Path(__file__).parents[2] / "tools" / "batches.py")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and beside them text/: two tars by plain tar, of short documents, some of which are not UTF-8."""
    out = build_shards(tmp_path_factory.mktemp("data") / "shards")
    folder = out.parent / "text"
    folder.mkdir()
    modules = sorted(Path(os.__file__).parent.glob("*.py"))[:80]
    for number in range(2):
        files = out.parent / f"files-{number}"
        files.mkdir()
        for path in modules[number::2]:
            (files / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8")[:300], encoding="utf-8")
        for bad in range(8):
            (files / f"latin1-{bad}.txt").write_bytes("d\u00e9j\u00e0 vu ".encode("latin-1") * 5)
        subprocess.run(["tar", "-C", str(files), "-cf", str(folder / f"{number}.tar"), "."], check=True)
    return out


def with_text(run_dir: Path, data: Path, parallel: ParallelConfig, max_bad_fraction: float = 0.05) -> Config:
    config = config_of(run_dir, data)
    sources = [SourceConfig(str(data / "train"), 1.0), SourceConfig(str(data.parent / "text"), 3.0)]
    return replace(
        config,
        data=replace(config.data, train=sources, max_bad_fraction=max_bad_fraction),
        parallel=parallel,
    )


def audited(run_dir: Path) -> str:
    done = subprocess.run([*BATCHES, "audit", str(run_dir)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_in_parts_is_the_run(data: Path, tmp_path: Path) -> None:
    """Bit for bit with the same ranks; and with others, the same tokens in the same order."""
    by_two, tensor = ParallelConfig(zero_stage=1), ParallelConfig(zero_stage=1, tensor=2)
    whole = run_well(with_text(tmp_path / "whole", data, by_two))
    config = with_text(tmp_path / "parts", data, by_two)
    parts = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    run_well(config)
    assert trajectory(parts) == trajectory(whole)
    others = run_well(with_text(tmp_path / "parts-of-others", data, tensor))
    assert [loss for _, _, loss, _, _ in trajectory(others)] == pytest.approx(
        [loss for _, _, loss, _, _ in trajectory(whole)], rel=1e-5
    )
    for run_dir in (whole, parts, others):
        said = audited(run_dir)
        assert f"{STEPS} steps" in said and "proven" in said
        assert re.search(r"passed over: \d+ bad documents: not UTF-8", said), said


def test_ranks_change_in_the_middle(data: Path, tmp_path: Path) -> None:
    """One data rank's ledger goes on where two stopped; the text goes on in every lane."""
    config = with_text(tmp_path / "run", data, ParallelConfig(zero_stage=0))
    run_dir = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    run_well(replace(config, cluster=replace(config.cluster, procs_per_node=1)))
    assert "proven" in audited(run_dir)
    entries = [json.loads(line) for line in (run_dir / "ledger" / "rank-00000.jsonl").read_text().splitlines()]
    assert [entry["data_size"] for entry in entries] == [2] * HALF + [1] * (STEPS - HALF)
    shown = subprocess.run([*BATCHES, "show", str(run_dir), "--step", "20"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and ".tar: document" in shown.stdout, shown.stderr


def test_a_bad_document_stops_the_run_where_none_is_allowed(data: Path, tmp_path: Path) -> None:
    attempt = run(with_text(tmp_path / "run", data, ParallelConfig(zero_stage=0), max_bad_fraction=0.0))
    assert attempt.status == 2
    said = attempt.output + "".join(attempt.ranks)
    assert re.search(r"\d\.tar: sample latin1-\d: not UTF-8\. To skip such documents and count them, set", said), said
    assert "Traceback" not in said, "each rank ends by itself"


def test_a_damaged_shard_stops_the_run_or_is_masked(data: Path, tmp_path: Path) -> None:
    """A byte of a document's tokens is flipped: its checksum tells, and bad data never becomes a token id."""
    from bigtrain.data.order import training_order
    from bigtrain.data.shards import Dataset

    damaged = tmp_path / "shards"
    shutil.copytree(data, damaged)
    config = config_of(tmp_path / "run", damaged)
    order = training_order(config.data, seed=config.run.seed, sequence_length=config.train.sequence_length)
    document, dataset = order.pieces(3)[0].document, Dataset.open(damaged / "train")
    with (damaged / "train" / dataset.index.shards[0].file).open("r+b") as file:
        file.seek(int(dataset.documents_of_shard(0)[document]["tokens_at"]) + 7)
        file.write(b"\xff")
    attempt = run(config)
    assert attempt.status == 2
    assert f"sample {document} (byte" in attempt.output + "".join(attempt.ranks)
    config = replace(config, data=replace(config.data, max_bad_fraction=0.5))
    run_dir = run_well(config)
    assert "its tokens are damaged" in audited(run_dir)
    (event,) = [event for event in records(run_dir, "event") if event["name"] == "bad_documents"]
    assert list(event["skipped"].values()) == [1]


def test_another_mixture_in_the_middle_of_a_run(data: Path, tmp_path: Path) -> None:
    """Refused unless it is accepted; then the run goes on, may be stopped again, and is proven as a whole."""
    config = with_text(tmp_path / "run", data, ParallelConfig(zero_stage=0))
    run_dir = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    shards, text = config.data.train
    other = replace(config, data=replace(config.data, train=[replace(shards, weight=3.0), replace(text, weight=1.0)]))
    attempt = run(other)
    assert attempt.status == 2 and "data.on_change=accept" in attempt.output
    accepted = replace(other, data=replace(other.data, on_change="accept"))
    run_well(replace(accepted, train=replace(accepted.train, stop_after=HALF + 6)))
    run_well(other)
    assert "proven" in audited(run_dir)


def test_a_run_that_begins_with_another_runs_checkpoint(data: Path, tmp_path: Path) -> None:
    config = with_text(tmp_path / "first", data, ParallelConfig(zero_stage=0))
    first = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    config = with_text(tmp_path / "second", data, ParallelConfig(zero_stage=0))
    second = run_well(replace(config, checkpoint=replace(config.checkpoint, resume=str(first))))
    said = audited(second)
    assert "proven" in said and f"{STEPS - HALF} steps" in said
    shown = [
        subprocess.run([*BATCHES, "show", str(second), "--step", step], capture_output=True, text=True, timeout=60)
        for step in (str(HALF), str(HALF + 1))
    ]
    assert shown[0].returncode == 2 and f"the run began with step {HALF + 1}" in shown[0].stderr
    assert f"global sequences {8 * HALF} to" in shown[1].stdout
