"""In front of PYTHONPATH: ranks that Slurm starts get the fault of `tools.faults.rank`."""

import os
import sys
from pathlib import Path

if "FAULT" in os.environ and sys.orig_argv[1:3] == ["-m", "bigtrain.train"]:
    from tools.faults.rank import arm

    arm(Path(sys.orig_argv[3]))
