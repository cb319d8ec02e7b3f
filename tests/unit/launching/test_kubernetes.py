"""launchers/kubernetes.yaml without a cluster: the operator's schema, and what torchrun makes of it.

The fields are those of kubeflow.org/v1 (manifests/base/crds/kubeflow.org_pytorchjobs.yaml of the training operator)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCHERS = Path(__file__).resolve().parents[3] / "launchers"
RUN_POLICY = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "cleanPodPolicy",
    "managedBy",
    "schedulingPolicy",
    "suspend",
    "ttlSecondsAfterFinished",
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((LAUNCHERS / "kubernetes.yaml").read_text(encoding="utf-8"))
    return document


def pods(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: spec["template"]["spec"] for name, spec in job["spec"]["pytorchReplicaSpecs"].items()}


def test_the_operator_knows_every_field(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert set(spec) <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    assert isinstance(spec["nprocPerNode"], str) and set(spec["runPolicy"]) <= RUN_POLICY
    assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    for replica in spec["pytorchReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"} and isinstance(replica["replicas"], int)
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")


def test_each_pod_starts_a_rank_on_each_of_its_gpus(job: dict[str, Any]) -> None:
    for pod in pods(job).values():
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", "the one that the operator gives its variables to"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        run = container["command"][-1]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        assert env == {"PYTHONPATH": f"{run}/code", "PYTHONSAFEPATH": "1"}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert mounts["shm"] == "/dev/shm" and run.startswith(mounts["data"] + "/")


def test_torchrun_reads_the_rest_from_the_operator(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.run import parse_args

    variables = {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_ADDR": "big-master-0"}
    for name, value in {**variables, "MASTER_PORT": "23456"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    program, *arguments = pods(job)["Worker"]["containers"][0]["command"]
    found = parse_args(arguments)
    assert program == "torchrun" and found.module and found.training_script == "bigtrain.train"
    assert found.training_script_args == ["/data/runs/RUN"]
    assert (found.nnodes, found.nproc_per_node, int(found.node_rank)) == ("2", "8", 1)
    assert (found.master_addr, int(found.master_port)) == ("big-master-0", 23456)
