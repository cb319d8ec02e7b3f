"""Measure a model: the loss on held-out shards, or tasks of lm-eval.

    python -m bigtrain.evaluate checkpoint=RUN [data=SETS] [key=value ...]
    python -m bigtrain.evaluate checkpoint=RUN --lm-eval TASKS [key=value ...]

    python -m bigtrain.evaluate checkpoint=runs/default                                    # as the run evaluated itself
    python -m bigtrain.evaluate checkpoint=runs/default data=corpus/valid num_tokens=0     # all of a folder of shards
    python -m bigtrain.evaluate checkpoint=runs/default 'data={web: web/valid, code: [{path: a}, {path: b}]}'
    python -m bigtrain.evaluate checkpoint=runs/default ranks=4 tensor=2                   # tensor 2 x data 2
    python -m bigtrain.evaluate checkpoint=Llama-3.2-1B data=corpus/valid sequence_length=2048  # a Hugging Face folder
    python -m bigtrain.evaluate checkpoint=runs/default --lm-eval arc_easy,hellaswag limit=100

what
  checkpoint       a checkpoint of any layout, a run's folder (then its newest), or a Hugging Face folder
  data             a folder of shards, or as data.valid: {NAME: FOLDER, ...} or [{path: FOLDER}, ...]; default: the
                   data.valid of the run that made the checkpoint
  num_tokens       tokens of each set, rounded up to whole sequences; 0: all. Default: as many as the run took
  sequence_length  tokens a sequence; default: the run's
  out              a file that gets a JSON line a set, added at its end: step, set, loss, perplexity, bits_per_byte,
                   tokens; or a line a task
  lm_eval          tasks by their names, with commas between; also spelt --lm-eval TASKS. Needs `pip install lm-eval`
  include_path     lm-eval: a folder of tasks of your own
  num_fewshot      lm-eval: examples before each question; default: as the task says
  limit            lm-eval: only the first so many documents of a task; 0: all (0)

where
  micro_batch_size sequences at a time on a rank; default: the run's
  ranks            of this machine; tensor x data ranks (as many as tensor)
  tensor           ranks that share the model (1). Also spelt parallel.tensor
  device           auto | cpu | cuda
  dtype            auto | fp32 | bf16 | fp16: numbers of the weights; auto: the run's or the folder's own

loss is in nats a predicted token; bits_per_byte counts the bytes of text. The numbers do not depend on the layout. Exit
status: 0, 2 for a mistake, 130 for Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.config import arguments
from bigtrain.config.arguments import Rule
from bigtrain.config.vendors import check_versions, importing


@dataclass(frozen=True)
class Arguments:
    checkpoint: str
    data: str = ""
    num_tokens: int = -1
    sequence_length: int = 0
    out: str = ""
    lm_eval: str = ""
    include_path: str = ""
    num_fewshot: int = -1
    limit: int = 0
    micro_batch_size: int = 0
    ranks: int = 0
    tensor: int = 1
    device: str = "auto"
    dtype: str = "auto"


def parse(argv: list[str]) -> Arguments:
    """Raises UserError for what is no key=value, an unknown key, or a value of another type or out of range."""
    aliases = {"parallel.tensor": "tensor", "--lm-eval": "lm_eval"}
    joined = arguments.joined(argv, "--lm-eval")
    return arguments.parse(Arguments, joined, command="bigtrain.evaluate", aliases=aliases, rules=_rules)


def _rules(given: Arguments) -> list[Rule]:
    whole = "a multiple of tensor, or is left out"
    return [
        ("num_tokens", given.num_tokens >= -1, "0 (all) or more, or is left out"),
        ("sequence_length", given.sequence_length == 0 or given.sequence_length >= 2, "2 or more, or is left out"),
        ("num_fewshot", given.num_fewshot >= -1, "0 or more, or is left out"),
        ("limit", given.limit >= 0, "0 (all) or more"),
        ("lm_eval", not (given.lm_eval and given.data), "tasks, and data=... is not given beside it"),
        ("include_path", not given.include_path or bool(given.lm_eval), "a folder, and --lm-eval TASKS beside it"),
        ("micro_batch_size", given.micro_batch_size >= 0, "1 or more, or is left out"),
        *arguments.place_rules(given, "auto"),
        ("ranks", given.ranks >= 0 and given.ranks % max(given.tensor, 1) == 0, whole),
        ("ranks", not given.lm_eval or given.ranks in (0, given.tensor), "as many as tensor, with lm-eval"),
    ]


def main(argv: Sequence[str]) -> int:
    return arguments.run(argv, __doc__ or "", _main)


def _main(argv: list[str]) -> int:
    given = parse(argv)
    check_versions()
    with importing():
        from bigtrain.engine.open_model import open_model
        from bigtrain.launching import ranks
        from bigtrain.trainer import evaluation

    opened = open_model(given.checkpoint)
    opened.check_tensor(given.tensor)
    ranks.check_gpu(given.device)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if given.lm_eval:
        from bigtrain.trainer import lm_tasks

        job: evaluation.Job = lm_tasks.Tasks(
            given.lm_eval.split(","),
            include_path=given.include_path,
            num_fewshot=None if given.num_fewshot < 0 else given.num_fewshot,
            limit=given.limit or None,
            batch_size=given.micro_batch_size or 8,
        )
    else:
        job = evaluation.HeldOutSets.of(
            opened,
            data=given.data,
            num_tokens=None if given.num_tokens < 0 else given.num_tokens,
            sequence_length=given.sequence_length or None,
            micro_batch_size=given.micro_batch_size or None,
        )
    evaluation.check_out(given.out)
    world = given.ranks or given.tensor
    if world > 1 and not ranks.is_rank():
        return ranks.run("bigtrain.evaluate", argv, world=world, device=given.device)
    evaluation.run(opened, job, tensor=given.tensor, device=given.device, dtype=given.dtype, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
