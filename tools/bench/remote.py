#!/usr/bin/env python
"""What it costs to read shards through the cache: against the same folder on a disk, over a web server on this machine.

python tools/bench/remote.py data/corpus/train
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bigtrain.data.cache import Cache
from bigtrain.data.folders import Places
from bigtrain.data.order import Order, Source
from bigtrain.data.shards import Dataset
from bigtrain.launching.environment import free_port

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a built folder: train/ or valid/")
    parser.add_argument("--sequences", type=int, default=2000, help="of 2048 tokens, read in each pass (2000)")
    options = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(options.folder), str(port)]
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server,
    ):
        try:
            _measure(options.folder, f"http://127.0.0.1:{port}", Path(scratch), options.sequences)
        finally:
            server.terminate()
    return 0


def _measure(folder: Path, url: str, scratch: Path, sequences: int) -> None:
    _wait_for(url)

    def remote() -> Dataset:
        return Dataset.open(url, places=Places(Cache(scratch, max_bytes=1 << 40)))

    def whole(dataset: Dataset) -> int:
        return sum(len(dataset.tar(shard)) for shard in range(len(dataset.index.shards)))

    here, open_here = _timed(lambda: Dataset.open(folder))
    print(f"open on the disk           {open_here * 1e3:9.1f} ms   {len(here.index.shards)} shards")
    _, first = _timed(remote)
    print(f"open remote, first time    {first * 1e3:9.1f} ms   index, tokenizer and the documents' rows are fetched")
    there, again = _timed(remote)
    print(f"open remote, from cache    {again * 1e3:9.1f} ms   the index alone is fetched")
    size, took = _timed(lambda: whole(there))
    print(f"fetch all shards           {took:9.2f} s    {size / took / 1e6:,.0f} MB/s, checked against their sha256")
    for name, dataset in (("disk", here), ("cache", there), ("disk", here), ("cache", there)):
        order = Order([Source(dataset)], seed=1, num_lanes=16, sequence_length=2048)
        order.sequence(0)
        _, took = _timed(lambda order=order: [order.sequence(number) for number in range(sequences)])
        rate = sequences * 2048 / took
        print(f"{sequences} sequences, {name:<10} {took:9.2f} s    {rate / 1e6:,.1f} M tokens/s")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
