from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import bigtrain.config
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, DataConfig, ModelConfig, PrepareConfig, SourceConfig, TokenizerConfig
from bigtrain.data import build, claim, prepare, writing
from bigtrain.data.shards import Dataset

from . import foreign
from .conftest import make_texts


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run whose text is there, and nothing else."""
    for number, text in enumerate(make_texts(60)):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{number}.py").write_text(text)
    out = tmp_path / "data" / "corpus"
    return Config(
        model=ModelConfig(vocab_size=330),
        data=DataConfig(
            train=[SourceConfig(str(out / "train"))],
            valid=[SourceConfig(str(out / "valid"))],
            num_lanes=8,
            prepare=PrepareConfig(inputs=[str(tmp_path / "text" / "*.py")], out=str(out), held_out=0.2),
        ),
        tokenizer=TokenizerConfig(path=f"{out}.model", vocab_size=330),
    )


def run(config: Config) -> list[str]:
    said: list[str] = []
    prepare.prepare(config.data, config.tokenizer, num_workers=0, progress=False, say=said.append)
    return said


def with_prepare(config: Config, **values: object) -> Config:
    changed = replace(config.data.prepare, **values)  # pyright: ignore[reportArgumentType]
    return replace(config, data=replace(config.data, prepare=changed))


def test_makes_what_is_missing_and_keeps_what_is_there(config: Config) -> None:
    said = run(config)
    assert [line.split()[0] for line in said] == ["trained", "built", "built", "built"]
    lines = prepare.check(config)
    train, valid = (Dataset.open(source.path) for source in (config.data.train[0], config.data.valid[0]))
    assert len(train) + len(valid) == 60
    assert lines[0].startswith(f"train: {len(train)} documents, {train.index.num_tokens:,} tokens")

    before = {path: path.stat().st_mtime_ns for path in Path(config.tokenizer.path).parent.rglob("*")}
    said = run(config)
    assert len(said) == 2 and all("there" in line for line in said)
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.tokenizer.path).parent.rglob("*")}


def test_the_run_is_not_in_the_data(config: Config) -> None:
    run(config)
    first = Dataset.open(config.data.train[0].path).fingerprint
    shutil.rmtree(config.data.prepare.out)
    Path(config.tokenizer.path).unlink()
    run(replace(config, run=replace(config.run, seed=99)))
    assert Dataset.open(config.data.train[0].path).fingerprint == first


def test_the_tokenizer_sees_no_held_out_text(config: Config) -> None:
    texts = make_texts(60)
    files = sorted(str(path) for path in Path(config.data.prepare.inputs[0]).parent.glob("*.py"))
    seen = list(prepare.training_texts(files, field="text", held_out=0.2, progress=False))
    run(config)
    held_out = set(texts) - set(seen)
    assert len(held_out) == len(Dataset.open(config.data.valid[0].path)) > 0
    assert len(seen) == len(Dataset.open(config.data.train[0].path))


def test_too_few_documents_are_known_before_the_tokenizer(config: Config) -> None:
    few = with_prepare(config, inputs=[str(Path(config.data.prepare.inputs[0]).with_name("1?.py"))], held_out=0.01)
    with pytest.raises(UserError) as caught:
        run(replace(few, data=replace(few.data, num_lanes=64)))
    said = str(caught.value)
    for part in (
        "10, of which 9 for train/ and 1 for valid/",
        "data.num_lanes=64",
        "data.num_lanes to at most 9",
        "text",
    ):
        assert part in said
    assert not Path(config.tokenizer.path).exists()


def test_why_documents_are_dropped_is_said(config: Config, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"body": "x"}\n' * 3)
    (tmp_path / "bad" / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "bad" / "c.txt").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        run(with_prepare(config, inputs=[str(tmp_path / "bad")]))
    assert str(caught.value).replace(str(tmp_path), "") == (
        "no document is left. Dropped: 1 empty (such as /bad/c.txt), 3 no field 'text' (such as /bad/a.jsonl:1), 1 not "
        "UTF-8 (such as /bad/b.txt); data.prepare.json_field (--field) names the key that holds the text, "
        "prompt_field that of a prompt"
    )


def test_one_large_file_is_enough(config: Config, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("\n\n".join(make_texts(3000)))
    config = with_prepare(config, inputs=[str(tmp_path / "input.txt")], held_out=0.05)
    run(replace(config, data=replace(config.data, num_lanes=64)))
    assert len(Dataset.open(config.data.train[0].path)) > 100


def test_nothing_to_prepare(config: Config) -> None:
    assert run(with_prepare(config, inputs=[])) == []
    assert not Path(config.tokenizer.path).exists()


def test_a_tokenizer_of_another_size_is_refused(config: Config) -> None:
    run(config)
    with pytest.raises(UserError, match=r"vocab_size is 300, but .*\.model is there with 330 pieces"):
        run(replace(config, tokenizer=replace(config.tokenizer, vocab_size=300)))


def test_special_tokens(config: Config) -> None:
    run(config)
    config = replace(config, tokenizer=replace(config.tokenizer, specials=["<|user|>"]))
    with pytest.raises(UserError, match=r"tokenizer\.specials has <\|user\|>, but .*\.model is there without"):
        run(config)
    shutil.rmtree(config.data.prepare.out)
    Path(config.tokenizer.path).unlink()
    run(config)
    assert Dataset.open(config.data.train[0].path).tokenizer.specials["<|user|>"] == 4
    assert len(run(config)) == 2


@pytest.fixture
def foreign_config(config: Config, tmp_path: Path) -> Config:
    """A run with the tokenizer.json of others, which changes text."""
    (tmp_path / "tokenizer.json").write_bytes(foreign.dump(foreign.byte_fallback(make_texts(60))))
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), kind="file", vocab_size=0)
    return replace(config, tokenizer=tokenizer, model=ModelConfig(vocab_size=1000))


def test_a_tokenizer_of_others_is_used_as_it_is(
    foreign_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bigtrain.config.save(foreign_config, tmp_path / "run")
    assert prepare.main([str(tmp_path / "run")]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith(f"tokenizer {foreign_config.tokenizer.path} is there: Hugging Face tokenizer.json, ")
    assert [line for line in said if line.startswith("note: tokenizer")] == [said[-1]]
    assert (Path(foreign_config.data.train[0].path) / "tokenizer.json").is_file()
    assert prepare.main([str(tmp_path / "run")]) == 0


def test_too_many_pieces_are_known_before_the_shards(
    foreign_config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bigtrain.config.save(replace(foreign_config, model=ModelConfig(vocab_size=100)), tmp_path / "run")
    assert prepare.main([str(tmp_path / "run")]) == 2
    assert "model.vocab_size is 100, but tokenizer" in capfd.readouterr().err
    assert not Path(foreign_config.data.prepare.out).exists()


def test_a_tokenizer_of_others_that_is_not_there_is_not_trained(foreign_config: Config) -> None:
    Path(foreign_config.tokenizer.path).unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        run(foreign_config)
    assert not Path(foreign_config.tokenizer.path).exists()


@pytest.mark.parametrize("values", [{"held_out": 0.1}, {"exclude": ["*x*"]}, {"json_field": "body"}])
def test_shards_made_in_another_way_are_refused(config: Config, values: dict[str, object]) -> None:
    run(config)
    with pytest.raises(UserError, match=r"was built with (held_out|exclude|field)="):
        run(with_prepare(config, **values))


def test_shards_of_another_tokenizer_are_refused(config: Config, model: bytes) -> None:
    run(config)
    Path(config.tokenizer.path).write_bytes(model)
    other = replace(config, tokenizer=replace(config.tokenizer, vocab_size=420))
    with pytest.raises(UserError, match="was built with the tokenizer"):
        run(other)


def test_another_launch_that_was_faster_is_fine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = build.build

    def late(*arguments: object, **options: object) -> object:
        real(*arguments, **options)  # pyright: ignore
        return real(*arguments, **options)  # pyright: ignore

    monkeypatch.setattr(build, "build", late)
    assert "are there" in run(config)[-1]


def test_a_launch_waits_for_another_that_builds(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_POLL_S", 0.05)
    out = Path(config.data.prepare.out)
    said: list[str] = []
    second = threading.Thread(
        target=lambda: prepare.prepare(
            config.data, config.tokenizer, num_workers=0, progress=False, say=lambda line: said.append(line)
        )
    )
    with claim.locked(out):
        second.start()
        deadline = time.monotonic() + 60
        while not any(line.startswith("waiting: ") for line in said) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said[-1].startswith(f"waiting: {out} is being built at this moment by process ")
        time.sleep(0.2)
    second.join(60)
    assert [line.split()[0] for line in said] == ["trained", "waiting:", "built", "built", "built"]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_launch_goes_on_with_a_build_that_was_stopped(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_index", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    said = run(config)
    assert "is there: sentencepiece, 330 pieces" in said[0]
    assert "goes on with a build that was stopped: all 60 documents are tokenised, 2 shards are written" in said[1]


def test_check_refuses_a_model_too_small(config: Config) -> None:
    run(config)
    with pytest.raises(UserError, match=r"model\.vocab_size is 300, .* has 330 pieces"):
        prepare.check(replace(config, model=ModelConfig(vocab_size=300)))


def test_check_refuses_too_many_lanes(config: Config) -> None:
    run(config)
    with pytest.raises(UserError, match=r"too few for data\.num_lanes=64"):
        prepare.check(replace(config, data=replace(config.data, num_lanes=64)))


@pytest.mark.parametrize("form", ["folder", "file"])
def test_the_command_reads_the_frozen_config(
    config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str], form: str
) -> None:
    run(config)
    path = bigtrain.config.save(config, tmp_path / "run")
    assert prepare.main([str(path if form == "file" else path.parent)]) == 0
    assert "are there" in capfd.readouterr().out


def test_the_command_says_errors_in_one_line(config: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bigtrain.config.save(with_prepare(config, inputs=["/nowhere/*.txt"]), tmp_path / "run")
    assert prepare.main([str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err == (
        "error: input '/nowhere/*.txt': no such file or folder, and no file matches it as a pattern\n"
    )
    assert prepare.main([]) == 2


def test_importing_it_takes_nothing_that_is_slow() -> None:
    slow = {"torch", "pyarrow", "requests", "fsspec", "s3fs", "aiohttp", "webdataset"}
    code = f"import sys, bigtrain.data.prepare, bigtrain.data.order; sys.exit(bool({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
