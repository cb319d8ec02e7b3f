"""W&B, for real and offline: what was logged is read back from the file that it wrote."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.schema import ClusterConfig, Config, DataConfig, SourceConfig, TrackerConfig
from bigtrain.telemetry import recorder as recorder_module
from bigtrain.telemetry import tracking
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.tracking import WandbTracker, without_secrets

from .records import config_of, record_steps, recorder_of
from .wandb_log import history, logged_config, read_finished

OFFLINE = TrackerConfig(kind="wandb", mode="offline", project="a project")


def logs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_offline_run_is_written_and_resumed_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    config = config_of("the name", tracker=OFFLINE)
    with recorder_of(tmp_path, config=config) as recorder:
        record_steps(recorder, range(1, 4))
        recorder.evaluation(3, loss=2.5, perplexity=12.18, bits_per_byte=None)
        recorder.evaluation(3, set="books", loss=3.5, perplexity=33.1, bits_per_byte=1.25)
        recorder.epochs(3, {"data/web/train": 1.5, "data/code/train": 0.25})
        recorder.event("save", step=3)
    (first,) = logs(tmp_path)
    records = read_finished(first)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    kept = (tmp_path / "wandb_id").read_text().strip()
    assert (run.run_id, run.project, run.display_name) == (kept, "a project", "the name")
    assert '"num_layers":6' in logged_config(records).replace(" ", "")
    rows = history(records)
    assert [json.loads(row["step"]) for row in rows] == [1, 2, 3, 3, 3, 3]
    assert json.loads(rows[1]["train/loss"]) == 8.0 / 2**0.5
    assert json.loads(rows[1]["train/tokens"]) == 8192
    assert set(rows[3]) == {"step", "eval/loss", "eval/perplexity"}
    assert set(rows[4]) == {"step", *(f"eval/books/{name}" for name in ("loss", "perplexity", "bits_per_byte"))}
    assert json.loads(rows[4]["eval/books/bits_per_byte"]) == 1.25
    assert {key: json.loads(value) for key, value in rows[5].items() if key != "step"} == {
        "epochs/web": 1.5,
        "epochs/code": 0.25,
    }
    (exit_record,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 0

    time.sleep(1)  # W&B names a folder by the second and the id
    with pytest.raises(RuntimeError), recorder_of(tmp_path, config=config, resume_step=3) as recorder:
        record_steps(recorder, range(4, 5))
        raise RuntimeError
    (second,) = [path for path in tmp_path.glob("wandb/offline-run-*/*.wandb") if path != first]
    records = read_finished(second)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert run.run_id == kept
    assert [json.loads(row["step"]) for row in history(records)] == [4]
    (exit_record,) = [record.exit for record in records if record.WhichOneof("record_type") == "exit"]
    assert exit_record.exit_code == 1


@pytest.mark.parametrize("tracker", [TrackerConfig(kind="none"), TrackerConfig(mode="disabled")])
def test_turned_off_it_leaves_no_trace(tmp_path: Path, tracker: TrackerConfig) -> None:
    with recorder_of(tmp_path, config=config_of(tracker=tracker)) as recorder:
        record_steps(recorder, range(1, 2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_failing_start_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    # The folder that W&B wants to make is a file.
    (tmp_path / "wandb_id").mkdir()
    said: list[str] = []
    tracker = WandbTracker(tmp_path, config_of(tracker=OFFLINE), warn=said.append)
    for step in (1, 2):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.close()
    assert len(said) == 1
    assert said[0].startswith("warning: W&B stopped, training goes on without it: ")


def test_a_later_failure_is_said_once_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    tracker = WandbTracker(tmp_path, config_of(tracker=OFFLINE), warn=said.append)
    run = tracker._run
    assert run is not None, said
    # The run's own connection to its service is gone, as when the service is killed.
    run.finish()
    for step in (1, 2):
        tracker.log({"kind": "train", "step": step, "loss": 1.0})
    tracker.close()
    assert len(said) == 1


class Unreachable:
    """A W&B run whose server does not answer: it finishes when that does."""

    def __init__(self) -> None:
        self.answered = threading.Event()

    def finish(self, exit_code: int) -> None:
        self.answered.wait(60)


@pytest.mark.parametrize("end", ["well", "by a signal", "by an error"])
def test_a_server_that_does_not_answer_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    run, said = Unreachable(), list[str]()
    monkeypatch.setattr(tracking, "_start", lambda run_dir, config: run)
    monkeypatch.setattr(recorder_module, "FINISH_S", 1.0 if end == "well" else 60.0)
    monkeypatch.setattr(recorder_module, "HURRIED_FINISH_S", 60.0 if end == "well" else 0.1)
    monkeypatch.setattr(Console, "note", lambda self, text: said.append(text))
    began = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), recorder_of(tmp_path, config=config_of(tracker=OFFLINE)) as recorder:
        if end == "by an error":
            raise ZeroDivisionError
        recorder.close(hurried=end == "by a signal")
    assert time.monotonic() - began < 30
    assert said[-1].startswith("warning: W&B did not finish in ")
    run.answered.set()


def test_wandb_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    WandbTracker(tmp_path, config_of(tracker=OFFLINE), warn=said.append).close()
    assert len(said) == 1
    assert "wandb" in said[0]


def test_secrets_stay_here() -> None:
    config = dataclasses.replace(
        Config(),
        cluster=ClusterConfig(setup=["export HF_TOKEN=hunter2"], sbatch={"export": "KEY=hunter2"}),
        data=DataConfig(train=[SourceConfig("https://me:hunter2@host/shards?Signature=hunter2&x=1")]),
    )
    values = without_secrets(config)
    assert "hunter2" not in json.dumps(values)
    assert values["data"]["train"][0]["path"] == "https://***@host/shards?***"
    assert values["train"]["num_tokens"] is None
    assert values["tokenizer"] == dataclasses.asdict(config.tokenizer)
