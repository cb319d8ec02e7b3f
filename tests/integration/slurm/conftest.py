from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runs import build_shards
from tests.integration.slurm.cluster import MISSING, WHY_SKIPPED, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests. Where it stops, none of its processes is left, or the tests fail."""
    if MISSING:
        pytest.skip(WHY_SKIPPED)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    started = cluster.control("start")
    assert started.returncode == 0, started.stderr
    yield cluster
    stopped = cluster.control("stop")
    assert stopped.returncode == 0, stopped.stderr


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def here(cluster: Cluster, data: Path, folder: Path) -> Path:
    """The run that the others must be: four ranks on this machine, no Slurm."""
    from tests.integration.slurm.test_train_on_slurm import FOUR_RANKS, LAUNCH, settings

    cluster.ask(*LAUNCH, *settings(data, "here"), *FOUR_RANKS, "--freeze", cwd=folder)
    program = (
        "import sys; from bigtrain.config.frozen import load; from bigtrain.launching import local; "
        "sys.exit(local.run(local.rank_commands(load(sys.argv[1]))))"
    )
    cluster.ask(sys.executable, "-c", program, folder / "runs" / "here", cwd=folder, OMP_NUM_THREADS="1")
    return folder / "runs" / "here"
