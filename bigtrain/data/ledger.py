"""The ledger: which sequences each data rank was fed in each step, and which bad documents it passed over.

RUN/ledger/rank-00003.jsonl has a line a step: the sequences, and a digest of their tokens as they were fed. begin.json
is there where the run went on from another run's checkpoint, and says where. `bigtrain.data.audit` reads nothing else
of the run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bigtrain.config.errors import UserError

FOLDER = "ledger"
_BEGIN = "begin.json"
_DIGESTED = np.dtype("<i8")


@dataclass(frozen=True)
class Entry:
    """One data rank's share of a step."""

    step: int
    """From 1 on."""
    first: int
    """The global sequence that the step begins with."""
    size: int
    """Global sequences of the step."""
    data_rank: int
    data_size: int
    digest: str
    """Of the tokens of this rank's sequences: `digest`."""

    @property
    def sequences(self) -> range:
        """This rank's global sequences, in the order in which they were fed."""
        return range(self.first + self.data_rank, self.first + self.size, self.data_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Entry:
        """Raises KeyError, TypeError or ValueError for what is no entry."""
        numbers = {name: int(values[name]) for name in ("step", "first", "size", "data_rank", "data_size")}
        if numbers["data_size"] < 1 or not 0 <= numbers["data_rank"] < numbers["data_size"] or numbers["size"] < 1:
            raise ValueError("sizes that cannot be")
        return Entry(**numbers, digest=str(values["digest"]))


def path_of(run_dir: Path, data_rank: int) -> Path:
    """The file of one data rank."""
    return run_dir / FOLDER / f"rank-{data_rank:05d}.jsonl"


def skipped_path_of(run_dir: Path, data_rank: int) -> Path:
    """Where a data rank writes down the bad documents that it passed over: step, data, shard, sample, reason."""
    return run_dir / FOLDER / f"skipped-{data_rank:05d}.jsonl"


def skipped(run_dir: Path) -> Counter[str]:
    """Bad documents that the run passed over, by reason. A document is counted once for each start of the run that met
    it."""
    lines = [
        line for path in sorted((run_dir / FOLDER).glob("skipped-*.jsonl")) for line in path.read_bytes().split(b"\n")
    ]
    return Counter(str(json.loads(line)["reason"]) for line in lines if line.endswith(b"}"))


@dataclass(frozen=True)
class Begin:
    """Where a run begins: what came before is another run's."""

    step: int = 0
    num_sequences: int = 0


def write_begin(run_dir: Path, begin: Begin) -> None:
    """Once, with the first step of a run that goes on from another run's checkpoint."""
    (run_dir / FOLDER / _BEGIN).write_text(json.dumps(asdict(begin)) + "\n", encoding="utf-8")


def read_begin(run_dir: Path) -> Begin:
    """Raises UserError where the file is damaged."""
    path = run_dir / FOLDER / _BEGIN
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Begin(int(values["step"]), int(values["num_sequences"]))
    except FileNotFoundError:
        return Begin()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it does not say where the run begins: {error}") from error


def digest(tokens: Iterable[np.ndarray], prompts_B: Sequence[Sequence[tuple[int, int]]] = ()) -> str:
    """Of these tokens, one array behind the other, padding included, and of the places of prompts in each row
    (`Rows.prompts_B`), where there are any: 64 bits, hexadecimal (xxh3)."""
    state = xxhash.xxh3_64()
    for part in tokens:
        state.update(part.data if part.dtype == _DIGESTED else part.astype(_DIGESTED).data)
    if any(prompts_B):
        places = [(row, *prompt) for row, prompts in enumerate(prompts_B) for prompt in prompts]
        state.update(np.array(places, _DIGESTED).data)
    return state.hexdigest()


def read(run_dir: Path) -> list[Entry]:
    """All entries of a run, by step and data rank. A last line that a crash cut is left out.

    Raises UserError where there is no ledger, or a line is none of it."""
    files = sorted((run_dir / FOLDER).glob("rank-*.jsonl"))
    if not files:
        raise UserError(f"{run_dir}: it has no ledger ({FOLDER}/rank-NNNNN.jsonl). Was data.ledger=false?")
    entries: list[Entry] = []
    for path in files:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entries.append(Entry.from_dict(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: it is no entry of a ledger: {error}") from error
    return sorted(entries, key=lambda entry: (entry.step, entry.data_rank))
