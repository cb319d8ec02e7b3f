"""The sbatch script, as submitit writes it."""

from __future__ import annotations

import pickle
import shlex

from bigtrain.config.schema import ClusterConfig, Config, RunConfig
from bigtrain.launching.slurm import RankTask, rendezvous_port, sbatch_script


def options(script: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = shlex.split(value)[0] if value else ""
    return found


def script(**cluster: object) -> str:
    settings = {"kind": "slurm", "num_nodes": 2, "procs_per_node": 8, "device": "cuda", **cluster}
    return sbatch_script(Config(run=RunConfig(name="big", dir="/shared/big"), cluster=ClusterConfig(**settings)))  # type: ignore[arg-type]


def test_script_asks_for_what_the_config_says() -> None:
    text = script(partition="gpu", account="me", time="2-00:00:00", cpus_per_proc=6, sbatch={"qos": "high"})
    found = options(text)
    expected = {
        "job-name": "big",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "6",
        "time": str(2 * 24 * 60),
        "partition": "gpu",
        "account": "me",
        "qos": "high",
        "requeue": "",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["output"].startswith("/shared/big/logs/")
    assert "wckey" not in found
    assert "srun" in text and "--kill-on-bad-exit=1" in text


def test_script_without_gpus_requeue_or_extras() -> None:
    text = script(device="cpu", requeue=False, setup=["module load python"])
    found = options(text)
    assert "no-requeue" in found and not {"requeue", "gpus-per-node", "partition", "account"} & set(found)
    assert text.index("module load python") < text.index("srun")


def test_every_node_computes_the_same_port_and_jobs_differ() -> None:
    assert rendezvous_port("1234") == rendezvous_port("1234") != rendezvous_port("1235")
    assert 12000 <= rendezvous_port("99999999_7") < 32000


def test_task_travels_to_the_nodes() -> None:
    task = RankTask("/shared/big", "cuda", requeue=True)
    assert pickle.loads(pickle.dumps(task)) == task
    assert task.checkpoint() is not None
    assert RankTask("/shared/big", "cuda", requeue=False).checkpoint() is None
