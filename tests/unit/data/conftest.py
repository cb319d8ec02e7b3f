"""A small corpus with everything that is hard in it, a tokenizer trained on it, and shards built from it."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

from bigtrain.data import tokenizer_training as training
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer import Tokenizer

TRICKY = [
    "tabs\tand\t\ttabs\n\tindented\r\nCRLF\rCR\n\n\n",
    "  leading, trailing and   inner spaces   ",
    "nul \x00 bell \x07 vertical \x0b form \x0c end",
    "emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1eb\U0001f1f7 combining e\u0301 o\u0308\u0323",
    "sentencepiece's own space \u2581 here \u2581\u2581x and unk \u2047",
    "specials as text <s> </s> <unk> <pad> <0x0A> <0xE2>",
    "\ufeffbyte order mark, nbsp \u00a0, line separator \u2028, ligature \ufb01, roman \u2163, \ufffd",
    "\u4e2d\u6587 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f",
    " ",
    "\n",
    "x" * 5000,
]
WORDS = [
    "def",
    "return",
    "self",
    "import",
    "for",
    "in",
    "range",
    "print",
    "None",
    "0",
    "17",
    "(",
    ")",
    ":",
    "=",
    "#",
    "of",
]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths, all distinct."""
    rng = random.Random(seed)
    return [
        f"document {seed}.{number}\n"
        + "\n".join(
            " " * rng.choice([0, 4, 8]) + " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
            for _ in range(int(rng.lognormvariate(1.5, 1)) + 1)
        )
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module."""
    path = Path(__file__).parents[3] / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """What the shards of `built` hold: 150 documents, some tricky, one of them three times."""
    tricky = [text for text in TRICKY if text.strip()]
    return [*make_texts(147 - len(tricky)), *tricky, "a copy", "a copy", "a copy"]


@pytest.fixture(scope="session")
def model(texts: list[str]) -> bytes:
    return training.train(texts, vocab_size=420, kind="bpe")


@pytest.fixture(scope="session")
def tokenizer(model: bytes) -> Tokenizer:
    return SentencePieceTokenizer(model)


@pytest.fixture(scope="session")
def inputs(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Half of the texts as files in folders, half as JSON lines, and some that must be dropped."""
    root = tmp_path_factory.mktemp("corpus")
    half = len(texts) // 2
    for number, text in enumerate(texts[:half]):
        path = root / "files" / f"part{number % 3}" / f"{number:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (root / "files" / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "files" / "empty.txt").write_bytes(b"")
    (root / "files" / "blank.txt").write_bytes(b" \n\t\n")
    lines = write_jsonl(root / "lines.jsonl", texts[half:])
    with lines.open("a", encoding="utf-8") as file:
        file.write('not json\n{"other": "x"}\n{"text": 7}\n{"text": "half a pair \\ud800"}\n')
    return [str(root / "files"), str(lines)]


@pytest.fixture(scope="session")
def built(inputs: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of `texts`, several a split."""
    out = tmp_path_factory.mktemp("built") / "corpus"
    options = BuildOptions(inputs, held_out=0.2, seed=3, shard_tokens=1000)
    build(options, tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    return out
