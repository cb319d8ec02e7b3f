"""Everything of a run meets here: start up, go on from a checkpoint, train, say how it went."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import torch

from bigtrain.config.derive import flops_per_token
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.ledger import Begin
from bigtrain.distributed.start import Runtime, start, stop
from bigtrain.engine.engine import Engine
from bigtrain.model.build import DTYPES
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.peak import device_peak
from bigtrain.telemetry.recorder import Recorder
from bigtrain.telemetry.report import write_report
from bigtrain.trainer import peers
from bigtrain.trainer.ledger_file import LedgerFile
from bigtrain.trainer.loop import Position, Throughput, fit, last_step
from bigtrain.trainer.run_data import RunData
from bigtrain.trainer.saver import Saver, checkpoints_to_resume
from bigtrain.trainer.stopping import StopSignal
from bigtrain.trainer.summary import tells_of, write_summary


def run(config: Config, run_dir: Path, console: Console) -> str | None:
    """Train `config` in `run_dir` on this rank, from its newest checkpoint on. Collective; every rank calls it.

    Returns the name of the signal that stopped it before its last step, the same on every rank.
    Raises UserError for what the user can fix: missing data, a layout that does not fit, a foreign checkpoint."""
    begin = time.perf_counter()
    with console.phase("joining the ranks"):
        runtime = start(config)
    _check_world(config, runtime.topology.world)
    resume = checkpoints_to_resume(config, run_dir)
    stop_signal = StopSignal(runtime, say=console.note_at_once)
    stop_signal.install()
    with console.phase("opening the data"):
        data = RunData.open(config, runtime.topology)
    with console.phase("building the model"):
        engine = Engine(config, runtime)
    saver = Saver(config, run_dir, data.tokenizer.files)
    position = Position(0, data.order.start())
    if resume:
        with console.phase(f"loading {resume[0]}"):
            position = Position(*saver.load(engine, resume))
            accept = config.data.on_change == "accept"
            consumed = position.cursor.num_sequences
            if data.order.go_on_from(position.cursor, accept_change=accept):
                console.note(f"data.train: another mixture from sequence {consumed:,} on")
            position = Position(position.step, data.order.cursor(consumed))
    if config.parallel.zero_stage == 3:
        console.note(f"weights are gathered once a {'step' if engine.keeps_gathered else 'microbatch'}")
    console.note(f"{runtime.topology} on {runtime.device.type}, step {position.step} of {last_step(config)}")
    if position.step >= last_step(config) and tells_of(run_dir, position.step):
        console.note(f"already finished: {position.step:,} steps")
        return stop()
    throughput = _throughput(config, runtime, console)

    ledger = LedgerFile(run_dir, config, runtime.topology, Begin(position.step, position.cursor.num_sequences))
    with (
        closing(ledger),
        Recorder(
            run_dir,
            config,
            num_steps=last_step(config),
            resume_step=position.step,
            console=console,
            is_writer=runtime.is_main,
        ) as recorder,
    ):
        for passed_over in saver.fallbacks:
            recorder.event("fallback", step=position.step, damaged=str(passed_over.folder), reason=passed_over.reason)
            console.note(f"{passed_over.reason}. It is now {passed_over.folder}; step {position.step} goes on instead")
        position = fit(
            config,
            position,
            engine=engine,
            batches=peers.agreed(data.batches(position.cursor), runtime, data.order.allow),
            evaluators=data.evaluators(),
            epochs=data.order.epochs,
            saver=saver,
            recorder=recorder,
            ledger=ledger,
            throughput=throughput,
            stop=stop_signal,
        )
        if name := stop_signal.received:
            recorder.event("stop", step=position.step, signal=name)
            where = f"step {position.step} is saved in {saver.folder(position.step)}"
            goes_on = "; the same command goes on from there" if position.step < last_step(config) else ""
            if saver.last is not None and not saver.last.error:
                console.note(f"stopped by {name}: {where}{goes_on}")
    if runtime.is_main:
        try:
            write_summary(run_dir, unigram_nats=data.unigram_nats(), wall_s=time.perf_counter() - begin)
            with console.phase("writing report.html"):
                write_report([run_dir])
        except OSError as error:  # a full disk; what counts is in metrics.jsonl and in the checkpoints
            console.note(
                f"{run_dir}: no summary.json or report.html ({error.strerror}); tools/report.py writes the report"
            )
    stop()
    if saver.last is not None and saver.last.error:
        raise UserError(f"{saver.last.error}. The same command goes on from the newest checkpoint in {saver.root}")
    return stop_signal.received if position.step < last_step(config) else None


def _check_world(config: Config, world: int) -> None:
    expected = config.cluster.num_nodes * config.cluster.procs_per_node
    if config.cluster.procs_per_node and world != expected:
        raise UserError(
            f"{world} ranks were started, but the run's config.yaml was made for cluster.num_nodes="
            f"{config.cluster.num_nodes} x cluster.procs_per_node={config.cluster.procs_per_node} = {expected}. "
            "Start that many, or freeze the config anew: python -m bigtrain.launch --freeze ..."
        )


def _throughput(config: Config, runtime: Runtime, console: Console) -> Throughput:
    """The peak of all ranks together is what model FLOPs are held against."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(config.cluster.procs_per_node or 1)))
    peak = device_peak(runtime.device, DTYPES[config.precision.dtype], ranks_on_machine=ranks_here)
    total = torch.tensor(peak.flops_per_second, dtype=torch.float64, device=runtime.device)
    peak_of_all = float(runtime.all_reduce(total).item())
    console.note(f"peak of all ranks {peak_of_all / 1e12:,.3f} TFLOP/s ({peak.source})")
    return Throughput(flops_per_token(config.model, config.train.sequence_length), peak_of_all)
