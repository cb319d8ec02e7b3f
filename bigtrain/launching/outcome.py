"""What a run that ended well tells its user: how good the model is, a few lines that it writes, what to try next."""

from __future__ import annotations

import json
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import manifest
from bigtrain.config.derive import num_steps
from bigtrain.config.schema import Config
from bigtrain.launching.local import Command

CODE_PROMPT = "import "
OWN = ["run.name", "run.dir", "train.stop_after"]
"""Keys that belong to one run: another does not take them over."""
LENGTH = ["train.num_steps", "train.num_tokens"]
ABOUT_DATA = ("data", "tokenizer", "--config-dir")
CLUSTER_RANKS = 16
"""Of the preset +cluster=slurm."""


def summary(run_dir: Path, *, took_s: float) -> list[str]:
    """The lines of RUN/summary.json; none where the trainer wrote none. `took_s`: seconds since the command began."""
    found = _summary(run_dir)
    rows: list[tuple[str, str]] = []
    if "steps" in found:
        loss = f", training loss {found['train_loss']:.4f}" if found.get("train_loss") is not None else ""
        rows.append(
            (
                "trained",
                f"{found['steps']:,} steps, {found.get('tokens', 0):,} tokens{loss}; this launch took {took_s:,.0f} s",
            )
        )
    rows += _held_out({**(found.get("eval") or {}), "unigram_nats": found.get("unigram_nats")}, "held-out loss")
    for name, values in (found.get("eval_sets") or {}).items():
        rows += _held_out(values, f"loss of {name}")
    if (run_dir / "report.html").is_file():
        rows.append(("report", short(run_dir / "report.html")))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{max(width, 14)}} {text}" for name, text in rows]


def _held_out(found: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """How good the model is on one evaluation set, called `name`."""
    loss, bits, unigram = found.get("loss"), found.get("bits_per_byte"), found.get("unigram_nats")
    if loss is None:
        return []
    rows = [(name, f"{loss:.4f} nats a token" + (f" ({bits:.3f} bits a byte)" if bits is not None else ""))]
    if unigram is not None:
        where = "below" if unigram >= loss else "ABOVE"
        rows.append(("unigram", f"{unigram:.4f} nats a token, cross-entropy of the same tokens"))
        rows.append(("difference", f"the model is {abs(unigram - loss):.4f} nats {where} the unigram"))
    return rows


def _summary(run_dir: Path) -> dict[str, Any]:
    """RUN/summary.json; empty where it is not there, or cannot be read."""
    try:
        found: Any = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest committed checkpoint of a run."""
    return folders.newest(run_dir / "checkpoints")


def damage(run_dir: Path) -> list[str]:
    """Warnings where the newest checkpoint is not what was saved, as far as `manifest.problems` sees: whether a run can
    go on from it is said."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return []
    found = manifest.problems(newest)
    told = {
        "is damaged, no run can go on from it": "; ".join(found.damage),
        "has lost what a run does not need to go on": "; ".join(found.beside),
        "cannot be checked": found.unknown,
    }
    verify = f"python tools/checkpoint.py verify {short(newest)}"
    return [f"warning: {short(newest)} {what}: {why}. Look: {verify}" for what, why in told.items() if why]


def already_finished(config: Config, typed: Sequence[str]) -> list[str]:
    """What to say of a run that has nothing left to do, and how to go on; none where it has. `typed`: the settings and
    flags of the command line."""
    run_dir, train = Path(config.run.dir), config.train
    checkpoint = newest_checkpoint(run_dir)
    steps = 0 if checkpoint is None else folders.step_of(checkpoint) or 0
    last = num_steps(train)
    if steps < min(last, train.stop_after or last) or _summary(run_dir).get("steps") != steps:
        return []
    if steps < last:
        said = f"already at step {steps:,} of {last:,}, where train.stop_after={train.stop_after} ends it. To go on:"
        return [said, again(typed, without=["train.stop_after"])]
    if config.schedule.name == "constant" and train.num_tokens is None:
        said = f"already finished: {steps:,} steps. Raise train.num_steps to go on:"
        return [said, again(typed, _length(config, 2), without=LENGTH)]
    said = f"already finished: {steps:,} steps, its {config.schedule.name} schedule ends there. Another run goes on:"
    resume = f"checkpoint.resume={short(run_dir)}"
    settings = [*_another(config, str(2 * steps)), resume, _length(config, 2)]
    without = [*OWN, *LENGTH, "checkpoint.resume"]
    if config.checkpoint.init_from:  # its weights are in the checkpoint, its tokenizer may be in the run's folder
        settings.append(f"tokenizer.path={short(Path(config.tokenizer.path))}")
        without += ["checkpoint.init_from", "tokenizer.path"]
    return [said, again(typed, *settings, without=without)]


def generate_command(config: Config, checkpoint: Path) -> Command:
    """Let the model write: from its own beginning, or as code begins where it learned from Python's library."""
    prompt = CODE_PROMPT if _is_stdlib(config) else ""
    arguments = [sys.executable, "-m", "bigtrain.generate", f"checkpoint={checkpoint}", f"prompt={prompt}"]
    return Command("generation", arguments)


def next_steps(config: Config, checkpoint: Path | None, typed: Sequence[str]) -> list[str]:
    """What to try next: commands that work as they stand, with the user's own settings from `typed`."""
    lines = ["try next:"]
    if checkpoint is not None:
        more = "prompt='class '" if _is_stdlib(config) else "max_tokens=300"
        lines.append(f"  python -m bigtrain.generate checkpoint={short(checkpoint)} {more}")
    longer = [*_another(config, str(10 * num_steps(config.train))), _length(config, 10)]
    lines.append(again(typed, *longer, without=[*OWN, *LENGTH]))
    if _is_stdlib(config):
        text = [*_another(config, "my-text"), "data=text", "data.prepare.inputs=[FOLDER]"]
        made = [] if config.tokenizer.kind == "file" else ["tokenizer.path"]
        lines.append(again(typed, *text, without=[*OWN, "data", *made]))
    if config.data.num_lanes % CLUSTER_RANKS == 0 and not config.checkpoint.init_from:
        large = [*_another(config, "1b"), "+cluster=slurm", "model=gpt_1b", "dry_run=true"]
        lines.append(again([one for one in typed if _key(one).split(".")[0] in ABOUT_DATA], *large, without=OWN))
    return lines


def again(typed: Sequence[str], *settings: str, without: Sequence[str]) -> str:
    """A launch as it was `typed`, with other `settings`, and `without` these keys or groups, indented."""
    kept = [one for one in typed if not any(_key(one) == name or _key(one).startswith(name + ".") for name in without)]
    return "  " + shlex.join(["python", "-m", "bigtrain.launch", *kept, *settings])


def _key(typed: str) -> str:
    """The key or group that an argument sets; a flag's name where it is one."""
    return typed.lstrip("+").partition("=")[0].partition("@")[0]


def _length(config: Config, times: int) -> str:
    train = config.train
    if train.num_tokens is not None:
        return f"train.num_tokens={times * train.num_tokens}"
    return f"train.num_steps={times * train.num_steps}"


def _another(config: Config, ending: str) -> list[str]:
    """A name that is not this run's, and a folder beside its own where that is not the default."""
    begin = config.run.name.removesuffix(f"-{num_steps(config.train)}")  # else names would grow
    name, folder = f"{begin}-{ending}", Path(config.run.dir)
    is_default = folder == Path.cwd() / "runs" / config.run.name
    return [f"run.name={name}"] + ([] if is_default else [f"run.dir={short(folder.with_name(name))}"])


def _is_stdlib(config: Config) -> bool:
    library = sysconfig.get_path("stdlib")
    return bool(config.data.prepare.inputs) and all(name.startswith(library) for name in config.data.prepare.inputs)


def short(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
