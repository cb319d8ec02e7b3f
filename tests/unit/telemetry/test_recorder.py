"""The recorder: what the training loop calls, and what is then in the run's folder."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from bigtrain.config.schema import ClusterConfig
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.metrics import read_metrics
from bigtrain.telemetry.recorder import Recorder
from bigtrain.trainer.saver import Outcome

from .records import config_of, record_steps, recorder_of

TRAIN_FIELDS = {"kind", "step", "tokens", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_second", "mfu"}
EVAL_FIELDS = {"kind", "step", "loss", "perplexity", "bits_per_byte"}


def test_the_fields_are_those_of_the_contract(tmp_path: Path) -> None:
    with recorder_of(tmp_path / "run") as recorder:
        record_steps(recorder, range(1, 3))
        recorder.evaluation(2, loss=2.0, perplexity=7.389, bits_per_byte=None)
        recorder.event("save", step=2, seconds=0.5)
    first, second, held_out, event = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert set(first) == set(second) == TRAIN_FIELDS
    assert set(held_out) == EVAL_FIELDS
    assert event == {"kind": "event", "name": "save", "step": 2, "seconds": 0.5}


def test_a_named_set_and_epochs(tmp_path: Path) -> None:
    with recorder_of(tmp_path) as recorder:
        recorder.evaluation(2, set="books", loss=2.0, perplexity=7.389, bits_per_byte=1.0)
        recorder.epochs(2, {"data/train": 0.25})
    held_out, epochs = read_metrics(tmp_path / "metrics.jsonl")
    assert held_out == {
        "kind": "eval",
        "step": 2,
        "set": "books",
        "loss": 2.0,
        "perplexity": 7.389,
        "bits_per_byte": 1.0,
    }
    assert epochs == {"kind": "event", "name": "epochs", "step": 2, "epochs": {"data/train": 0.25}}


def test_no_set_has_a_step_twice_after_a_resume(tmp_path: Path) -> None:
    """Killed between the sets of step 30; the newest checkpoint is that of step 20."""
    with recorder_of(tmp_path) as recorder:
        for step in (10, 20, 30):
            for name in ("code", "books") if step < 30 else ("code",):
                recorder.evaluation(step, set=name, loss=2.0, perplexity=7.4, bits_per_byte=1.0)
            recorder.epochs(step, {"a": step / 8})
    with recorder_of(tmp_path, resume_step=20) as recorder:
        for name in ("code", "books"):
            recorder.evaluation(30, set=name, loss=2.0, perplexity=7.4, bits_per_byte=1.0)
        recorder.epochs(30, {"a": 30 / 8})
    records = read_metrics(tmp_path / "metrics.jsonl")
    for name in ("code", "books"):
        assert [record["step"] for record in records if record.get("set") == name] == [10, 20, 30]
    assert [record["step"] for record in records if record.get("name") == "epochs"] == [10, 20, 30]


def test_a_resumed_run_has_the_lines_of_one_that_ran_through(tmp_path: Path) -> None:
    with recorder_of(tmp_path / "through") as recorder:
        record_steps(recorder, range(1, 41))
    killed = recorder_of(tmp_path / "killed")
    record_steps(killed, range(1, 28), offset=1e-9)
    record_steps(killed, range(28, 29), offset=1e-9)
    (tmp_path / "again").mkdir()
    # What is on the disk when the process is killed while it writes step 29; steps 1 to 20 are in the checkpoint.
    with recorder_of(tmp_path / "again") as recorder:
        record_steps(recorder, range(1, 21))
    path = tmp_path / "again" / "metrics.jsonl"
    lost = (tmp_path / "killed" / "metrics.jsonl").read_bytes().splitlines(keepends=True)[20:]
    path.write_bytes(path.read_bytes() + b"".join(lost) + b'{"kind": "train", "step": 29, "tok')
    with recorder_of(tmp_path / "again", resume_step=20) as recorder:
        record_steps(recorder, range(21, 41))

    def lines(folder: str) -> list[bytes]:
        return [line for line in (tmp_path / folder / "metrics.jsonl").read_bytes().splitlines() if b"train" in line]

    assert lines("again") == lines("through")
    events = [record for record in read_metrics(path) if record["kind"] == "event"]
    assert events == [{"kind": "event", "name": "resume", "step": 20, "lines_removed": 8, "lines_unreadable": 1}]


@pytest.mark.parametrize(("cluster", "said"), [(ClusterConfig(kind="slurm"), 1), (ClusterConfig(), 0)])
def test_a_save_that_the_time_limit_would_cut_off_is_said_once(
    tmp_path: Path, cluster: ClusterConfig, said: int
) -> None:
    stream = io.StringIO()
    config = dataclasses.replace(config_of(), cluster=cluster)
    with Recorder(tmp_path, config, num_steps=9, resume_step=0, console=Console(stream=stream)) as recorder:
        record_steps(recorder, range(1, 2))
        for step, seconds in ((1, 89.0), (2, 90.0), (3, 200.0)):
            recorder.saved([Outcome(step, seconds, 0.0)])
    late = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record.get("name") == "late_save"]
    assert late == [{"kind": "event", "name": "late_save", "step": 2, "seconds": 90.3, "signal_s": 90.0}][:said]
    assert stream.getvalue().count("cluster.signal_s") == said


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with recorder_of(tmp_path / "run", is_writer=False) as recorder:
        record_steps(recorder, range(1, 3))
        recorder.evaluation(2, loss=2.0, perplexity=7.4, bits_per_byte=1.0)
        recorder.event("save", step=2)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_file_complete_and_goes_on_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="boom"), recorder_of(tmp_path) as recorder:
        record_steps(recorder, range(1, 3))
        raise RuntimeError("boom")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_evaluations_that_a_stop_left_out_are_known(tmp_path: Path) -> None:
    with recorder_of(tmp_path) as recorder:
        for step in (1, 2, 3):
            record_steps(recorder, range(step, step + 1))
            recorder.evaluation(step, set="web", loss=2.0, perplexity=7.4, bits_per_byte=1.0)
            if step != 2:
                recorder.evaluation(step, set="code", loss=2.0, perplexity=7.4, bits_per_byte=1.0)
    with recorder_of(tmp_path, resume_step=2) as recorder:
        assert recorder.past.lacks(2, ["code", "web"]) == ["code"]
        assert recorder.past.lacks(1, ["code", "web"]) == []
    with recorder_of(tmp_path / "another run", resume_step=2) as recorder:
        assert recorder.past.lacks(2, ["code", "web"]) == [], "its own evaluations begin behind that step"
