"""The same tokens in the formats of all contenders of tools/bench/data.py, and copies of them that look large.

FOLDER/train, valid             our shards; WebDataset tars, so webdataset reads them as they are
FOLDER/text/shard-000.tar       the texts of train/, in plain tars
FOLDER/flat/SIDE.bin            uint16, documents end to end: what nanoGPT reads
FOLDER/megatron/SIDE.bin, .idx  an IndexedDataset of megatron-core
FOLDER/mds/SIDE                 MosaicML streaming; a sample is a sequence of S + 1 tokens, as llm-foundry writes them
FOLDER/litdata/SIDE             litdata, for its TokensLoader
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.shards import Dataset

SEQUENCE_LENGTH = 2048
SIDES = ("train", "valid")
_SHARD_BYTES = 1 << 22


def convert(folder: Path) -> None:
    """Write every format that is not there yet from FOLDER/train and FOLDER/valid."""
    for side in SIDES:
        dataset = Dataset.open(folder / side)
        assert dataset.index.dtype == "<u2", "the contenders are set up for uint16"
        for kind, write in (("flat", _flat), ("megatron", _megatron), ("mds", _mds), ("litdata", _litdata)):
            _once(folder / kind, side, lambda out, write=write, dataset=dataset: write(dataset, out))
    _once(folder, "text", lambda out: _text(Dataset.open(folder / "train"), out))


def enlarge(folder: Path, out: Path, num_tokens: int) -> None:
    """train/ again and again, until there are so many tokens: files are links or have holes, every index is whole."""
    times = -(-num_tokens // Dataset.open(folder / "train").index.num_tokens)
    if (out / "DONE").exists():
        return
    for kind in ("", "mds", "litdata"):
        source, target = folder / kind / "train", out / kind / "train"
        target.mkdir(parents=True, exist_ok=True)
        index = json.loads((source / "index.json").read_text("utf-8"))
        for place in range(times):
            for file in source.iterdir():
                name = f"{place}-{file.name}" if file.name != "tokenizer.model" else file.name
                if not (target / name).exists():
                    os.link(file, target / name)
        (target / "index.json").write_text(json.dumps(_repeated(index, times)), "utf-8")
    _large_megatron(folder / "megatron" / "train", out / "megatron", times)
    (out / "DONE").touch()


def import_streaming() -> Any:
    """MosaicML streaming's `base`, without its `streaming/__init__`: that imports torchvision for its vision part."""
    if "streaming.base" in sys.modules:
        return sys.modules["streaming.base"]
    spec = find_spec("streaming")
    if spec is None:
        raise SystemExit("error: mosaicml-streaming is missing. `make bench-data` installs it.")
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["streaming"] = package
    import streaming.base  # pyright: ignore[reportMissingImports]

    return streaming.base


def _once(folder: Path, name: str, write: Any) -> None:
    done = folder / f"{name}.done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / name)
        done.touch()


def _documents(dataset: Dataset) -> Iterator[np.ndarray]:
    return (dataset.tokens(number) for number in range(len(dataset)))


def _flat(dataset: Dataset, out: Path) -> None:
    with out.with_suffix(".bin").open("wb") as file:
        for tokens in _documents(dataset):
            file.write(tokens.tobytes())


def _megatron(dataset: Dataset, out: Path) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    for tokens in _documents(dataset):
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
    builder.finalize(f"{out}.idx")


def _mds(dataset: Dataset, out: Path) -> None:
    size = SEQUENCE_LENGTH + 1
    tokens = np.concatenate(list(_documents(dataset)))
    columns = {"tokens": f"ndarray:uint16:{size}"}
    with import_streaming().MDSWriter(columns=columns, out=str(out), size_limit=_SHARD_BYTES) as writer:
        for start in range(0, len(tokens) - size + 1, size):
            writer.write({"tokens": tokens[start : start + size]})


def _litdata(dataset: Dataset, out: Path) -> None:
    import torch
    from litdata.streaming import Cache, TokensLoader  # pyright: ignore[reportMissingImports]

    out.mkdir()
    size = SEQUENCE_LENGTH + 1
    cache = Cache(str(out), chunk_size=_SHARD_BYTES // 2 // size * size, item_loader=TokensLoader(size))
    for number, tokens in enumerate(_documents(dataset)):
        cache[number] = torch.from_numpy(tokens.astype(np.int16))  # it knows no uint16; the vocabulary is small
    cache.done()
    cache.merge()


def _text(dataset: Dataset, out: Path) -> None:
    out.mkdir()
    tokenizer = dataset.tokenizer
    for shard in range(len(dataset.index.shards)):
        with tarfile.open(out / f"shard-{shard:03d}.tar", "w") as tar:
            for number in np.flatnonzero(dataset.shards_of_documents() == shard).tolist():
                text = tokenizer.decode(dataset.tokens(number).tolist()).encode()
                member = tarfile.TarInfo(f"{number:09d}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))


def _repeated(index: dict[str, Any], times: int) -> dict[str, Any]:
    """An index of ours, of MDS or of litdata, with every shard so many times."""
    index = dict(index)
    for key in ("num_documents", "num_tokens", "text_bytes"):
        if key in index:
            index[key] *= times
    shards = "chunks" if "chunks" in index else "shards"
    index[shards] = [_renamed(shard, f"{place}-") for place in range(times) for shard in index[shards]]
    return index


def _renamed(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    shard = dict(shard)
    for key in ("file", "documents_file", "filename"):
        if key in shard:
            shard[key] = prefix + shard[key]
    if "raw_data" in shard:
        shard["raw_data"] = {**shard["raw_data"], "basename": prefix + shard["raw_data"]["basename"]}
    return shard


def _large_megatron(source: Path, out: Path, times: int) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter

    dataset = IndexedDataset(str(source))  # a name: its arrays are views of maps that it closes when it goes
    lengths = np.tile(dataset.sequence_lengths, times)
    out.mkdir(exist_ok=True)
    with (out / "train.bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))
    with _IndexWriter(str(out / "train.idx"), np.uint16) as writer:
        writer.write(lengths.tolist(), None, range(len(lengths) + 1))
