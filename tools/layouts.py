"""Prove that every layout computes the same training run: ``python tools/layouts.py [OPTIONS] [KEY=VALUE...]``.

The same seed and batches run under each layout (on CPU ranks of this machine) and, in one process, under Hugging Face
Transformers in a bare PyTorch loop, which shares no code with bigtrain. Losses, gradient norms, gradients and weights
are compared. Run it from a clone: the oracle and the pool of ranks are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bigtrain.config.check import check  # noqa: E402
from bigtrain.config.compose import compose  # noqa: E402
from bigtrain.config.errors import UserError  # noqa: E402
from bigtrain.config.schema import Config, ParallelConfig  # noqa: E402
from tools.certificate import matrix  # noqa: E402
from tools.certificate.compare import BOUNDS, Bounds, Deviation, Trajectory, compare  # noqa: E402
from tools.certificate.matrix import Layout  # noqa: E402

SMALL = (
    "model.num_layers=9",
    "model.hidden_size=64",
    "model.num_attention_heads=8",
    "model.num_query_groups=4",
    "model.ffn_hidden_size=160",
    "model.vocab_size=256",
    "tokenizer.vocab_size=256",
    "train.sequence_length=48",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "tracker=none",
)
"""Small enough for eight ranks on two cores; 9 layers do not divide evenly. Settings on the command line come after."""
TIMEOUT_S = 900.0


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
    """What the ranks raised."""

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
    bounds: Bounds
    documents_are_apart: bool = False
    """Perturbing a row's first document left its second one's logits equal in every bit."""
    rows: list[Row] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.documents_are_apart and self.num_certified > 0 and not any(row.is_bad for row in self.rows)

    @property
    def num_certified(self) -> int:
        return sum(row.refused is None and not row.is_bad for row in self.rows)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 where all agree, 1 where a layout deviates, 2 where the user has something to fix."""
    options = parse(arguments)
    try:
        from tools.certificate import page

        certificate = certify(options)
        print(page.summary(certificate), flush=True)
        page.write(certificate, options.json, options.page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"error: {error}. The oracle wants it: pip install -e '.[dev]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if certificate.holds else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A layout's name is z3-t2s-p2v2-d1: ZeRO stage, tensor size (s: sequence parallel), pipeline size "
        "(v: chunks a stage), data size.",
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="the full matrix, not a covering dozen")
    which.add_argument("--layouts", metavar="NAME,...", help="these")
    parser.add_argument("--world", type=int, default=None, help="at most so many ranks (default 4; 8 with --all)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--strict", action="store_true", help="SGD instead of AdamW: 1e-5 on every step, and on weights"
    )
    parser.add_argument("--json", type=Path, default=Path("layouts.json"), help="default %(default)s")
    parser.add_argument("--page", type=Path, default=Path("layouts.html"), help="default %(default)s")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the config, as for bigtrain.launch")
    options = parser.parse_args(arguments)
    if options.steps < 1 or (options.world is not None and options.world < 1):
        parser.error("--steps and --world are at least 1")
    return options


def certify(options: argparse.Namespace) -> Certificate:
    """Runs the oracle and then every layout. Raises UserError for a config that cannot be certified."""
    from tests.distributed.harness import RankPool
    from tools.certificate.oracle import expect
    from tools.certificate.ranks import other_document_shows, train

    config = config_of(options)
    keep = options.steps if options.strict else 1
    name = "strict" if options.strict else config.precision.dtype
    certificate = Certificate({"steps": options.steps, "overrides": options.overrides}, BOUNDS[name])
    pools: dict[int, RankPool] = {}
    try:
        alone = pools[1] = RankPool(1)
        fp32 = replace(config, precision=replace(config.precision, dtype="fp32"), parallel=ParallelConfig(zero_stage=1))
        certificate.documents_are_apart = not alone.run(other_document_shows, fp32, timeout_s=TIMEOUT_S)[0]
        (first,) = alone.run(train, fp32, 1, 0, timeout_s=TIMEOUT_S)
        expected = expect(config, first.initial, options.steps, keep)
        layouts = chosen(options)
        for number, layout in enumerate(layouts, 1):
            row = run(layout, config, expected, certificate.bounds, pools, options.steps, keep)
            certificate.rows.append(row)
            print(f"{number:>3} of {len(layouts)}  {row.layout:<18} {row.seconds:5.0f} s  {row.verdict}", flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    return certificate


def config_of(options: argparse.Namespace) -> Config:
    """The run that all layouts do. Raises UserError."""
    strict = ["optim=sgd"] if options.strict else []
    config = compose([*SMALL, *strict, *options.overrides])
    config = replace(config, cluster=replace(config.cluster, device="cpu"))
    if config.model.attention_dropout or config.model.hidden_dropout:
        raise UserError("model: dropout draws other numbers in every layout. Set both dropouts to 0 to compare them.")
    if options.strict and config.precision.dtype != "fp32":
        raise UserError(
            f"precision.dtype={config.precision.dtype}: --strict compares fp32 runs. Leave one of them out."
        )
    return config


def chosen(options: argparse.Namespace) -> list[Layout]:
    if options.layouts:
        return [matrix.parse(name) for name in options.layouts.split(",")]
    return matrix.full_matrix(options.world or 8) if options.all else matrix.covering(options.world or 4)


def run(
    layout: Layout, config: Config, expected: Trajectory, bounds: Bounds, pools: dict[int, Any], steps: int, keep: int
) -> Row:
    """One layout: refused, run and compared, or failed."""
    from tests.distributed.harness import RankError, RankPool
    from tests.distributed.small import assemble
    from tools.certificate.ranks import train

    row = Row(str(layout), layout.world)
    parallel, cluster = (
        replace(config.parallel, **layout.settings()),
        replace(config.cluster, procs_per_node=layout.world),
    )
    config = replace(config, parallel=parallel, cluster=cluster)
    problems = check(config, layout.world)
    if problems:
        row.refused = str(problems[0])
        return row
    begin = time.monotonic()
    for world in [world for world in pools if world not in (1, layout.world)]:
        pools.pop(world).close()  # ranks of another size only take memory
    pool = pools.setdefault(layout.world, RankPool(layout.world))
    try:
        ranks = pool.run(train, config, steps, keep, timeout_s=TIMEOUT_S)
        found = [
            Trajectory(
                rank.losses,
                rank.grad_norms,
                [assemble([other.gradients[step] for other in ranks]) for step in range(keep)]
                if rank is ranks[0]
                else [],
                assemble([other.final for other in ranks]) if rank is ranks[0] else {},
            )
            for rank in ranks
        ]
        if any(each.losses != found[0].losses or each.grad_norms != found[0].grad_norms for each in found):
            row.failed = "the ranks report different losses or gradient norms"
        else:
            row.deviation = compare(found[0], expected, bounds)
    except RankError as error:
        row.failed = str(error).splitlines()[0] + "; " + last_error(str(error))
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
