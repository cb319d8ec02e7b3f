"""A checkpoint holds the whole model's tensors: what one layout saves, any other loads, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.schema import Config, ModelConfig
from tests.distributed import small
from tests.distributed.harness import PoolFactory, RankError

KINDS = ("weight", "exp_avg", "exp_avg_sq")
Pieces = dict[str, list[tuple[str, torch.Size, tuple[int, ...], torch.Tensor]]]


def train_and_save(config: Config, root: Path, num_steps: int, more_steps: int) -> tuple[Pieces, list[float]]:
    """On a rank: steps, a save, the state at the save, and the losses of the steps after it."""
    from bigtrain.checkpoint import folder as folders
    from bigtrain.checkpoint import store
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(config, start(config))
    small.take_steps(engine, 0, num_steps)
    fragments = state.fragments(engine)
    store.save(root, num_steps, fragments, {"format": folders.FORMAT, "step": num_steps})
    saved = {kind: small.pieces(fragments, kind) for kind in KINDS}
    return saved, small.take_steps(engine, num_steps, more_steps)


def load_and_train(config: Config, folder: Path, more_steps: int) -> tuple[Pieces, list[float]]:
    """On a rank: the state that a fresh engine has after loading, and the losses of the steps after it."""
    from bigtrain.checkpoint import store
    from bigtrain.distributed.start import start
    from bigtrain.engine import state
    from bigtrain.engine.engine import Engine

    engine = Engine(replace(config, run=replace(config.run, seed=99)), start(config))
    step = store.load(folder, state.fragments(engine))["step"]
    state.after_load(engine, adam_step=step)
    engine.steps_taken = step
    loaded = {kind: small.pieces(state.fragments(engine), kind) for kind in KINDS}
    return loaded, small.take_steps(engine, step, more_steps)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"zero_stage": 3, "tensor": 2}),
    (1, {"zero_stage": 0}),
    (2, {"zero_stage": 1}),
    (4, {"zero_stage": 2, "tensor": 4}),
    (4, {"zero_stage": 3}),
    (2, {"zero_stage": 0, "dtype": "bf16"}),
    (4, {"zero_stage": 3, "pipeline": 2, "tensor": 2}),
    (2, {"zero_stage": 1, "pipeline": 2, "virtual_pipeline": 2}),
    (4, {"zero_stage": 2, "pipeline": 4}),
    (8, {"zero_stage": 3, "tensor": 2, "pipeline": 2}),
    (8, {"zero_stage": 1, "tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}),
    (3, {"zero_stage": 0, "pipeline": 3}),
    (2, {"zero_stage": 3, "dtype": "bf16"}),
    (4, {"zero_stage": 2, "tensor": 2, "sequence": True}),
]
TIED = replace(small.GPT2, num_layers=5)
"""Uneven stages, and an embedding that the first and the last stage hold."""


@pytest.mark.parametrize(
    ("model", "source", "targets"),
    [
        (small.LLAMA, 0, (1, 2, 3, 4, 0)),
        (small.LLAMA, 1, (0,)),
        (small.LLAMA, 2, (4,)),
        (small.LLAMA, 4, (2,)),
        (TIED, 6, (1, 7, 6)),
        (TIED, 1, (6, 8)),
        (TIED, 8, (7, 11)),
        (TIED, 9, (1, 10, 13)),
        (TIED, 1, (9,)),
        (TIED, 10, (9,)),
        (small.LLAMA, 12, (2, 5, 13)),
    ],
    ids=[
        "z3t2",
        "one",
        "z1d2",
        "z3d4",
        "tied z3t2p2",
        "tied one",
        "tied z2p4",
        "tied 8 ranks z3t2p2",
        "tied one to 8",
        "tied 8 ranks z1t2sp2v2",
        "bf16 z3d2",
    ],
)
def test_any_layout_loads_what_another_saved(
    pool: PoolFactory, tmp_path: Path, model: ModelConfig, source: int, targets: tuple[int, ...]
) -> None:
    world, layout = LAYOUTS[source]
    ranks = pool(world).run(train_and_save, small.config(model, **layout), tmp_path, 3, 2)
    saved = {kind: small.assemble([pieces[kind] for pieces, _ in ranks]) for kind in KINDS}
    for target in targets:
        world, layout = LAYOUTS[target]
        loaded = pool(world).run(load_and_train, small.config(model, **layout), tmp_path / "step-00000003", 2)
        for kind in KINDS:
            whole = small.assemble([pieces[kind] for pieces, _ in loaded])
            assert whole.keys() == saved[kind].keys()
            assert all(torch.equal(whole[name], saved[kind][name]) for name in whole), f"{kind} changed"
        same_dtype = LAYOUTS[source][1].get("dtype") == layout.get("dtype")
        assert loaded[0][1] == pytest.approx(ranks[0][1], rel=1e-5 if same_dtype else 1e-2)
        if target == source:
            assert loaded[0][1] == ranks[0][1], "the same layout goes on bit for bit"


def test_bf16_masters_go_on_bit_for_bit(pool: PoolFactory, tmp_path: Path) -> None:
    for zero in (0, 1, 2, 3):
        config = small.config(zero_stage=zero, dtype="bf16")
        ranks = pool(2).run(train_and_save, config, tmp_path / str(zero), 2, 2)
        loaded = pool(2).run(load_and_train, config, tmp_path / str(zero) / "step-00000002", 2)
        assert loaded[0][1] == ranks[0][1], f"ZeRO {zero}"


def test_a_checkpoint_of_another_model_is_refused(pool: PoolFactory, tmp_path: Path) -> None:
    pool(1).run(train_and_save, small.config(zero_stage=1), tmp_path, 1, 0)
    other = small.config(replace(small.LLAMA, ffn_hidden_size=96), zero_stage=1)
    with pytest.raises(RankError, match=r"weight.decoder.layers.0.mlp.linear_fc1.weight has shape \(320, 64\)"):
        pool(1).run(load_and_train, other, tmp_path / "step-00000001", 0)
    deeper = small.config(replace(small.LLAMA, num_layers=3), zero_stage=1)
    with pytest.raises(RankError, match=r"has no tensor weight.decoder.layers.2"):
        pool(1).run(load_and_train, deeper, tmp_path / "step-00000001", 0)


def test_torchs_own_tools_read_it(pool: PoolFactory, tmp_path: Path) -> None:
    """dcp.load into plain full tensors, without any of our classes."""
    import torch.distributed.checkpoint as dcp

    ranks = pool(4).run(train_and_save, small.config(zero_stage=3, tensor=2), tmp_path, 1, 0)
    whole = small.assemble([pieces["weight"] for pieces, _ in ranks])
    plain = {f"weight.{name}": torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(plain, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    assert all(torch.equal(plain[f"weight.{name}"], tensor) for name, tensor in whole.items())
