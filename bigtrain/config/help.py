"""The text of --help and --keys, made from the schema and the presets."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bigtrain.config import compose, keys, schema

WIDTH = 110
_START = """\
Pretrain a language model: text to tokenizer, shards, ranks, checkpoints and a report, with one command.

usage: python -m bigtrain.launch [GROUP=PRESET ...] [KEY=VALUE ...] [FLAG]

Without arguments it trains a small Llama-style model on this machine, on the Python sources found here.
Everything about the run lands in its folder, runs/NAME. Ctrl-C saves it, and the same command goes on from there.
Failures: cluster.max_restarts, watchdog.* (what hangs), anomaly.* (bad losses); docs/failures.md has the rest.
"""
_EXAMPLES = """\
examples:
  python -m bigtrain.launch dry_run=true                          every derived number, and what would start
  python -m bigtrain.launch run.name=fast optim.lr=2e-3 schedule=wsd
  python -m bigtrain.launch cluster.procs_per_node=4 parallel=zero3 parallel.tensor=2
  python -m bigtrain.launch +experiment=finetune checkpoint.init_from=runs/default 'data.prepare.inputs=[qa.jsonl]'
  python -m bigtrain.launch +cluster=slurm model=gpt_1b cluster.partition=gpu dry_run=true
  python -m bigtrain.launch --multirun run.name=sweep optim.lr=1e-3,3e-4 run.seed=1,2

flags:
  --help             this text
  --keys             every key with its default and documentation
  --cfg job          the composed config; starts nothing. --cfg job --resolve: with every ${...} filled in
  --multirun         a run for every combination of values: key=a,b  'range(1,4)'  'glob(gpt_*)'. One after the other
                     here, one job array with +cluster=slurm; each in a folder of its own, runs/NAME/KEY-VALUE
  --freeze           write the run's folder and prepare its data, start nothing: for launchers/
  --info defaults    where each value comes from (Hydra)
  --config-dir DIR   presets of your own, in DIR/model, DIR/data, ...
"""
USEFUL = [
    "run.name",
    "run.dir",
    "run.seed",
    "dry_run",
    "train.num_steps",
    "train.num_tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.sequence_length",
    "train.recompute",
    "optim.lr",
    "schedule.warmup_steps",
    "parallel.tensor",
    "parallel.zero_stage",
    "parallel.gather",
    "data.train",
    "data.num_lanes",
    "checkpoint.interval",
    "checkpoint.keep",
    "checkpoint.resume",
    "checkpoint.init_from",
    "eval.interval",
    "tracker.mode",
    "cluster.num_nodes",
    "cluster.procs_per_node",
    "cluster.device",
]


def help_text(extra_dirs: Sequence[Path] = ()) -> str:
    """What --help prints: the purpose, each group's presets, the most useful keys, examples and flags."""
    lines = [_START, "groups and their presets, GROUP=PRESET (a group with + is added: +cluster=slurm):"]
    for group in compose.group_names(extra_dirs):
        plus = "+" if group in compose.APPENDED_GROUPS else ""
        lines.append(f"  {plus}{group}{_doc_of_group(group)}")
        for name, file in compose.presets(group, extra_dirs).items():
            lines += _item(f"    {name}", _title(file), 18)
    lines += ["", "the most useful keys with their defaults, KEY=VALUE (all of them: --keys):"]
    for path in USEFUL:
        lines += _key(keys.by_path()[path])
    return "\n".join([*lines, "", _EXAMPLES.rstrip()])


def keys_text() -> str:
    """What --keys prints: every key, group by group."""
    lines: list[str] = []
    group = ""
    for key in keys.all_keys():
        head = key.path.split(".")[0] if "." in key.path else ""
        if head != group:
            group = head
            lines += ["", f"{group}{_doc_of_group(group)}"]
        lines += _key(key)
    return "\n".join(lines).strip()


def _key(key: keys.Key) -> Iterable[str]:
    default = "" if key.default in (None, "", [], {}) else _shown(key.default)
    choices = f"({' | '.join(key.choices)})" if key.choices else ""
    return _item(f"  {key.path}={default}", f"{key.doc} {choices}".strip(), 34)


def _item(name: str, text: str, indent: int) -> Iterable[str]:
    filled = textwrap.wrap(text, WIDTH - indent) or [""]
    gap = name.ljust(indent) if len(name) < indent else name + "  "
    yield (gap + filled[0]).rstrip()
    for line in filled[1:]:
        yield " " * indent + line


def _title(file: Path) -> str:
    """The first comment of a preset that is not Hydra's."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""


def _doc_of_group(group: str) -> str:
    """``: `` and what the group's dataclass says of itself, up to the first parenthesis or full stop."""
    field = schema.Config.__dataclass_fields__.get(group)
    doc = "" if field is None else getattr(schema, str(field.type)).__doc__ or ""
    if not doc or doc.startswith(
        f"{field.type if field else ''}("
    ):  # dataclasses writes a signature where there is none
        return ""
    return ": " + re.split(r" \(|[.:]\s|\.$", doc)[0]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
