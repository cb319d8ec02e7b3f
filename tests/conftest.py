"""Settings for all tests: they run offline, and in as many threads as the machine has cores and no more."""

import logging
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


@pytest.fixture(autouse=True)
def _logging_as_it_is() -> None:
    """A command's main() that a test called in this process has turned warnings off."""
    logging.disable(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests stay together where several processes share them (`make test`): those that use the same ranks, those
    that use the same Slurm, and else those of a file."""
    for item in items:
        parts = item.path.relative_to(TESTS).parts
        shared = next((part for part in ("distributed", "slurm") if part in parts), "/".join(parts))
        item.add_marker(pytest.mark.xdist_group(shared))
