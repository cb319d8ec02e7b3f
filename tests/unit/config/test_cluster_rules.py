"""What a site may set, and what is refused before anything is submitted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.cluster import ClusterConfig
from bigtrain.config.cluster_rules import cluster_problems, is_secret
from bigtrain.config.compose import compose
from bigtrain.config.schema import Config, RunConfig

SLURM: dict[str, Any] = {"kind": "slurm", "num_nodes": 2, "procs_per_node": 8, "device": "cuda"}
SITE: dict[str, Any] = {
    "partition": "gpu,spot",
    "account": "lab-7",
    "qos": "high",
    "reservation": "maintenance.1",
    "constraint": "a100&[rack1|rack2]",
    "exclude": "gpu[07-09],gpu31",
    "time": "12:00:00",
    "gpus_per_node": "a100:8",
    "gres": "nvme:1",
    "memory": "480G",
    "mail_user": "me@example.org",
    "mail_type": "end,FAIL",
    "setup": ["module load cuda", "export WANDB_API_KEY=$(cat ~/.wandb)", 'export HF_TOKEN="$MINE"'],
    "env": {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false", "WANDB_IDENTITY_TOKEN_FILE": "/home/me/token"},
    "container_image": "nvcr.io#nvidia/pytorch:25.01-py3",
    "container_mounts": ["/data:/data", "/scratch:/tmp:rw"],
    "sbatch": {"nice": "100", "exclusive": "true", "export": "ALL,KEY=$KEY"},
    "array_parallelism": 4,
    "signal_s": 600,
}


def problems(**cluster: Any) -> dict[str, str]:
    config = Config(cluster=ClusterConfig(**{**SLURM, **cluster}))
    return {problem.key: str(problem) for problem in cluster_problems(config, 16)}


def test_all_that_a_site_sets_is_sound() -> None:
    assert problems(**SITE) == {}


@pytest.mark.parametrize(
    ("run_dir", "kind", "is_sound"),
    [
        ("/shared/runs/big-1.0_a", "slurm", True),
        ("/shared/My Runs/big", "slurm", False),
        ("/shared/50%/big", "slurm", False),
        ("/shared/a:b", "slurm", False),
        ("/home/me/My Runs/50%:b", "local", True),
    ],
)
def test_a_folder_that_slurm_cannot_take(run_dir: str, kind: str, is_sound: bool) -> None:
    cluster = ClusterConfig(**{**SLURM, "kind": kind, "num_nodes": 1})
    found = list(cluster_problems(Config(run=RunConfig(dir=run_dir), cluster=cluster), 8))
    assert [problem.key for problem in found] == ([] if is_sound else ["run.dir"])


@pytest.mark.parametrize(
    ("cluster", "key", "says"),
    [
        ({"partition": "gpu, spot"}, "partition", "several with commas"),
        ({"partition": "gpu\n#SBATCH --exclusive"}, "partition", "not what Slurm takes"),
        ({"account": ""}, "account", "Write a name"),
        ({"exclude": "gpu1 gpu2"}, "exclude", "without spaces"),
        ({"time": "43200"}, "time", "in a file with quotes"),
        ({"time": "soon"}, "time", "D-HH:MM:SS"),
        ({"memory": "half"}, "memory", "480G"),
        ({"gres": "gpu:a100:8:1"}, "gres", "gpu:a100:8"),
        ({"gpus_per_node": "eight"}, "gpus_per_node", "a100:8"),
        (
            {"gpus_per_node": "8", "gres": "nvme:1,gpu:8"},
            "gpus_per_node",
            "cluster.gres=nvme:1,gpu:8 asks for GPUs too",
        ),
        ({"gpus_per_node": "a100:4"}, "gpus_per_node", "each of the cluster.procs_per_node=8 ranks"),
        ({"gres": "gpu:a100:4"}, "gres", "each of the cluster.procs_per_node=8 ranks"),
        ({"gres": "gpu:8", "device": "cpu"}, "gres", "Set cluster.device=cuda"),
        ({"mail_user": "me@example.org"}, "mail_user", "no mail would be sent"),
        ({"mail_type": "END,SOMETIMES"}, "mail_type", "SOMETIMES is nothing that Slurm sends mail about"),
        ({"container_mounts": ["/data:/data"]}, "container_mounts", "no container"),
        ({"container_image": "/i.sqsh", "container_mounts": ["data"]}, "container_mounts", "HOST:CONTAINER"),
        ({"container_image": "an image"}, "container_image", "without spaces"),
        ({"env": {"RANK": "0"}}, "env.RANK", "sets it itself"),
        ({"env": {"MY-VAR": "0"}}, "env.MY-VAR", "letters, digits and _"),
        ({"env": {"TWO": "a\nb"}}, "env.TWO", "one line"),
        ({"sbatch": {"nodes": "4"}}, "sbatch.nodes", "Set cluster.num_nodes"),
        ({"sbatch": {"mem": "4G"}}, "sbatch.mem", "Set cluster.memory"),
        ({"sbatch": {"output": "x"}}, "sbatch.output", "needs it for itself"),
        ({"sbatch": {"--nice": "1"}}, "sbatch.--nice", "without the --"),
        ({"sbatch": {"signal": "B:TERM@60"}}, "sbatch.signal", "has a key of its own, cluster.signal_s"),
        ({"sbatch": {"comment": "a\n#SBATCH --hold"}}, "sbatch.comment", "one line"),
        ({"kind": "local", "num_nodes": 1, "partition": "gpu"}, "partition", "Add +cluster=slurm"),
        ({"kind": "local"}, "num_nodes", "+cluster=slurm"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(cluster: dict[str, Any], key: str, says: str) -> None:
    found = problems(**cluster)
    assert says in found[f"cluster.{key}"] and len(found) == 1, found


@pytest.mark.parametrize(
    "cluster",
    [
        {"env": {"WANDB_API_KEY": "s3cr3t"}},
        {"env": {"aws_secret_access_key": "s3cr3t"}},
        {"env": {"PROXY": "https://me:s3cr3t@proxy"}},
        {"setup": ["module load cuda; export HF_TOKEN=s3cr3t"]},
        {"setup": ["export DB_PASSWORD='s3cr3t'"]},
        {"setup": ["wandb login --relogin --host https://w.example s3cr3t"]},
        {"setup": ["huggingface-cli login --token s3cr3t"]},
        {"setup": ["tool --api-key='s3cr3t'"]},
        {"setup": ["curl -H 'authorization: Bearer s3cr3t' https://example.org"]},
        {"setup": ["pip install x --index-url https://me:s3cr3t@example.org/simple"]},
        {"env": {"GITHUB_PAT": "s3cr3t"}},
        {"sbatch": {"export": "ALL,GITHUB_TOKEN=s3cr3t"}},
    ],
)
def test_a_secret_is_refused_and_not_shown(cluster: dict[str, Any]) -> None:
    (message,) = problems(**cluster).values()
    assert "looks like a secret" in message and "s3cr3t" not in message


@pytest.mark.parametrize(
    "line",
    [
        "wandb login $WANDB_API_KEY",
        "wandb login --host https://w.example",
        'wandb login "$(cat ~/.wandb)"; echo done',
        "huggingface-cli login --token $(cat ~/.hf)",
        "tool --token-file tokens --password-stdin --api-key /home/me/key --max-tokens 8",
        'curl -H "Authorization: Bearer $TOKEN" https://example.org:8080/a@b',
        "git clone https://me:${TOKEN}@example.org/x ssh://git@example.org/y",
        "export https_proxy=http://proxy:3128 NCCL_IB_PKEY=0x7fff",
    ],
)
def test_what_is_looked_up_is_no_secret(line: str) -> None:
    assert problems(setup=[line]) == {}


def test_names_of_secrets() -> None:
    secret = ("WANDB_API_KEY", "HF_TOKEN", "APIKEY", "MY_TOKENS", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "DB_PASS")
    secret += ("PGPASS", "DB_PWD", "GITHUB_PAT")
    public = (
        "NCCL_IB_PKEY",
        "UCX_IB_PKEY",
        "PWD",
        "OLDPWD",
        "PATH",
        "PGPASSFILE",
        "TOKENIZERS_PARALLELISM",
        "KEYBOARD",
        "NCCL_DEBUG",
        "AWS_SHARED_CREDENTIALS_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "SSH_AUTH_SOCK",
        "COMPASS",
        "AUTHOR",
    )
    assert all(map(is_secret, secret)) and not any(map(is_secret, public))


def test_a_site_is_one_file(tmp_path: Path) -> None:
    """It begins with what conf/cluster/slurm.yaml has, and the command line goes on from there."""
    (tmp_path / "cluster").mkdir()
    lines = ["defaults: [slurm]", "partition: gpu", "time: '12:00:00'", "env: {NCCL_DEBUG: INFO}", "sbatch: {nice: 5}"]
    (tmp_path / "cluster" / "ours.yaml").write_text("\n".join(lines), encoding="utf-8")
    config = compose(["+cluster=ours", "cluster.num_nodes=4", "+cluster.env.OMP_NUM_THREADS=4"], [tmp_path])
    expected = {
        **SLURM,
        "max_restarts": 3,
        "num_nodes": 4,
        "partition": "gpu",
        "time": "12:00:00",
        "env": {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"},
        "sbatch": {"nice": "5"},
    }
    assert config.cluster == ClusterConfig(**expected)
    assert config.precision.dtype == "bf16"


def test_a_time_without_quotes_in_a_file_is_told(tmp_path: Path) -> None:
    """YAML 1.1 reads 12:00:00 as 43200, which Slurm would take for minutes: thirty days."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "ours.yaml").write_text("defaults: [slurm]\ntime: 12:00:00\n", encoding="utf-8")
    config = compose(["+cluster=ours"], [tmp_path])
    assert (
        dataclasses.replace(config.cluster, time="1:00:00")
        == compose(["+cluster=slurm", "cluster.time='1:00:00'"]).cluster
    )
    assert "cluster.time" in {problem.key for problem in cluster_problems(config, 16)}
