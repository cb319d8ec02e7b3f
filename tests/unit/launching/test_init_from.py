"""Weights to start from, as a launch looks at them before any rank starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_config
from bigtrain.config.check import check
from bigtrain.config.schema import CheckpointConfig, Config, ModelConfig, RunConfig, TokenizerConfig
from bigtrain.data import tokenizer_training as training
from bigtrain.launching import init_from, preflight

MODEL = ModelConfig(vocab_size=512)
NO_MODEL = {"format": folders.FORMAT, "config": {}}
TEXTS = [f"text {number} of some words that are there" for number in range(300)]


@pytest.fixture(scope="module")
def tokenizers() -> list[bytes]:
    return [training.train(TEXTS, vocab_size=size) for size in (300, 310)]


def commit(run: Path, step: int, files: dict[str, bytes], model: ModelConfig = MODEL, **state: Any) -> Path:
    """A checkpoint without tensors."""
    root = run / "checkpoints"
    folders.partial_of(root, step).mkdir(parents=True)
    made = {"format": folders.FORMAT, "step": step, "config": {"model": asdict(model)}, **state}
    return folders.commit(root, step, made, files)


@pytest.fixture
def source(tmp_path: Path, tokenizers: list[bytes]) -> Path:
    for step in (10, 20):
        commit(tmp_path / "x", step, {"tokenizer.model": tokenizers[0]})
    return tmp_path / "x"


def config_of(tmp_path: Path, named: Path, tokenizer: bytes | None, model: ModelConfig = MODEL) -> Config:
    path = tmp_path / "run.model"
    if tokenizer is not None:
        path.write_bytes(tokenizer)
    return Config(
        run=RunConfig(name="fine", dir=str(tmp_path / "fine")),
        model=model,
        checkpoint=CheckpointConfig(init_from=str(named)),
        tokenizer=TokenizerConfig(path=str(path)),
    )


def told(config: Config) -> str:
    return "\n".join(str(problem) for problem in init_from.problems(config))


def test_a_run_is_its_newest_checkpoint(source: Path, tmp_path: Path, tokenizers: list[bytes]) -> None:
    newest = str(source / "checkpoints" / "step-00000020")
    for named in (source, source / "checkpoints", source / "checkpoints" / "latest"):
        settled = init_from.settled(config_of(tmp_path, named, tokenizers[0]))
        assert (settled.checkpoint.init_from, settled.tokenizer.path) == (newest, str(tmp_path / "run.model"))
        assert told(settled) == "" and init_from.settled(settled) == settled


def test_the_tokenizer_of_the_weights_is_copied(source: Path, tmp_path: Path, tokenizers: list[bytes]) -> None:
    """As the weights may be gone when the run goes on."""
    config = replace(config_of(tmp_path, source, None), tokenizer=TokenizerConfig(path=str(source), kind="file"))
    settled, own = init_from.settled(config), tmp_path / "fine" / "tokenizer"
    assert (
        settled.tokenizer.path == str(own) and told(settled) == "" and not list(preflight._missing_tokenizer(settled))
    )
    assert not own.exists(), "nothing is written before all is checked"
    init_from.copy_tokenizer(settled)
    assert (own / "tokenizer.model").read_bytes() == tokenizers[0]
    commit(tmp_path / "fine", 5, {}, init_from={"from": str(source / "checkpoints" / "step-00000010")})
    again = init_from.settled(config)
    init_from.copy_tokenizer(again)
    assert again == settled and told(again) == "" and (own / "tokenizer.model").read_bytes() == tokenizers[0]
    bare = commit(tmp_path / "bare", 1, {})
    config = replace(config, run=RunConfig(name="new", dir=str(tmp_path / "new")))
    bare_config = replace(
        config, checkpoint=CheckpointConfig(init_from=str(bare)), tokenizer=TokenizerConfig(path=str(bare))
    )
    assert "there is no tokenizer with the weights" in told(init_from.settled(bare_config))


def test_another_model_is_told_with_the_settings_that_make_it_this_one(
    source: Path, tmp_path: Path, tokenizers: list[bytes]
) -> None:
    ours = replace(MODEL, num_layers=7, tie_embeddings=True, max_positions=99, hidden_dropout=0.5)
    assert told(config_of(tmp_path, source, tokenizers[0], ours)) == (
        "model.num_layers=7: the model of checkpoint.init_from has 6. To start from its weights, set "
        "model.num_layers=6 model.tie_embeddings=false."
    )


def test_another_tokenizer(source: Path, tmp_path: Path, tokenizers: list[bytes]) -> None:
    assert "tokenizer.path=" in told(config_of(tmp_path, source, tokenizers[1]))
    assert "is not the tokenizer of checkpoint.init_from" in told(config_of(tmp_path, source, tokenizers[1]))
    (tmp_path / "run.model").unlink()
    assert "a new one would be trained" in told(config_of(tmp_path, source, None))
    bare = commit(tmp_path / "bare", 1, {})
    assert told(config_of(tmp_path, bare, tokenizers[1])) == "", "there is nothing to compare"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: (step / "COMMITTED").unlink(), "it was never committed"),
        (lambda step: (step / "state.json").write_text("{"), "state.json cannot be read"),
        (
            lambda step: (step / "state.json").write_text(json.dumps(NO_MODEL)),
            "not one that this version knows",
        ),
        (lambda step: step.rename(step.with_name("gone")), "there is no such folder"),
    ],
)
def test_what_is_no_checkpoint(
    source: Path, tmp_path: Path, tokenizers: list[bytes], damage: Any, message: str
) -> None:
    step = source / "checkpoints" / "step-00000020"
    damage(step)
    (text,) = told(config_of(tmp_path, step, tokenizers[0])).splitlines()
    assert text.startswith(f"checkpoint.init_from={step}: ") and message in text


def test_a_hugging_face_folder(tmp_path: Path, tokenizers: list[bytes]) -> None:
    theirs = hf_config.to_theirs(MODEL, dtype="fp32", vocab_size=510, bos_id=1, eos_id=2)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(theirs))
    text = told(config_of(tmp_path, tmp_path / "hf", tokenizers[0]))
    assert text.startswith("model.vocab_size=512: the model of checkpoint.init_from has 510")
    assert "import-hf --vocab-multiple" in text
    assert told(config_of(tmp_path, tmp_path / "hf", tokenizers[0], replace(MODEL, vocab_size=510))) == ""
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**theirs, "model_type": "mamba"}))
    assert "model_type" in told(config_of(tmp_path, tmp_path / "hf", tokenizers[0]))


def test_a_run_that_has_begun_goes_on_from_its_own(source: Path, tmp_path: Path, tokenizers: list[bytes]) -> None:
    """Whatever became of the weights that it began with; but it says where others are named."""
    first = source / "checkpoints" / "step-00000010"
    commit(tmp_path / "fine", 5, {}, init_from={"from": str(first), "from_step": 10})
    newest = config_of(tmp_path, source / "checkpoints" / "step-00000020", tokenizers[1], replace(MODEL, num_layers=9))
    assert told(newest) == ""
    shutil.rmtree(source)
    assert told(init_from.settled(config_of(tmp_path, source, None))) == ""
    other = commit(tmp_path / "y", 20, {})
    assert told(config_of(tmp_path, other, None)) == (
        f"checkpoint.init_from={other}: the run fine has checkpoints, and began with {first}. Choose another run.name, "
        "or leave it out to go on."
    )
    commit(tmp_path / "fine", 6, {})
    assert "began with random weights" in told(newest)


def test_it_is_not_both_started_and_gone_on_with(tmp_path: Path) -> None:
    config = Config(checkpoint=CheckpointConfig(init_from="a", resume="b"))
    (text,) = (str(each) for each in check(config, 1) if each.key == "checkpoint.init_from")
    assert "a run starts from weights, or goes on from checkpoint.resume=b, not both" in text
    for resume in ("auto", "never"):
        config = Config(checkpoint=CheckpointConfig(init_from="a", resume=resume))
        assert not [each for each in check(config, 1) if each.key == "checkpoint.init_from"]
