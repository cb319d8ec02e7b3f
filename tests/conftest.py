"""Settings for all tests: they run offline, and in as many threads as the machine has cores and no more."""

import logging
import os
import signal
from typing import Any

import pytest

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
# Where the tests run under nohup or in a script's background: what they start would leave these ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_as_it_is() -> None:
    """A command's main() that a test called in this process has turned warnings off."""
    logging.disable(logging.NOTSET)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests (`make test`), these stay together: those that use the same ranks, those
    that use the same Slurm, and else those of a file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByWhatTheyShare(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((part for part in ("distributed", "slurm") if part in path.split("/")), path)

    return ByWhatTheyShare(config, log)
