"""What Megatron-core 0.16.1 needs to run on a CPU: every patch to it, in one place.

Each names the line that it works around. `tests/unit/test_vendor_patches.py` fails when a patch is no longer needed.
Nothing here is applied on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class _CpuTorch:
    """`torch` as schedules.py sees it: the literal ``device="cuda"`` means the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)


def apply() -> None:
    """Patch Megatron-core for the CPU. Applying it twice is harmless."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    # rotary_pos_embedding.py:162, mappings.py:91, p2p_communication.py:313 and others allocate on
    # torch.cuda.current_device(); a torch.device is as good an answer as an index.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    # schedules.py:596, 983, 2138: torch.zeros(..., device="cuda")
    schedules.torch = _CpuTorch()
    # random.py:41, 72: the state of the CUDA generator; on a CPU dropout draws from the CPU's.
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    random._CUDA_RNG_STATE_TRACKER = _cpu_tracker(random.CudaRNGStatesTracker)
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _cpu_tracker(base: type) -> Any:
    class CpuRNGStatesTracker(base):
        """random.py:217 (`add`) reads and seeds the CUDA generator; random.py:243 (`fork`) warns where the CPU's state
        changes, which here is the point."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            before = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before)

    return CpuRNGStatesTracker()
