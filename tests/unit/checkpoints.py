"""For the tests of tools/checkpoint.py: small checkpoints, and damage to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest, store
from bigtrain.checkpoint.hf_names import our_shapes
from bigtrain.config.schema import ModelConfig
from tests.torch_reader import read_by_torch
from tests.unit.data.conftest import load_tool
from tests.unit.hf_models import LLAMA

KINDS = ("weight", "exp_avg", "exp_avg_sq")
main = load_tool("checkpoint").main


def tensors(model: ModelConfig = LLAMA, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights and moments by ``kind.name``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = our_shapes(model)
    return {f"{kind}.{name}": torch.randn(shapes[name], generator=generator) for kind in KINDS for name in shapes}


def save(
    root: Path, content: dict[str, torch.Tensor], *, step: int = 300, model: ModelConfig = LLAMA, **state: Any
) -> Path:
    """A committed checkpoint, as a run writes it."""
    everything = {
        "format": folders.FORMAT,
        "step": step,
        "loss": 4.25,
        "adam_step": step,
        "loss_scale": {"value": 1.0, "good_steps": 0},
        "cursor": {"num_sequences": 16 * step, "order": "o", "num_lanes": 8, "mixture": [], "positions": {}},
        "config": {
            "model": dataclasses.asdict(model),
            "precision": {"dtype": "bf16"},
            "train": {"sequence_length": 256},
            "optim": {"lr": 0.001},
        },
        "versions": {"bigtrain": "0.1.0", "torch": "2.13.0"},
        **state,
    }
    saved = store.save_tensors(root, step, content, everything, files={"tokenizer.model": b"pieces"})
    assert saved is not None
    return saved.folder


def flip(file: Path, position: int) -> None:
    """One bit of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def place_of(folder: Path, name: str) -> tuple[Path, int]:
    """The file and the byte where a tensor's numbers are, found by looking for them."""
    numbers = read_by_torch(folder)[name].flatten()[:64].numpy().tobytes()
    for file in sorted(folder.glob("*.distcp")):
        if (at := file.read_bytes().find(numbers)) >= 0:
            return file, at
    raise AssertionError(f"{name} is in no file of {folder}")


def commit_again(folder: Path, change: Callable[[dict[str, dict[str, dict[str, object]]]], None] | None = None) -> None:
    """Make the manifest true of the files as they are, so that only what the tensors tell is wrong."""
    fields = json.loads((folder / manifest.MANIFEST).read_bytes())
    for name in fields["files"]:
        fields["files"][name] = vars(manifest.file_of(folder / name))
    if change:
        change(fields)
    content = json.dumps(fields).encode()
    (folder / manifest.MANIFEST).write_bytes(content)
    (folder / manifest.COMMITTED).write_text(manifest.hash_of(content))
