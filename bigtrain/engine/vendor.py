"""Bring DeepSpeed in: quietly, for the device that the run uses, in a version that is known."""

from __future__ import annotations

import logging
import os
import warnings
from importlib.metadata import version
from typing import Any

import torch

from bigtrain.config.errors import UserError
from bigtrain.distributed import megatron_cpu
from bigtrain.engine import deepspeed_patches

_KNOWN = {"deepspeed": deepspeed_patches.KNOWN_VERSIONS, "megatron-core": megatron_cpu.KNOWN_VERSIONS}


def check_versions() -> None:
    """Raises UserError for a vendor's version that the patches were not made for."""
    for package, known in _KNOWN.items():
        found = version(package)
        if found not in known:
            raise UserError(
                f"{package} {found} is installed, and bigtrain works around lines of {', '.join(known)}: "
                f"pip install {package}=={known[-1]}"
            )


def import_deepspeed(device: torch.device) -> Any:
    """The package. It picks its device and logs while it is imported, so both are settled before."""
    check_versions()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
