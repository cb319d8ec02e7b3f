"""Writes the ledger of this data rank (data/ledger.py) as the run goes, and the bad documents that it passed over."""

from __future__ import annotations

from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.data import ledger
from bigtrain.data.ledger import Begin, Entry
from bigtrain.data.loader import StepBatch
from bigtrain.telemetry.metrics import MetricsFile
from bigtrain.topology import Topology


class LedgerFile:
    """One line a step. Tensor and pipeline peers read the same data, so one of them writes."""

    def __init__(self, run_dir: Path, config: Config, topology: Topology, begin: Begin) -> None:
        """`begin`: what is done. Lines of later steps, which will be computed again, are removed, also those of data
        ranks that there are no longer."""
        resume_step = begin.step
        self._size, self._topology = config.train.global_batch_size, topology
        self._file: MetricsFile | None = None
        if not config.data.ledger or topology.tensor_rank or topology.stage:
            return
        path = ledger.path_of(run_dir, topology.data_rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if begin.step and not path.exists() and topology.data_rank == 0:  # from another run's checkpoint
            ledger.write_begin(run_dir, begin)
        self._file = MetricsFile(path, resume_step=resume_step)
        self._skipped = MetricsFile(ledger.skipped_path_of(run_dir, topology.data_rank), resume_step=resume_step)
        for other in sorted(path.parent.glob("*-*.jsonl")) if topology.data_rank == 0 else ():
            if int(other.stem.rpartition("-")[2]) >= topology.data:
                MetricsFile(other, resume_step=resume_step).close()

    def record(self, step: int, batch: StepBatch) -> None:
        """`batch` is what step `step` was fed."""
        if self._file is not None:
            topology = self._topology
            first = batch.cursor.num_sequences - self._size
            entry = Entry(step, first, self._size, topology.data_rank, topology.data, batch.digest)
            self._file.append(entry.to_dict())
            for skipped in batch.skipped:
                self._skipped.append({"step": step, **skipped.to_dict()})

    def sync(self) -> None:
        """On the disk when this returns, so that no checkpoint knows of steps that the ledger has lost."""
        if self._file is not None:
            self._file.sync()
            self._skipped.sync()

    def close(self) -> None:
        """A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._skipped.close()
