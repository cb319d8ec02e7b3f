"""Prove that every layout computes the same training run: ``python tools/layouts.py [OPTIONS] [KEY=VALUE...]``.

The same seed and batches run under each layout (on CPU ranks of this machine) and, in one process, under Hugging Face
Transformers in a bare PyTorch loop, which shares no code with bigtrain. Losses, gradient norms, gradients and weights
are compared. Run it from a clone: the oracle and the pool of ranks are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bigtrain.config.check import check  # noqa: E402
from bigtrain.config.compose import compose  # noqa: E402
from bigtrain.config.errors import UserError  # noqa: E402
from bigtrain.config.schema import Config, ModelConfig, ParallelConfig  # noqa: E402
from tools.certificate import matrix, page  # noqa: E402
from tools.certificate.compare import BOUNDS, Bounds, Deviation, Trajectory, compare, difference  # noqa: E402
from tools.certificate.matrix import Layout  # noqa: E402

if TYPE_CHECKING:
    from tests.distributed.harness import PoolFactory
    from tests.distributed.small import Pieces

PRESETS = ROOT / "tools" / "certificate" / "conf"
SMALL = (
    "model=nine_layers",
    "tokenizer.vocab_size=256",
    "train.sequence_length=48",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "tracker=none",
)
"""Small enough for eight ranks on two cores. Settings on the command line come after."""
OURS = {
    "cluster": "ranks are CPU processes of this machine. Leave it out",
    "dry_run": "there is nothing to show. Leave it out",
    "experiment": "a preset of settings would meet those of the certificate. Give its settings one by one",
    "parallel": "each layout sets it. Name layouts with --layouts; parallel.gather is yours",
    "schedule": "the learning rate is constant, optim.lr. Leave it out",
    "train.num_steps": "--steps says how many. Leave it out",
    "train.num_tokens": "--steps says how many steps. Leave it out",
    "train.stop_after": "--steps says how many steps. Leave it out",
}
"""What the certificate sets itself, so that a setting of the user's would do nothing; and what to do instead."""
EPILOG = """\
A layout's name is z3-t2s-p2v2-d1: ZeRO stage, tensor size (s: sequence parallel), pipeline size (v: chunks a stage),
data size; what is left out is 1.

The columns are the largest relative deviations from the oracle: of the loss and of the gradient norm in any step; of
any parameter's gradient, as a share of that tensor's norm, in the first step (--strict: in any); of any weight after
the last step, likewise. `ok`: all within the bounds, which are printed below the table. Otherwise the first step and
parameter that deviate, or `refused` with what bigtrain.launch says of that layout too, or `FAILED`: the ranks' report
is in the JSON. The JSON and the page are written after each layout, so an interrupted run keeps what it certified.

The model is tools/certificate/conf/model/nine_layers.yaml; model=PRESET and model.KEY=VALUE choose another of Llama's
or GPT-2's shape. optim, precision, train, run.seed and parallel.gather count too. The batches are made up, so data,
tokenizer, checkpoint, eval and tracker change nothing; cluster, schedule, the length of the training and the rest of
parallel are set here and refused. With precision=fp16 a step that overflows is skipped, which the oracle does not do:
lower precision.initial_loss_scale then.

examples:
  python tools/layouts.py                                          # 13 layouts of up to 4 ranks: minutes
  python tools/layouts.py --all                                    # 136 of up to 8: up to 40 minutes on two cores
  python tools/layouts.py --world 2 model=tiny                     # a preset of conf/model/, on two ranks
  python tools/layouts.py --layouts z3-t2s-p2v2,z1-p4 --strict     # these, bounds of 1e-5 throughout

exit status: 0 all agree, 1 one deviates or failed, 2 a setting is wrong, 130 interrupted"""
TIMEOUT_S = 900.0
NUM_LINES = 20
"""Of a failed layout's report, on the terminal."""


@dataclass
class Row:
    """A line of the certificate."""

    layout: str
    ranks: int
    seconds: float = 0.0
    deviation: Deviation | None = None
    refused: str | None = None
    """Why this layout cannot be, said before any rank starts."""
    failed: str | None = None
    """What the ranks raised, in a line."""
    report: str | None = None
    """All that the ranks said when they failed."""

    @property
    def verdict(self) -> str:
        if self.refused is not None:
            return f"refused: {self.refused}"
        if self.failed is not None:
            return f"FAILED: {self.failed}"
        first = self.deviation.first if self.deviation is not None else "nothing was measured"
        return "ok" if first is None else f"DEVIATES, {first}"

    @property
    def is_bad(self) -> bool:
        return self.refused is None and self.verdict != "ok"


@dataclass
class Certificate:
    """What was certified, and with what outcome."""

    settings: dict[str, Any]
    model: ModelConfig
    bounds: Bounds
    num_planned: int
    """Layouts that were asked for."""
    documents_are_apart: bool = False
    """Perturbing a row's first document left its second one's logits equal in every bit."""
    rows: list[Row] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.rows) == self.num_planned

    @property
    def holds(self) -> bool:
        sound = self.is_complete and self.documents_are_apart and self.num_certified > 0
        return sound and not any(row.is_bad for row in self.rows)

    @property
    def num_certified(self) -> int:
        return sum(row.refused is None and not row.is_bad for row in self.rows)


def main(arguments: list[str] | None = None, pool: PoolFactory | None = None) -> int:
    """Exit status 0 where all agree, 1 where a layout deviates, 2 where the user has something to fix, 130 where they
    interrupted. `pool`: ranks to use, which stay open; without it, ranks of its own."""
    options = parse(arguments)
    try:
        certificate = certify(options, pool)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error}. The oracle wants it: pip install -e '.[dev]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(page.summary(certificate), options.json, options.page, sep="\n", flush=True)
    return 0 if certificate.holds else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Exits with status 2 where it cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--all", action="store_true", help="every combination; without it, a dozen that have each value of each setting"
    )
    which.add_argument("--layouts", metavar="NAME,...", help="these layouts and no others")
    parser.add_argument(
        "--world", type=int, metavar="RANKS", help="layouts of at most so many ranks (default 4; 8 with --all)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each run (default %(default)s)")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="SGD instead of AdamW: bounds of 1e-5 on every step's loss, norm and gradients, and on the last weights",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", default=Path("layouts.json"), help="default %(default)s; folders are made"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", default=Path("layouts.html"), help="default %(default)s; folders are made"
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the config, as for bigtrain.launch")
    options = parser.parse_args(arguments)
    if options.steps < 1 or (options.world is not None and options.world < 1):
        parser.error("--steps and --world are at least 1")
    if options.world is not None and options.layouts is not None:
        parser.error("--world chooses among layouts, --layouts names them: give one of the two")
    if options.json == options.page:
        parser.error(f"--json and --page are both {options.json}")
    return options


def certify(options: argparse.Namespace, pool: PoolFactory | None = None) -> Certificate:
    """Runs the oracle and then every layout, and writes what is certified after each. Raises UserError for a config
    that cannot be certified."""
    layouts = chosen(options)
    config = config_of(options)
    page.require_writable(options.json, options.page)

    from tools.certificate.oracle import build, expect

    steps, keep = options.steps, options.steps if options.strict else 1
    certificate = Certificate(
        {"steps": steps, "strict": options.strict, "overrides": options.overrides},
        config.model,
        BOUNDS["strict" if options.strict else config.precision.dtype],
        len(layouts),
    )
    hf = build(config.model)
    with nullcontext(pool) if pool is not None else own_ranks() as ranks:
        kind = "Llama" if config.model.position == "rope" else "GPT-2"
        print(f"oracle: Transformers' {kind}, {steps} steps in one process ...", end="", flush=True)
        begin = time.monotonic()
        initial, certificate.documents_are_apart = reference(config, ranks)
        expected = expect(hf, config, initial, steps, keep)
        print(f" {time.monotonic() - begin:.0f} s", flush=True)
        try:
            for number, layout in enumerate(layouts, 1):
                row = run(layout, config, expected, certificate.bounds, ranks, steps, keep)
                certificate.rows.append(row)
                page.write(certificate, options.json, options.page)
                print(
                    f"{number:>3} of {len(layouts)}  {row.layout:<18} {row.seconds:5.0f} s  {row.verdict}", flush=True
                )
                if row.report is not None:
                    print(*row.report.splitlines()[-NUM_LINES:], sep="\n", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            page.write(certificate, options.json, options.page)
            print(f"\n{page.outcome(certificate)}\n{options.json}\n{options.page}", flush=True)
            raise
    return certificate


def chosen(options: argparse.Namespace) -> list[Layout]:
    """The layouts that the command line asks for. Raises UserError for a name that is none."""
    if options.layouts is not None:
        layouts = [matrix.parse(name) for name in options.layouts.split(",")]
    else:
        layouts = matrix.full_matrix(options.world or 8) if options.all else matrix.covering(options.world or 4)
    if not layouts:
        raise UserError(f"--world {options.world}: no layout is so small. Give a larger number.")
    return layouts


def config_of(options: argparse.Namespace) -> Config:
    """The run that all layouts do. Raises UserError for a setting that is wrong, or that would do nothing."""
    for override in options.overrides:
        key = override.partition("=")[0].lstrip("+").partition("@")[0]
        for ours, instead in OURS.items():
            if (key == ours or key.startswith(f"{ours}.")) and key != "parallel.gather":
                raise UserError(f"{override}: {instead}.")
        if options.strict and key in ("optim", "optim.name"):
            raise UserError(f"{override}: --strict compares runs of SGD. Leave one of them out.")
    strict = ["optim=sgd"] if options.strict else []
    config = compose([*SMALL, *strict, *options.overrides], [PRESETS])
    config = replace(
        config,
        cluster=replace(config.cluster, device="cpu", procs_per_node=1),
        parallel=ParallelConfig(zero_stage=1, gather=config.parallel.gather),
    )
    problems = [str(problem) for problem in check(config, world=1)]
    if problems:
        raise UserError("\nerror: ".join(problems))
    if config.model.attention_dropout or config.model.hidden_dropout:
        raise UserError("model: dropout draws other numbers in every layout. Set both dropouts to 0 to compare them.")
    if options.strict and config.precision.dtype != "fp32":
        raise UserError(
            f"precision.dtype={config.precision.dtype}: --strict compares fp32 runs. Leave one of them out."
        )
    return config


def reference(config: Config, pool: PoolFactory) -> tuple[Pieces, bool]:
    """The initial weights, and whether a row's documents are apart: of fp32 on one rank. Raises UserError."""
    from tests.distributed.harness import RankError
    from tools.certificate.ranks import other_document_shows, train

    config = replace(config, precision=replace(config.precision, dtype="fp32"))
    try:
        (shows,) = pool(1).run(other_document_shows, config, timeout_s=TIMEOUT_S)
        (first,) = pool(1).run(train, config, 1, 0, timeout_s=TIMEOUT_S)
    except RankError as error:
        tail = "\n".join(str(error).splitlines()[-NUM_LINES:])
        raise UserError(
            f"one rank, which gives the initial weights, failed: {last_error(str(error))}\n{tail}"
        ) from error
    return first.initial, not shows


@contextmanager
def own_ranks() -> Iterator[PoolFactory]:
    """Ranks of one size at a time, beside the single one: those of other sizes only take memory."""
    from tests.distributed.harness import RankPool

    pools: dict[int, RankPool] = {}

    def of(world: int) -> RankPool:
        for other in [other for other in pools if other not in (1, world)]:
            pools.pop(other).close()
        return pools.setdefault(world, RankPool(world))

    try:
        yield of
    finally:
        for each in pools.values():
            each.close()


def run(
    layout: Layout, config: Config, expected: Trajectory, bounds: Bounds, pool: PoolFactory, steps: int, keep: int
) -> Row:
    """One layout: refused, run and compared, or failed."""
    from tests.distributed.harness import RankError
    from tests.distributed.small import assemble
    from tools.certificate.ranks import train

    row = Row(str(layout), layout.world)
    parallel = replace(config.parallel, **layout.settings())
    config = replace(config, parallel=parallel, cluster=replace(config.cluster, procs_per_node=layout.world))
    problems = check(config, layout.world)
    if problems:
        row.refused = str(problems[0])
        return row
    begin = time.monotonic()
    try:
        ranks = pool(layout.world).run(train, config, steps, keep, timeout_s=TIMEOUT_S)
        row.failed = difference(
            losses=[rank.losses for rank in ranks], gradient_norms=[rank.grad_norms for rank in ranks]
        )
        if row.failed is None:
            gradients = [assemble([rank.gradients[step] for rank in ranks]) for step in range(keep)]
            weights = assemble([rank.final for rank in ranks])
            found = Trajectory(ranks[0].losses, ranks[0].grad_norms, gradients, weights)
            row.deviation = compare(found, expected, bounds)
    except RankError as error:
        row.report = str(error)
        row.failed = row.report.splitlines()[0] + "; " + last_error(row.report)
    except (ValueError, AssertionError) as error:
        row.failed = str(error).splitlines()[0]
    row.seconds = time.monotonic() - begin
    return row


def last_error(report: str) -> str:
    """The line of a rank's traceback that says what went wrong."""
    lines = [line for line in report.splitlines() if line.partition(":")[0].endswith("Error")]
    return lines[0] if lines else "see the ranks' output"


if __name__ == "__main__":
    sys.exit(main())
