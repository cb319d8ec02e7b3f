"""A run starts from another layout's weights, with an optimizer of its own, and learns completions only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import cross_entropy

from bigtrain.checkpoint import folder as folders
from bigtrain.config.schema import Config
from bigtrain.data.mixture import Mixture, Stage
from bigtrain.data.order import Cursor
from tests import oracle
from tests.distributed import small
from tests.distributed.harness import PoolFactory

KINDS = ("weight", "exp_avg", "exp_avg_sq")
IMPORTED = {"from": "huggingface", "vocab_size": 250}
NO_DATA = Cursor(0, "", Mixture([Stage(0, {})], 1))


def train_and_save(config: Config, run_dir: Path, num_steps: int) -> small.Pieces:
    """On a rank: a run's checkpoint, and the weights in it."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine
    from bigtrain.trainer.saver import Saver

    engine = Engine(config, start(config))
    for step in range(num_steps):
        engine.forward_backward(small.share_of(small.global_batch(step), engine.runtime.topology))
        engine.optimizer_step(1e-3)
    saver = Saver(config, run_dir, {})
    saver.load_weights(engine, lambda weights: None, origin={"imported": IMPORTED})
    saver.save(engine, num_steps, NO_DATA)
    saver.wait()
    return small.pieces(state.fragments(engine), "weight")


def start_from(config: Config, source: Path, run_dir: Path) -> tuple[dict[str, small.Pieces], int, list[float]]:
    """On a rank: what an engine has that starts from the weights, and the losses of an evaluation and two steps."""
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine
    from bigtrain.engine.open_model import open_model
    from bigtrain.trainer.saver import Saver

    engine = Engine(replace(config, run=replace(config.run, seed=99)), start(config))
    saver, opened = Saver(config, run_dir, {}), open_model(source, tokenizer=cast(Any, "none is in the checkpoint"))
    saver.load_weights(engine, opened.read, origin=opened.origin)
    found = {kind: small.pieces(state.fragments(engine), kind) for kind in KINDS}
    steps = state.adam_step(engine) + engine.steps_taken
    losses = [engine.evaluate(small.share_of(prompted_batch(0), engine.runtime.topology)).mean.item()]
    for step in range(2):
        loss = engine.forward_backward(small.share_of(prompted_batch(step), engine.runtime.topology))
        engine.optimizer_step(1e-3)
        losses.append(loss.mean.item())
    saver.save(engine, 2, NO_DATA)
    saver.wait()
    again = Saver(config, run_dir, {})
    assert again.load(engine, [saver.folder(2)])[0] == 2
    again.save(engine, 3, NO_DATA)
    again.wait()
    return found, steps, losses


def prompted_batch(step: int) -> list[Any]:
    """Each document begins with a prompt; the second sequence of each microbatch is nothing else."""
    return [
        replace(batch, prompts_B=[prompts_of(batch, row) for row in range(len(batch.starts_B))])
        for batch in small.global_batch(step)
    ]


def prompts_of(batch: Any, row: int) -> list[tuple[int, int]]:
    ends = [*batch.starts_B[row][1:], small.SEQUENCE + 1]
    share = 1.0 if row == 1 else 0.4
    return [
        (start, start + max(1, int(share * (end - start))))
        for start, end in zip(batch.starts_B[row], ends, strict=True)
    ]


def of_plain_pytorch(weights: dict[str, torch.Tensor]) -> list[float]:
    """The same losses by Transformers' Llama and torch's cross-entropy over the tokens of completions, named one by
    one."""
    hf = oracle.build(small.LLAMA)
    oracle.load(hf, weights, small.LLAMA)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in hf.parameters()],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses: list[float] = []
    for step in (0, 0, 1):
        logits, targets = [], []
        for batch in prompted_batch(step):
            of_batch = oracle.logits(hf, batch)
            for row, (starts, prompts) in enumerate(zip(batch.starts_B, batch.prompts_B, strict=True)):
                unlearned = {0, *starts, *(place for begin, end in prompts for place in range(begin, end))}
                places = [place for place in range(small.SEQUENCE + 1) if place not in unlearned]
                logits.append(of_batch[row, [place - 1 for place in places]])
                targets.append(batch.targets_BS[row, [place - 1 for place in places]])
        loss = cross_entropy(torch.cat(logits).float(), torch.cat(targets))
        losses.append(loss.item())
        if len(losses) > 1:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
            optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("source", "target"),
    [((2, {"zero_stage": 3}), (1, {"zero_stage": 1})), ((1, {"zero_stage": 0}), (2, {"zero_stage": 2, "tensor": 2}))],
)
def test_weights_of_another_layout(pool: PoolFactory, tmp_path: Path, source: Any, target: Any) -> None:
    saved = pool(source[0]).run(train_and_save, small.config(**source[1]), tmp_path, 3)
    weights = small.assemble(saved)
    ranks = pool(target[0]).run(start_from, small.config(**target[1]), tmp_path, tmp_path / "fine")
    for kind in KINDS:
        whole = small.assemble([found[kind] for found, _, _ in ranks])
        assert whole.keys() == weights.keys()
        for name, tensor in whole.items():
            assert torch.equal(tensor, weights[name] if kind == "weight" else torch.zeros_like(tensor)), (kind, name)
    expected = of_plain_pytorch(weights)
    for _, steps, losses in ranks:
        assert steps == 0 and losses == pytest.approx(expected, rel=1e-5)
    for step in (2, 3):
        state = folders.state_of(tmp_path / "fine" / "checkpoints" / f"step-{step:08d}")
        began = {"from": str(tmp_path / "checkpoints" / "step-00000003"), "from_step": 3}
        assert (state["init_from"], state["imported"]) == (began, IMPORTED)
