"""``python -m tools.faults.launcher RUN``: start a frozen run as bigtrain.launch does, with FAULT, if there is one in
the environment, in its ranks (`tools.faults.rank`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bigtrain.config.errors import exit_status
from bigtrain.config.frozen import load
from bigtrain.config.schema import Config
from bigtrain.launching import attempts, local
from bigtrain.launching.local import Command
from bigtrain.launching.lock import only_launch


def launch(run_dir: Path) -> int:
    config, well = load(run_dir), local.rank_commands

    def faulty(config: Config) -> Sequence[Command]:
        arguments = [sys.executable, "-m", "tools.faults.rank", config.run.dir]
        return [replace(each, arguments=arguments) for each in well(config)]

    if os.environ.get("FAULT"):
        local.rank_commands = faulty  # type: ignore[assignment]
    with only_launch(run_dir):
        return attempts.train(config)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: launch(Path(sys.argv[1]))))
