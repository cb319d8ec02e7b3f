"""What tools/bench/data.py measured, as text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

OURS = ("ours, concat", "ours, best_fit")
LIBRARIES = ("webdataset", "streaming", "litdata")
TARGET = 1.5
"""Our tokens a second over those of the best of the three libraries."""


@dataclass
class Result:
    """What one process measured."""

    first_batch_s: float
    """From opening the data on; the imports are done by then."""
    tokens: str = ""
    """Of that batch: a hash."""
    tokens_per_s: float = 0.0
    cpu_ms: float = 0.0
    """A batch, of the process and its workers."""
    rss_growth_mb: float = 0.0
    """Of the process, from the first measured batch to the last, page cache of maps left out."""


def table(found: dict[str, dict[int, list[Result]]]) -> str:
    """Tokens a second at 0 workers and at the best other number, and what ours is of the others'."""
    rows = [f"{'contender':22}{'0 workers, M tokens/s':>26}{'CPU ms':>8}{'with workers':>26}{'of':>4}{'CPU ms':>8}"
            f"{'first batch s':>15}{'grows MB':>10}"]  # fmt: skip
    for name, of_workers in found.items():
        best = best_of(of_workers)
        cells = [_rates(of_workers.get(0, [])), _median(of_workers.get(0, []), "cpu_ms", ".3f")]
        cells += [_rates(of_workers.get(best, [])), str(best) if best > 0 else "-"]
        cells += [_median(of_workers.get(best, []), "cpu_ms", ".3f")]
        cells += [_median(of_workers.get(0, []), field, ".2f") for field in ("first_batch_s", "rss_growth_mb")]
        rows.append(
            f"{name:22}{cells[0]:>26}{cells[1]:>8}{cells[2]:>26}{cells[3]:>4}{cells[4]:>8}{cells[5]:>15}{cells[6]:>10}"
        )
    rows.append("In brackets the lowest and the highest of the rounds. CPU ms: a batch, with all workers.")
    for ours in (name for name in OURS if name in found):
        others = [name for name in found if name not in OURS]
        rows += [f"{ours} of {other}: {ratios(found, ours, [other])}" for other in others]
        libraries = [name for name in LIBRARIES if name in found]
        if libraries:
            rows.append(f"{ours} of the best of the libraries: {ratios(found, ours, libraries)}; wanted: {TARGET}")
    return "\n".join(rows)


def best_of(of_workers: dict[int, list[Result]]) -> int:
    """The number of workers above 0 with the highest median; -1 where there is none."""
    rates = {n: statistics.median(r.tokens_per_s for r in found) for n, found in of_workers.items() if n and found}
    return max(rates, key=lambda n: rates[n]) if rates else -1


def ratios(found: dict[str, dict[int, list[Result]]], ours: str, others: list[str]) -> str:
    """Median, lowest and highest over the rounds of our speed over that of the fastest of the others in the round."""
    told: list[str] = []
    for where, pick in (("0 workers", lambda _: 0), ("with workers", best_of)):
        mine = [result.tokens_per_s for result in found[ours].get(pick(found[ours]), [])]
        rates = [[result.tokens_per_s for result in found[name].get(pick(found[name]), [])] for name in others]
        shares = [one / max(each) for one, *each in zip(mine, *rates, strict=True)] if rates else []
        if shares:
            told.append(f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) {where}")
    return ", ".join(told)


def restart_table(found: dict[str, dict[int, list[float]]]) -> str:
    rows = [f"{'contender':22}{'step 0':>24}{f'step {max(found[OURS[0]]):,}':>24}"]
    for name, of_steps in found.items():
        cells = [f"{statistics.median(s):.2f} ({min(s):.2f} to {max(s):.2f})" for s in of_steps.values()]
        rows.append(f"{name:22}{cells[0]:>24}{cells[1]:>24}")
    rows.append("webdataset reads everything before it again; random windows of a memory map are never found again.")
    return "\n".join(rows)


def tokenise_table(found: list[dict[str, float]]) -> str:
    rows = ["tokenising in one process, M tokens a second of processor time"]
    for name in found[0]:
        rates = [each[name] / 1e6 for each in found]
        share = statistics.median(each[name] / each["sentencepiece"] for each in found)
        rows.append(f"{name:22}{statistics.median(rates):>8.2f} ({min(rates):.2f} to {max(rates):.2f})  {share:.2f}")
    return "\n".join(rows)


def _rates(found: list[Result]) -> str:
    rates = [result.tokens_per_s / 1e6 for result in found]
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})" if rates else "-"


def _median(found: list[Result], field: str, form: str) -> str:
    return format(statistics.median(getattr(result, field) for result in found), form) if found else "-"
