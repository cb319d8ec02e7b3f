"""--multirun: the command line of a sweep as that of each of its runs. Hydra's own syntax: a,b  choice(a,b)
range(1,4)  glob(gpt_*); several swept settings make every combination, the last one changing first.

Each run has a label, which is the name of its folder in the sweep's and the end of its run.name: the swept settings in
the order of the command line, each as LEAF-VALUE, such as lr-0.001-seed-2. LEAF is the last part of the key, or as many
parts as tell it from another swept one. A value that is not made of letters, digits, . _ + and -, or is longer than 40,
is cut down to that, with six digits of its hash behind it; so is a label longer than 150.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bigtrain.config.compose import as_hydra_takes, presets
from bigtrain.config.errors import UserError

MAX_RUNS = 1000
"""As many as a job array of Slurm has at most, where its site has not said otherwise."""
_LONGEST_VALUE, _LONGEST_LABEL = 40, 150
_OF_THE_SWEEP = ("run.name", "run.dir", "dry_run")


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    label: str
    overrides: tuple[str, ...]
    """The command line that gives its config."""
    swept: tuple[str, ...]
    """Those of them that differ from run to run."""


def points(overrides: Sequence[str], extra_dirs: Sequence[Path] = ()) -> list[Point]:
    """The runs of a sweep, in its order. Raises UserError where nothing is swept, or what cannot be."""
    choices = [_choices(override, extra_dirs) for override in overrides]
    swept = [place for place, values in enumerate(choices) if len(values) > 1]
    if not swept:
        raise UserError("--multirun: no setting has several values. Write them with commas: optim.lr=1e-3,3e-4")
    total = 1
    for values in choices:
        total *= len(values)
    if total > MAX_RUNS:
        raise UserError(f"--multirun: a sweep has {MAX_RUNS:,} runs at most, and these are more. Leave some out.")
    leaves = _leaves([_name(overrides[place]) for place in swept])
    found: list[Point] = []
    for chosen in itertools.product(*choices):
        own = [chosen[place] for place in swept]
        label = "-".join(f"{leaf}-{_value(one)}" for leaf, one in zip(leaves, own, strict=True))
        found.append(Point(_cut(label, _LONGEST_LABEL), chosen, tuple(own)))
    labels = [point.label for point in found]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"--multirun: two runs would be called {twice}. Write each value once.")
    return found


def _choices(override: str, extra_dirs: Sequence[Path]) -> list[str]:
    """An argument of the command line, once for each of its values. What Hydra cannot read stays as it is: composing
    says what is wrong with it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(as_hydra_takes(override))
    except HydraException:
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    key = parsed.get_key_element()
    if key in _OF_THE_SWEEP:
        raise UserError(f"{override}: it is the sweep's, the same for all its runs. Sweep over other settings.")
    if not parsed.is_discrete_sweep():
        raise UserError(f"{override}: it has no list of values. Write them with commas, or range(START,STOP,STEP).")
    value: Any = parsed.value()
    if isinstance(value, Glob):
        values: Iterable[str] = value.filter(list(presets(parsed.key_or_group, extra_dirs)))
    else:
        values = itertools.islice(cast("Iterable[str]", parsed.sweep_string_iterator()), MAX_RUNS + 1)
    found = [as_hydra_takes(f"{key}={value}") for value in values]
    if not found:
        raise UserError(f"{override}: there is no value in it. Write them with commas.")
    return found


def _name(override: str) -> str:
    """The key or group that an argument sets."""
    return override.partition("=")[0].lstrip("+").partition("@")[0]


def _leaves(names: Sequence[str]) -> list[str]:
    """The end of each dotted name, as long as it has to be to differ from the others'."""
    return [_leaf(name, [other for other in names if other != name]) for name in names]


def _leaf(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name)


def _value(override: str) -> str:
    return _cut(override.partition("=")[2].strip("'\""), _LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    if re.fullmatch(rf"[\w.+-]{{1,{longest}}}", text, re.ASCII):
        return text
    readable = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-")[:longest]
    return f"{readable}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")
