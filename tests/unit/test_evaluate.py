"""What `python -m bigtrain.evaluate` understands and refuses, on folders that hold no weights."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from bigtrain.checkpoint import folder as folders
from bigtrain.config import evaluation_sets
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, DataConfig, EvalConfig, ModelConfig, SourceConfig, TrainConfig
from bigtrain.data import tokenizer_training as training
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.engine.open_model import open_model
from bigtrain.evaluate import Arguments, main, parse
from bigtrain.trainer import lm_tasks
from bigtrain.trainer.evaluation import HeldOutSets

TEXT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: shards, and a checkpoint without tensors."""
    root = tmp_path_factory.mktemp("run")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": TEXT * (1 + n % 5)}) + "\n" for n in range(60)))
    tokenizer = SentencePieceTokenizer(training.train([TEXT] * 20, vocab_size=290))
    options = BuildOptions([str(root / "text.jsonl")], held_out=0.3)
    build(options, tokenizer=tokenizer, out=root / "data", num_workers=0, progress=False)
    config = Config(
        model=ModelConfig(num_layers=1, vocab_size=290, max_positions=64, position="learned"),
        data=DataConfig(valid=[SourceConfig(str(root / "data" / "valid"))]),
        train=TrainConfig(global_batch_size=4, micro_batch_size=2, sequence_length=32),
        eval=EvalConfig(num_batches=2),
    )
    folders.partial_of(root / "checkpoints", 5).mkdir(parents=True)
    folders.commit(
        root / "checkpoints", 5, {"format": folders.FORMAT, "step": 5, "config": asdict(config)}, tokenizer.files
    )
    return root


def test_keys() -> None:
    assert parse(["checkpoint=a", "--lm-eval", "x,y"]) == parse(["checkpoint=a", "lm_eval=x,y"])
    assert parse(["checkpoint=a", "parallel.tensor=2", "ranks=4"]) == Arguments("a", tensor=2, ranks=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dat=x"], "'dat=x' is no setting of bigtrain.evaluate; did you mean data"),
        (["tensor=2", "ranks=3"], "ranks=3: it takes a multiple of tensor"),
        (["num_tokens=-2"], "num_tokens=-2: it takes 0 .all. or more"),
        (["sequence_length=1"], "sequence_length=1: it takes 2 or more"),
        (["dtype=int8"], "dtype=int8: it takes fp32, bf16, fp16 or auto"),
        (["--lm-eval", "x", "data=y"], "lm_eval=x: it takes tasks, and data=... is not given"),
        (["--lm-eval", "x", "ranks=2"], "ranks=2: it takes as many as tensor, with lm-eval"),
        (["include_path=x"], "include_path=x: it takes a folder, and --lm-eval TASKS"),
        (["--lm-eval"], "--lm-eval is the last argument"),
        (["data=/none"], "/none: no such folder"),
        (["data={a: {b: c}}"], "the set a is"),
        (["data=[3]"], "a source has no path"),
        (["data=[{path: x, wieght: 3}]"], "wieght means nothing here"),
        (["data={a: "], "it cannot be read"),
        (["data={a b: /none}"], "a set's name has letters"),
        (["sequence_length=65"], "the model has learned positions for 64 tokens only"),
        (["tensor=7"], r"tensor=7: the model does not divide .*model.num_attention_heads="),
        (["out=/none/file"], "out=/none/file: it cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"checkpoint={run}", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert re.search(message, said.err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": "two"}, "model.num_layers='two'"),
        ({"hidden_size": 0}, "model.hidden_size=0"),
        ({"norm": "none"}, "model.norm=none"),
        ({"experts": 8}, "unexpected keyword argument 'experts'"),
    ],
)
def test_a_model_that_is_not_known(run: Path, change: dict[str, object], message: str, tmp_path: Path) -> None:
    state = folders.state_of(folders.resolve(run))
    state["config"]["model"] |= change
    folders.partial_of(tmp_path, 5).mkdir()
    folders.commit(tmp_path, 5, state)
    with pytest.raises(UserError, match=f"its model is not one that this version knows .*{message}"):
        open_model(tmp_path)


def test_lm_eval_is_asked_for_where_it_is_missing(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_tasks, "find_spec", lambda _: None)
    assert main([f"checkpoint={run}", "--lm-eval", "hellaswag"]) == 2
    assert (
        capsys.readouterr().err == "error: --lm-eval: lm-eval is not installed here. Install it: pip install lm-eval\n"
    )


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {key} ", said, re.MULTILINE) for key in Arguments.__dataclass_fields__)


def test_as_many_sequences_as_the_run_took_or_as_are_asked_for(run: Path) -> None:
    opened = open_model(run)
    assert (opened.step, opened.model.num_layers) == (5, 1)
    assert HeldOutSets.of(opened).sets[""].num_sequences == 8
    assert HeldOutSets.of(opened, num_tokens=33).sets[""].num_sequences == 2
    everything = HeldOutSets.of(opened, num_tokens=0).sets[""]
    assert everything.num_sequences > 8 and HeldOutSets.of(opened).micro_batch_size == 2
    named = HeldOutSets.of(opened, data=f"{{a: {run / 'data' / 'valid'}, b: {run / 'data' / 'train'}}}")
    assert list(named.sets) == ["a", "b"]


def test_where_data_are_as_they_may_be_written() -> None:
    assert evaluation_sets.parse("a/b") == [SourceConfig("a/b")]
    assert evaluation_sets.parse("s3://b/{x}") == [SourceConfig("s3://b/{x}")]
    assert evaluation_sets.parse("[{path: a}, {path: b}]") == [SourceConfig("a"), SourceConfig("b")]
    found = evaluation_sets.parse("{web: a, code: [{path: b}, {path: c}]}")
    assert [(each.path, each.set) for each in found] == [("a", "web"), ("b", "code"), ("c", "code")]
    for empty in ("[]", "{a: []}", "{a: 3}"):
        with pytest.raises(UserError):
            evaluation_sets.parse(empty)
