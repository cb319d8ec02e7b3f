"""One rank of a training run: ``python -m bigtrain.train RUN_DIR``, started by a launcher, torchrun or srun.

It reads RUN_DIR/config.yaml and nothing else; RANK, WORLD_SIZE and LOCAL_RANK say which rank it is.
To start a run: ``python -m bigtrain.launch --help``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from pathlib import Path

from bigtrain.config.errors import UserError
from bigtrain.config.frozen import load
from bigtrain.config.vendors import check_versions
from bigtrain.launching.environment import COME_BACK
from bigtrain.telemetry.console import Console


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__.strip() if __doc__ else "", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    is_main = os.environ.get("RANK", "0") == "0"
    for vendor in ("megatron", "deepspeed", r"torch\.distributed"):  # what they say to their developers, at each call
        warnings.filterwarnings("ignore", module=vendor)
    # Vendors turn a KeyboardInterrupt in their imports into all sorts of errors. There is nothing to save before run().
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    # Slurm's warning, ahead of the time limit, waits until a StopSignal listens.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        check_versions()
        config = load(arguments[0])
        console = Console(enabled=is_main, log_interval=config.tracker.log_interval)
        with console.phase("importing torch, DeepSpeed and Megatron"):
            from bigtrain.trainer.run import run
        stopped_by = run(config, Path(arguments[0]), console)
    except UserError as error:  # often on all ranks alike; the launcher shows it once
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {arguments[0]} cannot be written, its disk is full ({error.strerror}). Make room; the same "
            "command goes on from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        return 2
    if stopped_by:  # srun ends the others once rank 0 has said it: they end well by themselves
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return COME_BACK if is_main and stopped_by == "SIGUSR2" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
