"""Speed of reading training batches, against what a user would pick instead.

    make bench-data                                    all of it; 15 minutes on 2 cores
    python tools/bench/data.py                         the same, once .venv/bench is there (data-requirements.txt)
    python tools/bench/data.py --only restart          seconds to the first batch, at the start and at step 100,000
    python tools/bench/data.py --text 'web/*.jsonl'    on your text, not on Python's standard library

All contenders read the same tokens, written before in the format of each (data_formats.py), warm in the page cache,
and make batches of 8 x 2048 int64 inputs and targets, torch tensors (data_contenders.py). Each runs in a process of its
own, one after the other, in interleaved rounds. A ratio is the median over the rounds of the ratios within each round,
and stands with the lowest and highest. Nothing else should run on the machine meanwhile; the processor time of a batch
tells a slow contender from a disturbed one. Ours gives more than the others: positions and a loss mask by document, a
digest of every step, the cursor; only "megatron, documents" gives the first two.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(sys.prefix) / "bench"))  # behind the packages of .venv: none of those is replaced
import data_formats
from step import run

VOCAB_SIZE = 4096
PARTS = ("read", "mixture", "restart", "tokenise")
RESTART_STEP = 100_000
TARGET = 1.5
"""Our tokens a second over those of the best of the three libraries."""
_SHARD_TOKENS = 1_000_000


@dataclass
class Result:
    """What one process measured."""

    first_batch_s: float
    """From opening the data on; the imports are done by then."""
    tokens_per_s: float = 0.0
    cpu_ms: float = 0.0
    """A batch, of the process and its workers."""
    rss_growth_mb: float = 0.0
    """Of the process, from the first measured batch to the last, page cache of maps left out."""


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
    parser.add_argument("--workers", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--contenders", type=lambda text: text.split(";"), help="some of them, with ; between")
    parser.add_argument("--mixture", action="store_true", help="contender: of two sources")
    parser.add_argument("--first-step", type=int, default=0, help="contender: the step to go on at")
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
    import psutil
    from data_contenders import BATCH_SIZE, CONTENDERS, Reading

    (num_workers,) = options.workers
    reading = Reading(options.folder, num_workers, options.mixture, options.first_step)
    if options.first_step or not options.seconds:
        reading = Reading(options.folder, 0, first_step=options.first_step, num_samples=RESTART_STEP * BATCH_SIZE + 80)
    _import_of(options.name)
    began = time.perf_counter()
    batches = CONTENDERS[options.name](reading)
    shapes = {(part.shape, part.dtype, part.is_contiguous()) for part in next(batches)}
    first = time.perf_counter() - began
    if [str(each) for each in shapes] != [f"(torch.Size([{BATCH_SIZE}, 2048]), torch.int64, True)"]:
        raise ValueError(f"{options.name}: its batches are {shapes}")
    if not options.seconds:
        return Result(first)
    _take(batches, options.seconds / 6)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    anonymous, cpu = _anonymous_bytes(), _cpu_s(processes)
    count, took = _take(batches, options.seconds)
    cpu = _cpu_s(processes) - cpu
    growth = (_anonymous_bytes() - anonymous) / 1e6
    return Result(first, count * BATCH_SIZE * data_formats.SEQUENCE_LENGTH / took, cpu / count * 1e3, growth)


def rounds(options: argparse.Namespace, *, mixture: bool) -> dict[str, dict[int, list[Result]]]:
    """Results by contender and number of workers, one a round."""
    from data_contenders import CONTENDERS

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
    """Tokens a second of one process, from text in memory or in the tars of FOLDER/text."""
    return {name: work(folder, seconds) for name, work in TOKENISERS.items()}


def sentencepiece_alone(folder: Path, seconds: float) -> float:
    """The library's `encode` on one text after the other: what online tokenising cannot beat."""
    import sentencepiece

    from bigtrain.data.shards import Dataset

    dataset = Dataset.open(folder / "train")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "train" / "tokenizer.model"))
    texts = [dataset.tokenizer.decode(dataset.tokens(number).tolist()) for number in range(min(len(dataset), 500))]
    return _rate((len(processor.encode(text)) for _ in range(1000) for text in texts), seconds)


TOKENISERS = {"sentencepiece": sentencepiece_alone}
"""For a source of raw text: add its reader of FOLDER/text here, which yields tokens through `_rate` likewise."""


def table(found: dict[str, dict[int, list[Result]]]) -> str:
    """Tokens a second at 0 workers and at the best other number, and what ours is of the others'."""
    from data_contenders import LIBRARIES, OURS

    rows = [f"{'contender':22}{'0 workers, M tokens/s':>26}{'CPU ms':>8}{'with workers':>26}{'of':>4}{'CPU ms':>8}"
            f"{'first batch s':>15}{'grows MB':>10}"]  # fmt: skip
    for name, of_workers in found.items():
        best = best_of(of_workers)
        cells = [_rates(of_workers.get(0, [])), _median(of_workers.get(0, []), "cpu_ms", ".3f")]
        cells += [_rates(of_workers.get(best, [])), str(best), _median(of_workers.get(best, []), "cpu_ms", ".3f")]
        cells += [_median(of_workers.get(0, []), field, ".2f") for field in ("first_batch_s", "rss_growth_mb")]
        rows.append(
            f"{name:22}{cells[0]:>26}{cells[1]:>8}{cells[2]:>26}{cells[3]:>4}{cells[4]:>8}{cells[5]:>15}{cells[6]:>10}"
        )
    rows.append("In brackets the lowest and the highest of the rounds. CPU ms: a batch, with all workers.")
    for ours in OURS:
        for other in (name for name in found if name not in OURS and ours in found):
            zero = ratio(found[ours].get(0, []), found[other].get(0, []))
            many = ratio(found[ours].get(best_of(found[ours]), []), found[other].get(best_of(found[other]), []))
            wanted = f"; wanted: {TARGET} of the best of {', '.join(LIBRARIES)}" if other in LIBRARIES else ""
            rows.append(f"{ours} of {other}: {zero} at 0 workers, {many} with workers{wanted}")
    return "\n".join(rows)


def best_of(of_workers: dict[int, list[Result]]) -> int:
    """The number of workers above 0 with the highest median."""
    rates = {n: statistics.median(r.tokens_per_s for r in found) for n, found in of_workers.items() if n and found}
    return max(rates, key=lambda n: rates[n]) if rates else 0


def ratio(ours: list[Result], others: list[Result]) -> str:
    """Median, lowest and highest over the rounds of our speed over theirs."""
    ratios = [mine.tokens_per_s / other.tokens_per_s for mine, other in zip(ours, others, strict=False)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-"


def restart_table(found: dict[str, dict[int, list[float]]]) -> str:
    rows = [f"{'contender':22}{'step 0':>24}{f'step {RESTART_STEP:,}':>24}"]
    for name, of_steps in found.items():
        cells = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in of_steps.values()]
        rows.append(f"{name:22}{cells[0]:>24}{cells[1]:>24}")
    rows.append("webdataset reads everything before it again; random windows of a memory map are never found again.")
    return "\n".join(rows)


def tokenise_table(found: list[dict[str, float]]) -> str:
    rows = ["tokenising in one process, M tokens/s"]
    for name in found[0]:
        rates = [each[name] / 1e6 for each in found]
        share = statistics.median(each[name] / each["sentencepiece"] for each in found)
        rows.append(f"{name:22}{statistics.median(rates):>8.2f} ({min(rates):.2f} to {max(rates):.2f})  {share:.2f}")
    return "\n".join(rows)


def _rates(found: list[Result]) -> str:
    rates = [result.tokens_per_s / 1e6 for result in found]
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})" if rates else "-"


def _median(found: list[Result], field: str, form: str) -> str:
    return format(statistics.median(getattr(result, field) for result in found), form) if found else "-"


def _take(batches: Iterator[Any], seconds: float) -> tuple[int, float]:
    """(batches, seconds) taken in about so many seconds."""
    began, count = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds or not count:
        next(batches)
        count += 1
    return count, took


def _rate(counts: Iterator[int], seconds: float) -> float:
    """Tokens a second of something that yields how many it made."""
    began, total = time.perf_counter(), 0
    for count in counts:
        total += count
        if (took := time.perf_counter() - began) > seconds:
            return total / took
    raise ValueError("it ended before the time did")


def _cpu_s(processes: list[Any]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


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
