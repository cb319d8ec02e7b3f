"""Speed of reading training batches, against what a user would pick instead.

    make bench-data                                    all of it; 20 minutes on 2 cores
    python tools/bench/data.py                         the same, once .venv/bench is there (data-requirements.txt)
    python tools/bench/data.py --only restart          seconds to the first batch, at the start and at step 100,000
    python tools/bench/data.py --text 'web/*.jsonl'    on your text, not on Python's standard library

All contenders read the same tokens, written before in the format of each (data_formats.py), warm in the page cache,
and make batches of 8 x 2048 int64 inputs and targets, torch tensors (data_contenders.py). Each runs in a process of its
own, one after the other, in interleaved rounds. A ratio is the median over the rounds of the ratios within each round,
and stands with the lowest and highest. Nothing else should run on the machine meanwhile; the processor time of a batch
tells a slow contender from a disturbed one. Inputs and targets may be views of the same rows, in all of them. Ours
gives more than the others: where documents begin, a digest of every step, the cursor. "ours, documents" and "megatron,
documents" also make positions and a loss mask by document, which ours otherwise makes when they are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(sys.prefix) / "bench"))  # behind the packages of .venv: none of those is replaced
import data_formats
from data_tables import Result, restart_table, table, tokenise_table
from step import run

VOCAB_SIZE = 4096
PARTS = ("read", "mixture", "restart", "tokenise")
RESTART_STEP = 100_000
CHECKED_STEP = 50
"""Where it is proven, on the small corpus, that a contender goes on where it was."""
_SHARD_TOKENS = 1_000_000


def main() -> int:
    options = parse()
    if options.command == "contender":
        print("\n" + json.dumps(asdict(contend(options))))
        return 0
    build_corpus(options)
    data_formats.convert(options.folder)
    print(f"load of the machine at the beginning: {os.getloadavg()[0]:.2f}")
    parts = options.only or PARTS
    found: dict[str, Any] = {}
    if "read" in parts:
        found["read"] = rounds(options, mixture=False)
        print(f"\none source, {options.rounds} rounds\n{table(found['read'])}", flush=True)
    if "mixture" in parts:
        found["mixture"] = rounds(options, mixture=True)
        print(f"\nmixture of two sources, {options.rounds} rounds\n{table(found['mixture'])}", flush=True)
    if "restart" in parts:
        found["restart"] = restarts(options)
        print(f"\nseconds to the first batch\n{restart_table(found['restart'])}", flush=True)
    if "tokenise" in parts:
        found["tokenise"] = [tokenise(options.folder) for _ in range(options.rounds)]
        print(f"\n{tokenise_table(found['tokenise'])}", flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, default=asdict), encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run", "contender"], default="run")
    parser.add_argument("name", nargs="?", help="of the contender; data_contenders.py lists them")
    parser.add_argument(
        "--folder", type=Path, default=Path("data/bench"), help="where the data are and go (data/bench)"
    )
    parser.add_argument("--text", help="text to build from, as tools/shards.py takes it (Python's standard library)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured, in each process")
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[0, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--contenders", type=lambda text: text.split(";"), help="some of them, with ; between")
    parser.add_argument("--mixture", action="store_true", help="contender: of two sources")
    parser.add_argument("--first-step", type=int, default=0, help="contender: the step to go on at")
    parser.add_argument("--discard", type=int, default=0, help="contender: batches to read before")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.command == "contender" and not options.name:
        parser.error("contender needs a name")
    return options


def build_corpus(options: argparse.Namespace) -> None:
    """FOLDER/train and FOLDER/valid, with our own tools, unless they are there."""
    if (options.folder / "train" / "index.json").exists():
        return
    text = [options.text or f"{sysconfig.get_path('stdlib')}/**/*.py", "--exclude", "*-packages/*", "--held-out", "0.2"]
    model, scratch = options.folder / "bench.model", options.folder / "built"
    options.folder.mkdir(parents=True, exist_ok=True)
    _tool("tokenizer.py", "train", *text, "--vocab-size", str(VOCAB_SIZE), "--out", str(model))
    settings = ["--tokenizer", str(model), "--shard-tokens", str(_SHARD_TOKENS), "--out", str(scratch)]
    _tool("shards.py", "build", *text, *settings)
    for side in data_formats.SIDES:
        (scratch / side).rename(options.folder / side)
    scratch.rmdir()


def contend(options: argparse.Namespace) -> Result:
    """One contender, in this process."""
    from data_contenders import BATCH_SIZE, CONTENDERS, Reading

    (num_workers,) = options.workers
    reading = Reading(options.folder, num_workers, options.mixture, options.first_step)
    if options.first_step or not options.seconds:
        reading = Reading(options.folder, 0, first_step=options.first_step, num_samples=RESTART_STEP * BATCH_SIZE + 80)
    _import_of(options.name)
    began = time.perf_counter()
    batches = CONTENDERS[options.name](reading)
    batch = next(batches)
    first = time.perf_counter() - began
    for _ in range(options.discard):
        batch = next(batches)
    shapes = {(tuple(part.shape), str(part.dtype)) for part in batch}
    if shapes != {((BATCH_SIZE, data_formats.SEQUENCE_LENGTH), "torch.int64")}:
        raise ValueError(f"{options.name}: its batches are {shapes}")
    tokens = hashlib.sha256(batch[0].numpy().tobytes()).hexdigest()
    if not options.seconds:
        return Result(first, tokens)
    _take(batches, options.seconds / 6)
    anonymous, cpu = _anonymous_bytes(), _cpu_s()
    count, took = _take(batches, options.seconds)
    cpu = _cpu_s() - cpu
    growth = (_anonymous_bytes() - anonymous) / 1e6
    rate = count * BATCH_SIZE * data_formats.SEQUENCE_LENGTH / took
    return Result(first, tokens, rate, cpu / count * 1e3, growth)


def rounds(options: argparse.Namespace, *, mixture: bool) -> dict[str, dict[int, list[Result]]]:
    """Results by contender and number of workers, one a round."""
    from data_contenders import CONTENDERS

    if unknown := set(options.contenders or ()) - set(CONTENDERS):
        print(f"error: --contenders {';'.join(sorted(unknown))}: choose of {';'.join(CONTENDERS)}", file=sys.stderr)
        raise SystemExit(2)
    names = options.contenders or [name for name in CONTENDERS if not (mixture and name.startswith("megatron"))]
    found: dict[str, dict[int, list[Result]]] = {name: {n: [] for n in options.workers} for name in names}
    for number in range(options.rounds):
        for name, of_workers in found.items():
            for num_workers, results in of_workers.items():
                result = launch(options, options.folder, name, num_workers, *(["--mixture"] if mixture else []))
                results.append(result)
                told = f"{result.tokens_per_s / 1e6:.1f} M tokens/s, {result.cpu_ms:.3f} CPU ms a batch"
                where = f"round {number + 1} of {options.rounds}"
                print(f"{where}: {name}, {num_workers} workers  {told}", file=sys.stderr, flush=True)
    return found


def restarts(options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Seconds to the first batch, by contender and step: of a large corpus, that is 100,000 steps long."""
    from data_contenders import BATCH_SIZE, RESUMES

    large = options.folder / "large"
    data_formats.enlarge(options.folder, large, (RESTART_STEP + 100) * BATCH_SIZE * data_formats.SEQUENCE_LENGTH)
    for name in RESUMES:
        gone_on = launch(options, options.folder, name, 0, "--seconds", "0", "--first-step", str(CHECKED_STEP))
        through = launch(options, options.folder, name, 0, "--seconds", "0", "--discard", str(CHECKED_STEP))
        if gone_on.tokens != through.tokens:
            raise SystemExit(f"{name}: what it reads after a restart is not what it reads there without one")
    found: dict[str, dict[int, list[float]]] = {name: {0: [], RESTART_STEP: []} for name in RESUMES}
    for number in range(options.rounds + 1):
        for name, of_steps in found.items():
            for step, seconds in of_steps.items():
                result = launch(options, large, name, 0, "--seconds", "0", "--first-step", str(step))
                if number:  # the first one may build an index that the later ones find
                    seconds.append(result.first_batch_s)
                print(f"restart: {name}, step {step}  {result.first_batch_s:.2f} s", file=sys.stderr, flush=True)
    return found


def launch(options: argparse.Namespace, folder: Path, name: str, num_workers: int, *more: str) -> Result:
    """One contender in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "contender", name, "--workers", str(num_workers)]
    command += ["--folder", str(folder), "--seconds", str(options.seconds), *more]
    code, output = run([command], [dict(os.environ)])
    if code:
        raise SystemExit(f"{name} with {num_workers} workers failed with status {code}; its end:\n{output[-4000:]}")
    return Result(**json.loads(next(line for line in output.splitlines()[::-1] if line.startswith('{"first_batch_s"'))))


def tokenise(folder: Path, seconds: float = 5.0) -> dict[str, float]:
    """Tokens a second of processor time, in one process: batches from the raw text tars of FOLDER/text, against
    sentencepiece's own `encode` of the same texts in the same order, which it cannot beat."""
    import sentencepiece

    from bigtrain.data.loader import batches
    from bigtrain.data.order import Order, Source
    from bigtrain.data.shards import Dataset
    from bigtrain.data.text_tars import TextTars

    texts: list[str] = []

    class Recording(TextTars):
        def text(self, document: int) -> str:
            texts.append(super().text(document))
            return texts[-1]

    opened = TextTars.open(str(folder / "text"), Dataset.open(folder / "train").tokenizer)
    tars = Recording(opened._folder, opened.files, opened.tokenizer, name=opened.name, field="text")
    order = Order([Source(tars)], seed=1, num_lanes=64, sequence_length=data_formats.SEQUENCE_LENGTH)
    sizes: Any = {"data_rank": 0, "data_size": 1, "global_batch_size": 8, "micro_batch_size": 8}
    steps, began = batches(order, start=order.start(), **sizes), time.process_time()
    while time.process_time() - began < seconds:
        next(steps)
    ours_s = time.process_time() - began

    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "train" / "tokenizer.model"))
    began = time.process_time()
    num_tokens = sum(len(processor.encode(text)) for text in texts)
    alone_s = time.process_time() - began
    return {"sentencepiece": num_tokens / alone_s, "ours, from text tars": num_tokens / ours_s}


def _take(batches: Iterator[Any], seconds: float) -> tuple[int, float]:
    """(batches, seconds) taken in about so many seconds."""
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not count:
        next(batches)
        count += 1
    return count, took


def _cpu_s() -> float:
    """Of this process and its workers, those that have ended and those that have not."""
    import psutil

    myself = psutil.Process()
    total = sum(myself.cpu_times()[:4])
    for worker in myself.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(worker.cpu_times()[:4])
    return total


def _anonymous_bytes() -> int:
    """Of this process: what is its own, without mapped files."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def _import_of(name: str) -> None:
    """What a contender imports, before the clock starts."""
    if name == "streaming":
        data_formats.import_streaming()
    elif name in ("webdataset", "litdata"):
        importlib.import_module(name)
    elif name != "memmap":
        vendor = "megatron.core.datasets.gpt_dataset" if name.startswith("megatron") else "bigtrain.data.loader"
        importlib.import_module(vendor)


def _tool(name: str, *arguments: str) -> None:
    tool = Path(__file__).resolve().parents[1] / name
    code, output = run([[sys.executable, str(tool), *arguments]], [dict(os.environ)])
    if code:
        raise SystemExit(f"tools/{name} failed with status {code}:\n{output[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
