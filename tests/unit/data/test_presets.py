"""The presets of conf/data and conf/tokenizer, and the tools' commands over them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bigtrain.config.compose import compose
from bigtrain.data import readers

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
    assert (config.data.train[0].path, config.tokenizer.path) == ("D/train", "D/train/tokenizer.model")
    config = compose(["data=shards", "data.train=[{path: A, weight: 4}, {path: B}]"])
    assert [(source.path, source.weight) for source in config.data.train] == [("A", 4.0), ("B", 1.0)]
    assert config.tokenizer.path == "A/tokenizer.model"


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
    command = ["build", *inputs, "--tokenizer", model, "--out", out, "--workers", "0", "--held-out", "0.2"]
    assert shards.main(command) == 0
    printed = capsys.readouterr().out
    assert "train/ " in printed and "dropped documents: 2 empty" in printed
    assert shards.main(["verify", out]) == 0
    assert shards.main(command) == 2
    assert tokenizer.main(["inspect", out]) == 2
    assert "already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--held-out", "2"], "held_out is 2.0: a share of the documents"),
        (["--sample-mb", "-1"], "the sample is -1000000 bytes"),
        (["--field", "body"], "no document is left"),
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
