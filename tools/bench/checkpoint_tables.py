"""What tools/bench/checkpoint.py measured, as text."""

from __future__ import annotations

import statistics
from typing import Any

Found = dict[str, Any]
"""``figures``: by number of ranks, part and contender, one entry a round."""
Lines = dict[str, list[dict[str, float]]]
HASH_SHARE, STALL, RAW_SHARE, LOAD_SHARE, RESHARD = 0.05, 1.3, 0.8, 1.0, 2.5
"""What is wanted of ours: at most, at most, at least, at least, at most."""


def tables(found: Found) -> str:
    rows = [f"load of the machine: {found['load_before']:.2f} at the beginning, {found['load_after']:.2f} at the end"]
    for ranks, parts in found["figures"].items():
        for part, lines in parts.items():
            size = next(iter(lines.values()))[0]["num_bytes"] / 1e9
            rows += ["", f"{part}, {ranks} rank{'s' * (ranks != '1')}, {size:.3g} GB"]
            rows += {"save": _save, "load": _load, "async": _async, "reshard": _reshard}[part](lines)
    return "\n".join([*rows, "", "Medians; in brackets the lowest and the highest of the rounds."])


def _save(lines: Lines) -> list[str]:
    rows = [f"{'contender':16}{'seconds':>22}{'GB/s':>7}{'CPU s':>7}{'left s':>8}{'memory MB':>11}   speed of raw's"]
    for name, figures in lines.items():
        rate = figures[0]["num_bytes"] / 1e9 / _median(figures, "seconds_s")
        numbers = f"{_spread(figures, 'seconds_s'):>22}{rate:>7.2f}{_median(figures, 'cpu_s'):>7.1f}"
        numbers += f"{_median(figures, 'left_s'):>8.2f}{_median(figures, 'peak_bytes') / 1e6:>11.0f}"
        rows.append(f"{name:16}{numbers}   {_speed(lines, name, 'raw', 'seconds_s')}")
    rows += _wanted("ours of a raw fsynced write", _speeds(lines, "ours", "raw", "seconds_s"), f"at least {RAW_SHARE}")
    rows += _wanted("ours of a direct write", _speeds(lines, "ours", "direct", "seconds_s"))
    if "ours" in lines and "ours-unhashed" in lines:
        pairs = list(zip(lines["ours"], lines["ours-unhashed"], strict=True))
        wall = [1 - without["seconds_s"] / whole["seconds_s"] for whole, without in pairs]
        cpu = [(whole["cpu_s"] - without["cpu_s"]) / whole["cpu_s"] for whole, without in pairs]
        rows += _wanted("hashes of tensors, share of the save's time", wall, f"under {HASH_SHARE}")
        rows += _wanted("hashes of tensors, share of its processor time", cpu)
    return rows


def _load(lines: Lines) -> list[str]:
    rows = [f"{'contender':16}{'cold, seconds':>22}{'CPU s':>7}{'warm, seconds':>22}{'CPU s':>7}{'memory MB':>11}"
            "   speed of dcp's, cold; warm"]  # fmt: skip
    for name, figures in lines.items():
        numbers = "".join(f"{_spread(figures, f'{how}_s'):>22}{_median(figures, f'{how}_cpu_s'):>7.1f}" for how in HOW)
        peak = max(_median(figures, f"{how}_peak") for how in HOW) / 1e6
        speeds = "; ".join(_speed(lines, name, "dcp", f"{how}_s") for how in HOW)
        rows.append(f"{name:16}{numbers}{peak:>11.0f}   {speeds}")
    for how in HOW:
        rows += _wanted(f"ours of dcp, {how}", _speeds(lines, "ours", "dcp", f"{how}_s"), f"at least {LOAD_SHARE}")
    return rows


HOW = ("cold", "warm")


def _async(lines: Lines) -> list[str]:
    rows = [f"{'contender':16}{'stall, seconds':>22}{'of a copy':>22}{'first stall':>13}{'behind s':>10}"
            f"{'lost behind, seconds':>24}{'speed then':>12}{'memory MB':>11}"]  # fmt: skip
    for name, figures in lines.items():
        numbers = f"{_spread(figures, 'stall_s'):>22}{_spread(figures, 'stall_of_copy'):>22}"
        numbers += f"{_median(figures, 'first_stall_s'):>13.2f}{_median(figures, 'behind_s'):>10.2f}"
        numbers += f"{_spread(figures, 'lost_s'):>24}{_median(figures, 'share_of_speed'):>12.0%}"
        rows.append(f"{name:16}{numbers}{_median(figures, 'peak_bytes') / 1e6:>11.0f}")
    if "ours" in lines:
        shares = [one["stall_of_copy"] for one in lines["ours"]]
        rows += _wanted("stall of ours of a plain copy", shares, f"at most {STALL}")
        for other in (name for name in lines if name != "ours"):
            lost = [
                (mine["stall_s"] + mine["lost_s"]) / (theirs["stall_s"] + theirs["lost_s"])
                for mine, theirs in zip(lines["ours"], lines[other], strict=True)
            ]
            rows += _wanted(f"training lost to ours, stall and behind, of {other}'s", lost)
    return rows


def _reshard(lines: Lines) -> list[str]:
    rows = [f"{'contender':16}{'seconds':>22}{'CPU s':>7}{'memory MB':>11}   seconds of the copy's"]
    for name, figures in lines.items():
        numbers = f"{_spread(figures, 'seconds_s'):>22}{_median(figures, 'cpu_s'):>7.1f}"
        numbers += f"{_median(figures, 'peak_bytes') / 1e6:>11.0f}"
        rows.append(f"{name:16}{numbers}   {_speed(lines, 'copy', name, 'seconds_s')}")
    rows += _wanted("ours of a copy", _speeds(lines, "copy", "ours", "seconds_s"), f"at most {RESHARD}")
    return rows


def _wanted(what: str, values: list[float], target: str = "") -> list[str]:
    return [f"{what}: {_of(values)}" + (f"; wanted: {target}" if target else "")] if values else []


def _speeds(lines: Lines, name: str, other: str, key: str) -> list[float]:
    """Of each round."""
    if name not in lines or other not in lines:
        return []
    return [theirs[key] / mine[key] for mine, theirs in zip(lines[name], lines[other], strict=True)]


def _speed(lines: Lines, name: str, other: str, key: str) -> str:
    speeds = _speeds(lines, name, other, key)
    return _of(speeds) if speeds else "-"


def _spread(figures: list[dict[str, float]], key: str) -> str:
    return _of([one[key] for one in figures])


def _of(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _median(figures: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in figures)
