"""A checkpoint of any layout on one process: load it, let it go on from a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import store
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig, PrecisionConfig
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.distributed.start import start
from bigtrain.model.build import Decoder, build, shards_of
from bigtrain.model.sampling import choose


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked."""

    decoder: Decoder
    tokenizer: Tokenizer
    model: ModelConfig
    step: int
    device: torch.device


def load(checkpoint: Path, *, device: str = "auto") -> Loaded:
    """The model of a checkpoint (or of a run's newest), in fp32, whole on this process.

    Raises UserError where there is no committed checkpoint, or it is damaged."""
    folder = folders.resolve(checkpoint)
    state = folders.state_of(folder)
    try:
        model = ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: its model is not one that this version knows ({error})") from error
    config = Config(model=model, parallel=ParallelConfig(zero_stage=0), precision=PrecisionConfig(dtype="fp32"))
    runtime = start(replace(config, cluster=replace(config.cluster, device=device)))
    (decoder,) = build(config, runtime)
    decoder.to(runtime.device).eval()
    wanted = {shard.name: parameter for shard, parameter in shards_of(decoder, runtime.topology)}
    store.check_shapes(folder, {f"weight.{name}": parameter.shape for name, parameter in wanted.items()})
    for name, tensor in store.load_full(folder).items():
        if name in wanted:
            wanted[name].data.copy_(tensor)
    return Loaded(decoder, Tokenizer.load(folder), model, state["step"], runtime.device)


@torch.inference_mode()
def continue_text(
    loaded: Loaded, prompt: str, *, max_tokens: int, temperature: float, top_k: int, seed: int
) -> Iterator[int]:
    """Token ids that follow `prompt`, one by one, until the end of the document or `max_tokens`.

    Reads the whole text again for each token. A text that outgrows the model's positions is read from its last
    `max_positions` tokens."""
    tokenizer, generator = loaded.tokenizer, torch.Generator(loaded.device).manual_seed(seed)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for _ in range(max_tokens):
        window = torch.tensor([ids[-loaded.model.max_positions :]], device=loaded.device)
        positions = torch.arange(window.shape[1], device=loaded.device)[None]
        logits_BSV = loaded.decoder(window, positions, None)
        following = int(
            choose(
                logits_BSV[:, -1, : tokenizer.vocab_size], temperature=temperature, top_k=top_k, generator=generator
            ).item()
        )
        if following == tokenizer.eos_id:
            return
        ids.append(following)
        yield following
