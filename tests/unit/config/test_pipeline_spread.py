"""Layers over the stages of a pipeline: all of them, as even as the embedding and the output layer allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigtrain.config.derive import (
    layers_of_chunks,
    parameter_count,
    parameter_parts,
    parameters_of_stages,
)
from bigtrain.config.schema import ModelConfig, ParallelConfig

SMALL_VOCABULARY = ModelConfig(num_layers=8, hidden_size=256, ffn_hidden_size=704, vocab_size=256)


def test_equal_where_embedding_and_head_are_small() -> None:
    assert layers_of_chunks(SMALL_VOCABULARY, ParallelConfig(pipeline=4)) == (2, 2, 2, 2)
    assert layers_of_chunks(SMALL_VOCABULARY, ParallelConfig(pipeline=2, virtual_pipeline=2)) == (2, 2, 2, 2)


def test_ends_with_a_large_vocabulary_get_fewer_layers() -> None:
    """An embedding of 2.9 layers' weights at both ends."""
    model = replace(SMALL_VOCABULARY, vocab_size=8192, num_layers=10)
    assert layers_of_chunks(model, ParallelConfig(pipeline=4)) == (1, 4, 4, 1)


@pytest.mark.parametrize("layers", [4, 5, 7, 31])
@pytest.mark.parametrize("virtual", [1, 2])
def test_every_layer_is_somewhere_and_no_move_evens_it_out(layers: int, virtual: int) -> None:
    model = replace(SMALL_VOCABULARY, num_layers=layers, vocab_size=4096)
    if layers < 2 * virtual:
        return
    counts = layers_of_chunks(model, ParallelConfig(pipeline=2, virtual_pipeline=virtual))
    assert sum(counts) == layers and min(counts) >= 1
    parts = parameter_parts(model)
    loads = [count * parts.layer.total for count in counts]
    loads[0] += parts.embedding.total
    loads[-1] += parts.embedding.total + parts.final_norm.total
    movable = max(load for load, count in zip(loads, counts, strict=True) if count > 1) if layers > len(counts) else 0
    assert movable <= min(loads) + parts.layer.total


def test_too_few_layers() -> None:
    with pytest.raises(ValueError, match="3 layers do not fill 4 chunks"):
        layers_of_chunks(replace(SMALL_VOCABULARY, num_layers=3), ParallelConfig(pipeline=4))


@pytest.mark.parametrize("tied", [False, True])
def test_stages_together_hold_the_model_and_a_copy_of_a_tied_embedding(tied: bool) -> None:
    model = replace(SMALL_VOCABULARY, tie_embeddings=tied, position="learned", bias=True)
    whole, copy = parameter_count(model), parameter_parts(model).embedding.total if tied else 0
    for pipeline in (1, 2, 4):
        stages = parameters_of_stages(model, ParallelConfig(pipeline=pipeline))
        assert len(stages) == pipeline
        assert sum(stage.total for stage in stages) == whole.total + (copy if pipeline > 1 else 0)
        assert sum(stage.replicated for stage in stages) == whole.replicated
