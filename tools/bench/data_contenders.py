"""The contenders of tools/bench/data.py: how a user reads training batches with each library, as its manual has it.

Each is a function of a `Reading` that returns an endless iterator of (inputs, targets), int64 [B, S] torch tensors.
`CONTENDERS` at the end names them, and says which can go on at a later step without reading what comes before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_formats import SEQUENCE_LENGTH, SIDES, import_streaming
from data_tables import OURS
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

BATCH_SIZE = 8
SEED = 1
WEIGHTS = (0.75, 0.25)
"""Of train/ and valid/ in a mixture."""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reading:
    """What to read."""

    folder: Path
    """As data_formats.py makes it."""
    num_workers: int = 0
    mixture: bool = False
    """train/ and valid/ by `WEIGHTS`, not train/ alone."""
    first_step: int = 0
    """Steps that a run before this one took."""
    num_samples: int = 400_000
    """For megatron-core, which wants to know it first: sequences that the run reads at most."""

    @property
    def workers(self) -> dict[str, Any]:
        """What a DataLoader takes. Workers live on: epochs are short here."""
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.mixture else SIDES[:1]


def shifted(rows: Tensor) -> Batch:
    """int64 [B, S + 1] -> inputs and targets."""
    return rows[:, :-1], rows[:, 1:]


def ours(reading: Reading, pack: str, documents: bool = False) -> Iterator[Batch]:
    """bigtrain.data: the places of documents, the digest of each step and the cursor come with it. `documents`: with
    the positions, loss mask and boundaries that are made of those places when they are asked for."""
    from bigtrain.config.schema import DataConfig
    from bigtrain.data.loader import batches
    from bigtrain.data.order import Order, Source
    from bigtrain.data.shards import Dataset

    weights = WEIGHTS if reading.mixture else (1.0,)
    datasets = [Dataset.open(reading.folder / side) for side in reading.sides]
    sources = [Source(dataset, weight) for dataset, weight in zip(datasets, weights, strict=True)]
    lanes = min(DataConfig().num_lanes, *map(len, datasets)) if reading.mixture else 64
    order = Order(sources, seed=SEED, num_lanes=lanes, sequence_length=SEQUENCE_LENGTH, pack=pack)
    steps = batches(
        order,
        data_rank=0,
        data_size=1,
        global_batch_size=BATCH_SIZE,
        micro_batch_size=BATCH_SIZE,
        start=order.cursor(reading.first_step * BATCH_SIZE),
        num_workers=reading.num_workers,
    )
    for step in steps:
        (batch,) = step.microbatches
        if documents:
            _ = batch.positions_BS, batch.loss_mask_BS, batch.boundaries
        yield batch.tokens_BS, batch.targets_BS
        del step, batch  # or the next one would not go where the caller lets go of this one


def memmap(reading: Reading) -> Iterator[Batch]:
    """nanoGPT: a flat file, windows at random places. Nothing is read once, nothing can be gone on with."""
    flat = [np.memmap(reading.folder / "flat" / f"{side}.bin", np.uint16, "r") for side in reading.sides]
    windows = _RandomWindows(flat)
    return iter(windows) if not reading.num_workers else _loaded(windows, reading, batch_size=None)


class _RandomWindows(IterableDataset[Batch]):
    def __init__(self, flat: list[Any]) -> None:
        self._flat = flat

    def __iter__(self) -> Iterator[Batch]:
        while True:
            data = self._flat[int(torch.rand(()) >= WEIGHTS[0]) if len(self._flat) > 1 else 0]
            places = torch.randint(len(data) - SEQUENCE_LENGTH, (BATCH_SIZE,)).tolist()
            inputs = [torch.from_numpy(data[at : at + SEQUENCE_LENGTH].astype(np.int64)) for at in places]
            targets = [torch.from_numpy(data[at + 1 : at + 1 + SEQUENCE_LENGTH].astype(np.int64)) for at in places]
            yield torch.stack(inputs), torch.stack(targets)


def webdataset(reading: Reading) -> Iterator[Batch]:
    """Tars, a shuffle buffer, decode, documents end to end."""
    import webdataset as wds

    def pipeline(side: str) -> Any:
        tars = sorted(str(path) for path in (reading.folder / side).glob("*.tar"))
        found = wds.WebDataset(tars, shardshuffle=100, seed=SEED, empty_check=False)  # pyright: ignore[reportAttributeAccessIssue]
        return found.shuffle(1000).decode().repeat()

    parts = [pipeline(side) for side in reading.sides]
    mixed = wds.RandomMix(parts, list(WEIGHTS)) if reading.mixture else parts[0]  # pyright: ignore[reportAttributeAccessIssue]
    rows = wds.DataPipeline(mixed, _end_to_end, wds.batched(BATCH_SIZE, collation_fn=torch.stack))  # pyright: ignore[reportAttributeAccessIssue]
    loader = wds.WebLoader(rows, batch_size=None, **reading.workers)  # pyright: ignore[reportAttributeAccessIssue]
    return map(shifted, iter(loader))


def _end_to_end(samples: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """int64 [S + 1] each."""
    size, parts, count = SEQUENCE_LENGTH + 1, [], 0
    for sample in samples:
        parts.append(sample["tokens.npy"])
        count += len(parts[-1])
        if count >= size:
            tokens = np.concatenate(parts).astype(np.int64)
            for start in range(0, count - size + 1, size):
                yield torch.from_numpy(tokens[start : start + size])
            count %= size
            parts = [tokens[len(tokens) - count :]]


def streaming(reading: Reading) -> Iterator[Batch]:
    """MosaicML StreamingDataset over sequences that are packed already."""
    base = import_streaming()
    base.util.clean_stale_shared_memory()
    folders = [str(reading.folder / "mds" / side) for side in reading.sides]
    which: dict[str, Any] = {"local": folders[0]}
    if reading.mixture:
        which = {
            "streams": [base.Stream(local=folder, proportion=w) for folder, w in zip(folders, WEIGHTS, strict=True)]
        }
    dataset = base.StreamingDataset(**which, shuffle=True, shuffle_seed=SEED, batch_size=BATCH_SIZE)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, **reading.workers, collate_fn=_stacked_arrays, drop_last=True)
    if reading.first_step:
        state = {"epoch": 0, "sample_in_epoch": reading.first_step * BATCH_SIZE, "shuffle_seed": SEED}
        dataset.load_state_dict(state | {"num_canonical_nodes": 1, "initial_physical_nodes": 1})
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def _stacked_arrays(samples: list[dict[str, np.ndarray]]) -> Batch:
    return shifted(torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64)))


def litdata(reading: Reading) -> Iterator[Batch]:
    """litdata's StreamingDataset with its TokensLoader."""
    import litdata as lit  # pyright: ignore[reportMissingImports]

    size = SEQUENCE_LENGTH + 1
    parts = [
        lit.StreamingDataset(
            str(reading.folder / "litdata" / side),
            item_loader=lit.TokensLoader(size),
            shuffle=True,
            drop_last=True,
            seed=SEED,
        )
        for side in reading.sides
    ]
    whole = parts[0]
    if reading.mixture:
        whole = lit.CombinedStreamingDataset(parts, seed=SEED, weights=list(WEIGHTS), iterate_over_all=False)
    loader = lit.StreamingDataLoader(
        whole, batch_size=BATCH_SIZE, **reading.workers, collate_fn=_stacked_tensors, drop_last=True
    )
    if reading.first_step:
        taken = reading.first_step * BATCH_SIZE
        state = loader.state_dict()
        state |= {"current_epoch": 1, "num_samples_yielded": taken}
        state["dataset"] |= {"current_epoch": 1, "num_samples_yielded": taken, "sample_in_epoch": taken}
        loader.load_state_dict(state)
    return itertools.chain.from_iterable(loader for _ in itertools.count())


def _stacked_tensors(samples: list[Tensor]) -> Batch:
    return shifted(torch.stack(samples).long())


def megatron(reading: Reading, documents: bool) -> Iterator[Batch]:
    """megatron-core's GPTDataset. `documents`: with positions and a loss mask that keep documents apart, as ours.

    One source only: its BlendedDataset wants a process group."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        eod, pad, vocab_size, unique_identifiers = 2, -1, 4096, {"class": "bench"}

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE_LENGTH,
        path_to_cache=str(reading.folder / "megatron" / "cache"),
        tokenizer=Tokenizer(),  # type: ignore[arg-type]
        reset_position_ids=documents,
        reset_attention_mask=False,
        eod_mask_loss=documents,
        create_attention_mask=False,
    )
    path = str(reading.folder / "megatron" / "train")
    tokens = IndexedDataset(path)
    whole = GPTDataset(tokens, path, np.arange(len(tokens), dtype=np.int32), reading.num_samples, Split.train, config)
    places = range(reading.first_step * BATCH_SIZE, reading.num_samples)
    loader = _loaded(whole, reading, batch_size=BATCH_SIZE, sampler=places)
    return ((batch["tokens"], batch["labels"]) for batch in loader)


def _loaded(dataset: Any, reading: Reading, **settings: Any) -> Iterator[Any]:
    return iter(DataLoader(dataset, **reading.workers, **settings))


CONTENDERS: dict[str, Callable[[Reading], Iterator[Batch]]] = {
    "ours, concat": lambda reading: ours(reading, "concat"),
    "ours, best_fit": lambda reading: ours(reading, "best_fit"),
    "ours, documents": lambda reading: ours(reading, "concat", documents=True),
    "webdataset": webdataset,
    "streaming": streaming,
    "litdata": litdata,
    "megatron": lambda reading: megatron(reading, documents=False),
    "megatron, documents": lambda reading: megatron(reading, documents=True),
    "memmap": memmap,
}
RESUMES = (*OURS, "streaming", "litdata", "megatron")
"""Those that find a later step again. The others read from the start up to it, or never know where they were."""
