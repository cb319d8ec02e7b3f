"""In front of PYTHONPATH: ranks that Slurm starts get the fault of `tests.integration.faulty`."""

import os
import sys

if "FAULT" in os.environ and sys.orig_argv[1:3] == ["-m", "bigtrain.train"]:
    from tests.integration.faulty import arm

    arm()
