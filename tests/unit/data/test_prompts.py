"""Prompts are read and not learned. The oracle reads tars with tarfile and cuts text with sentencepiece itself."""

from __future__ import annotations

import json
import math
import random
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

from bigtrain.config.errors import UserError
from bigtrain.data import encoding, ledger, shard_format, tokenising
from bigtrain.data.audit import audit
from bigtrain.data.baseline import unigram_cross_entropies
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.faults import BadDocument
from bigtrain.data.held_out import HeldOut
from bigtrain.data.ledger import Entry
from bigtrain.data.loader import batches, evaluation_batches
from bigtrain.data.order import Order, Source
from bigtrain.data.shards import Dataset
from bigtrain.data.text_tars import TextTars
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.verify import verify
from bigtrain.engine.engine import LossSum
from bigtrain.trainer.evaluator import Evaluator
from tests.unit.data.conftest import WORDS, load_tool

S, LANES, G = 24, 4, 8
Pair = tuple[str, str]


def make_pairs(count: int) -> list[Pair]:
    """Short and long, some without a prompt, and longer than a sequence on either side."""
    rng = random.Random(1)

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    return [(words(rng.choice([2, 30])) * (n % 9 > 0), f"{n} {words(rng.choice([2, 30]))}") for n in range(count)]


PAIRS = make_pairs(90)
BAD = ['{"completion": "x"}', '{"prompt": 7, "completion": "x"}', '{"prompt": "x", "completion": " \\n"}', "nothing"]


def write_pairs(path: Path, pairs: list[Pair], more: list[str] | None = None) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    path.write_text("".join(f"{line}\n" for line in [*lines, *(more or [])]), encoding="utf-8")
    return path


def build_pairs(out: Path, path: Path, tokenizer: Tokenizer, **options: Any) -> Any:
    wanted = BuildOptions([str(path)], field="completion", prompt_field="prompt", shard_tokens=250, **options)
    return build(wanted, tokenizer=tokenizer, out=out, num_workers=0, progress=False)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    build_pairs(root / "built", write_pairs(root / "pairs.jsonl", PAIRS, BAD), tokenizer, held_out=0.2)
    return root / "built"


@pytest.fixture(scope="module")
def expected(folder: Path, model: bytes) -> dict[str, list[tuple[list[int], int]]]:
    """Of each split the (tokens, tokens of the prompt) of its documents, in the order of the tars."""
    by_hand = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
    found: dict[str, list[tuple[list[int], int]]] = {}
    for split in ("train", "valid"):
        for tar in sorted((folder / split).glob("*.tar")):
            with tarfile.open(tar) as members:
                for member in members:
                    if member.name.endswith(".json"):
                        content: Any = members.extractfile(member)
                        number = int(json.loads(content.read())["source"].rpartition(":")[2]) - 1
                        asked, answered = (by_hand.encode(text) for text in PAIRS[number])
                        tokens = [by_hand.bos_id(), *asked, *answered, by_hand.eos_id()]
                        found.setdefault(split, []).append((tokens, 1 + len(asked)))
    return found


def test_prompt_and_completion_are_cut_apart(folder: Path, expected: dict[str, list[tuple[list[int], int]]]) -> None:
    for split, documents in expected.items():
        dataset = Dataset.open(folder / split)
        assert dataset.has_prompts and len(dataset.index.shards) > 1
        assert [(dataset.tokens(n).tolist(), dataset.prompt_tokens(n)) for n in range(len(dataset))] == documents
        assert dataset.num_prompt_tokens == sum(count for _, count in documents)
        assert verify(folder / split, progress=False) == []
    assert sum(map(len, expected.values())) == len(PAIRS)


def test_what_is_left_out_is_counted(folder: Path) -> None:
    assert Dataset.open(folder / "train").index.dropped == {
        "no field 'prompt'": 1,
        "field 'prompt' is not text": 1,
        "field 'completion' is empty": 1,
        "not JSON": 1,
    }


def order_of(folder: Path, pack: str) -> Order:
    source = Source(Dataset.open(folder / "train"))
    return Order([source], seed=5, num_lanes=LANES, sequence_length=S, pack=pack)


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_each_token_of_a_completion_is_learned_once_an_epoch_and_none_of_a_prompt(
    folder: Path, expected: dict[str, list[tuple[list[int], int]]], pack: str
) -> None:
    """Documents are cut over sequences; the mask follows their tokens."""
    order, documents = order_of(folder, pack), expected["train"]
    steps = batches(order, data_rank=0, data_size=1, global_batch_size=G, micro_batch_size=2, start=order.start())
    learned: Counter[tuple[int, int, int]] = Counter()
    num_steps = 2 * sum(len(tokens) for tokens, _ in documents) // (G * S)
    for step in range(num_steps):
        micros = next(steps).microbatches
        rows = [row for micro in micros for row in zip(micro.targets_BS, micro.loss_mask_BS, strict=True)]
        for place, (targets, mask) in enumerate(rows):
            pieces = order.pieces(step * G + place)
            named = [(p.epoch, p.document, p.start + n) for p in pieces for n in range(p.count)]
            for target, is_learned, (epoch, document, token) in zip(targets, mask, named[1:], strict=False):
                tokens, prompt = documents[document]
                if is_learned:
                    assert int(target) == tokens[token] and token >= prompt
                    learned[epoch, document, token] += 1
            assert not mask[max(len(named) - 1, 0) :].any(), "padding"
    ended = order.census(0, num_steps * G, np.zeros(0, np.int64)).epochs_ended
    assert ended.min() >= 1
    whole = {
        (epoch, document, token): 1
        for document, (tokens, prompt) in enumerate(documents)
        for epoch in range(int(ended[document]))
        for token in range(prompt, len(tokens))
    }
    assert {place: count for place, count in learned.items() if place in whole} == whole
    assert max(learned.values()) == 1
    assert any(piece.start > 0 for n in range(num_steps * G) for piece in order.pieces(n)), "none was cut"


class OneNat:
    """A model that says every token costs one nat."""

    runtime: Any = SimpleNamespace(device="cpu", groups=SimpleNamespace(dp=None), all_reduce=lambda tensor, **_: tensor)

    def evaluate(self, microbatches: Any) -> LossSum:
        count = sum(int(micro.loss_mask_BS.sum()) for micro in microbatches)
        return LossSum(torch.tensor(float(count)), torch.tensor(count))


def test_an_evaluation_counts_completions_and_their_bytes_only(
    folder: Path, tokenizer: Tokenizer, expected: dict[str, list[tuple[list[int], int]]]
) -> None:
    held_out = HeldOut([Dataset.open(folder / "valid")], sequence_length=S)
    parts = dict(data_rank=0, data_size=1, global_batch_size=4, micro_batch_size=2)
    found = Evaluator.of(lambda: evaluation_batches(held_out, **parts), tokenizer).evaluate(OneNat())
    completions = [tokens[prompt:] for tokens, prompt in expected["valid"]]
    assert found.tokens == sum(map(len, completions)) > 0
    text_bytes = sum(len(tokenizer.decode(tokens).encode()) for tokens in completions)
    assert found.text_bytes == text_bytes
    assert found.as_record()["bits_per_byte"] == pytest.approx(found.tokens / math.log(2) / text_bytes)
    assert held_out.predicted_tokens().tolist() == [token for tokens in completions for token in tokens]


def test_the_unigram_is_that_of_completions(folder: Path, expected: dict[str, list[tuple[list[int], int]]]) -> None:
    dataset = Dataset.open(folder / "train")
    counts = Counter(token for tokens, prompt in expected["train"] for token in tokens[prompt:])
    total, token = sum(counts.values()) + dataset.index.vocab_size, counts.most_common(1)[0][0]
    found = unigram_cross_entropies([dataset], {"": np.array([token])})
    assert found[""] == pytest.approx(-math.log((counts[token] + 1) / total))


def test_other_prompts_are_other_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same tokens, of which another number is learned."""
    a, b, c = "def", " return", " import"
    built: list[Dataset] = []
    for name, pairs in {"short": [(a, b + c)], "long": [(a + b, c)]}.items():
        build_pairs(tmp_path / name, write_pairs(tmp_path / f"{name}.jsonl", pairs), tokenizer, held_out=0.0)
        built.append(Dataset.open(tmp_path / name / "train"))
    one, other = built
    assert one.tokens(0).tolist() == other.tokens(0).tolist() and one.prompt_tokens(0) < other.prompt_tokens(0)
    assert one.fingerprint != other.fingerprint
    orders = [Order([Source(each)], seed=1, num_lanes=1, sequence_length=4) for each in built]
    assert orders[0].mixture != orders[1].mixture, "a run does not go on with it"


def test_shards_of_plain_text_are_as_they_were(built: Path) -> None:
    dataset = Dataset.open(built / "train")
    index = next((built / "train").glob("*.idx.npy"))
    assert np.load(index).dtype == shard_format.DOCUMENT_DTYPE and "prompt_field" not in dataset.index.made
    assert not dataset.has_prompts and dataset.prompt_tokens(0) == 0 and dataset.num_prompt_tokens == 0


def test_a_changed_prompt_is_found(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "train"
    copy.mkdir()
    for file in (folder / "train").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    index = sorted(copy.glob("*.idx.npy"))[0]
    rows = np.load(index)
    rows["prompt_tokens"][2] += 1
    np.save(index, rows)
    problems = verify(copy, progress=False)
    assert any("sha256 differs" in each for each in problems) and any(
        "the tar and the index" in each for each in problems
    )
    np.save(index, rows[[*(shard_format.DOCUMENT_DTYPE.names or ())]].astype(shard_format.DOCUMENT_DTYPE))
    assert any("the tar and the index" in each for each in verify(copy, progress=False)), "without its prompts"
    rows["prompt_tokens"][2] = rows["num_tokens"][2]
    np.save(index, rows)
    with pytest.raises(UserError, match="a prompt is as long as its document"):
        Dataset.open(copy)


def test_prompts_are_read_from_json_lines_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt: prompts are read from JSON lines only .* 'prompt'"):
        build_pairs(tmp_path / "out", tmp_path / "a.txt", tokenizer, held_out=0.0)


def test_raw_text_has_the_same_prompts(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Tars of .json, of which one has no completion and one is .txt."""
    bad = {"x.json": b'{"prompt": "a", "completion": ""}', "y.txt": b"text"}
    content = {
        f"{n:03d}.json": json.dumps({"prompt": asked, "completion": answered}).encode()
        for n, (asked, answered) in enumerate(PAIRS)
    }
    for name, raw in {**content, **bad}.items():
        (tmp_path / name).write_bytes(raw)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in (*content, *bad):
            tar.add(tmp_path / name, name)
    tars = TextTars.open(str(tmp_path / "0.tar"), tokenizer, field="completion", prompt_field="prompt")
    for number, pair in enumerate(PAIRS):
        tokens, prompt = encoding.encode_pair(tokenizer, *pair)
        assert tars.tokens(number).tolist() == tokens.tolist() and tars.prompt_tokens(number) == prompt
        assert tars.text(number) == "".join(pair)
    for number, reason in ((len(PAIRS), "field 'completion' is empty"), (len(PAIRS) + 1, "it is .txt")):
        with pytest.raises(BadDocument, match=reason):
            tars.tokens(number)
    plain = TextTars.open(str(tmp_path / "0.tar"), tokenizer, field="completion")
    assert plain.fingerprint != tars.fingerprint and plain.prompt_tokens(0) == 0
    order = Order([Source(tars)], seed=1, num_lanes=2, sequence_length=S, max_bad_fraction=0.5)
    windows = [order.sequence(number) for number in range(60)]
    for window in windows:
        places = [(p.document, p.start + n) for p in window.pieces for n in range(p.count)]
        wanted = [n > 0 and token >= tars.prompt_tokens(d) for n, (d, token) in enumerate(places)]
        assert window.predicted.tolist() == wanted


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_the_audit_knows_what_was_learned(folder: Path, pack: str) -> None:
    order = order_of(folder, pack)
    start = order.start()
    loader = batches(order, data_rank=0, data_size=1, global_batch_size=G, micro_batch_size=2, start=start)
    steps = [next(loader) for _ in range(60)]
    entries = [Entry(n, (n - 1) * G, G, 0, 1, step.digest) for n, step in enumerate(steps, start=1)]
    found = audit(order, entries)
    assert found.problems == []
    assert found.tokens == sum(int(micro.loss_mask_BS.sum()) for step in steps for micro in step.microbatches)
    tokens_only = ledger.digest(window.tokens for window in map(order.sequence, range(G)))
    (problem,) = audit(order, [Entry(1, 0, G, 0, 1, tokens_only)]).problems
    assert "what it was fed is not what the order says" in problem, "another mask is other data"


def test_a_tokenizer_that_adds_a_space(tokenizer: Tokenizer) -> None:
    """It stands between prompt and completion once, whether the completion has it or not."""
    spaced = sentencepiece_with_a_space()
    assert spaced.adds_a_space and not tokenizer.adds_a_space
    wanted = [*spaced.encode("def"), *spaced.encode("return")]
    for completion in ("return", " return"):
        tokens, prompt = encoding.encode_pair(spaced, "def", completion)
        assert tokens[1:-1].tolist() == wanted and prompt == 1 + len(spaced.encode("def"))
        assert spaced.decode(tokens.tolist()) == "def return"
        built, _, of_prompt, _ = tokenising._encode(spaced, "def", completion, "<u2")
        assert (b"".join(built), of_prompt) == (tokens.astype("<u2").tobytes(), prompt)
    tokens, prompt = encoding.encode_pair(spaced, "", "return")
    assert tokens[1:-1].tolist() == spaced.encode("return") and prompt == 1


def sentencepiece_with_a_space() -> Tokenizer:
    import io

    from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([" ".join(WORDS)] * 50),
        model_writer=made,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(made.getvalue())


def test_the_tools_show_prompts(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bigtrain.config import frozen
    from bigtrain.config.schema import Config, DataConfig, RunConfig, SourceConfig, TokenizerConfig, TrainConfig

    run = Config(
        run=RunConfig(dir=str(tmp_path)),
        data=DataConfig(train=[SourceConfig(str(folder / "train"))], num_lanes=LANES, pack="best_fit"),
        tokenizer=TokenizerConfig(path=str(folder / "train" / "tokenizer.model")),
        train=TrainConfig(global_batch_size=G, sequence_length=200),
    )
    frozen.save(run, tmp_path)
    assert load_tool("batches").main(["show", str(tmp_path), "--step", "1", "--characters", "9999"]) == 0
    said = capsys.readouterr().out
    order = Order(
        [Source(Dataset.open(folder / "train"))],
        seed=run.run.seed,
        num_lanes=LANES,
        sequence_length=200,
        pack="best_fit",
    )
    for number in range(G):
        for piece in order.pieces(number):
            document, prompt = order.datasets[0].tokens(piece.document).tolist(), 0
            prompt = order.datasets[0].prompt_tokens(piece.document)
            asked, answered = tokenizer.decode(document[:prompt]), tokenizer.decode(document[prompt:])
            learned = f"then {len(document) - prompt} tokens that are:\n{answered}\n"
            assert f"its prompt, {prompt} tokens that are not learned:\n{asked}\n  {learned}" in said
    assert load_tool("shards").main(["inspect", str(folder)]) == 0
    assert "of prompts" in capsys.readouterr().out
