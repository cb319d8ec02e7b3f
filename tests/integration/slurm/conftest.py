from __future__ import annotations

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
