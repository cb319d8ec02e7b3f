"""A training script without bigtrain, up to the end of its first step: the yardstick of startup.py, which starts it.

    startup_bare.py JOB.json DONE

It imports what JOB.json lists, joins the ranks over gloo, makes the model of the job by hand, and trains one step on
random tokens. Each rank adds a line to DONE for each thing that it has done: {"rank", "phase", "time"}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from typing import Any


def main(job_file: str, done_file: str) -> None:
    with open(job_file, encoding="utf-8") as file:
        job = json.load(file)
    rank, ranks = int(os.environ.setdefault("RANK", "0")), int(os.environ.setdefault("WORLD_SIZE", "1"))

    def mark(phase: str) -> None:
        with open(done_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"rank": rank, "phase": phase, "time": time.time()}) + "\n")

    for name in job["modules"]:
        with contextlib.suppress(ImportError):  # what a module makes of others under names of its own
            importlib.import_module(name)
    mark("imports")
    import torch.distributed as dist

    if ranks == 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo")
    dist.barrier()
    mark("joining the ranks")
    step(job, ranks)
    mark("model and first step")
    os._exit(0)


def step(job: dict[str, Any], ranks: int) -> None:
    """One step of AdamW on `global_batch_size` sequences, `micro_batch_size` at a time."""
    import torch
    from plain_llama import PlainLlama
    from torch.nn import functional as F

    from bigtrain.config.schema import ModelConfig

    bare = PlainLlama(ModelConfig(**job["model"]))
    model = torch.nn.parallel.DistributedDataParallel(bare) if ranks > 1 else bare
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], fused=True)
    count = job["global_batch_size"] // job["micro_batch_size"] // ranks
    for _ in range(count):
        batch = torch.randint(job["model"]["vocab_size"], (job["micro_batch_size"], job["sequence_length"] + 1))
        logits = model(batch[:, :-1])
        (F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), job["grad_clip"])
    optimizer.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
