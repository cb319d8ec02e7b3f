"""What `python -m bigtrain.generate` understands, and how a text goes on, with a model whose next token is known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.data import tokenizer_training as training
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.distributed.start import Runtime
from bigtrain.engine.inference import Loaded, Sampling
from bigtrain.engine.prompts import Prompt, read_prompts
from bigtrain.engine.writing import Shown, Writer
from bigtrain.generate import Arguments, main, parse
from bigtrain.model.pointwise import rotary_table
from bigtrain.topology import Topology

MORE_ROWS = 5
"""Rows of the model's embedding that no piece of the tokenizer has."""


def test_keys_and_their_types() -> None:
    found = parse(["checkpoint=runs/a=b", "max_tokens=7", "temperature=0", "top_k=3", "seed=4", "prompt=a = 1"])
    assert found == Arguments("runs/a=b", "a = 1", 7, 0.0, 3, seed=4)
    assert isinstance(found.temperature, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=x", "promt=a"], "'promt=a' is no setting .* did you mean prompt?"),
        (["checkpoint=x", "zzz=1"], "the keys are checkpoint, prompt, max_tokens"),
        (["runs/x"], "'runs/x' is no setting"),
        (["checkpoint=x", "max_tokens=many"], "max_tokens=many: it takes a whole number"),
        (["checkpoint=x", "top_k=1.5"], "top_k=1.5: it takes a whole number"),
        (["checkpoint=x", "temperature=hot"], "temperature=hot: it takes a number"),
        (["checkpoint=x", "cache=perhaps"], "cache=perhaps: it takes true or false"),
        (["checkpoint=x", "top_p=0"], "top_p=0.0: it takes more than 0, at most 1"),
        (["checkpoint=x", "top_p=nan"], "top_p=nan: it takes more than 0"),
        (["checkpoint=x", "tensor=0"], "tensor=0: it takes 1 or more"),
        (["checkpoint=x", "parallel.tensor=two"], "tensor=two: it takes a whole number"),
        (["checkpoint=x", "batch_size=0"], "batch_size=0: it takes 1 or more"),
        (["checkpoint=x", "dtype=int8"], "dtype=int8: it takes fp32, bf16 or fp16"),
        (["checkpoint=x", "prompts=f", "prompt=a"], "prompts=f: it takes a file, and prompt=... is not given"),
        (["checkpoint=x", "out=f"], "out=f: it takes a file, and prompts=FILE beside it"),
        (["checkpoint=x", "prompts=/none/f"], "prompts=/none/f: it cannot be read"),
        (["checkpoint=x", "temperature=nan"], "temperature=nan: it takes 0, or a number"),
        (["checkpoint=x", "temperature=-1"], "temperature=-1.0: it takes 0, or a number"),
        (["checkpoint=x", "temperature=1e-40"], "temperature=1e-40: it takes 0, or a number"),
        (["checkpoint=x", "max_tokens=-1"], "max_tokens=-1: it takes 1 or more"),
        (["checkpoint=x", "top_k=-3"], "top_k=-3: it takes 0 "),
        (["checkpoint=x", "seed=99999999999999999999"], "seed=99999999999999999999: it takes a whole number from 0"),
        (["checkpoint=x", "seed=-1"], "seed=-1: it takes a whole number from 0"),
        (["checkpoint=x", "prompt=caf\udce9"], "prompt='caf.udce9': it is no UTF-8"),
        (["checkpoint=x", "device=gpu"], "device=gpu: it takes auto, cpu or cuda"),
        ([], "checkpoint=... is missing"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert re.search(message, said.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.engine.open_model.open_model", lambda _: SimpleNamespace(check_tensor=lambda _: None))
    assert main(["checkpoint=x", "device=cuda"]) == 2
    assert capsys.readouterr().err == "error: device=cuda: PyTorch sees no GPU here. Set device=cpu or leave it out.\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in Arguments.__dataclass_fields__)


class Successor(torch.nn.Module):
    """After token n comes n + 1, almost surely; `seen` has the tokens and positions that it was asked about."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def hidden(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.seen.append((tokens_BS.tolist(), positions_BS.tolist()))
        if cache is not None:
            cache.at(positions_BS).extended(1, *[torch.zeros(tokens_BS.shape[1], len(tokens_BS), 1, 1)] * 2)
        return tokens_BS.t()[..., None]

    def logits(self, hidden_N1: torch.Tensor) -> torch.Tensor:
        return 10.0 * torch.nn.functional.one_hot((hidden_N1[:, 0] + 1) % self.rows, self.rows).float()


class Uniform(Successor):
    def logits(self, hidden_N1: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(hidden_N1), self.rows)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(training.train(["def f(x):\n    return x + 1\n"] * 20, vocab_size=290))


@pytest.fixture
def loaded(tokenizer: Tokenizer) -> Iterator[Loaded]:
    yield with_decoder(Successor(tokenizer.vocab_size + MORE_ROWS), tokenizer)


def with_decoder(decoder: Successor, tokenizer: Tokenizer, positions: int = 64) -> Loaded:
    model = ModelConfig(max_positions=positions, vocab_size=decoder.rows)
    runtime = Runtime(Topology.of(world=1, tensor=1, pipeline=1, rank=0), torch.device("cpu"), None)
    return Loaded(decoder, tokenizer, model, 1, runtime)  # type: ignore[arg-type]


def writer(loaded: Loaded, max_tokens: int = 4, use_cache: bool = True, **sampling: Any) -> Writer:
    return Writer(loaded, Sampling(**sampling), max_tokens=max_tokens, use_cache=use_cache)


def text_of(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, at_start=False)


def test_it_goes_on_from_the_prompt(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    last = loaded.tokenizer.encode("return")[-1]
    writer(loaded).stream("return")
    said = capsys.readouterr()
    assert said.out == "return" + text_of([last + 1, last + 2, last + 3, last + 4], loaded.tokenizer) + "\n"
    assert re.fullmatch(r"4 tokens in \d+\.\d s, [\d,]+ tokens/s\n", said.err)


def test_without_a_prompt_a_document_begins_and_may_end(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    """<s> is 1 and </s> is 2: the successor ends the document at once, and </s> is no part of the text."""
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (1, 2)
    writer(loaded).stream("")
    said = capsys.readouterr()
    assert said.out == "\n" and said.err.startswith("0 tokens in ")


@pytest.mark.parametrize("use_cache", [True, False])
def test_each_new_token_costs_one_position_with_the_cache(loaded: Loaded, use_cache: bool) -> None:
    writer(loaded, use_cache=use_cache).stream("return x")
    length = len(loaded.tokenizer.encode("return x")) + 1
    assert isinstance(loaded.decoder, Successor)
    read = [len(positions[0]) for _, positions in loaded.decoder.seen]
    assert read == ([length, 1, 1, 1] if use_cache else [length, length + 1, length + 2, length + 3])
    assert [positions[0][-1] for _, positions in loaded.decoder.seen] == list(range(length - 1, length + 3))


def test_a_text_that_outgrows_the_positions_ends_there_and_that_is_told(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = with_decoder(Successor(tokenizer.vocab_size), tokenizer, positions=6)
    writer(loaded, max_tokens=9).stream("return")
    said = capsys.readouterr().err
    assert "the text ends before max_tokens=9: the model has 6 positions, and no more\n" in said
    assert isinstance(loaded.decoder, Successor)
    assert loaded.decoder.seen[-1][1] == [[5]], "the last position was used"
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens, and the model has 6 positions. Shorten it"):
        writer(loaded).stream("return x + 1 return x + 1")
    with pytest.raises(UserError, match="the prompt of line 7 has"):
        writer(loaded).answer([Prompt("x", 3), Prompt("def f(x): return", 7)], 0, out="", batch_size=1)


def test_rows_without_a_piece_are_never_drawn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    uniform = with_decoder(Uniform(tokenizer.vocab_size + 50 * MORE_ROWS), tokenizer)
    asked = [Prompt("x", line) for line in range(30)]
    writer(uniform, max_tokens=10, temperature=1.0).answer(asked, 0, out=str(tmp_path / "out.jsonl"), batch_size=30)
    assert isinstance(uniform.decoder, Successor)
    drawn = [token for tokens, _ in uniform.decoder.seen[1:] for row in tokens for token in row]
    assert len(drawn) > 200 and max(drawn) < tokenizer.vocab_size


def test_a_seed_is_a_text_whatever_the_batch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    uniform = with_decoder(Uniform(tokenizer.vocab_size), tokenizer)
    asked = [Prompt("x", 1), Prompt("def f", 2), Prompt("", 4), Prompt("x", 5)]
    found = {}
    for name, seed, batch_size in (("a", 1, 1), ("b", 1, 3), ("c", 2, 3)):
        out = tmp_path / f"{name}.jsonl"
        writer(uniform, max_tokens=20, temperature=1.0, seed=seed).answer(asked, 0, out=str(out), batch_size=batch_size)
        found[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["a"] == found["b"] != found["c"]
    assert [each["line"] for each in found["a"]] == [1, 2, 4, 5]
    assert found["a"][0]["text"] != found["a"][3]["text"], "the same prompt twice: two texts"


def test_answers_as_text_and_as_json_lines(loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("return\n\n  x = 1\n")
    asked, skipped = read_prompts(tmp_path / "prompts.txt")
    assert [(each.text, each.line) for each in asked] == [("return", 1), ("  x = 1", 3)] and skipped == 1
    writer(loaded).answer(asked, skipped, out=str(tmp_path / "out.jsonl"), batch_size=2)
    writer(loaded).answer(asked, skipped, out="", batch_size=2)
    said = capsys.readouterr()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["prompt"] for each in records] == ["return", "  x = 1"]
    assert all(each["tokens"] == 4 and each["ended"] == "max_tokens" for each in records)
    expected = "".join(f"==> line {each['line']} <==\n{each['prompt']}{each['text']}\n\n" for each in records)
    assert said.out == expected
    assert said.err.count("1 empty lines of the prompts were skipped\n8 tokens in ") == 2
    with pytest.raises(UserError, match="there is such a file already"):
        writer(loaded).answer(asked, 0, out=str(tmp_path / "out.jsonl"), batch_size=2)


def test_prompts_in_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\\nb", "id": 3}\n{"prompt": ""}\n')
    assert [each.text for each in read_prompts(file)[0]] == ["a\nb", ""]
    for line in ('{"text": "a"}', "[]", "3", '"a"', "{", '{"prompt": 3}', '{"prompt": "\\ud800"}', "[" * 100_000):
        file.write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(UserError, match=r"p.jsonl: line 2"):
            read_prompts(file)
    (tmp_path / "p.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(UserError, match=r"line 2 is no UTF-8 \(byte 5 of it\)"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\n \n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(tmp_path / "p.txt")


def test_a_character_is_shown_when_it_is_whole(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown("", enabled=True)
    for byte in "é😀".encode():
        shown.write(bytes([byte]))
    assert capsys.readouterr().out == "é😀"
    shown.write(b"\xf0\x9f")
    shown.end()
    assert capsys.readouterr().out == "\ufffd\n"


def test_mistakes_and_help_need_no_torch() -> None:
    for command in ("generate", "evaluate"):
        for arguments in ("['--help']", "['checkpoint=/none']", "['chekpoint=/none']"):
            code = (
                f"import sys; from bigtrain.{command} import main; main({arguments}); sys.exit('torch' in sys.modules)"
            )
            assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_process_may_train_after_it_generated() -> None:
    """Tables that are kept are no inference tensors, which no backward takes."""
    with torch.inference_mode():
        assert not any(table.is_inference() for table in rotary_table(13, 8, 1e4, torch.device("cpu")))
