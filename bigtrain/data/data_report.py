"""What a launch says of its data: how much there is, how often the run goes through it, and how it is packed.

Packing costs two things, and both are told for each source:

- padding, the share of the places in the sequences that stay empty. Documents end to end (concat) leave none in
  training; held-out data, once through, fill all but the last sequence.
- cut documents: those whose predicted tokens are not all in one sequence, so that a part of them is learned, or scored,
  without what stands before it. best_fit counts the documents that are longer than a sequence. Of held-out data they
  are counted. Under concat a document's place differs from epoch to epoch, so the share is what is to be expected: a
  document of n tokens begins anywhere in a sequence of S with the same chance and has n - 1 to predict, so it is cut
  with a chance of (n - 2) / S, at most 1. That takes one pass over the sizes, a shard at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bigtrain.config import epochs, locations
from bigtrain.config.derive import num_steps
from bigtrain.config.schema import Config
from bigtrain.data.held_out import HeldOut
from bigtrain.data.order import Order
from bigtrain.data.packing import PackedSequences
from bigtrain.data.shards import Dataset


@dataclass(frozen=True)
class Packing:
    """Of one source."""

    padding: float
    """Share of the places in the sequences."""
    cut_documents: float
    """Share of the documents."""
    is_expected: bool = False
    """The documents are not counted: it is what is to be expected."""

    def __str__(self) -> str:
        about = "about " if self.is_expected else ""
        padding = f"{self.padding:.2%} padding" if self.padding else "no padding"
        return f"{padding}, {about}{self.cut_documents:.1%} of the documents cut"


def lines(config: Config, order: Order, held_out: Mapping[str, HeldOut]) -> Iterator[str]:
    """All that a launch says of its data."""
    steps = num_steps(config.train)
    planned = order.epochs(steps * config.train.global_batch_size)
    names = locations.short_names(planned)
    if shards := [dataset for dataset in order.datasets if isinstance(dataset, Dataset)]:
        yield _amount("train", shards)
    for source, dataset in enumerate(order.datasets):
        if not isinstance(dataset, Dataset):
            size = f", {dataset.size_bytes / 1e6:,.1f} MB" if dataset.size_bytes else ""
            yield f"  {names[dataset.name]}: {len(dataset.files):,} tars of raw text{size}, tokenised as they are read"
            continue
        packing = packing_of(order, source)
        count = epochs.number(planned[dataset.name])
        yield f"  {names[dataset.name]}: {count} epochs in {steps:,} steps; {order.pack}: {packing}"
    for name, sequences in held_out.items():
        told = packing_of_held_out(sequences)
        yield f"{_amount(f'valid {name}'.strip(), sequences.datasets)}; {told}"
    yield from epochs.warnings(planned)


def packing_of(order: Order, source: int) -> Packing:
    """How a source of the training data, of tokenised shards, is packed."""
    dataset, sequences = order.datasets[source], order.sequences_of(source)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{dataset.name} is raw text: its documents have no sizes yet")
    if isinstance(sequences, PackedSequences):
        return Packing(sequences.padding, sequences.cut_documents / len(dataset))
    return Packing(0.0, expected_cut_documents(dataset, order.sequence_length), is_expected=True)


def expected_cut_documents(dataset: Dataset, sequence_length: int) -> float:
    """Share of the documents that are to be cut where they lie end to end, in an order that is drawn."""
    chances = sum(int(np.clip(sizes - 2, 0, sequence_length).sum()) for sizes in _sizes(dataset))
    return chances / (sequence_length * len(dataset))


def packing_of_held_out(held_out: HeldOut) -> Packing:
    """How the whole of a held-out set is packed, its sources together."""
    size, places, predicted, cut, documents = held_out.sequence_length, 0, 0, 0, 0
    for dataset in held_out.datasets:
        end = 0
        for sizes in _sizes(dataset):
            ends = end + np.cumsum(sizes)
            # its tokens are inputs from here on; its last target stands one place before its last token
            first, last = (ends - sizes) // size, np.maximum(ends - 2, ends - sizes) // size
            cut += int((last > first).sum())
            end = int(ends[-1])
        documents += len(dataset)
        predicted += end - 1
        places += -(-(end - 1) // size) * size
    return Packing(1 - predicted / places if places else 0.0, cut / documents)


def _sizes(dataset: Dataset) -> Iterator[np.ndarray]:
    """int64[documents], tokens, of each shard."""
    for shard in range(len(dataset.index.shards)):
        rows = dataset.documents_of_shard(shard)
        if len(rows):
            yield rows["num_tokens"].astype(np.int64)


def _amount(name: str, datasets: list[Dataset]) -> str:
    documents = sum(len(dataset) for dataset in datasets)
    tokens = sum(dataset.index.num_tokens for dataset in datasets)
    size = sum(dataset.index.text_bytes for dataset in datasets)
    prompts = sum(dataset.num_prompt_tokens for dataset in datasets)
    asked = f" ({prompts / tokens:.0%} of them prompts, not learned)" if prompts else ""
    return f"{name}: {documents:,} documents, {tokens:,} tokens{asked}, {size / 1e6:,.1f} MB of text"
