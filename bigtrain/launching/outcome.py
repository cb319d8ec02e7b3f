"""What a run that ended well tells its user: how good the model is, a few lines that it writes, what to try next."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bigtrain.config.schema import Config
from bigtrain.launching.local import Command

CODE_PROMPT = "import "


def summary(run_dir: Path) -> list[str]:
    """The lines of RUN/summary.json; none where the trainer wrote none."""
    try:
        found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    rows: list[tuple[str, str]] = []
    if "steps" in found:
        took = f"; this launch took {found['wall_s']:,.0f} s" if "wall_s" in found else ""
        loss = f", training loss {found['train_loss']:.4f}" if found.get("train_loss") is not None else ""
        rows.append(("trained", f"{found['steps']:,} steps, {found.get('tokens', 0):,} tokens{loss}{took}"))
    held_out, unigram = found.get("eval") or {}, found.get("unigram_nats")
    if held_out.get("loss") is not None:
        bits = f" ({held_out['bits_per_byte']:.3f} bits a byte)" if held_out.get("bits_per_byte") is not None else ""
        rows.append(("held-out loss", f"{held_out['loss']:.4f} nats a token{bits}"))
        if unigram is not None:
            difference = unigram - held_out["loss"]
            where = "below" if difference >= 0 else "ABOVE"
            rows.append(("unigram", f"{unigram:.4f} nats a token, cross-entropy of the same tokens"))
            rows.append(("difference", f"the model is {abs(difference):.4f} nats {where} the unigram"))
    if (run_dir / "report.html").is_file():
        rows.append(("report", short(run_dir / "report.html")))
    return [f"{name:<14} {text}" for name, text in rows]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest committed checkpoint of a run."""
    return max((path.parent for path in (run_dir / "checkpoints").glob("step-*/COMMITTED")), default=None)


def generate_command(config: Config, checkpoint: Path) -> Command:
    """Let the model write: from its own beginning, or as code begins where it learned from Python files."""
    prompt = CODE_PROMPT if any(name.endswith(".py") for name in config.data.prepare.inputs) else ""
    arguments = [sys.executable, "-m", "bigtrain.generate", f"checkpoint={checkpoint}", f"prompt={prompt}"]
    return Command("generation", arguments)


def next_steps(config: Config, checkpoint: Path | None) -> list[str]:
    """What to try next."""
    lines = [
        "try next:",
        f"  python -m bigtrain.launch run.name=longer train.num_steps={10 * config.train.num_steps}",
        "  python -m bigtrain.launch run.name=mine data=text 'data.prepare.inputs=[FOLDER]'",
        "  python -m bigtrain.launch +cluster=slurm model=gpt_1b dry_run=true",
    ]
    if checkpoint is not None:
        lines.insert(1, f"  python -m bigtrain.generate checkpoint={short(checkpoint)} prompt='class '")
    return lines


def short(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
