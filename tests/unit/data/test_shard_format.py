"""The parts of the format on disk that the tests of whole folders do not reach."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bigtrain.data.shard_format import DOCUMENT_DTYPE, npy_header


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads take turns, and garbage is collected, as often as can be."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)


class Garbage:
    """Of a kind that runs Python when it is collected, so that another thread may go on in the midst of a parse."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        sum(range(300))


@pytest.mark.usefixtures("busy_threads")
def test_headers_are_read_by_many_threads_at_once() -> None:
    """Without a lock it is a SystemError on Python 3.11.7: https://github.com/python/cpython/issues/106905"""
    file = io.BytesIO()
    np.save(file, np.zeros(16, DOCUMENT_DTYPE))

    def read(_: int) -> tuple[np.dtype, tuple[int, ...]]:
        Garbage()
        return npy_header(io.BytesIO(file.getvalue()))

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(read, range(3000))) == {(DOCUMENT_DTYPE, (16,))}
