"""Back to the newest checkpoint, and on behind the data in which the numbers went wrong: all of it or nothing.

What counts is one act: the window of data is added to RUN/passed_over.json (data/passed_over.py), once the checkpoint
is loaded. Before it, nothing on the disk has changed: a run that is killed there goes on from the same checkpoint,
meets the same numbers and goes back again. Behind it, a start of the run does what is left to do, as behind any crash:
it goes on from that checkpoint, removes what metrics.jsonl and the ledger know of later steps, and the loader passes
over the window. The step that went wrong is in the window, so the run is the one that never saw it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from bigtrain.config.errors import UserError
from bigtrain.config.schema import Config
from bigtrain.data import passed_over
from bigtrain.data.order import Order
from bigtrain.data.passed_over import Window
from bigtrain.engine.engine import Engine
from bigtrain.trainer.anomaly import Trouble
from bigtrain.trainer.loop import Position
from bigtrain.trainer.saver import Saver, checkpoints_to_resume

GOES_ON = "The same command goes on from the newest checkpoint"


def load(
    config: Config, engine: Engine, saver: Saver, order: Order, candidates: Sequence[Path]
) -> tuple[Position, bool]:
    """Fill `engine` from the first candidate that is whole, and let `order` go on from there. Returns where that is,
    and whether the mixture of the data is another one from there on. Collective. Raises UserError as both do."""
    step, cursor = saver.load(engine, candidates)
    is_changed = order.go_on_from(cursor, accept_change=config.data.on_change == "accept")
    return Position(step, order.cursor(cursor.num_sequences)), is_changed


def windows_of(run_dir: Path) -> list[Window]:
    """The windows that the run passes over, as rank 0 reads them. Collective. Raises UserError on all ranks alike."""
    return _on_rank_0(lambda: passed_over.read(run_dir))


def check_possible(config: Config, run_dir: Path, trouble: Trouble, windows: Sequence[Window]) -> Sequence[Path]:
    """The checkpoints to go back to, the newest first. Collective. Raises UserError on all ranks where there is none,
    or the run went back too often already."""
    limit = config.anomaly.max_rewinds
    if len(windows) >= limit:
        raise UserError(
            f"step {trouble.step}: {trouble.reason}. The run went back {len(windows)} times already, and "
            f"anomaly.max_rewinds={limit}. Look at the data ({passed_over.FILE} names the windows) and the learning "
            f"rate, or raise the limit. {GOES_ON}."
        )
    found = checkpoints_to_resume(config, run_dir)
    if not found:
        raise UserError(
            f"step {trouble.step}: {trouble.reason}, and there is no checkpoint yet to go back to. Save earlier "
            "(checkpoint.interval), lower the learning rate, or look at the data: tools/batches.py show."
        )
    return found


def pass_over(run_dir: Path, trouble: Trouble, back: Position, end: int) -> list[Window]:
    """From now on the run is at `back`, and passes over the data from there to global sequence `end`. Returns all
    windows. Collective. Raises UserError on all ranks where the disk does not take it: then nothing has changed."""
    window = Window(back.cursor.num_sequences, end, trouble.step, back.step, trouble.reason)
    return _on_rank_0(lambda: passed_over.add(run_dir, window))


def _on_rank_0(act: Callable[[], list[Window]]) -> list[Window]:
    """What `act` returns on rank 0, on all ranks, or its error on all."""
    said: list[list[Window] | str] = [[]]
    if dist.get_rank() == 0:
        try:
            said[0] = act()
        except (UserError, OSError) as error:
            said[0] = str(error)
    dist.broadcast_object_list(said)
    if isinstance(said[0], str):
        raise UserError(said[0])
    return said[0]
