"""Real runs of real ranks on real text: the run's folder, stopping, dying and going on, and text from what was trained.

Every run goes through `bigtrain.launching.local`, as `python -m bigtrain.launch` starts it. The runs are made once and
shared: a start of ranks costs seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from bigtrain.config import frozen
from bigtrain.config.schema import (
    CheckpointConfig,
    ParallelConfig,
    TrackerConfig,
)
from bigtrain.config.status import STOPPED
from bigtrain.telemetry.goodput import PARTS
from tests.integration.runs import (
    DEADLINE_S,
    HALF,
    LAUNCHER,
    LAYOUTS,
    STEPS,
    Attempt,
    at_step,
    build_shards,
    committed,
    config_of,
    ended,
    last_step,
    launch,
    records,
    run,
    run_well,
    trajectory,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def through(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of each layout that was never interrupted. The first also feeds W&B and saves on the way."""
    done: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in done:
            config = config_of(tmp_path_factory.mktemp("runs") / f"through-{layout}", data, layout)
            if not done:
                config = replace(config, tracker=TrackerConfig(), checkpoint=CheckpointConfig(interval=9, keep=2))
            done[layout] = run_well(config)
        return done[layout]

    return of


@pytest.fixture(scope="module")
def whole(through: Callable[[str], Path]) -> Path:
    return through("zero3-tensor2")


# the run's folder


def test_metrics(whole: Path) -> None:
    train, evaluations = records(whole, "train"), records(whole, "eval")
    keys = {"kind", "step", "tokens", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_second", "mfu"}
    assert all(record.keys() == keys for record in train)
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert [record["tokens"] for record in train] == [512 * step for step in range(1, STEPS + 1)]
    assert all(0 < record["mfu"] < 1.5 and record["tokens_per_second"] > 0 for record in train)
    assert train[-1]["loss"] < train[0]["loss"] - 0.5, "it learns"
    assert [set(record) for record in evaluations] == [{"kind", "step", "loss", "perplexity", "bits_per_byte"}] * 2
    assert [record["step"] for record in evaluations] == [HALF, STEPS]
    events = [(record["name"], record["step"]) for record in records(whole, "event") if record["name"] != "goodput"]
    saved = [("checkpoint", 9), ("epochs", HALF), ("checkpoint", 18), ("epochs", STEPS), ("checkpoint", STEPS)]
    assert sorted(events) == sorted(saved), "a save is recorded once it is durable, which may be steps later"
    (source,) = frozen.load(whole).data.train
    tokens = json.loads((Path(source.path) / "index.json").read_text())["num_tokens"]
    epochs = [record["epochs"] for record in records(whole, "event") if record["name"] == "epochs"]
    assert epochs == [{source.path: pytest.approx(512 * step / tokens)} for step in (HALF, STEPS)]


def test_files(whole: Path) -> None:
    assert frozen.load(whole).train.num_steps == STEPS
    assert committed(whole) == [18, STEPS]
    newest = whole / "checkpoints" / f"step-{STEPS:08d}"
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == STEPS and state["cursor"]["num_sequences"] == 8 * STEPS
    assert (newest / "tokenizer.model").read_bytes() == Path(frozen.load(whole).tokenizer.path).read_bytes()
    assert not list((whole / "checkpoints").glob(".*"))
    report = (whole / "report.html").read_text()
    assert "<html" in report and "plotly" in report.lower() and "http-equiv" not in report
    assert (whole / "logs" / "rank-1.log").exists()


def test_wandb_offline(whole: Path) -> None:
    assert (whole / "wandb_id").read_text().strip()
    (folder,) = (whole / "wandb").glob("offline-run-*")
    assert (whole / "wandb_id").read_text().strip() in folder.name
    assert list(folder.glob("*.wandb"))


def test_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    train, evaluation = records(whole, "train")[-1], records(whole, "eval")[-1]
    assert (summary["steps"], summary["tokens"]) == (STEPS, 512 * STEPS)
    assert summary["train_loss"] == train["loss"]
    assert summary["eval"] == {key: evaluation[key] for key in ("loss", "perplexity", "bits_per_byte")}
    assert 3.0 < summary["unigram_nats"] < 7.0 and summary["wall_s"] > 0
    goodput = summary["goodput"]
    parts = [goodput[f"{part}_s"] for part in PARTS]
    assert goodput["attempts"] == 1 and goodput["wall_s"] == pytest.approx(sum(parts), abs=0.01)
    steps_s = sum(record["step_time_s"] for record in records(whole, "train"))
    assert 0.9 * steps_s < goodput["compute_s"] + goodput["data_wait_s"] < 1.1 * steps_s + 1.0
    assert goodput["start_up_s"] > 1 and goodput["evaluation_s"] > 0 and goodput["save_stall_s"] > 0
    assert goodput["replay_s"] == goodput["lost_s"] == 0


# stopping and going on


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_in_two_parts_is_the_run(layout: str, through: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    """Bit for bit, each step once: a run that was stopped is the run that was not."""
    config = config_of(tmp_path / "parts", data, layout)
    run_dir = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    assert last_step(run_dir) == HALF and committed(run_dir) == [HALF]
    first_half = trajectory(run_dir)
    run_well(config)
    expected = through(layout)
    assert trajectory(run_dir) == trajectory(expected)
    assert trajectory(run_dir)[:HALF] == first_half, "the first part was not computed again"
    assert records(run_dir, "eval") == records(expected, "eval")
    (resume,) = [record for record in records(run_dir, "event") if record["name"] == "resume"]
    assert resume["step"] == HALF and resume["lines_removed"] == 0
    assert committed(run_dir) == [HALF, STEPS]


def test_a_run_goes_on_in_another_layout_from_the_newest_checkpoint_that_is_whole(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    """Two ranks wrote it, one goes on: same data, same losses. What the newest one lost is computed again."""
    config = config_of(tmp_path / "run", data)
    config = replace(config, checkpoint=CheckpointConfig(interval=HALF // 2))
    run_dir = run_well(replace(config, train=replace(config.train, stop_after=HALF)))
    assert committed(run_dir) == [HALF // 2, HALF]
    file = run_dir / "checkpoints" / f"step-{HALF:08d}" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:100_000])
    alone = replace(
        config, parallel=ParallelConfig(zero_stage=1), cluster=replace(config.cluster, procs_per_node=1, device="cpu")
    )
    attempt = run(alone)
    assert attempt.status == 0, attempt.output
    damaged = run_dir / "checkpoints" / f"damaged-step-{HALF:08d}"
    assert f"It is now {damaged}; step {HALF // 2} goes on instead" in attempt.output
    (event,) = [record for record in records(run_dir, "event") if record["name"] == "fallback"]
    assert event["step"] == HALF // 2 and event["damaged"] == str(damaged)
    found, expected = records(run_dir, "train"), records(whole, "train")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
    entries = [(path / "ledger" / "rank-00000.jsonl").read_text() for path in (run_dir, whole)]
    assert entries[0] == entries[1], "another order of the data"


def test_a_full_disk_does_not_stop_the_training(whole: Path, data: Path, small_disk: Path) -> None:
    """A file system with room for one checkpoint: later ones fail. With more room the run goes on from the first."""
    config = config_of(small_disk / "run", data)
    config = replace(config, checkpoint=CheckpointConfig(interval=9))
    attempt = run(config)
    run_dir = Path(config.run.dir)
    assert attempt.status == 2, attempt.output
    assert last_step(run_dir) == STEPS and committed(run_dir) == [9]
    failed = [record for record in records(run_dir, "event") if record["name"] == "checkpoint_failed"]
    assert [record["step"] for record in failed] == [18, STEPS]
    assert re.search(r"the checkpoint of step 18 was not saved: .* GB free. Training goes on", attempt.output)
    assert attempt.output.count(f"error: the checkpoint of step {STEPS} was not saved: ") == 1
    assert "Traceback" not in attempt.output
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    run_well(config)
    assert trajectory(run_dir) == trajectory(whole) and committed(run_dir) == [18, STEPS]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@dataclass
class Interrupted:
    """A run that was stopped twice and killed once before it ended."""

    run_dir: Path
    attempts: dict[str, Attempt]
    steps: dict[str, int]
    """Last step in metrics.jsonl when an attempt ended."""
    commits: dict[str, list[int]]


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    run_dir = tmp_path_factory.mktemp("runs") / "interrupted"
    config = config_of(run_dir, data)
    found = Interrupted(run_dir, {}, {}, {})

    def interrupt(name: str, step: int, act: Callable[[subprocess.Popen[str]], None]) -> None:
        launcher = launch(config)
        wait_for(at_step(run_dir, step), launcher)
        act(launcher)
        found.attempts[name] = ended(config, launcher)
        found.steps[name], found.commits[name] = last_step(run_dir), committed(run_dir)

    def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
        return psutil.Process(launcher.pid).children()

    def tell_the_second_rank(launcher: subprocess.Popen[str]) -> None:
        (second,) = [rank for rank in ranks_of(launcher) if rank.environ()["RANK"] == "1"]
        second.send_signal(signal.SIGTERM)

    def kill_all_ranks(launcher: subprocess.Popen[str]) -> None:
        launcher.send_signal(signal.SIGSTOP)  # so that it cannot end the others more gently
        for rank in ranks_of(launcher):
            rank.kill()
        launcher.send_signal(signal.SIGCONT)

    interrupt("one rank told", 4, tell_the_second_rank)
    interrupt("launcher told", found.steps["one rank told"] + 4, lambda launcher: launcher.send_signal(signal.SIGTERM))
    interrupt("killed", found.steps["launcher told"] + 5, kill_all_ranks)
    shutil.copy(run_dir / "metrics.jsonl", run_dir / "metrics-when-killed.jsonl")
    found.attempts["ended"] = run(config)
    return found


def test_one_rank_that_is_told_to_stop_stops_all_at_a_boundary(interrupted: Interrupted) -> None:
    attempt = interrupted.attempts["one rank told"]
    assert attempt.status == STOPPED, attempt.output + "".join(attempt.ranks)
    assert "error" not in attempt.output
    assert "stopping: this step ends, then the run is saved" in attempt.output
    step = interrupted.steps["one rank told"]
    assert 4 <= step < STEPS and interrupted.commits["one rank told"] == [step]
    stops = [r for r in records(interrupted.run_dir, "event") if r["name"] == "stop"]
    assert {"kind": "event", "name": "stop", "step": step, "signal": "SIGTERM"} in stops


def test_a_launcher_that_is_told_to_stop_lets_its_ranks_save(interrupted: Interrupted) -> None:
    """Its own status says that it was told, as a shell says it; no rank failed."""
    attempt = interrupted.attempts["launcher told"]
    assert attempt.status == 128 + signal.SIGTERM and "error" not in attempt.output
    step = interrupted.steps["launcher told"]
    assert step < STEPS and interrupted.commits["launcher told"][-1] == step
    folder = interrupted.run_dir / "checkpoints" / f"step-{step:08d}"
    said = ("stopping: ", f"stopped by SIGTERM: step {step} is saved in {folder}; the same command goes on from there")
    assert [attempt.output.count(line) for line in said] == [1, 1]


def test_a_terminal_that_is_closed_loses_nothing(data: Path, tmp_path: Path) -> None:
    """The end of an ssh session: SIGHUP to the launcher, and nobody reads what is said."""
    config = config_of(tmp_path / "run", data)
    run_dir = Path(config.run.dir)
    frozen.save(config, run_dir)
    ours, theirs = pty.openpty()
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, run_dir],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
    )
    os.close(theirs)
    reached = at_step(run_dir, 4)

    def reads() -> bool:
        if select.select([ours], [], [], 0)[0]:
            os.read(ours, 1 << 16)
        return reached()

    wait_for(reads, launcher)
    os.close(ours)
    assert launcher.wait(60) == 128 + signal.SIGHUP
    assert committed(run_dir) == [last_step(run_dir)] and 4 <= last_step(run_dir) < STEPS
    (stop,) = [each for each in records(run_dir, "event") if each["name"] == "stop"]
    assert stop["signal"] == "SIGHUP"


def test_killed_ranks_leave_steps_that_no_checkpoint_has(interrupted: Interrupted) -> None:
    attempt = interrupted.attempts["killed"]
    assert attempt.status == 128 + signal.SIGKILL and "SIGKILL" in attempt.output
    assert interrupted.commits["killed"] == interrupted.commits["launcher told"]
    assert STEPS > interrupted.steps["killed"] >= interrupted.commits["killed"][-1] + 5


def test_the_interrupted_run_is_the_run(interrupted: Interrupted, whole: Path) -> None:
    attempt = interrupted.attempts["ended"]
    assert attempt.status == 0, attempt.output + "".join(attempt.ranks)
    assert trajectory(interrupted.run_dir) == trajectory(whole), "bit for bit, each step once"
    assert records(interrupted.run_dir, "eval") == records(whole, "eval")
    resumes = [record for record in records(interrupted.run_dir, "event") if record["name"] == "resume"]
    assert [record["step"] for record in resumes] == [
        interrupted.steps["one rank told"],
        interrupted.steps["launcher told"],
        interrupted.steps["launcher told"],
    ][-len(resumes) :]
    lost = interrupted.steps["killed"] - interrupted.steps["launcher told"]
    assert resumes[-1]["lines_removed"] >= lost


BATCHES = [sys.executable, str(Path(__file__).parents[2] / "tools" / "batches.py")]


def test_its_ledger_proves_that_nothing_was_repeated_or_left_out(interrupted: Interrupted, whole: Path) -> None:
    """Through two stops and a crash: the same steps, the same tokens."""
    done = subprocess.run([*BATCHES, "audit", str(interrupted.run_dir)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{STEPS} steps, {8 * STEPS} sequences" in done.stdout and "proven" in done.stdout
    entries = [(path / "ledger" / "rank-00000.jsonl").read_text() for path in (interrupted.run_dir, whole)]
    assert entries[0] == entries[1]
    ledger = interrupted.run_dir / "ledger" / "rank-00000.jsonl"
    ledger.write_text("".join(entries[0].splitlines(keepends=True)[:-3]) + entries[0].splitlines(keepends=True)[-1])
    done = subprocess.run([*BATCHES, "audit", str(interrupted.run_dir)], capture_output=True, text=True, timeout=120)
    ledger.write_text(entries[0])
    assert done.returncode == 1 and f"wrong: step {STEPS - 2} is missing" in done.stderr


def test_what_a_step_was_fed_is_shown(whole: Path) -> None:
    command = [*BATCHES, "show", str(whole), "--step", "3", "--characters", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "step 3: global sequences 16 to 23" in done.stdout and done.stdout.count("sequence ") >= 8
    assert "shard-000000.tar: document" in done.stdout and "epoch 0, from /" in done.stdout
    for bad in ("0", "-1"):
        done = subprocess.run(
            [*BATCHES, "show", str(whole), "--step", bad], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2 and done.stderr == f"error: --step {bad}: steps count from 1\n"


def test_a_finished_run_is_left_as_it_is(interrupted: Interrupted) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.run_dir.glob("[!.]*.*")}
    attempt = run(frozen.load(interrupted.run_dir))
    assert attempt.status == 0 and f"already finished: {STEPS} steps" in attempt.output, attempt.output
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"config.yaml"}, "which is frozen at every launch"


# bad input


def test_a_checkpoint_of_another_model_is_one_error_line(whole: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "wider", data)
    config = replace(
        config,
        model=replace(config.model, ffn_hidden_size=160),
        checkpoint=CheckpointConfig(interval=0, resume=str(whole)),
    )
    attempt = run(config)
    assert attempt.status == 2
    errors = [line for line in attempt.output.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error: checkpoint ")
    assert "model.ffn_hidden_size is 128 there, 160 here" in errors[0]
    assert "Traceback" not in attempt.output + "".join(attempt.ranks)
    assert not (tmp_path / "wider" / "metrics.jsonl").exists()


# text


def generate(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigtrain.generate", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_seed_is_a_text(whole: Path) -> None:
    checkpoint = whole / "checkpoints" / f"step-{STEPS:08d}"
    asked = [
        generate(f"checkpoint={where}", "prompt=import ", "max_tokens=30", f"seed={seed}")
        for where, seed in ((whole, 1), (checkpoint, 1), (whole, 2))
    ]
    answers = [(*process.communicate(timeout=DEADLINE_S), process.returncode) for process in asked]
    assert [status for *_, status in answers] == [0, 0, 0], answers
    texts = [text for text, _, _ in answers]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("import ") and len(text) > 20 for text in texts)
    assert all(re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d,]+ tokens/s\n", errors) for _, errors, _ in answers)


def test_mistakes_of_generate_are_one_line(whole: Path, tmp_path: Path) -> None:
    asked = [generate(f"checkpoint={whole}", "promt=x"), generate(f"checkpoint={tmp_path / 'none'}")]
    answers = [(*process.communicate(timeout=DEADLINE_S), process.returncode) for process in asked]
    for out, errors, status in answers:
        assert (out, status) == ("", 2) and errors.startswith("error: ") and errors.count("\n") == 1
    assert "did you mean prompt?" in answers[0][1] and str(tmp_path / "none") in answers[1][1]
