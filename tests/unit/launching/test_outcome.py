"""What a finished run tells its user."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path

import pytest

from bigtrain.checkpoint import folder as folders
from bigtrain.config.check import check
from bigtrain.config.compose import compose
from bigtrain.config.derive import world_size
from bigtrain.config.schema import Config
from bigtrain.launching import outcome
from bigtrain.launching.machine import resolve
from bigtrain.launching.outcome import (
    already_finished,
    damage,
    generate_command,
    newest_checkpoint,
    next_steps,
    summary,
)
from bigtrain.launching.preflight import differences

FOUND = {
    "steps": 300,
    "tokens": 1228800,
    "train_loss": 3.1,
    "eval": {"loss": 3.25, "perplexity": 25.79, "bits_per_byte": 1.4},
    "unigram_nats": 6.0,
    "wall_s": 120.4,
}


def test_held_out_loss_stands_beside_the_unigram(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FOUND), encoding="utf-8")
    (tmp_path / "report.html").write_text("", encoding="utf-8")
    text = "\n".join(summary(tmp_path, took_s=131.0))
    for part in (
        "this launch took 131 s",
        "300 steps",
        "1,228,800 tokens",
        "3.2500 nats",
        "1.400 bits a byte",
        "6.0000 nats",
        "2.7500 nats below",
    ):
        assert part in text
    assert str(tmp_path / "report.html") in text


def test_a_model_worse_than_the_unigram_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**FOUND, "unigram_nats": 3.0}), encoding="utf-8")
    assert "0.2500 nats ABOVE" in "\n".join(summary(tmp_path, took_s=131.0))


def test_every_evaluation_set_is_told(tmp_path: Path) -> None:
    sets = {
        "code": {"loss": 3.25, "perplexity": 25.8, "bits_per_byte": 1.4, "unigram_nats": 6.0},
        "a-long-name": {"loss": 4.5, "perplexity": 90.0, "bits_per_byte": None, "unigram_nats": 4.0},
    }
    nothing = {"loss": None, "perplexity": None, "bits_per_byte": None}
    found = {**FOUND, "eval": nothing, "unigram_nats": None, "eval_sets": sets}
    (tmp_path / "summary.json").write_text(json.dumps(found), encoding="utf-8")
    rows = summary(tmp_path, took_s=1.0)[1:]
    names = [name for of in ("loss of code", "loss of a-long-name") for name in (of, "unigram", "difference")]
    assert len(rows) == 6 and all(row.startswith(f"{name:<19} ") for row, name in zip(rows, names, strict=True))
    assert "3.2500 nats a token (1.400 bits a byte)" in rows[0] and "2.7500 nats below" in rows[2]
    assert rows[3].endswith("4.5000 nats a token") and "0.5000 nats ABOVE" in rows[5]


def test_summary_with_parts_missing(tmp_path: Path) -> None:
    assert summary(tmp_path, took_s=131.0) == []
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1, "eval": None}), encoding="utf-8")
    assert len(summary(tmp_path, took_s=131.0)) == 1


def test_newest_committed_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000009", "step-99999999", "step-100000000", "step-old", "step-100000001"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        if name != "step-100000001":  # half written
            (folder / "COMMITTED").touch()
    newest = tmp_path / "checkpoints" / "step-100000000"
    assert newest_checkpoint(tmp_path) == newest
    assert f"checkpoint={newest}" in generate_command(Config(), newest).arguments


# what it proposes


def settings_of(line: str) -> list[str]:
    """The arguments of a line that can be pasted."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "bigtrain.launch"]
    return words[3:]


def run_of(*typed: str) -> Config:
    return resolve(compose(typed), cwd=Path.cwd())


def launches(*typed: str) -> list[list[str]]:
    return [settings_of(line) for line in next_steps(run_of(*typed), None, typed)[1:]]


OWN_TEXT = ["data=text", "data.prepare.inputs=[my corpus/*.txt]", "tokenizer.vocab_size=280"]


@pytest.mark.parametrize(
    "typed",
    [
        ["cluster.device=cpu"],
        ["+experiment=smoke"],
        [*OWN_TEXT, "run.name=mine", "parallel.tensor=2", "cluster.device=cpu", "train.num_steps=7"],
        ["tokenizer=hf", "tokenizer.path=gpt2/tokenizer.json", "cluster.device=cpu"],
        [*OWN_TEXT, "run.dir=elsewhere/default", "cluster.device=cpu", "train.num_tokens=500000"],
        ["run.name=longer", "train.stop_after=5", "cluster.device=cpu"],
    ],
)
def test_what_it_proposes_is_another_run_that_works(typed: list[str]) -> None:
    before = run_of(*typed)
    for settings in launches(*typed):
        config = run_of(*settings)
        assert check(config, world_size(config)) == []
        assert config.run.name != before.run.name and config.run.dir != before.run.dir
        assert config.train.stop_after is None


def test_the_users_own_settings_are_carried() -> None:
    typed = [*OWN_TEXT, "run.name=mine", "parallel.tensor=2", "cluster.device=cpu", "train.num_steps=7"]
    longer, cluster = [run_of(*settings) for settings in launches(*typed)]
    assert longer.data == cluster.data == run_of(*typed).data
    assert longer.parallel.tensor == 2 and longer.train.num_steps == 70
    assert cluster.cluster.kind == "slurm" and cluster.dry_run


def test_names_do_not_grow() -> None:
    assert "run.name=default-1200" in launches("run.name=default-120", "train.num_steps=120")[0]


def test_a_folder_of_presets_is_carried() -> None:
    lines = next_steps(run_of(), None, ["--config-dir=my presets"])[1:]
    assert all("'--config-dir=my presets'" in line for line in lines)


def test_python_is_prompted_for_only_where_it_was_learned() -> None:
    checkpoint = Path("checkpoint")
    own = next_steps(run_of(*OWN_TEXT), checkpoint, OWN_TEXT)
    assert "prompt" not in own[1] and not any("FOLDER" in line for line in own)
    assert generate_command(run_of(*OWN_TEXT), checkpoint).arguments[-1] == "prompt="
    library = next_steps(run_of(), checkpoint, [])
    assert "prompt='class '" in library[1] and any("FOLDER" in line for line in library)
    assert generate_command(run_of(), checkpoint).arguments[-1] == "prompt=import "


# a run that has nothing left to do


def finished(tmp_path: Path, steps: int, *typed: str) -> list[str]:
    """What is said of a run of 12 steps whose newest checkpoint and summary are at `steps`."""
    typed = (f"run.dir={tmp_path}", "cluster.device=cpu", "train.num_steps=12", *typed)
    folder = tmp_path / "checkpoints" / f"step-{steps:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMMITTED").touch()
    (tmp_path / "summary.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return already_finished(run_of(*typed), typed)


def test_a_run_that_is_not_finished_goes_on(tmp_path: Path) -> None:
    assert already_finished(run_of(f"run.dir={tmp_path}"), []) == []
    assert finished(tmp_path, 5) == []
    assert finished(tmp_path, 12)
    (tmp_path / "summary.json").unlink()
    assert already_finished(run_of(f"run.dir={tmp_path}", "train.num_steps=12"), []) == []


def test_a_constant_schedule_goes_on_as_the_same_run(tmp_path: Path) -> None:
    said, command = finished(tmp_path, 12, "schedule=constant")
    assert said.startswith("already finished: 12 steps")
    config = run_of(*settings_of(command))
    assert config.train.num_steps == 24
    assert differences(run_of(f"run.dir={tmp_path}", "train.num_steps=12", "schedule=constant"), config) == []


def test_another_schedule_goes_on_as_another_run(tmp_path: Path) -> None:
    said, command = finished(tmp_path, 12, "run.name=mine")
    assert said.startswith("already finished: 12 steps")
    config = run_of(*settings_of(command))
    assert config.checkpoint.resume == str(tmp_path) and config.train.num_steps == 24
    assert config.run.name != "mine" and config.run.dir != str(tmp_path)


def test_a_fine_tune_goes_on_from_its_own_weights(tmp_path: Path) -> None:
    """With the tokenizer of the weights that it began with, which may be gone."""
    typed = ["+experiment=finetune", f"checkpoint.init_from={tmp_path / 'x'}", f"tokenizer.path={tmp_path / 't'}"]
    said, command = finished(tmp_path, 12, *typed)
    assert said.startswith("already finished: 12 steps")
    config = run_of(*settings_of(command))
    assert (config.checkpoint.resume, config.checkpoint.init_from) == (str(tmp_path), "")
    assert config.tokenizer.path == str(tmp_path / "t") and config.data.prepare.prompt_field == "prompt"


def test_a_run_that_was_to_stop_goes_on_without_that(tmp_path: Path) -> None:
    said, command = finished(tmp_path, 5, "train.stop_after=5")
    assert "step 5 of 12" in said
    assert run_of(*settings_of(command)).train.stop_after is None


def test_a_newest_checkpoint_that_is_damaged_is_told(tmp_path: Path) -> None:
    assert damage(tmp_path) == []
    for step in (6, 12):
        folders.prepare(tmp_path / "checkpoints", step, 0)
        newest = folders.commit(tmp_path / "checkpoints", step, {}, {"tokenizer.model": b"pieces", "a.json": b"{}"})
    assert damage(tmp_path) == []
    (newest / "tokenizer.model").write_bytes(b"piece")
    (newest / "a.json").unlink()
    (warning,) = damage(tmp_path)
    for part in (
        "has lost what a run does not need to go on: ",
        "tokenizer.model: it has 5 bytes, manifest.json says 6 bytes",
        "a.json: the file is missing",
        f"tools/checkpoint.py verify {newest}",
    ):
        assert part in warning
    (newest / "state.json").write_text("{}{}{}{}")
    warning, beside = damage(tmp_path)
    assert "is damaged, no run can go on from it: state.json: it has 8 bytes, " in warning
    assert "tokenizer.model" in beside and "state.json" not in beside
    (newest / "manifest.json").write_text("{}")
    (warning,) = damage(tmp_path)
    assert "no run can go on from it: manifest.json is not the one that was committed" in warning


def test_a_newest_checkpoint_that_the_disk_does_not_show_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.prepare(tmp_path, 6, 0)
    folders.commit(tmp_path, 6, {})

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(outcome, "newest_checkpoint", lambda _: folders.path_of(tmp_path, 6))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    for act in ("stat", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, act, denied)
            (warning,) = damage(tmp_path)
        assert "step-00000006 cannot be checked: " in warning and "Permission denied" in warning
