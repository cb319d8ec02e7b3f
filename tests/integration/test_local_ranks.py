"""Real child processes: they end together, and none is left."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from bigtrain.config import frozen
from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.config.status import COME_BACK, HUNG, STOPPED
from bigtrain.launching.local import Child, Command, run, watch
from bigtrain.launching.lock import only_launch

SLEEPER = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER


def python(rank: int, code: str, *arguments: object, log: Path | None = None) -> Command:
    return Command(f"rank {rank}", [sys.executable, "-c", code, *map(str, arguments)], {"RANK": str(rank)}, log)


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def pid_in(file: Path) -> int:
    wait_for(lambda: file.is_file() and file.read_text())
    return int(file.read_text())


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_all_end_well(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print('rank', os.environ['RANK'])"
    assert run([python(0, code), python(1, code, log=tmp_path / "logs" / "rank-1.log")]) == 0
    assert capfd.readouterr().out == "rank 0\n"
    assert (tmp_path / "logs" / "rank-1.log").read_text() == "rank 1\n"


def test_one_that_dies_ends_the_others_and_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, file = tmp_path / "rank-3.log", tmp_path / "pid"
    log.write_text("of an earlier start\n")
    dying = f"import os, time\nwhile not os.path.exists({str(file)!r}): time.sleep(0.01)\nraise ValueError('the cause')"
    start = time.monotonic()
    assert run([python(0, SLEEPER, file), python(3, dying, log=log)]) == 1
    assert time.monotonic() - start < 9
    assert is_gone(pid_in(file))
    said = capfd.readouterr().err
    assert "[rank 3] ValueError: the cause" in said and "earlier" not in said
    assert "error: rank 3 ended with status 1; the other 1 were stopped" in said and str(log) in said


def test_a_mistake_of_the_user_is_status_2_and_no_more_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('error: train.x=1: no', file=sys.stderr); sys.exit(2)"
    assert run([python(1, code, log=tmp_path / "log")]) == 2
    assert capfd.readouterr().err == "[rank 1] error: train.x=1: no\n"


def test_a_mistake_that_all_ranks_see_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quick = "import sys; print('error: no', file=sys.stderr); sys.exit(2)"
    assert run([python(0, "import time; time.sleep(0.5); " + quick), python(1, quick, log=tmp_path / "log")]) == 2
    assert capfd.readouterr().err == "error: no\n"


def test_the_cause_may_come_after_its_effect(tmp_path: Path) -> None:
    """A rank that lost another one may end first."""

    def is_effect(child: Child) -> bool:
        return child.command.label == "rank 0"

    commands = [python(0, "raise SystemExit(1)"), python(1, "import time; time.sleep(0.7); raise SystemExit(7)")]
    ended = watch(commands, is_effect=is_effect)
    assert (ended.status, [child.command.label for child in ended.failed]) == (7, ["rank 1", "rank 0"])
    begin = time.monotonic()
    ended = watch([commands[0], python(1, SLEEPER, tmp_path / "pid")], is_effect=is_effect, grace_s=1.0)
    assert ended.status == 1 and time.monotonic() - begin < 20, "no cause is waited for for long"


def test_the_others_have_time_to_end_by_themselves(tmp_path: Path) -> None:
    closes = f"import time; time.sleep(1); open({str(tmp_path / 'closed')!r}, 'w').close()"
    assert watch([python(0, closes), python(1, "raise SystemExit(1)")], linger_s=20).status == 1
    assert (tmp_path / "closed").exists()


def test_one_that_the_kernel_has_stopped_is_killed_at_once_after_a_hang(tmp_path: Path) -> None:
    stopped = "import os, signal; open('stopped', 'w').close(); os.kill(os.getpid(), signal.SIGSTOP)"
    hung = f"import os, time\nwhile not os.path.exists('stopped'): time.sleep(0.01)\nos._exit({HUNG})"
    begin = time.monotonic()
    with contextlib.chdir(tmp_path):
        assert watch([python(0, stopped), python(1, hung)], grace_s=60).status == HUNG
    assert time.monotonic() - begin < 30


def test_death_by_signal_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([python(0, "import os; os.kill(os.getpid(), 9)")]) == 128 + 9
    assert "rank 0 ended by SIGKILL (the kernel does that when memory runs out)" in capfd.readouterr().err


def test_a_terminal_gets_its_cursor_back() -> None:
    program = (
        "import sys; from bigtrain.launching.local import Command, run; "
        "run([Command('rank 0', [sys.executable, '-c', 'import os; print(123, flush=True); os.kill(os.getpid(), 9)'])])"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=theirs, stderr=subprocess.DEVNULL, check=True, timeout=60)
    assert os.read(ours, 1000).endswith(b"\x1b[?25h")
    os.close(ours)
    os.close(theirs)


def test_one_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    nest = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}, {str(inner)!r}]); {STUBBORN}"
    there = f"os.path.exists({str(inner)!r}) and os.path.exists({str(outer)!r})"
    dying = f"import os, time\nwhile not ({there}): time.sleep(0.01)\nos._exit(5)"
    start = time.monotonic()
    assert run([python(0, nest, outer), python(1, dying, log=tmp_path / "log")], grace_s=0.3) == 5
    assert is_gone(pid_in(outer))
    wait_for(lambda: is_gone(pid_in(inner)))
    assert time.monotonic() - start < 30  # they would have slept for 60 s


def launcher(
    tmp_path: Path, code: str, grace_s: float = 1.0, by: Sequence[str] = ()
) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A process that runs two children of `code`, and their ids. `by`: a command that starts another."""
    files = [tmp_path / "0", tmp_path / "1"]
    program = (
        "import sys; from bigtrain.launching.local import Command, run; "
        "code, *files = sys.argv[1:]; "
        "sys.exit(run([Command(f, [sys.executable, '-c', code, f]) for f in files], "
        f"grace_s={grace_s}))"
    )
    command = [*by, sys.executable, "-c", program, code, *map(str, files)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    return process, [pid_in(file) for file in files]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_passed_on(tmp_path: Path, signum: signal.Signals) -> None:
    noting = (
        "import pathlib, signal, sys, time\n"
        "def note(signum, frame):\n"
        "    pathlib.Path(sys.argv[1] + '.got').write_text(str(int(signum))); sys.exit(0)\n"
        f"signal.signal({int(signum)}, note)\n"
    )
    process, pids = launcher(tmp_path, noting + SLEEPER)
    process.send_signal(signum)
    assert process.wait(20) == 128 + signum
    assert all(is_gone(pid) for pid in pids)
    assert [(tmp_path / f"{name}.got").read_text() for name in "01"] == [str(int(signum))] * 2


@pytest.mark.parametrize(
    ("by", "ignored"),
    [(["nohup"], signal.SIGHUP), (["sh", "-c", '"$@" & wait', "sh"], signal.SIGINT)],
    ids=["nohup", "a script's background"],
)
def test_what_whoever_started_us_has_ignored_stays_so(
    tmp_path: Path, by: Sequence[str], ignored: signal.Signals
) -> None:
    """In the launcher and in its ranks."""
    process, pids = launcher(tmp_path, SLEEPER, by=by)
    started = psutil.Process(pids[0]).parent()
    assert started is not None
    for each in (started, *map(psutil.Process, pids)):
        each.send_signal(ignored)
    time.sleep(0.5)
    assert started.is_running() and not any(map(is_gone, pids))
    started.terminate()
    process.wait(20)
    assert all(is_gone(pid) for pid in pids)


def test_ranks_that_a_warning_stopped_have_not_failed(tmp_path: Path) -> None:
    """SIGUSR2, from whomever: the status says that the run is to be started again."""
    stopped = python(0, f"raise SystemExit({COME_BACK})")
    ended = watch([stopped, python(1, f"import time; time.sleep(1); open({str(tmp_path / 'ended')!r}, 'w').close()")])
    assert (ended.status, ended.failed) == (COME_BACK, ()) and (tmp_path / "ended").exists()
    code = "import signal, sys; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(status * sys.argv[1].endswith('0')));"
    process, pids = launcher(tmp_path, f"status = {COME_BACK}; {code} {SLEEPER}")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == COME_BACK
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("act", "status"), [("sys.exit(2)", 2), ("sys.exit(1)", 1), ("signal.raise_signal(signal.SIGUSR2)", COME_BACK)]
)
def test_a_failure_behind_a_warning_is_a_failure(tmp_path: Path, act: str, status: int) -> None:
    """A save that finds no room, say; not a rank that did not listen yet."""
    code = (
        "import signal, sys\n"
        "def warned(*_):\n"
        "    signal.signal(signal.SIGUSR2, signal.SIG_DFL)\n"
        f"    {act}\n"
        "signal.signal(signal.SIGUSR2, warned)\n"
    )
    process, _ = launcher(tmp_path, code + SLEEPER)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == status


def test_a_rank_that_was_told_to_stop_has_not_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([python(0, f"raise SystemExit({STOPPED})"), python(1, "import time; time.sleep(0.3)")]) == STOPPED
    assert capfd.readouterr().err == ""


def test_a_second_signal_ends_those_that_did_not_listen(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + STUBBORN
    process, pids = launcher(tmp_path, deaf)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT
    assert all(is_gone(pid) for pid in pids)


def test_a_second_sigterm_leaves_the_time_to_save(tmp_path: Path) -> None:
    """Slurm sends two within milliseconds."""
    saving = (
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(2); open(sys.argv[1] + '.saved', 'w').close(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
    )
    process, _ = launcher(tmp_path, saving + SLEEPER, grace_s=0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert all((tmp_path / f"{name}.saved").exists() for name in "01")


def test_a_second_signal_is_passed_on_and_ends_at_once_those_that_took_the_first_as_a_wish(tmp_path: Path) -> None:
    once = "import signal; signal.signal(signal.SIGINT, lambda number, _: signal.signal(number, signal.SIG_DFL)); "
    process, pids = launcher(tmp_path, once + STUBBORN.replace("sleep(60)", "sleep(60); time.sleep(60)"), grace_s=30.0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT and time.monotonic() - begin < 10
    assert all(is_gone(pid) for pid in pids)


def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path: Path) -> None:
    frozen.save(Config(), tmp_path)
    rank = subprocess.Popen(
        [sys.executable, "-m", "bigtrain.train", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert rank.stdout is not None and rank.stdout.read(9) == b"importing"
    rank.send_signal(signal.SIGINT)
    _, errors = rank.communicate(timeout=60)
    assert (rank.returncode, errors) == (130, b"")


def test_no_orphan_when_the_launcher_is_killed(tmp_path: Path) -> None:
    process, pids = launcher(tmp_path, STUBBORN)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for pid in pids:
        wait_for(lambda pid=pid: is_gone(pid), 5)


def test_one_launch_at_a_time_in_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from bigtrain.launching.lock import only_launch\n"
        "with only_launch(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"), only_launch(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with only_launch(tmp_path):
            pass
