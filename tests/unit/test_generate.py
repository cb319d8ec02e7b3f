"""What `python -m bigtrain.generate` understands, and how a text goes on, with a model whose next token is known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.data import tokenizer_training as training
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.engine.inference import Loaded, continue_text
from bigtrain.generate import Arguments, main, parse

MORE_ROWS = 5
"""Rows of the model's embedding that no piece of the tokenizer has."""


def test_keys_and_their_types() -> None:
    found = parse(["checkpoint=runs/a=b", "max_tokens=7", "temperature=0", "top_k=3", "seed=4", "prompt=a = 1"])
    assert found == Arguments("runs/a=b", "a = 1", 7, 0.0, 3, 4)
    assert isinstance(found.temperature, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=x", "promt=a"], "'promt=a' is no setting .* did you mean prompt?"),
        (["checkpoint=x", "zzz=1"], "the keys are checkpoint, prompt, max_tokens"),
        (["runs/x"], "'runs/x' is no setting"),
        (["checkpoint=x", "max_tokens=many"], "max_tokens=many: it takes int"),
        (["checkpoint=x", "top_k=1.5"], "top_k=1.5: it takes int"),
        (["checkpoint=x", "temperature=hot"], "temperature=hot: it takes float"),
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
    with pytest.raises(UserError, match=message):
        parse(arguments)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint=x", "device=cuda"]) == 2
    assert capsys.readouterr().err == "error: device=cuda: PyTorch sees no GPU here. Set device=cpu or leave it out.\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in Arguments.__dataclass_fields__)


class Successor(torch.nn.Module):
    """After token n comes n + 1, almost surely; `seen` has the windows that it was asked about."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[tuple[list[int], list[int]]] = []

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, mask: None) -> torch.Tensor:
        self.seen.append((tokens_BS[0].tolist(), positions_BS[0].tolist()))
        return 10.0 * torch.nn.functional.one_hot((tokens_BS + 1) % self.rows, self.rows).float()


class Uniform(Successor):
    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor, mask: None) -> torch.Tensor:
        return torch.zeros(*tokens_BS.shape, self.rows)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer(training.train(["def f(x):\n    return x + 1\n"] * 20, vocab_size=290))


@pytest.fixture
def loaded(tokenizer: Tokenizer) -> Iterator[Loaded]:
    yield with_decoder(Successor(tokenizer.vocab_size + MORE_ROWS), tokenizer)


def with_decoder(decoder: Successor, tokenizer: Tokenizer) -> Loaded:
    model = ModelConfig(max_positions=6, vocab_size=decoder.rows)
    return Loaded(decoder, tokenizer, model, 1, torch.device("cpu"))  # type: ignore[arg-type]


def go_on(loaded: Loaded, prompt: str, **settings: float) -> list[int]:
    values = {"max_tokens": 4, "temperature": 0.0, "top_k": 0, "seed": 0} | settings
    return list(continue_text(loaded, prompt, **values))  # type: ignore[arg-type]


def test_it_goes_on_from_the_prompt(loaded: Loaded) -> None:
    last = loaded.tokenizer.encode("return")[-1]
    assert go_on(loaded, "return") == [last + 1, last + 2, last + 3, last + 4]


def test_without_a_prompt_a_document_begins_and_may_end(loaded: Loaded) -> None:
    """<s> is 1 and </s> is 2: the successor ends the document at once, and </s> is no part of the text."""
    assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (1, 2)
    assert go_on(loaded, "") == []


def test_it_reads_no_more_than_the_models_positions(loaded: Loaded) -> None:
    written = go_on(loaded, "return", max_tokens=9)
    assert isinstance(loaded.decoder, Successor)
    tokens, positions = loaded.decoder.seen[-1]
    assert tokens == written[-7:-1] and positions == [0, 1, 2, 3, 4, 5]


def test_rows_without_a_piece_are_never_drawn(tokenizer: Tokenizer) -> None:
    uniform = with_decoder(Uniform(tokenizer.vocab_size + 50 * MORE_ROWS), tokenizer)
    drawn = [token for seed in range(30) for token in go_on(uniform, "x", temperature=1.0, max_tokens=10, seed=seed)]
    assert len(drawn) > 200 and max(drawn) < tokenizer.vocab_size


def test_a_seed_is_a_text(tokenizer: Tokenizer) -> None:
    uniform = with_decoder(Uniform(tokenizer.vocab_size), tokenizer)
    texts = [go_on(uniform, "x", temperature=1.0, max_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
