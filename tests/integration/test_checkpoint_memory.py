"""The tools take the memory of a chunk, not of a tensor: one of 590 MB, written as a single chunk, below a cap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoints import save

CAP_MIB = 600
"""Resident, the program included (torch alone takes 270)."""
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    runpy.run_path("tools/checkpoint.py", run_name="__main__")
except SystemExit as end:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(end.code, int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
def test_a_tensor_that_is_larger_than_the_memory(tmp_path: Path) -> None:
    shape = 1 << 15, 4500
    folders = [
        save(tmp_path / str(seed), {"weight.a": torch.arange(shape[0] * shape[1]).add_(seed).float().view(shape)})
        for seed in (0, 1)
    ]
    for status, arguments in (
        (0, ["verify", folders[0]]),
        (1, ["diff", *folders, "--values"]),
        (0, ["reshard", folders[0], tmp_path / "b", "--files", "2"]),
        (0, ["reshard", folders[0], tmp_path / "c", "--weights-only", "--dtype", "bf16"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
        assert done.stdout, done.stderr
        code, peak = map(int, done.stdout.splitlines()[-1].split())
        assert code == status, done.stderr
        assert peak < CAP_MIB, arguments
