"""Signals set a flag, and a second one kills."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bigtrain.trainer.stopping import SIGNALS, STOPPING, StopSignal


class Ranks:
    """All-reduces with what the other ranks hold."""

    def __init__(self, others: int = 0) -> None:
        self.others = others

    def all_reduce(self, tensor: torch.Tensor, *, op: Any = None, group: Any = None) -> torch.Tensor:
        return tensor.clamp_(min=self.others)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered(number: signal.Signals) -> None:
    stop = StopSignal(Ranks())  # type: ignore[arg-type]
    stop.install()
    assert stop.received is None and not stop.agreed()
    os.kill(os.getpid(), number)
    assert stop.received == number.name and not stop.told, "the others do not know yet"
    assert stop.agreed() and stop.told == number.name


def test_only_a_second_ctrl_c_is_not_caught() -> None:
    """Slurm sends SIGTERM twice within milliseconds when it preempts a job."""
    stop = StopSignal(Ranks())  # type: ignore[arg-type]
    stop.install()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert stop.received == "SIGTERM", "the first one counts"
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL != signal.getsignal(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_or_a_shell_has_ignored_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    stop = StopSignal(Ranks())  # type: ignore[arg-type]
    stop.install()
    os.kill(os.getpid(), number)
    assert stop.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received == "SIGTERM"


def test_a_warning_ahead_of_time_is_not_lost() -> None:
    stop = StopSignal(Ranks())  # type: ignore[arg-type]
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # other threads of the tests do not block it
    stop.install()
    assert stop.received == "SIGUSR2"


def test_a_signal_of_another_rank_stops_this_one_and_is_named() -> None:
    stop = StopSignal(Ranks(others=int(signal.SIGTERM)))  # type: ignore[arg-type]
    assert stop.agreed()
    assert stop.received == "SIGTERM"


def test_it_says_once_and_at_once_that_it_stops() -> None:
    said: list[str] = []
    stop = StopSignal(Ranks(), say=said.append)  # type: ignore[arg-type]
    stop.install()
    os.kill(os.getpid(), signal.SIGINT)
    assert said == [STOPPING]
    assert stop.agreed() and said == [STOPPING]


def test_it_says_that_another_rank_stops_it() -> None:
    said: list[str] = []
    stop = StopSignal(Ranks(others=int(signal.SIGTERM)), say=said.append)  # type: ignore[arg-type]
    assert stop.agreed() and said == [STOPPING]


def test_a_signal_during_the_agreement_counts_at_the_next_step() -> None:
    class Late(Ranks):
        def all_reduce(self, tensor: torch.Tensor, *, op: Any = None, group: Any = None) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return tensor

    stop = StopSignal(Late())  # type: ignore[arg-type]
    stop.install()
    assert not stop.agreed()
    stop._runtime = Ranks()  # type: ignore[assignment]
    assert stop.agreed()
