"""Which rows of which tensor of ours each tensor of Transformers' model is. Names and shapes only, no torch.

Both sides hold the same numbers. A tensor of theirs is some rows of one tensor of ours, in an order: `linear_qkv` has
the heads group by group (the query heads of a group, its key head, its value head), theirs have all query heads, then
all key heads, then all value heads; `linear_fc1` of SwiGLU has the gate's rows, then the up projection's. GPT-2 keeps
its matrices transposed. Rotary embeddings need no permutation: both rotate the two halves of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bigtrain.checkpoint.hf_config import architecture
from bigtrain.config.schema import ModelConfig

Rows = tuple[tuple[int, int], ...]
"""[start, stop) after [start, stop)."""


@dataclass(frozen=True)
class Part:
    """One tensor of theirs."""

    name: str
    shape: tuple[int, ...]
    ours: str
    """Our tensor that it lies in."""
    rows: Rows
    """Rows of ours, in its order."""
    transposed: bool
    """Its rows are our columns."""


def parts(model: ModelConfig, vocab_size: int | None = None) -> Iterator[Part]:
    """Every tensor of theirs, those of one tensor of ours together.

    `vocab_size`: rows of their embedding, the first of ours; default: all. Raises UserError for a model that
    Transformers has not."""
    vocabulary = vocab_size or model.vocab_size
    yield from (_llama if architecture(model) == "llama" else _gpt2)(model, vocabulary)


def our_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our global tensors, in the order of `parts`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts(model):
        rows = sum(stop - start for start, stop in part.rows)
        columns = () if len(part.shape) == 1 else (part.shape[0] if part.transposed else part.shape[1],)
        shapes[part.ours] = (shapes.get(part.ours, (0,))[0] + rows, *columns)
    return shapes


def _llama(model: ModelConfig, vocabulary: int) -> Iterator[Part]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key, value = _heads(model)
    yield _whole("model.embed_tokens.weight", (vocabulary, hidden), "embedding.word_embeddings.weight")
    for number in range(model.num_layers):
        theirs, ours = f"model.layers.{number}", f"decoder.layers.{number}"
        yield _whole(f"{theirs}.input_layernorm.weight", (hidden,), f"{ours}.input_layernorm.weight")
        for kind, columns in _kinds(model, hidden):
            for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
                shape = (_count(rows), *columns)
                yield Part(
                    f"{theirs}.self_attn.{name}.{kind}", shape, f"{ours}.self_attention.linear_qkv.{kind}", rows, False
                )
        for kind, columns in _kinds(model, hidden):
            yield _whole(
                f"{theirs}.self_attn.o_proj.{kind}", (hidden, *columns), f"{ours}.self_attention.linear_proj.{kind}"
            )
        yield _whole(f"{theirs}.post_attention_layernorm.weight", (hidden,), f"{ours}.pre_mlp_layernorm.weight")
        for kind, columns in _kinds(model, hidden):
            fc1 = f"{ours}.mlp.linear_fc1.{kind}"
            yield Part(f"{theirs}.mlp.gate_proj.{kind}", (ffn, *columns), fc1, ((0, ffn),), False)
            yield Part(f"{theirs}.mlp.up_proj.{kind}", (ffn, *columns), fc1, ((ffn, 2 * ffn),), False)
        for kind, columns in _kinds(model, ffn):
            yield _whole(f"{theirs}.mlp.down_proj.{kind}", (hidden, *columns), f"{ours}.mlp.linear_fc2.{kind}")
    yield _whole("model.norm.weight", (hidden,), "decoder.final_layernorm.weight")
    if not model.tie_embeddings:
        yield _whole("lm_head.weight", (vocabulary, hidden), "output_layer.weight")


def _gpt2(model: ModelConfig, vocabulary: int) -> Iterator[Part]:
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key, value = _heads(model)
    yield _whole("transformer.wte.weight", (vocabulary, hidden), "embedding.word_embeddings.weight")
    positions = (model.max_positions, hidden)
    yield _whole("transformer.wpe.weight", positions, "embedding.position_embeddings.weight")
    for number in range(model.num_layers):
        theirs, ours = f"transformer.h.{number}", f"decoder.layers.{number}"
        matrices = (
            ("attn.c_attn", "self_attention.linear_qkv", hidden, query + key + value),
            ("attn.c_proj", "self_attention.linear_proj", hidden, ((0, hidden),)),
            ("mlp.c_fc", "mlp.linear_fc1", hidden, ((0, ffn),)),
            ("mlp.c_proj", "mlp.linear_fc2", ffn, ((0, hidden),)),
        )
        for norm, our_norm in (("ln_1", "input_layernorm"), ("ln_2", "pre_mlp_layernorm")):
            for kind in ("weight", "bias"):
                yield _whole(f"{theirs}.{norm}.{kind}", (hidden,), f"{ours}.{our_norm}.{kind}")
        for name, our_name, columns, rows in matrices:
            count = _count(rows)
            yield Part(f"{theirs}.{name}.weight", (columns, count), f"{ours}.{our_name}.weight", rows, True)
            yield Part(f"{theirs}.{name}.bias", (count,), f"{ours}.{our_name}.bias", rows, False)
    for kind in ("weight", "bias"):
        yield _whole(f"transformer.ln_f.{kind}", (hidden,), f"decoder.final_layernorm.{kind}")
    if not model.tie_embeddings:
        yield _whole("lm_head.weight", (vocabulary, hidden), "output_layer.weight")


def _kinds(model: ModelConfig, columns: int) -> list[tuple[str, tuple[int, ...]]]:
    """A linear layer's tensors with their columns."""
    return [("weight", (columns,)), *([("bias", ())] if model.bias else [])]


def _heads(model: ModelConfig) -> tuple[Rows, Rows, Rows]:
    """Rows of `linear_qkv` that are query, key and value heads."""
    width = model.hidden_size // model.num_attention_heads
    per_group = model.num_attention_heads // model.num_query_groups
    starts = [group * (per_group + 2) * width for group in range(model.num_query_groups)]
    query, key = per_group * width, (per_group + 1) * width
    return (
        tuple((start, start + query) for start in starts),
        tuple((start + query, start + key) for start in starts),
        tuple((start + key, start + key + width) for start in starts),
    )


def _whole(name: str, shape: tuple[int, ...], ours: str) -> Part:
    return Part(name, shape, ours, ((0, shape[0]),), False)


def _count(rows: Rows) -> int:
    return sum(stop - start for start, stop in rows)
