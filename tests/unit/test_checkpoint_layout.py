"""Who writes which part of a checkpoint, planned without ranks, against the real engine's ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.checkpoint import layout as layouts
from bigtrain.checkpoint.hf_names import our_shapes
from bigtrain.checkpoint.layout import Layout, Piece
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from tests.unit.hf_models import GPT2, LLAMA

SMALL = replace(LLAMA, num_layers=5)


def covered(files: list[list[Piece]], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """How often each element is written."""
    counts = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for piece in (each for file in files for each in file):
        counts[piece.name][tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))] += 1
    return counts


@settings(deadline=None, max_examples=40)  # a busy machine
@given(
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.integers(1, 5),
    data=st.integers(1, 5),
    zero=st.integers(0, 3),
    model=st.sampled_from([SMALL, replace(GPT2, num_layers=5), replace(GPT2, num_layers=5, tie_embeddings=False)]),
)
def test_every_layout_writes_every_element_once(
    tensor: int, pipeline: int, data: int, zero: int, model: ModelConfig
) -> None:
    shapes = our_shapes(model)
    files = layouts.of_layout(shapes, model, Layout(tensor, pipeline, data, zero))
    assert len(files) == tensor * pipeline * data
    assert all((count == 1).all() for count in covered(files, shapes).values())


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(1, 9), max_size=2).map(tuple), min_size=1), st.data())
def test_files_are_equally_large(shapes: dict[str, tuple[int, ...]], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 5))
    files = layouts.in_files(shapes, number)
    assert len(files) == number
    assert all((count == 1).all() for count in covered(files, shapes).values())
    sizes = [sum(piece.numel for piece in file) for file in files]
    assert max(sizes) - min(sizes) <= 2 * 9


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 400))
def test_cuts_are_rows_that_fit(rows: int, columns: int, most: int) -> None:
    pieces = list(layouts.cut(Piece("a", (3, 4), (rows, columns)), 4, most))
    assert (covered([pieces], {"a": (rows + 3, columns + 4)})["a"][3:, 4:] == 1).all()
    assert all(piece.numel * 4 <= most or piece.sizes[0] == 1 for piece in pieces)
    assert len(pieces) <= -(-rows // max(1, most // (4 * columns)))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), "4 key/value heads"),
        (Layout(pipeline=6), "5 layers do not fill 6 chunks: lower --pipeline"),
        (Layout(zero=4), "--zero 4"),
        (Layout(data=0), "--data 0: it takes 1 or more"),
        (Layout(virtual_pipeline=2), "--pipeline 2 or more"),
    ],
)
def test_a_layout_that_the_model_cannot_have(layout: Layout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layouts.of_layout(our_shapes(SMALL), SMALL, layout)


def test_a_tensor_that_does_not_divide_is_named() -> None:
    odd = replace(SMALL, vocab_size=421)
    with pytest.raises(UserError, match=r"--tensor 2: embedding.word_embeddings.weight has shape \(421, 64\)"):
        layouts.of_layout(our_shapes(odd), odd, Layout(tensor=2))
    with pytest.raises(UserError, match="strange is no tensor of this model"):
        layouts.of_layout({"strange": (4,)}, SMALL, Layout())


ENGINE = """
import os, sys
from dataclasses import replace
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from bigtrain.checkpoint.hf_names import our_shapes
from bigtrain.checkpoint.layout import Layout, of_layout
from bigtrain.checkpoint.slices import state_dict_of
from bigtrain.distributed.start import start, stop
from bigtrain.engine import state
from bigtrain.engine.engine import Engine
from tests.distributed import small

new_group = dist.new_group
dist.new_group = lambda *arguments, **options: new_group(*arguments, **{**options, "backend": "fake"})


def written(config, rank, world):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        tensors = state_dict_of(state.fragments(Engine(config, start(config))), only_owned=True)
    finally:
        stop()
    return [
        (name.removeprefix("weight."), offsets, tuple(chunk.shape))
        for name, tensor in tensors.items() if name.startswith("weight.") for offsets, chunk in tensor.chunks.items()
    ]


LLAMA, GPT2 = replace(small.LLAMA, num_layers=4), replace(small.GPT2, num_layers=5)
for model, layout, dtype in (
    (LLAMA, Layout(tensor=2, data=2, zero=1), "fp32"),
    (LLAMA, Layout(tensor=2, data=3, zero=3), "fp32"),
    (LLAMA, Layout(data=2, zero=0), "fp32"),
    (LLAMA, Layout(pipeline=2, virtual_pipeline=2, data=3, zero=2), "fp32"),
    (GPT2, Layout(data=3, zero=1), "bf16"),
    (GPT2, Layout(tensor=2, pipeline=2, data=2, zero=1), "fp32"),
    (GPT2, Layout(pipeline=3, data=2, zero=3), "bf16"),
):
    parallel = dict(tensor=layout.tensor, pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline)
    config = small.config(model, zero_stage=layout.zero, dtype=dtype, **parallel)
    plan = of_layout(our_shapes(model), model, layout)
    for rank in range(layout.world):
        planned = [(piece.name, piece.offsets, piece.sizes) for piece in plan[rank]]
        assert planned == written(config, rank, layout.world), (layout, rank, planned)
    print("same", layout)
"""


@pytest.mark.slow
def test_it_is_what_the_engine_writes() -> None:
    """The real engine of each rank, with process groups that send nothing."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.stdout.count("same") == 7, done.stdout + done.stderr
