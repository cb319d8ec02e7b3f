"""Settings for all tests: they run offline, and in as many threads as the machine has cores and no more."""

import logging
import os

import pytest

# Before any test imports the libraries that read them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


@pytest.fixture(autouse=True)
def _logging_as_it_is() -> None:
    """A command's main() that a test called in this process has turned warnings off."""
    logging.disable(logging.NOTSET)
