"""The presets of conf/data and conf/tokenizer, and the tools' commands over them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bigtrain.config.check import check
from bigtrain.config.compose import compose
from bigtrain.data import readers
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer

from . import foreign
from .conftest import load_tool, write_jsonl


@pytest.mark.parametrize(
    ("preset", "name"), [("bpe", "bpe-4096"), ("unigram", "unigram-4096"), ("bpe_32k", "bpe-32000")]
)
def test_the_standard_library_is_named_after_its_tokenizer(preset: str, name: str) -> None:
    config = compose([f"tokenizer={preset}"])
    assert config.data.prepare.out == f"data/stdlib/{name}"
    assert [source.path for source in config.data.train] == [f"data/stdlib/{name}/train"]
    assert [source.path for source in config.data.valid] == [f"data/stdlib/{name}/valid"]
    assert config.tokenizer.path == f"data/stdlib/{name}.model"


@pytest.mark.parametrize(
    ("preset", "path", "name"),
    [
        ("hf", "models/gpt2/tokenizer.json", "gpt2"),
        ("hf", "a b/own.json", "own"),
        ("hf", "models/Llama 3", "Llama-3"),
        ("tiktoken", "cl100k_base.tiktoken", "cl100k_base"),
    ],
)
def test_a_tokenizer_of_others_names_what_is_made_with_it(preset: str, path: str, name: str) -> None:
    for data in ("stdlib", "text"):
        config = compose([f"tokenizer={preset}", f"tokenizer.path={path}", f"data={data}"])
        assert (config.tokenizer.path, config.data.prepare.out) == (path, f"data/{data}/{name}")
        assert config.tokenizer.kind == "file" and config.tokenizer.vocab_size == 0
    (problem,) = (problem for problem in check(compose([f"tokenizer={preset}"]), 1) if "tokenizer" in problem.key)
    assert problem.key == "tokenizer.path" and "is empty" in problem.message


def test_the_standard_library_is_found_without_tests_and_packages() -> None:
    wanted = compose([]).data.prepare
    root = Path(sysconfig.get_path("stdlib"))
    found = [Path(path).relative_to(root).parts for path in readers.find_files(wanted.inputs, wanted.exclude)]
    assert ("json", "decoder.py") in found
    assert not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & {
        part for path in found for part in path
    }
    assert sum((root / Path(*path)).stat().st_size for path in found) > 5e6


def test_own_shards_bring_their_tokenizer() -> None:
    config = compose(["data=shards", "data.prepare.out=D"])
    assert config.data.prepare.inputs == []
    assert (config.data.train[0].path, config.tokenizer.path) == ("D/train", "D/train")
    config = compose(["data=shards", "data.train=[{path: A, weight: 4}, {path: B}]"])
    assert [(source.path, source.weight) for source in config.data.train] == [("A", 4.0), ("B", 1.0)]
    assert config.tokenizer.path == "A"


def test_own_text() -> None:
    config = compose(["data=text", "data.prepare.inputs=[corpus/]"])
    assert config.data.prepare.inputs == ["corpus/"]
    assert config.data.train[0].path == "data/text/bpe-4096/train"


def test_the_tools_make_what_a_run_needs(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, shards = load_tool("tokenizer"), load_tool("shards")
    model, out = str(tmp_path / "t.model"), str(tmp_path / "out")
    assert tokenizer.main(["train", *inputs, "--vocab-size", "360", "--out", model]) == 0
    assert tokenizer.main(["inspect", model, "--text", "def x"]) == 0
    assert "5 bytes" in capsys.readouterr().out
    special = ["--special", "<|user|>", "--special", "<|end|>", "--kind", "unigram"]
    assert tokenizer.main(["train", *inputs, "--vocab-size", "360", "--out", f"{model}2", *special]) == 0
    capsys.readouterr()
    for option, count in ([], 0), (["--specials"], 1):
        assert tokenizer.main(["inspect", f"{model}2", "--text", "x<|end|>", *option]) == 0
        printed = capsys.readouterr().out
        assert "<|user|> 4, <|end|> 5" in printed and printed.count("'<|end|>'") == count
    command = ["build", *inputs, "--tokenizer", model, "--out", out, "--workers", "0", "--held-out", "0.2"]
    assert shards.main(command) == 0
    printed = capsys.readouterr().out
    assert "train/ " in printed and "dropped documents: 2 empty" in printed
    assert shards.main(["verify", out]) == 0
    assert shards.main(command) == 2
    assert tokenizer.main(["inspect", out]) == 2
    assert "already there" in capsys.readouterr().err


def test_the_tools_use_tokenizers_of_others(
    inputs: list[str], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, shards = load_tool("tokenizer"), load_tool("shards")
    ranks = foreign.ranks(texts)
    files = {
        "gpt/tokenizer.json": foreign.dump(foreign.byte_level(texts)),
        "llama/tokenizer.json": foreign.dump(foreign.byte_fallback(texts)),
        "own.tiktoken": foreign.tiktoken_file(ranks),
        "own.tiktoken.json": foreign.tiktoken_settings(ranks),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name, changes in (("gpt", False), ("llama/tokenizer.json", True), ("own.tiktoken", False)):
        assert tokenizer.main(["inspect", str(tmp_path / name), "--text", "def x"]) == 0
        assert "5 bytes" in capsys.readouterr().out
        out = str(tmp_path / "out" / name)
        command = ["build", *inputs, "--tokenizer", str(tmp_path / name), "--out", out, "--workers", "0"]
        assert shards.main(command) == 0
        assert ("note: tokenizer" in capsys.readouterr().out) == changes
        assert shards.main(["verify", out]) == 0 and shards.main(["inspect", out]) == 0
        made = Tokenizer.load(tmp_path / name)
        assert Dataset.open(f"{out}/train").tokenizer.fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--held-out", "2"], "held_out is 2.0: a share of the documents"),
        (["--sample-mb", "-1"], "the sample is -1000000 bytes"),
        (["--field", "body"], "no document is left"),
        (["--special", "</s>"], "the special token '</s>' cannot be"),
    ],
)
def test_the_tokenizer_tool_refuses(
    texts: list[str], tmp_path: Path, option: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = write_jsonl(tmp_path / "x.jsonl", texts), tmp_path / "t.model"
    assert load_tool("tokenizer").main(["train", str(lines), "--vocab-size", "360", "--out", str(out), *option]) == 2
    assert says in capsys.readouterr().err and not out.exists()


def test_the_shards_tool_refuses_a_negative_number_of_workers(
    inputs: list[str], model: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.model").write_bytes(model)
    command = ["build", *inputs, "--tokenizer", str(tmp_path / "t.model"), "--out", str(tmp_path / "out")]
    assert load_tool("shards").main([*command, "--workers", "-2"]) == 2
    assert capsys.readouterr().err == "error: workers is -2: a number of processes, 0 for none but this one\n"


@pytest.mark.parametrize("tool", ["tokenizer", "shards"])
def test_help_has_examples(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_tool(tool).main(["--help"])
    assert exit_.value.code == 0
    assert f"python tools/{tool}.py" in capsys.readouterr().out
