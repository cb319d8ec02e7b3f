"""What is wrong with the group cluster, as far as its text says. Pure; launching/slurm.py asks Slurm itself, later."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bigtrain.config import locations
from bigtrain.config.cluster import ClusterConfig
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config

_MEMORY = "Write megabytes, or a number with K, M, G or T, such as 480G; 0 is all of the node"
_GRES = "Write NAME:COUNT or NAME:TYPE:COUNT, with commas between several, such as gpu:a100:8"
_GPUS = "Write a number, or TYPE:NUMBER, such as a100:8"
_MOUNT = "Write HOST:CONTAINER or HOST:CONTAINER:FLAGS, whole paths without spaces and commas"
_FORMS: dict[str, tuple[str, str]] = {
    "partition": (r"[^\s,]+(,[^\s,]+)*", "Write a name, or several with commas between"),
    "account": (r"\S+", "Write a name"),
    "qos": (r"\S+", "Write a name"),
    "reservation": (r"\S+", "Write a name"),
    "constraint": (r"\S+", "Write features without spaces, such as 'a100&ib'"),
    "exclude": (r"\S+", "Write names of nodes without spaces, such as gpu[07-09],gpu31"),
    "memory": (r"\d+[KMGT]?", _MEMORY),
    "gres": (r"[\w.-]+(:[\w.-]+){0,2}(,[\w.-]+(:[\w.-]+){0,2})*", _GRES),
    "gpus_per_node": (r"([\w.-]+:)?\d+", _GPUS),
    "mail_user": (r"[^\s,]+(,[^\s,]+)*", "Write an address"),
    "container_image": (r"\S+", "Write the path of an image without spaces, or REGISTRY#NAME:TAG"),
    "container_python": (r"\S+", "Write a path or a name without spaces"),
}
"""Keys of text, with what they look like and the words for it. None has a line break, which would end its line of the
script."""
_LIMITS = ("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50")
_MAIL = ("NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "ARRAY_TASKS", *_LIMITS)
_OF_SLURM = ("partition", "account", "qos", "reservation", "constraint", "exclude", "gres", "memory", "mail_user")
_KEY_OF_OPTION = {
    **{
        name: name.replace("-", "_") for name in ("partition", "account", "qos", "reservation", "constraint", "exclude")
    },
    **{name: name for name in ("gres", "time", "requeue")},
    "nodes": "num_nodes",
    "ntasks-per-node": "procs_per_node",
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_proc",
    "mem": "memory",
    "mail-user": "mail_user",
    "mail-type": "mail_type",
    "container-image": "container_image",
    "container-mounts": "container_mounts",
    "no-requeue": "requeue",
    "signal": "signal_s",
}
"""Options of sbatch that a key stands for."""
_TAKEN = ("array", "chdir", "error", "input", "job-name", "ntasks", "open-mode", "output", "parsable", "wrap", "wait")
"""Options of sbatch that the launcher sets, or that would hide the job from it."""
_SET_BY_LAUNCHER = re.compile(
    r"(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONSAFEPATH|(SLURM|SUBMITIT)_.*)"
)
_SECRET = re.compile(r"\w*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?|PASS|PGPASS|AUTH", re.IGNORECASE)
_SECRET_AT_END = re.compile(r"\w+_(PAT|PWD)", re.IGNORECASE)
_PUBLIC = ("NCCL_IB_PKEY", "UCX_IB_PKEY", "SSH_AUTH_SOCK", "GOOGLE_APPLICATION_CREDENTIALS")
"""Partition keys of InfiniBand, a socket's path, a file's."""
_ASSIGNED = re.compile(r"(?<![\w-])(\w+)=(\"?'?)([^\s$\"'`]\S*)")
"""NAME=VALUE in a shell line, where VALUE is written out: neither empty nor looked up with $ or a command."""
_HANDED_OVER = (
    (r"\bwandb\s+login(?:\s+(?:--host[=\s]\s*\S+|-\S+))*+\s+[\"']?\w", "WANDB_API_KEY"),
    (r"--(?:[\w-]+-)?(?:token|password|passwd|secret|api-?key)(?:=|\s+)[\"']?[\w+=]", "it"),
    (r"\bauthorization:\s*(?:bearer|basic|token)\s+[\w+/=]", "it"),
    (r"://[^\s/@:]*:[^\s/@$`][^\s/@]*@", "it"),
)
"""A secret written out otherwise in a shell line, and what to set instead: the value of an option (but no path), a
header, the password of a URL."""


def cluster_problems(config: Config, world: int) -> Iterator[Problem]:
    """Every problem of the group cluster."""
    cluster = config.cluster
    if cluster.kind == "local":
        yield from _local(cluster)
    else:
        yield from _slurm(config)
    if cluster.time.isdigit():  # Slurm would take it for minutes
        message = "is a bare number, as YAML makes one of 12:00:00 without quotes"
        yield Problem("cluster.time", cluster.time, message, "Write D-HH:MM:SS; in a file with quotes: '12:00:00'")
    elif time_limit_minutes(cluster.time) is None:
        yield Problem("cluster.time", cluster.time, "is not a time limit", "Write D-HH:MM:SS, such as 1-00:00:00")
    for name, (pattern, fix) in _FORMS.items():
        value: str | None = getattr(cluster, name)
        if value is not None and not re.fullmatch(pattern, value):
            yield Problem(f"cluster.{name}", value, "is not what Slurm takes", fix)
    yield from _gpus(cluster)
    yield from _mail(cluster)
    yield from _container(cluster)
    yield from _environment(cluster)
    yield from _sbatch(cluster)


def _local(cluster: ClusterConfig) -> Iterator[Problem]:
    if cluster.num_nodes > 1:
        message = "this machine is one node"
        yield Problem("cluster.num_nodes", cluster.num_nodes, message, "Set it to 1, or add +cluster=slurm")
    for name in _OF_SLURM:
        value: Any = getattr(cluster, name)
        if value is not None:
            message = "is for a Slurm cluster, and this run is for this machine"
            yield Problem(f"cluster.{name}", value, message, "Add +cluster=slurm, or leave it out")


def _slurm(config: Config) -> Iterator[Problem]:
    if config.cluster.device == "auto":
        message = "the launcher cannot see the nodes of a Slurm cluster"
        yield Problem("cluster.device", config.cluster.device, message, "Set cluster.device=cuda or cpu")
    if re.search(r"[\s%:]", config.run.dir):
        message = "squeue divides the job's command at spaces, sbatch replaces % in names, and : divides PYTHONPATH"
        fix = "Choose a run.name and a run.dir without spaces, % and :"
        yield Problem("run.dir", config.run.dir, message, fix)


def asks_for_gpus(gres: str | None) -> bool:
    """Whether GPUs are among the generic resources."""
    return any(part.split(":")[0] == "gpu" for part in (gres or "").split(","))


def _gpus(cluster: ClusterConfig) -> Iterator[Problem]:
    in_gres = asks_for_gpus(cluster.gres)
    if in_gres and cluster.gpus_per_node is not None:
        message = f"cluster.gres={cluster.gres} asks for GPUs too"
        yield Problem("cluster.gpus_per_node", cluster.gpus_per_node, message, "Leave one of them out")
        return
    if cluster.device == "cpu" and (in_gres or cluster.gpus_per_node not in (None, "0")):
        key = "cluster.gres" if in_gres else "cluster.gpus_per_node"
        value = cluster.gres if in_gres else cluster.gpus_per_node
        yield Problem(key, value, "with cluster.device=cpu no rank would use them", "Set cluster.device=cuda")
        return
    parts = [part for part in (cluster.gres or "").split(",") if part.split(":")[0] == "gpu"]
    for key, text in (*(("cluster.gres", part) for part in parts), ("cluster.gpus_per_node", cluster.gpus_per_node)):
        count = (text or "").split(":")[-1]
        if count.isdigit() and 0 < int(count) < cluster.procs_per_node:
            message = f"each of the cluster.procs_per_node={cluster.procs_per_node} ranks of a node wants a GPU"
            yield Problem(key, text, message, "Ask for as many")


def _mail(cluster: ClusterConfig) -> Iterator[Problem]:
    if cluster.mail_type is None:
        if cluster.mail_user is not None:
            message = "no mail would be sent: cluster.mail_type is not set"
            yield Problem("cluster.mail_user", cluster.mail_user, message, "Set cluster.mail_type=END,FAIL,REQUEUE")
        return
    unknown = [name for name in cluster.mail_type.split(",") if name.upper() not in _MAIL]
    if unknown:
        message = f"{','.join(unknown) or 'it'} is nothing that Slurm sends mail about"
        yield Problem("cluster.mail_type", cluster.mail_type, message, f"Choose of {', '.join(_MAIL)}")


def _container(cluster: ClusterConfig) -> Iterator[Problem]:
    for mount in cluster.container_mounts:
        if not re.fullmatch(r"/[^\s,:]*:/[^\s,:]*(:[^\s,:]+)?", mount):
            yield Problem("cluster.container_mounts", mount, "is no mount", _MOUNT)
    if cluster.container_mounts and cluster.container_image is None:
        message = "there is no container to mount into"
        yield Problem(
            "cluster.container_mounts", ",".join(cluster.container_mounts), message, "Set cluster.container_image"
        )


def _environment(cluster: ClusterConfig) -> Iterator[Problem]:
    """No message shows a value: it may be the secret."""
    for name, value in cluster.env.items():
        key = f"cluster.env.{name}"
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            yield Problem(key, "...", "is no name of an environment variable", "Use letters, digits and _")
        elif _SET_BY_LAUNCHER.fullmatch(name):
            yield Problem(key, "...", "the launcher or Slurm sets it itself", "Leave it out")
        elif is_secret(name) or locations.literal_secret(value):
            yield _kept(key, name)
        elif "\x00" in value or "\n" in value:
            yield Problem(key, "...", "has a line break", "Write one line")
    for number, line in enumerate(cluster.setup):
        if name := _written_secret(line):
            yield _kept(f"cluster.setup.{number}", name)


def is_secret(name: str) -> bool:
    """Whether a variable of this name would hold a secret. A path to one is none: WANDB_IDENTITY_TOKEN_FILE."""
    parts = name.split("_")
    if name in _PUBLIC or parts[-1].upper() in ("FILE", "PATH", "DIR"):
        return False
    return _SECRET_AT_END.fullmatch(name) is not None or any(_SECRET.fullmatch(part) for part in parts)


def _written_secret(text: str) -> str | None:
    """The name of a variable to set instead of a secret that is written out in shell text; "it" where it has none."""
    names = [found[1] for found in _ASSIGNED.finditer(text) if is_secret(found[1])]
    names += [name for pattern, name in _HANDED_OVER if re.search(pattern, text, re.IGNORECASE)]
    return next(iter(names), None)


def _kept(key: str, name: str) -> Problem:
    message = "looks like a secret, which config.yaml, the script and the logs would keep"
    fix = f"Leave it out and set {name} in the shell that submits, or let cluster.setup read it from a file of yours"
    return Problem(key, "...", message, fix)


def _sbatch(cluster: ClusterConfig) -> Iterator[Problem]:
    for option, value in cluster.sbatch.items():
        name, key = option.replace("_", "-"), f"cluster.sbatch.{option}"
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield Problem(key, value, "is no long name of an option of sbatch", "Write it without the --")
        elif name in _KEY_OF_OPTION:
            other = f"cluster.{_KEY_OF_OPTION[name]}"
            yield Problem(key, value, f"has a key of its own, {other}", f"Set {other}")
        elif name in _TAKEN:
            yield Problem(key, value, "the launcher needs it for itself", "Leave it out")
        elif written := _written_secret(value):
            yield _kept(key, written)
        elif not value or "\n" in value:
            yield Problem(key, value, "is no value", "Write one line; true for an option that takes no value")


def time_limit_minutes(text: str) -> int | None:
    """Minutes, rounded up, of one of Slurm's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None where it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *rest = match.groups()
    fields = [int(field) for field in rest if field is not None]
    if days is not None:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, (minutes, seconds) = 0, (*fields, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return -(-total // 60) or None


def memory_bytes(text: str) -> int | None:
    """Bytes of one of Slurm's forms (megabytes, or a number with K, M, G or T); None for 0, all of a node, and for what
    is none."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    return int(match[1]) << {"K": 10, "M": 20, "": 20, "G": 30, "T": 40}[match[2]] or None if match else None
