"""For the tests of import and export: small models of the presets' shapes, their checkpoints, Transformers' logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_names, store
from bigtrain.config.schema import ModelConfig

PRESETS = Path(__file__).parents[2] / "conf" / "model"
LLAMA = ModelConfig(
    num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96, vocab_size=420
)
GPT2 = dataclasses.replace(
    LLAMA, num_query_groups=8, position="learned", max_positions=96, norm="layernorm", activation="gelu", bias=True,
    tie_embeddings=True, ffn_hidden_size=256,
)  # fmt: skip


def shapes() -> Iterator[tuple[str, ModelConfig]]:
    """Every preset scaled down, each shape once; then what the presets do not vary."""
    seen: set[ModelConfig] = set()
    for file in sorted(PRESETS.glob("*.yaml")):
        preset = ModelConfig(**{key: _number(value) for key, value in yaml.safe_load(file.read_text()).items()})
        heads_a_group = preset.num_attention_heads // preset.num_query_groups
        small = dataclasses.replace(
            preset, name="", num_layers=2, hidden_size=64, num_attention_heads=8, num_query_groups=8 // heads_a_group,
            ffn_hidden_size=64 * preset.ffn_hidden_size // preset.hidden_size, vocab_size=420, max_positions=96,
        )  # fmt: skip
        if small not in seen:
            seen.add(small)
            yield file.stem, small
    yield "llama tied", dataclasses.replace(LLAMA, tie_embeddings=True)
    yield "llama one group", dataclasses.replace(LLAMA, num_query_groups=1)
    yield "llama as many groups as heads", dataclasses.replace(LLAMA, num_query_groups=8)
    yield "llama with biases", dataclasses.replace(LLAMA, bias=True, rope_theta=5e5, norm_eps=1e-3)
    yield "gpt2 untied", dataclasses.replace(GPT2, tie_embeddings=False, norm_eps=1e-3)


def params() -> list[Any]:
    """`shapes` for pytest; one of each architecture is fast."""
    fast = ("tiny", "gpt_125m")
    return [pytest.param(model, id=name, marks=() if name in fast else pytest.mark.slow) for name, model in shapes()]


def weights(model: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random global tensors; norms and biases too, so that a lost or a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, shape in hf_names.our_shapes(model).items():
        drawn = torch.randn(shape, generator=generator)
        found[name] = 1 + 0.2 * drawn if name.endswith("norm.weight") else 0.1 * drawn
    return found


def write(
    root: Path,
    model: ModelConfig,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: str = "fp32",
    files: Any = None,
    step: int = 7,
) -> Path:
    """A committed checkpoint with these weights, and moments that no export should read."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    everything = {
        f"{kind}.{name}": tensor if kind == "weight" else torch.full_like(tensor, torch.nan)
        for kind in kinds
        for name, tensor in tensors.items()
    }
    state = {
        "format": folders.FORMAT,
        "step": step,
        "config": {"model": dataclasses.asdict(model), "precision": {"dtype": dtype}},
    }
    saved = store.save_tensors(root, step, everything, state, files=files)
    assert saved is not None
    return saved.folder


def logits(folder: Path, tokens_BS: torch.Tensor, **options: Any) -> torch.Tensor:
    """Of the model that Transformers opens there, without remote code."""
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = opened
    assert not any(report.values()), report
    with torch.inference_mode():
        return model.eval()(tokens_BS).logits


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-5 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
