"""What the disks say before a rank starts."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from bigtrain import config as configs
from bigtrain.checkpoint import folder as folders
from bigtrain.config.schema import (
    CacheConfig,
    ClusterConfig,
    Config,
    DataConfig,
    PrepareConfig,
    RemoteConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
)
from bigtrain.launching.preflight import differences, preflight


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A config whose data is there."""
    for split, documents in (("train", 100), ("valid", 5)):
        (tmp_path / split).mkdir()
        index = {"num_documents": documents, "vocab_size": 4096}
        (tmp_path / split / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    return Config(
        run=RunConfig(dir=str(tmp_path / "run")),
        data=DataConfig(train=[SourceConfig(str(tmp_path / "train"))], valid=[SourceConfig(str(tmp_path / "valid"))]),
        tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer.model")),
        cluster=ClusterConfig(procs_per_node=4, device="cpu"),
    )


def changed(config: Config, group: str, **values: Any) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})


def texts(config: Config, *, prepared: bool = True) -> list[str]:
    return [str(problem) for problem in preflight(config, prepared=prepared)]


def test_nothing_wrong(config: Config) -> None:
    assert texts(config) == []


def test_missing_data_path_is_named(config: Config, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    (text,) = texts(changed(config, "data", valid=[SourceConfig(missing)]))
    assert f"data.valid.0.path={missing}" in text and "tools/shards.py" in text


@pytest.mark.parametrize("place", ["https://host/data", "s3://bucket/data", "pipe:cat /nowhere/{file}"])
def test_what_is_remote_is_not_missing(config: Config, place: str) -> None:
    config = changed(config, "data", train=[SourceConfig(place)])
    assert texts(changed(config, "tokenizer", path=f"{place}/tokenizer.model")) == []


def test_folder_without_index_is_no_data(config: Config, tmp_path: Path) -> None:
    (tmp_path / "valid" / "index.json").unlink()
    (text,) = texts(config)
    assert "index.json" in text and str(tmp_path / "valid") in text


def test_missing_tokenizer(config: Config) -> None:
    (text,) = texts(changed(config, "tokenizer", path="/nowhere/tokenizer.model"))
    assert "tokenizer.path=/nowhere/tokenizer.model" in text


def test_a_tokenizer_may_be_the_folder_that_it_is_in(config: Config, tmp_path: Path) -> None:
    assert texts(changed(config, "tokenizer", path=str(tmp_path / "train"))) == []


def test_a_tokenizer_that_preparation_does_not_make_is_missing_before_it(config: Config, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    inputs = PrepareConfig(inputs=[str(tmp_path / "*.txt")], out=str(tmp_path / "out"))
    config = changed(config, "data", prepare=inputs)
    assert texts(changed(config, "tokenizer", path="/nowhere/t.model"), prepared=False) == []
    (text,) = texts(changed(config, "tokenizer", path="/nowhere/tokenizer.json", kind="file"), prepared=False)
    assert "tokenizer.path=/nowhere/tokenizer.json" in text


def test_too_few_documents_for_the_lanes(config: Config) -> None:
    assert texts(changed(config, "data", num_lanes=100)) == []
    (text,) = texts(changed(config, "data", num_lanes=101))
    assert "data.num_lanes=101" in text and "100 documents" in text and config.data.train[0].path in text


def test_tokenizer_larger_than_the_model(config: Config) -> None:
    (text,) = texts(changed(config, "model", vocab_size=4095))
    assert "model.vocab_size=4095" in text and "4096 or more" in text


def test_what_preparation_makes_is_not_missing_before_it(config: Config, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    config = changed(
        config,
        "data",
        train=[SourceConfig(str(out / "train"))],
        valid=[SourceConfig(str(out / "valid"))],
        prepare=PrepareConfig(inputs=[str(tmp_path / "*.txt")], out=str(out)),
    )
    assert texts(config, prepared=False) == []
    assert len(texts(config)) == 2
    wrong = changed(config, "data", prepare=PrepareConfig(inputs=[str(tmp_path / "*.md")], out=str(out)))
    (text,) = texts(wrong, prepared=False)
    assert "*.md" in text


def test_no_compiler_is_needed(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DeepSpeed's CPU operators would want one; none of them is used (engine/deepspeed_patches.py)."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert texts(config) == []


def test_no_such_checkpoint_to_resume_from(config: Config) -> None:
    (text,) = texts(changed(config, "checkpoint", resume="/nowhere"))
    assert "checkpoint.resume=/nowhere" in text and "no such folder" in text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"config": {}}, ""),
        ({"config": {"model": {"num_layers": 6, "name": "other"}}}, ""),
        ({"config": {"model": {"num_layers": 8}}}, "model.num_layers is 8 there, 6 here. Set model.num_layers=8"),
        ({"config": {"model": {"rope_theta": 5e5}}}, "model.rope_theta is 500000.0 there, 10000.0 here"),
        ({"config": {"optim": {"name": "sgd"}}}, "optim.name is sgd there, adamw here"),
        ({"weights_only": True}, "weights only, and no place in the data. Set checkpoint.init_from instead"),
    ],
)
def test_a_checkpoint_of_another_run_to_resume_from(
    config: Config, tmp_path: Path, state: dict[str, Any], words: str
) -> None:
    """Its tensors may fit; what they compute would be something else."""
    folders.prepare(tmp_path, 5, 0)
    made = folders.commit(tmp_path, 5, {"format": folders.FORMAT, "step": 5, **state})
    found = texts(changed(config, "checkpoint", resume=str(made)))
    assert len(found) == bool(words) and all(words in text for text in found)


def test_a_checkpoint_to_resume_from_that_lost_a_file(config: Config, tmp_path: Path) -> None:
    """Named by itself. Of a run that has an older one, the ranks take that."""
    for step in (5, 6):
        folders.prepare(tmp_path / "checkpoints", step, 0)
        made = folders.commit(
            tmp_path / "checkpoints", step, {"format": folders.FORMAT}, {"tokenizer.model": b"t", "a.distcp": b"t"}
        )
    (made / "tokenizer.model").unlink()
    assert texts(changed(config, "checkpoint", resume=str(made))) == [], "no run needs it"
    (made / "a.distcp").unlink()
    (text,) = texts(changed(config, "checkpoint", resume=str(made)))
    assert f"checkpoint.resume={made}: " in text and "it is not what was saved: a.distcp: the file is missing" in text
    assert texts(changed(config, "checkpoint", resume=str(tmp_path))) == []


def test_a_checkpoint_to_resume_from_that_the_disk_does_not_show(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.prepare(tmp_path, 5, 0)
    made = folders.commit(tmp_path, 5, {"format": folders.FORMAT})

    def denied(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    (text,) = texts(changed(config, "checkpoint", resume=str(made)))
    assert "it cannot be checked: manifest.json cannot be read (Permission denied)" in text


def test_online_tracking_without_a_key(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("NETRC", "none"), ("WANDB_CONFIG_DIR", "none"), ("WANDB_API_KEY", "")):
        monkeypatch.setenv(name, value)
    online = changed(config, "tracker", mode="online")
    (text,) = texts(online)
    assert "tracker.mode=online" in text and "wandb login" in text and "tracker.mode=offline" in text
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert texts(online) == []


def test_run_folder_of_another_config(config: Config) -> None:
    folder = Path(config.run.dir)
    configs.save(config, folder)
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert texts(config) == []
    other = changed(changed(config, "optim", lr=0.5), "model", num_layers=3)
    (text,) = texts(other)
    assert "optim.lr is 0.001 there, 0.5 now" in text and "model.num_layers is 6 there, 3 now" in text
    assert "run.name" in text and str(folder) in text


def test_run_that_failed_before_its_first_step_may_be_corrected(config: Config) -> None:
    configs.save(config, config.run.dir)
    assert texts(changed(config, "optim", lr=0.5)) == []
    (Path(config.run.dir) / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert len(texts(changed(config, "optim", lr=0.5))) == 1


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("cluster", {"procs_per_node": 2}),
        ("tracker", {"mode": "online"}),
        ("checkpoint", {"interval": 7, "keep": 9, "resume": "never"}),
        ("eval", {"interval": 3}),
        ("train", {"recompute": "full"}),
        ("data", {"num_workers": 0, "cache": CacheConfig("/x", 7), "remote": RemoteConfig(7, 7)}),
    ],
)
def test_what_a_run_may_change(config: Config, group: str, values: dict[str, Any]) -> None:
    assert differences(config, changed(config, group, **values)) == []


def test_only_a_constant_schedule_goes_on_for_longer(config: Config) -> None:
    assert differences(config, changed(config, "train", num_steps=301)) == [("train.num_steps", 300, 301)]
    constant = dataclasses.replace(config, schedule=ScheduleConfig(name="constant"))
    assert differences(constant, changed(constant, "train", num_steps=301)) == []
    assert differences(constant, changed(constant, "train", num_steps=299)) == [("train.num_steps", 300, 299)]


def test_reads_only(config: Config, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    preflight(config, prepared=True)
    assert sorted(os.listdir(tmp_path)) == before
