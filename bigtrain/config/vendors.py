"""The versions of DeepSpeed and Megatron-core that bigtrain's workarounds were made for. No import of either.

The workarounds: `engine/deepspeed_patches.py`, `engine/gather.py` and `distributed/megatron_cpu.py`."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, version

from bigtrain.config.errors import UserError

KNOWN = {"deepspeed": ("0.19.8",), "megatron-core": ("0.16.1",)}


def check_versions() -> None:
    """Raises UserError for a vendor that is missing, or whose version the workarounds were not made for."""
    for package, known in KNOWN.items():
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise UserError(f"{package} is not installed: pip install {package}=={known[-1]}") from error
        if found not in known:
            raise UserError(
                f"{package} {found} is installed, and bigtrain works around lines of {', '.join(known)}: "
                f"pip install {package}=={known[-1]}"
            )


@contextlib.contextmanager
def importing() -> Generator[None]:
    """For the import of torch and the vendors. They make objects by the million and drop few: a garbage collector that
    looks through them again and again takes a fifth of the time, and as much again once it is back (docs/log.md). So
    it never looks at what the first import of torch has made, which stays as long as the process."""
    was_on, is_first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_first:  # later there may be engines, whose cycles are to be collected
            gc.freeze()
        if was_on:
            gc.enable()
