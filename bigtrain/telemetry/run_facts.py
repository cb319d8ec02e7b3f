"""What a report says of a run, as numbers and words: its settings, and how it went."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import epochs
from bigtrain.config.errors import UserError
from bigtrain.telemetry.goodput import Account, account, attempts_in
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

_LAST_STEPS = 10
"""Steps that the final training loss is the mean of."""
_FINAL_LOSS = f"Training loss, mean of the last {_LAST_STEPS} steps"
UNKNOWN = "-"


@dataclass(frozen=True)
class Run:
    """What a report shows of one run."""

    name: str
    config: dict[str, Any]
    """config.yaml; empty where the run has none."""
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]
    """Of each evaluation set, by its name; that of the only one is empty."""
    epochs: dict[str, float]
    """How often each source was gone through by the end, by its folder; empty where no record says it."""
    goodput: Account | None = None
    """Where its time went; None where no record says it."""


def read_run(run_dir: Path) -> Run:
    """Read a run's folder. Raises UserError where it is none, or its config.yaml is not readable."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder. Give the folder of a run, such as runs/default.")
    metrics, config_path = run_dir / METRICS_FILE, run_dir / "config.yaml"
    if not metrics.exists() and not config_path.exists():
        raise UserError(f"{run_dir}: not a run's folder: it has neither {METRICS_FILE} nor config.yaml.")
    records = read_metrics(metrics) if metrics.exists() else []
    config = _read_config(config_path) if config_path.exists() else {}
    return Run(
        name=str(config.get("run", {}).get("name", run_dir.resolve().name)),
        config=config,
        train=[record for record in records if record.get("kind") == "train"],
        evals=_by_set(records),
        goodput=account(attempts) if (attempts := attempts_in(records)) else None,
        epochs=next((record["epochs"] for record in reversed(records) if record.get("name") == "epochs"), {}),
    )


def _by_set(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("kind") == "eval":
            found.setdefault(record.get("set", ""), []).append(record)
    return found


def facts_of(run: Run) -> dict[str, str]:
    """Every fact by its name, as text."""
    return _config_facts(run) | _results(run)


def in_order(columns: list[dict[str, str]]) -> list[str]:
    """The facts of all columns, each behind the one that it follows in its column."""
    facts: list[str] = []
    for column in columns:
        place = 0
        for fact in column:
            if fact not in facts:
                facts.insert(place, fact)
            place = facts.index(fact) + 1
    return facts


def _config_facts(run: Run) -> dict[str, str]:
    def get(group: str, key: str) -> Any:
        values = run.config.get(group)
        return values.get(key, "?") if isinstance(values, dict) else "?"

    return {
        "Model": f"{get('model', 'name')}: {get('model', 'num_layers')} layers of {get('model', 'hidden_size')}, "
        f"vocabulary {get('model', 'vocab_size')}",
        "Layout": f"tensor {get('parallel', 'tensor')}, pipeline {get('parallel', 'pipeline')}, "
        f"ZeRO-{get('parallel', 'zero_stage')}, {get('precision', 'dtype')}",
        "Batch": f"{get('train', 'global_batch_size')} sequences of {get('train', 'sequence_length')} tokens",
        "Optimizer": f"{get('optim', 'name')}, peak lr {get('optim', 'lr')}, {get('schedule', 'name')} schedule",
        "Seed": f"{get('run', 'seed')}",
    }


def _results(run: Run) -> dict[str, str]:
    facts = {"Steps": "none yet", "Tokens": UNKNOWN, _FINAL_LOSS: UNKNOWN}
    if run.train:
        losses = [record["loss"] for record in run.train[-_LAST_STEPS:]]
        facts["Steps"] = f"{run.train[-1]['step']:,}"
        facts["Tokens"] = f"{run.train[-1]['tokens']:,}"
        facts[_FINAL_LOSS] = f"{statistics.fmean(losses):.4f}"
    for name, records in (run.evals or {"": []}).items():
        facts |= _evaluations(name, records)
    if run.epochs:
        facts["Epochs"] = epochs.told(run.epochs)
    facts["Tokens a second, median"] = _median(run, "tokens_per_second", ",.0f")
    facts["Step time in s, median"] = _median(run, "step_time_s", ".3f")
    facts["MFU, median"] = _median(run, "mfu", ".1%")
    return facts


def _evaluations(name: str, records: list[dict[str, Any]]) -> dict[str, str]:
    """Of one evaluation set."""
    of = f" of {name}" if name else ""
    loss = f"Loss{of}" if name else "Held-out loss"
    facts = {f"{loss}, last": "not evaluated", f"{loss}, best": UNKNOWN}
    facts |= {f"Perplexity{of}, last": UNKNOWN, f"Bits a byte{of}, last": UNKNOWN}
    if records:
        last = records[-1]
        facts[f"{loss}, last"] = f"{last['loss']:.4f} at step {last['step']:,}"
        facts[f"{loss}, best"] = f"{min(record['loss'] for record in records):.4f}"
        facts[f"Perplexity{of}, last"] = f"{last['perplexity']:.2f}"
        if last["bits_per_byte"] is not None:
            facts[f"Bits a byte{of}, last"] = f"{last['bits_per_byte']:.3f}"
    return facts


def _median(run: Run, field: str, form: str) -> str:
    values = [record[field] for record in run.train if record[field] is not None]
    return f"{statistics.median(values):{form}}" if values else UNKNOWN


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml as plain values. Not as a Config: a report of an old run must not depend on today's settings."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a config: {str(error).splitlines()[0]}") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
