"""Bring DeepSpeed in: quietly, and for the device that the run uses."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch


def import_deepspeed(device: torch.device) -> Any:
    """The package. It picks its device and logs while it is imported, so both are settled before."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
