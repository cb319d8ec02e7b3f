"""Speed of generation on a CPU: with the cache, without it, and Transformers' `generate` of the same shape.

    python tools/bench/generate.py [--preset tiny] [--tokens 200] [--batch 1] [--rounds 3] [--threads 1]

Greedy, from initial weights, one prompt token a text. Contenders take turns; a row has the median over the rounds, and
the lowest and highest. CPU time is what remains meaningful on a machine that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    for name, default in (("tokens", 200), ("batch", 1), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(given.threads)
    contenders = contenders_of(given.preset, given.tokens, given.batch)
    for run in contenders.values():
        run(4)  # what is built at the first call
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(given.rounds):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run(given.tokens)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(f"{given.preset}, {given.batch} x {given.tokens} tokens, {given.threads} threads, {given.rounds} rounds")
    for name, found in seconds.items():
        total = given.batch * given.tokens
        walls, cpus = ([total / pair[place] for pair in found] for place in (0, 1))
        print(f"{name:<14} {_spread(walls)} tokens/s, {_spread(cpus)} tokens per CPU second")
    return 0


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def contenders_of(preset: str, tokens: int, batch: int) -> dict[str, Callable[[int], None]]:
    import torch

    from bigtrain.config.compose import compose
    from bigtrain.config.schema import ClusterConfig, Config, ParallelConfig
    from bigtrain.distributed.start import start
    from bigtrain.engine.inference import Loaded, Sampling, Text, go_on
    from bigtrain.model.build import build, shards_of
    from bigtrain.model.initial import initialize
    from tests import oracle

    model = compose([f"model={preset}"]).model
    config = Config(model=model, parallel=ParallelConfig(zero_stage=0), cluster=ClusterConfig(device="cpu"))
    runtime = start(config)
    (decoder,) = build(config, runtime)
    initialize(decoder, model, seed=1, topology=runtime.topology)
    tokenizer: Any = SimpleNamespace(vocab_size=model.vocab_size, eos_id=-1)
    loaded = Loaded(decoder.eval(), tokenizer, model, 0, runtime)
    prompts = [[1 + number] for number in range(batch)]

    def ours(use_cache: bool) -> Callable[[int], None]:
        def run(count: int) -> None:
            texts = [Text.of(prompt, seed=0, number=0) for prompt in prompts]
            for _ in go_on(loaded, texts, max_tokens=count, sampling=Sampling(), use_cache=use_cache):
                pass

        return run

    hf: Any = oracle.build(model)
    weights = {shard.name: parameter.detach() for shard, parameter in shards_of(decoder, runtime.topology)}
    oracle.load(hf.eval(), weights, model)
    ids = torch.tensor(prompts)

    def transformers(count: int) -> None:
        settings = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return {"cached": ours(True), "uncached": ours(False), "transformers": transformers}


if __name__ == "__main__":
    sys.exit(main())
