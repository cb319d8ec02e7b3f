"""From the command line to a Config: Hydra composes the presets of conf/, the schema refuses what it does not know.

Hydra's own messages are for those who know Hydra; every override is looked at first, so that a wrong name gets the
nearest right one.
"""

from __future__ import annotations

import re
import shlex
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bigtrain.config import evaluation_sets, keys, locations
from bigtrain.config.errors import UserError
from bigtrain.config.frozen import to_config, writable_schema
from bigtrain.config.schema import Config

APPENDED_GROUPS = ("cluster", "experiment")
"""Groups that are not in the defaults list: +cluster=slurm."""
_OVERRIDE = re.compile(r"(\+{0,2})([\w./@:-]+)=(.*)", re.DOTALL)
_FOR_DEVELOPERS = re.compile(
    r"full_key\b|reference_type=|object_type=|\^|See |To append to|value: |"
    r"Invalid (value|type) assigned|Value .* is incompatible with type hint|Cannot assign \w+ to Dict"
)
"""Lines of an error of Hydra or OmegaConf that tell a user nothing, or the wrong thing."""
_MAPPING_IN_FILE = "a mapping stands where a list is due; evaluation sets in a file: valid: [{path: PATH, set: NAME}]"


def conf_dir() -> Path:
    """The presets: inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(
        f"the presets are missing: neither {package / 'conf'} nor {package.parent / 'conf'} holds config.yaml"
    )


def presets(group: str, extra_dirs: Sequence[Path] = ()) -> dict[str, Path]:
    """Name and file of each preset of a group, small models first; as in Hydra, ours come before `extra_dirs`'."""
    folders = [conf_dir(), *extra_dirs]
    found = {path.stem: path for folder in reversed(folders) for path in (folder / group).glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: _by_size(item[0])))


def _by_size(name: str) -> tuple[str, bool, int]:
    """Sort key: gpt_350m before gpt_1b before gpt_13b."""
    match = re.fullmatch(r"(.*?)(\d+)([mb])", name)
    return (match[1], match[3] == "b", int(match[2])) if match else (name, False, 0)


def group_names(extra_dirs: Sequence[Path] = ()) -> list[str]:
    """The groups that have presets, in the schema's order, then the others."""
    there = {path.name for folder in (conf_dir(), *extra_dirs) for path in folder.iterdir() if any(path.glob("*.yaml"))}
    ordered = [name for name in keys.groups() if name in there]
    return ordered + sorted(there.difference(ordered))


def register() -> None:
    """Give Hydra the schema under the name that conf/config.yaml asks for, ``${stdlib:}``: the folder of the running
    Python's standard library, and ``${label:PATH}``: a short name of a file, fit for the name of another."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("stdlib", partial(sysconfig.get_path, "stdlib"), replace=True)
    OmegaConf.register_new_resolver("label", _label, replace=True)
    ConfigStore.instance().store(name="schema", node=writable_schema())


def _label(path: str) -> str:
    """gpt2/tokenizer.json is gpt2, cl100k_base.tiktoken is cl100k_base."""
    file = Path(path)
    name = file.parent.name if file.stem == "tokenizer" and file.parent.name else file.stem
    return re.sub(r"[^\w.-]+", "-", name) or "file"


def compose(overrides: Sequence[str], extra_dirs: Sequence[Path] = ()) -> Config:
    """The config of these overrides. Raises UserError that names the key, the value and the nearest right name."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    problems = [problem for override in overrides for problem in _unknown_names(override, extra_dirs)]
    if problems:
        raise UserError("\nerror: ".join(problems))
    register()
    path = [f"hydra.searchpath=[{','.join(_quote(f'file://{folder.resolve()}') for folder in extra_dirs)}]"]
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            settings = [as_hydra_takes(override) for override in overrides]
            node = hydra.compose("config", overrides=[*settings, *(path if extra_dirs else [])])
        return to_config(node)
    except (HydraException, OmegaConfBaseException) as error:
        message = _readable(error)
        raise UserError(locations.redacted(message) if locations.literal_secret(message) else message) from error


def as_hydra_takes(argument: str) -> str:
    """An override that writes a whole number as 1e3 or 2.0, written as 1000 or 2: Hydra would refuse it where a whole
    number is due. Named evaluation sets as the list that the schema has. Any other argument of the command line as it
    is. Raises UserError for sets that are none."""
    argument = evaluation_sets.as_list(argument)
    match = _OVERRIDE.fullmatch(argument)
    key = keys.by_path().get(match[2]) if match else None
    if match is None or key is None or not key.is_whole_number or not re.search(r"[.eE]", match[3]):
        return argument
    try:
        number = float(match[3])
    except ValueError:
        return argument
    return f"{match[1]}{match[2]}={int(number)}" if number.is_integer() else argument


def _unknown_names(override: str, extra_dirs: Sequence[Path]) -> list[str]:
    """What is wrong with the names in one override: its group, preset or key."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        return [f"{override!r} is no setting. Settings are written key=value, such as train.num_steps=1000."]
    plus, name, value = match.groups()
    name = name.split("@")[0]
    if name.startswith(("hydra.", "hydra/")):
        return [
            f"{override}: Hydra's own settings do nothing here. run.dir is the run's folder, --config-dir adds presets."
        ]
    if name in group_names(extra_dirs):
        return _unknown_preset(plus, name, value.strip("'\""), extra_dirs)
    key = keys.find(name)
    if key is None:
        return [_no_such_key(override, name, extra_dirs)]
    if key.path != name and isinstance(key.default, list):
        return [f"{override}: a list is set as a whole, such as {key.path}=[...]; {key.path} is {key.kind}."]
    if key.path != name and not plus:
        return [f"{override}: {key.path} has no {name.rsplit('.', 1)[-1]} yet. Write +{override} to add it."]
    return []


def _unknown_preset(plus: str, group: str, value: str, extra_dirs: Sequence[Path]) -> list[str]:
    there = presets(group, extra_dirs)
    if value not in there:
        near = keys.nearest(value, there)
        nearest = f" Nearest: {', '.join(near)}." if near else ""
        return [f"{group}={value}: no such preset.{nearest} There are: {', '.join(there)}."]
    if group in APPENDED_GROUPS and not plus:
        return [f"{group}={value}: this group is added to the others. Write +{group}={value}."]
    if group not in APPENDED_GROUPS and plus:
        return [f"{plus}{group}={value}: this group has a preset already. Write {group}={value}."]
    return []


def _no_such_key(override: str, name: str, extra_dirs: Sequence[Path]) -> str:
    known = [*keys.by_path(), *group_names(extra_dirs)]
    near = keys.nearest(name, known)
    if near:
        return f"{override}: there is no key {name}. Nearest: {', '.join(near)}."
    prefix = name.split(".")[0] + "."
    inside = [key for key in keys.by_path() if key.startswith(prefix)]
    if inside:
        return f"{override}: there is no key {name}. {prefix[:-1]} has {', '.join(inside)}."
    return f"{override}: there is no key {name}. `--keys` lists them all."


def _readable(error: Exception) -> str:
    """Hydra's or OmegaConf's error in one line: what was set, what is wrong, what the key takes."""
    override = str(getattr(error, "override", "") or "")
    if type(error).__name__ == "OverrideParseException" and (quoted := _in_quotes(override)):
        return f"{override}: this value must be quoted, for the shell and for Hydra. Write {quoted}."
    cause = error.__cause__ or error
    full_key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    key = keys.find(re.sub(r"\[(\d+)\]", r".\1", str(full_key))) if full_key else None
    parts = [override, *_told(error), *(_told(cause) if cause is not error else ())]
    if key is not None:
        parts.append(f"{key.path} takes {key.kind}" + (f". Write {key.form}" if key.form else ""))
    parts = [part for part in dict.fromkeys(parts) if part]
    return ". ".join([": ".join(parts[:2]), *parts[2:]]) + "."


def _in_quotes(override: str) -> str:
    """The override with what Hydra cannot read in quotes, ready for a shell; empty where that does not help."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, _, value = override.partition("=")
    if value[:1] in "[{":
        words = r"[^\s\[\]{},:\"'][^\[\]{},:\"']*"
        value = re.sub(
            words, lambda word: _quote(word[0]) if re.search(r"[^\w./+ -]", word[0], re.ASCII) else word[0], value
        )
    else:
        value = _quote(value)
    try:
        OverridesParser.create().parse_override(f"{name}={value}")
    except HydraException:
        return ""
    return shlex.quote(f"{name}={value}")


def _quote(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


def _told(error: BaseException) -> list[str]:
    """The lines of an error that are for the user."""
    text = str(error).replace("Cannot merge DictConfig with ListConfig", _MAPPING_IN_FILE)
    lines = [re.sub(r"^Error merging (override )?", "", line.strip().rstrip(".:")) for line in text.splitlines()]
    return [line for line in lines if line and not _FOR_DEVELOPERS.match(line)]
