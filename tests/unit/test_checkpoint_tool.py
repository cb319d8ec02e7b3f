"""tools/checkpoint.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bigtrain.checkpoint import folder as folders
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer_training import train
from tests.unit.data.conftest import TRICKY, load_tool, make_texts
from tests.unit.hf_models import LLAMA, logits, weights, write

main = load_tool("checkpoint").main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint."""
    tokenizer = SentencePieceTokenizer(train(make_texts(150), vocab_size=LLAMA.vocab_size))
    write(tmp_path / "run" / "checkpoints", LLAMA, weights(LLAMA), files=tokenizer.files)
    return tmp_path / "run"


def test_out_in_and_out_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert main(["export-hf", str(run), str(first), "--dtype", "bf16", "--shard-gb", "0.00003"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM, 21 tensors" in said and "dtype bf16, 420 rows" in said and "step-00000007" in said
    assert main(["import-hf", str(first), str(tmp_path / "again"), "--vocab-multiple", "64"]) == 0
    assert "448 rows of the vocabulary, 28 of them padding" in capsys.readouterr().out
    assert main(["export-hf", str(tmp_path / "again"), str(second), "--shard-gb", "0.00003"]) == 0
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} < set(names)
    assert json.loads((first / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}
    tokenizer = SentencePieceTokenizer((folders.resolve(run) / "tokenizer.model").read_bytes())
    theirs = AutoTokenizer.from_pretrained(second)
    for text in TRICKY:
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_without_a_tokenizer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders.resolve(run) / "tokenizer.model").unlink()
    assert main(["export-hf", str(run), str(tmp_path / "a")]) == 2
    assert "the folder has no tokenizer.model" in capsys.readouterr().err
    assert main(["export-hf", str(run), str(tmp_path / "a"), "--no-tokenizer"]) == 0
    assert main(["import-hf", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert main(["import-hf", str(tmp_path / "a"), str(tmp_path / "b"), "--no-tokenizer"]) == 0
    assert logits(tmp_path / "a", torch.arange(10)[None]).shape == (1, 10, 420)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export-hf", "nowhere", "x"], "checkpoint nowhere: there is no such folder"),
        (["export-hf", "step-00000001", "x"], "checkpoint step-00000001: there is no such folder"),
        (["import-hf", "nowhere", "x"], "nowhere: there is no such folder"),
    ],
)
def test_one_error_and_no_traceback(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "HF"],
        ["verify", "HF"],
        ["verify", "HF", "--all"],
        ["diff", "HF", "HF"],
        ["reshard", "HF", "x"],
        ["export-hf", "HF", "x"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["llama", "step-00000300"])
def test_a_hugging_face_folder_is_told_from_a_checkpoint(
    tmp_path: Path, arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    places = {"HF": str(folder), "x": str(tmp_path / "x")}
    assert main([places.get(each, each) for each in arguments]) == 2
    said = capsys.readouterr()
    make = f"python tools/checkpoint.py import-hf {folder} CKPT"
    assert said.out == ""
    assert said.err == f"error: checkpoint {folder}: it is a Hugging Face folder. Make a checkpoint of it: {make}\n"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arguments", [[], ["export-hf"], ["export-hf", "a", "b", "--shard-gb", "0"], ["melt"]])
def test_arguments_that_are_wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the same error of a write."""
    assert main(["export-hf", str(run), str(tmp_path / "hf")]) == 0
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)); "
    program = f"{limited}runpy.run_path('tools/checkpoint.py', run_name='__main__')"
    for arguments in (
        ["export-hf", str(run), str(tmp_path / "x")],
        ["import-hf", str(tmp_path / "hf"), str(tmp_path / "y")],
    ):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run", "y"]
    assert list((tmp_path / "y").iterdir()) == []


def test_help_comes_without_torch() -> None:
    program = """
import runpy, sys
sys.argv = ["checkpoint.py", "--help"]
try:
    runpy.run_path("tools/checkpoint.py", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert "export-hf" in done.stdout and done.stdout.endswith("False\n")
