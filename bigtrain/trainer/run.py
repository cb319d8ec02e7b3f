"""Everything of a run meets here: start up, go on from a checkpoint, train, say how it went."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.derive import collective_timeout_s, flops_per_token
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.distributed.start import Runtime, start, stop
from bigtrain.engine.engine import Engine
from bigtrain.engine.open_model import has_tokenizer, open_model
from bigtrain.model.build import DTYPES
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.goodput import Clock, process_start
from bigtrain.telemetry.peak import device_peak
from bigtrain.telemetry.recorder import Recorder
from bigtrain.telemetry.report import write_report
from bigtrain.trainer import rewind
from bigtrain.trainer.anomaly import Guard
from bigtrain.trainer.loop import Position, Throughput, last_step
from bigtrain.trainer.run_data import RunData
from bigtrain.trainer.saver import Saver, checkpoints_to_resume
from bigtrain.trainer.stopping import StopSignal
from bigtrain.trainer.summary import tells_of, write_summary
from bigtrain.trainer.training import Training
from bigtrain.trainer.watchdog import Watchdog


def run(config: Config, run_dir: Path, console: Console, watchdog: Watchdog) -> str | None:
    """Train `config` in `run_dir` on this rank, from its newest checkpoint on. Collective; every rank calls it.

    Returns the name of the signal that stopped it, the same on every rank: the run is not complete, though it may have
    done its last step.
    Raises UserError for what the user can fix: missing data, a layout that does not fit, a foreign checkpoint."""
    begin = time.perf_counter()
    clock = Clock(process_start())
    with console.phase("joining the ranks"):
        runtime = start(config, timeout_s=collective_timeout_s(config.watchdog))
    _check_world(config, runtime.topology.world)
    resume = checkpoints_to_resume(config, run_dir)
    stop_signal = StopSignal(runtime, say=console.note_at_once)
    stop_signal.install()
    with console.phase("opening the data"):
        data = RunData.open(config, runtime.topology)
    with console.phase("building the model"):
        engine = Engine(config, runtime)
    guard = Guard(config.anomaly)
    saver = Saver(config, run_dir, data.tokenizer.files, guard, clock, watchdog)
    began_from = None
    if resume:
        position = _go_on(config, resume, engine, saver, data, console)
    else:
        position = Position(0, data.order.start())
        if config.checkpoint.init_from:
            began_from = _start_from_weights(config, engine, saver, data.tokenizer, console)
    if config.parallel.zero_stage == 3:
        console.note(f"weights are gathered once a {'step' if engine.keeps_gathered else 'microbatch'}")
    console.note(f"{runtime.topology} on {runtime.device.type}, step {position.step} of {last_step(config)}")
    if position.step >= last_step(config) and tells_of(run_dir, position.step):
        console.note(f"already finished: {position.step:,} steps")
        return stop()
    if told := saver.reserve(engine):
        console.note(told)
    throughput = _throughput(config, runtime, console)

    with Recorder(
        run_dir,
        config,
        num_steps=last_step(config),
        resume_step=position.step,
        console=console,
        is_writer=runtime.is_main,
        clock=clock,
    ) as recorder:
        watchdog.on_hang = partial(recorder.close, failed=True, ended=False)
        if began_from is not None:
            recorder.event("init", step=0, **began_from)
        for passed_over in saver.fallbacks:
            recorder.event("fallback", step=position.step, damaged=str(passed_over.folder), reason=passed_over.reason)
            console.note(f"{passed_over.reason}. It is now {passed_over.folder}; step {position.step} goes on instead")
        run_of = Training(config, run_dir, runtime, data, engine, saver, guard, clock, watchdog, recorder, console)
        try:
            position = run_of.train(position, throughput=throughput, stop=stop_signal)
        except UserError:  # of all ranks alike: nobody is missing from the save under way
            recorder.saved(saver.wait())
            raise
        finally:
            recorder.saved(saver.close())
        if name := stop_signal.told:
            recorder.event("stop", step=position.step, signal=name)
            if saver.last is not None and not saver.last.error:
                where = saver.folder(position.step)
                console.note(
                    f"stopped by {name}: step {position.step} is saved in {where}; the same command goes on from there"
                )
        if spent := recorder.account():
            console.note(spent.told())
        recorder.close(hurried=stop_signal.received is not None)
    if runtime.is_main and not stop_signal.told:  # a run that is stopped has no time: its next start does it
        _sum_up(run_dir, data, time.perf_counter() - begin, console)
    stop()
    if saver.last is not None and saver.last.error:
        raise UserError(f"{saver.last.error}. The same command goes on from the newest checkpoint in {saver.root}")
    return stop_signal.told or None


def _go_on(
    config: Config, checkpoints: list[Path], engine: Engine, saver: Saver, data: RunData, console: Console
) -> Position:
    """Load the first of `checkpoints` that is whole. Collective."""
    with console.phase(f"loading {checkpoints[0]}"):
        position, is_changed = rewind.load(config, engine, saver, data.order, checkpoints)
        if is_changed:
            console.note(f"data.train: another mixture from sequence {position.cursor.num_sequences:,} on")
        return position


def _sum_up(run_dir: Path, data: RunData, wall_s: float, console: Console) -> None:
    """summary.json and report.html. What counts is in metrics.jsonl and the checkpoints: a full disk is only said."""
    try:
        write_summary(run_dir, unigram_nats=data.unigram_nats(), wall_s=wall_s)
        with console.phase("writing report.html"):
            write_report([run_dir])
    except OSError as error:
        console.note(f"{run_dir}: no summary or report ({error.strerror}); tools/report.py writes the report")


def _start_from_weights(
    config: Config, engine: Engine, saver: Saver, tokenizer: Tokenizer, console: Console
) -> dict[str, Any]:
    """Fill the weights from checkpoint.init_from; returns where they came from. Collective. Raises UserError where they
    are of another model or tokenizer."""
    opened = open_model(config.checkpoint.init_from, tokenizer=tokenizer)
    if not has_tokenizer(opened.folder):
        console.note(f"warning: {opened.folder} has no tokenizer, so nothing tells that its ids are those of the data")
    elif not tokenizer.means_the_same(opened.tokenizer):
        raise UserError(
            f"checkpoint.init_from={opened.folder}: its tokenizer ({opened.tokenizer.fingerprint[:16]}) is not the "
            f"run's, {tokenizer.name} ({tokenizer.fingerprint[:16]}). Set tokenizer.path={opened.folder}, and shards "
            "that it made."
        )
    with console.phase(f"loading the weights of {opened.folder}"):
        saver.load_weights(engine, opened.read, origin=opened.origin)
    console.note(f"weights from {opened.folder} (step {opened.step:,}); optimizer, schedule and data begin anew")
    return opened.origin["init_from"]


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
