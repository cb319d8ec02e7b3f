from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.data import tokenizer_training as training
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.unit.data.conftest import make_texts, write_jsonl


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and valid/ with several shards each."""
    folder, texts = tmp_path_factory.mktemp("shards"), make_texts(200)
    tokenizer = SentencePieceTokenizer(training.train(texts, vocab_size=400))
    options = BuildOptions([str(write_jsonl(folder / "text.jsonl", texts))], held_out=0.2, shard_tokens=1500)
    build(options, tokenizer=tokenizer, out=folder / "data", num_workers=0, progress=False)
    return folder / "data"
