"""A run that starts from a Hugging Face folder trains as Transformers does from the same folder, under any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bigtrain.checkpoint.hf_import import import_folder
from bigtrain.config.schema import Config, ModelConfig
from tests import oracle
from tests.distributed import small
from tests.distributed.harness import PoolFactory

STEPS = 4
GPT2 = replace(small.GPT2, num_layers=4)
LAYOUTS: list[tuple[ModelConfig, int, dict[str, Any]]] = [
    (small.LLAMA, 1, {"zero_stage": 1}),
    (small.LLAMA, 2, {"zero_stage": 3}),
    (small.LLAMA, 4, {"zero_stage": 3, "tensor": 2, "pipeline": 2}),
    (GPT2, 2, {"zero_stage": 2, "tensor": 2}),
    (GPT2, 4, {"zero_stage": 0, "pipeline": 2}),
]


def start_and_train(config: Config, folder: Path, num_steps: int) -> list[float]:
    """On a rank: the losses of a run that starts from the weights of a checkpoint."""
    from bigtrain.checkpoint import store
    from bigtrain.distributed.start import start
    from bigtrain.engine.engine import Engine
    from bigtrain.trainer.saver import Saver

    runtime = start(config)
    engine = Engine(replace(config, run=replace(config.run, seed=99)), runtime)
    Saver(config, folder, {}).load_weights(engine, partial(store.load_weights, folder / "step-00000000"))
    losses: list[float] = []
    for step in range(num_steps):
        loss = engine.forward_backward(small.share_of(small.global_batch(step), runtime.topology))
        engine.optimizer_step(config.optim.lr)
        losses.append(loss.mean.item())
    return losses


def of_transformers(model: ModelConfig, folder: Path) -> list[float]:
    """Writes `folder`, opens it, and trains what was opened."""
    oracle.build(model).save_pretrained(folder)
    config = small.config(model)
    opened: Any = AutoModelForCausalLM.from_pretrained(folder)
    steps: Any = [small.global_batch(step) for step in range(STEPS)]
    clip = config.train.grad_clip
    return oracle.train(
        opened, steps, optim=config.optim, lr_of_step=lambda step: config.optim.lr, grad_clip=clip
    ).losses


@pytest.mark.parametrize(("model", "world", "layout"), LAYOUTS)
def test_it_trains_as_transformers_does(
    model: ModelConfig, world: int, layout: dict[str, Any], pool: PoolFactory, tmp_path: Path
) -> None:
    expected = of_transformers(model, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", files={})
    ranks = pool(world).run(start_and_train, small.config(model, **layout), tmp_path / "run", STEPS)
    for losses in ranks:
        assert losses == pytest.approx(expected, rel=1e-5)
