"""Asking a model: cached as uncached, a batch as one by one, tensor-parallel as alone, and as Transformers has it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigtrain.config.schema import ModelConfig
from tests import oracle
from tests.distributed import small
from tests.distributed.harness import PoolFactory, RankError

LOUD = replace(small.LLAMA, init_std=0.3, num_layers=3)
"""Large weights, so that the logits of two tokens are seldom close and every token read matters."""
MODELS = {
    "rope, gqa": LOUD,
    "rope, all heads, tied": replace(LOUD, num_query_groups=8, tie_embeddings=True),
    "rope, one group, layernorm, gelu, bias": replace(
        LOUD, num_query_groups=1, norm="layernorm", activation="gelu", bias=True
    ),
    "learned, tied (gpt-2)": replace(small.GPT2, init_std=0.3),
    "learned, gqa, rmsnorm, swiglu": replace(LOUD, position="learned", max_positions=64),
}
LENGTHS = (1, 9, 4, 17)
NEW = 24


def prompts(vocab_size: int = small.LLAMA.vocab_size) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def made(model: ModelConfig, tensor: int = 1) -> Any:
    """On a rank: a Loaded with the initial weights of seed 3, and a tokenizer that never ends a document."""
    from bigtrain.distributed.start import start
    from bigtrain.engine.inference import Loaded
    from bigtrain.model.build import build
    from bigtrain.model.initial import initialize

    config = small.config(model, tensor=tensor, zero_stage=0)
    runtime = start(config)
    (decoder,) = build(config, runtime)
    initialize(decoder, model, seed=3, topology=runtime.topology)
    tokenizer: Any = SimpleNamespace(vocab_size=model.vocab_size, bos_id=0, eos_id=-1)
    return Loaded(decoder.eval(), tokenizer, model, 0, runtime)


def written(loaded: Any, asked: list[list[int]], *, use_cache: bool = True, **sampling: Any) -> list[list[int]]:
    from bigtrain.engine.inference import Sampling, Text, go_on

    texts = [Text.of(prompt, seed=5, number=number) for number, prompt in enumerate(asked)]
    for _ in go_on(loaded, texts, max_tokens=NEW, sampling=Sampling(**sampling), use_cache=use_cache):
        pass
    assert all(text.ended == "max_tokens" for text in texts)
    return [text.ids for text in texts]


def ways(model: ModelConfig, asked: list[list[int]]) -> tuple[list[list[int]], ...]:
    """On a rank: greedy texts of a cached batch, of an uncached one, and of each prompt alone."""
    loaded = made(model)
    alone = [written(loaded, [prompt])[0] for prompt in asked]
    return written(loaded, asked), written(loaded, asked, use_cache=False), alone


def step_logits(model: ModelConfig, asked: list[list[int]]) -> tuple[float, float]:
    """On a rank: the largest difference of cached from uncached logits over all steps, and the largest logit.

    Rows leave the batch on the way: row 1 after step 3."""
    from bigtrain.model.cache import KeyValueCache

    decoder = made(model).decoder
    generator = torch.Generator().manual_seed(11)
    rows = [prompt + torch.randint(0, model.vocab_size, (8,), generator=generator).tolist() for prompt in asked]
    cache, apart, largest = KeyValueCache(40), 0.0, 0.0
    width = max(map(len, asked))
    present = list(range(len(asked)))
    with torch.inference_mode():
        for step in range(8):
            ends = [len(asked[row]) + step for row in present]
            if step == 0:
                tokens = torch.tensor([(asked[row] + [0] * width)[:width] for row in present])
                positions = torch.arange(width).expand_as(tokens)
                hidden = decoder.hidden(tokens, positions, cache)
                found = torch.stack([hidden[end - 1, row] for row, end in enumerate(ends)])
            else:
                tokens = torch.tensor([[rows[row][end - 1]] for row, end in zip(present, ends, strict=True)])
                found = decoder.hidden(tokens, torch.tensor(ends)[:, None] - 1, cache)[0]
            for place, (row, end) in enumerate(zip(present, ends, strict=True)):
                whole = torch.tensor([rows[row][:end]])
                expected = decoder(whole, torch.arange(end)[None], None)[0, -1]
                apart = max(apart, (decoder.logits(found)[place] - expected).abs().max().item())
                largest = max(largest, expected.abs().max().item())
            if step == 3:
                present.remove(1)
                cache.keep(torch.tensor([0, 2, 3]))
    return apart, largest


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_changes_nothing(pool: PoolFactory, name: str) -> None:
    cached, uncached, alone = pool(1).run(ways, MODELS[name], prompts())[0]
    assert cached == uncached == alone
    assert len({token for text in cached for token in text}) > 15, "texts of one token would prove little"
    quiet = replace(MODELS[name], init_std=0.05)
    apart, largest = pool(1).run(step_logits, quiet, prompts())[0]
    assert apart < 1e-5 < 0.1 < largest


def weights_and_texts(model: ModelConfig, asked: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    from bigtrain.model.build import shards_of

    loaded = made(model)
    weights = {shard.name: p.detach().clone() for shard, p in shards_of(loaded.decoder, loaded.runtime.topology)}
    return weights, written(loaded, asked)


@pytest.mark.parametrize("name", ["rope, gqa", "rope, all heads, tied", "learned, tied (gpt-2)"])
def test_greedy_texts_are_those_of_transformers(pool: PoolFactory, name: str) -> None:
    model, asked = MODELS[name], prompts()
    weights, texts = pool(1).run(weights_and_texts, model, asked)[0]
    hf: Any = oracle.build(model)
    oracle.load(hf, weights, model)
    hf.eval()
    for prompt, text in zip(asked, texts, strict=True):
        ids = torch.tensor([prompt])
        found = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        assert found[0, len(prompt) :].tolist() == text


def drawn(model: ModelConfig, asked: list[list[int]], tensor: int) -> tuple[list[list[int]], ...]:
    loaded = made(model, tensor)
    hot = {"temperature": 1.5, "top_k": 40, "top_p": 0.9}
    return written(loaded, asked), written(loaded, asked, **hot), [written(loaded, [asked[0]], **hot)[0]]


@pytest.mark.parametrize("name", ["rope, gqa", "learned, tied (gpt-2)"])
def test_tensor_ranks_write_what_one_process_writes(pool: PoolFactory, name: str) -> None:
    alone = pool(1).run(drawn, MODELS[name], prompts(), 1)[0]
    shared = pool(2).run(drawn, MODELS[name], prompts(), 2)
    assert shared[0] == shared[1] == alone
    greedy, hot, first = alone
    assert greedy != hot and first[0] == hot[0], "what is drawn for a prompt does not depend on the others"


def saved(config: Any, root: Path) -> None:
    """On a rank: a checkpoint of the initial weights, as the trainer writes it."""
    from bigtrain.checkpoint import folder as folders
    from bigtrain.checkpoint import store
    from bigtrain.data import tokenizer_training as training
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    model = training.train(["def f(x):\n    return x + 1\n"] * 20, vocab_size=290)
    known = {"format": folders.FORMAT, "step": 1, "config": {"model": asdict(config.model)}}
    store.save(root, 1, state.fragments(engine), known, files={"tokenizer.model": model})


def asked_of_checkpoint(folder: Path, tensor: int) -> tuple[list[list[int]], int, list[Any], list[Any]]:
    """On a rank: greedy texts, elements that the rank holds, scores of three continuations, and of the loss."""
    from bigtrain.engine.inference import Scorer, load
    from bigtrain.engine.open_model import open_model
    from bigtrain.engine.scoring import score

    opened = open_model(folder)
    opened.check_tensor(tensor)
    loaded = load(opened, tensor=tensor, device="cpu")
    held = sum(parameter.numel() for parameter in loaded.decoder.parameters())
    texts = written(loaded, prompts(200))
    pairs = [(prompt[:1], prompt[1:]) for prompt in prompts(200)[1:]] + [([0], texts[0][:1])]
    scores = score(loaded, pairs, batch_size=2)
    loss = Scorer(loaded).evaluate(small.share_of(small.global_batch(0), loaded.runtime.topology))
    return texts, held, [(each.log_likelihood, each.is_greedy) for each in scores], [loss.mean.item(), int(loss.tokens)]


def test_a_checkpoint_of_one_layout_is_asked_in_others(pool: PoolFactory, tmp_path: Path) -> None:
    model = replace(LOUD, num_layers=2, vocab_size=292)
    pool(2).run(saved, small.config(model, zero_stage=3, pipeline=2), tmp_path)
    texts, whole, scores, loss = pool(1).run(asked_of_checkpoint, tmp_path, 1)[0]
    for tensor in (2, 1):
        for shared_texts, held, shared_scores, shared_loss in pool(2).run(asked_of_checkpoint, tmp_path, tensor):
            assert shared_texts == texts
            assert [each[0] for each in shared_scores] == pytest.approx([each[0] for each in scores], rel=1e-5)
            assert shared_loss == pytest.approx(loss, rel=1e-6)
            assert held == whole if tensor == 1 else whole / 2 < held < whole * 0.51, "norms alone are held twice"

    hf = oracle.build(model)
    import torch.distributed.checkpoint as dcp

    plain = {f"weight.{name}": value.clone() for name, value in oracle.from_hf(hf.state_dict(), model).items()}
    dcp.load(plain, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    oracle.load(hf, {name.removeprefix("weight."): value for name, value in plain.items()}, model)
    for prompt, (found, is_greedy) in zip(prompts(200)[1:], scores, strict=False):
        with torch.no_grad():
            logs = hf.eval()(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = sum(logs[place, token].item() for place, token in enumerate(prompt[1:]))
        assert found == pytest.approx(expected, rel=1e-5) and not is_greedy
    batches: list[Any] = list(small.global_batch(0))
    with torch.no_grad():
        nats = sum(float(oracle.loss_sum(hf, batch)) for batch in batches)
    assert loss[0] == pytest.approx(nats / loss[1], rel=1e-5)


def test_a_model_that_does_not_divide_is_refused(pool: PoolFactory, tmp_path: Path) -> None:
    pool(1).run(saved, small.config(replace(LOUD, num_layers=1, num_query_groups=1), zero_stage=1), tmp_path)
    with pytest.raises(RankError, match=r"tensor=2: the model does not divide .* \(model.num_query_groups=1\)"):
        pool(2).run(asked_of_checkpoint, tmp_path, 2)


def test_a_vocabulary_that_does_not_divide_is_padded(pool: PoolFactory, tmp_path: Path) -> None:
    """The second rank has a row that is no token."""
    pool(1).run(saved, small.config(replace(LOUD, vocab_size=293), zero_stage=1), tmp_path)
    texts, _, scores, loss = pool(1).run(asked_of_checkpoint, tmp_path, 1)[0]
    for shared_texts, _, shared_scores, shared_loss in pool(2).run(asked_of_checkpoint, tmp_path, 2):
        assert shared_texts == texts
        assert [each[0] for each in shared_scores] == pytest.approx([each[0] for each in scores], rel=1e-5)
        assert shared_loss == pytest.approx(loss, rel=1e-6)


HUGGING_FACE = {
    "llama, gqa, untied": replace(LOUD, num_layers=2, vocab_size=293),
    "llama, biases, tied": replace(LOUD, num_layers=2, vocab_size=293, bias=True, tie_embeddings=True),
    "gpt-2, tied": replace(MODELS["learned, tied (gpt-2)"], vocab_size=293),
}


def hugging_face_folder(folder: Path, model: ModelConfig) -> Any:
    """What Transformers saved in several files, with random biases and norms, and a tokenizer. Returns its model."""
    from bigtrain.data import tokenizer_training as training
    from bigtrain.data.hf_files import hf_files
    from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer

    hf: Any = oracle.build(model)
    generator = torch.Generator().manual_seed(13)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    hf.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    trained = SentencePieceTokenizer(training.train(["def f(x):\n    return x + 1\n"] * 20, vocab_size=290))
    for name, content in hf_files(trained).items():
        (folder / name).write_bytes(content)
    return hf.eval()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_hugging_face_folder_is_asked_as_it_lies_there(pool: PoolFactory, name: str, tmp_path: Path) -> None:
    """Alone, and on two ranks that do not divide its vocabulary: what Transformers says of the same folder."""
    hf = hugging_face_folder(tmp_path, HUGGING_FACE[name])
    texts, whole, scores, loss = pool(1).run(asked_of_checkpoint, tmp_path, 1)[0]
    for shared_texts, held, shared_scores, shared_loss in pool(2).run(asked_of_checkpoint, tmp_path, 2):
        assert shared_texts == texts
        assert [each[0] for each in shared_scores] == pytest.approx([each[0] for each in scores], rel=1e-5)
        assert shared_loss == pytest.approx(loss, rel=1e-6)
        assert whole / 2 < held < whole * 0.55, "norms and learned positions alone are held twice"
    with torch.no_grad():
        for prompt, (found, _) in zip(prompts(200)[1:], scores, strict=False):
            logs = hf(torch.tensor([prompt])).logits[0].log_softmax(-1)
            expected = sum(logs[place, token].item() for place, token in enumerate(prompt[1:]))
            assert found == pytest.approx(expected, rel=1e-5)
        batches: list[Any] = list(small.global_batch(0))
        assert loss[0] == pytest.approx(sum(float(oracle.loss_sum(hf, batch)) for batch in batches) / loss[1], rel=1e-5)
    assert len({token for text in texts for token in text}) > 4
