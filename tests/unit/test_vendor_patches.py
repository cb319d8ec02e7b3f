"""What bigtrain works around in its vendors is still there, at the lines that the comments name.

When a test here fails after an upgrade, the vendor has changed that place: remove the patch, or make it anew. Only the
vendors' sources are read; nothing of them is imported.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import pytest

import bigtrain
from bigtrain.config import vendors
from bigtrain.config.errors import UserError

MEGATRON, DEEPSPEED = "megatron-core", "deepspeed"
FILES = {
    "rotary_pos_embedding.py": (MEGATRON, "megatron/core/models/common/embeddings/rotary_pos_embedding.py"),
    "mappings.py": (MEGATRON, "megatron/core/tensor_parallel/mappings.py"),
    "p2p_communication.py": (MEGATRON, "megatron/core/pipeline_parallel/p2p_communication.py"),
    "schedules.py": (MEGATRON, "megatron/core/pipeline_parallel/schedules.py"),
    "random.py": (MEGATRON, "megatron/core/tensor_parallel/random.py"),
    "torch_norm.py": (MEGATRON, "megatron/core/transformer/torch_norm.py"),
    "comm/torch.py": (DEEPSPEED, "deepspeed/comm/torch.py"),
    "zero/stage3.py": (DEEPSPEED, "deepspeed/runtime/zero/stage3.py"),
    "zero/stage_1_and_2.py": (DEEPSPEED, "deepspeed/runtime/zero/stage_1_and_2.py"),
    "bf16_optimizer.py": (DEEPSPEED, "deepspeed/runtime/bf16_optimizer.py"),
    "zero/utils.py": (DEEPSPEED, "deepspeed/runtime/zero/utils.py"),
    "engine.py": (DEEPSPEED, "deepspeed/runtime/engine.py"),
    "parameter_offload.py": (DEEPSPEED, "deepspeed/runtime/zero/parameter_offload.py"),
    "partitioned_param_coordinator.py": (DEEPSPEED, "deepspeed/runtime/zero/partitioned_param_coordinator.py"),
}
CITED = {
    ("distributed/megatron_cpu.py", "rotary_pos_embedding.py", 162): "torch.cuda.current_device()",
    ("distributed/megatron_cpu.py", "mappings.py", 91): "torch.cuda.current_device()",
    ("distributed/megatron_cpu.py", "p2p_communication.py", 313): "torch.cuda.current_device()",
    ("distributed/megatron_cpu.py", "schedules.py", 596): 'torch.zeros([], dtype=torch.int, device="cuda")',
    ("distributed/megatron_cpu.py", "schedules.py", 983): 'torch.zeros([], dtype=torch.int, device="cuda")',
    ("distributed/megatron_cpu.py", "schedules.py", 2138): 'torch.zeros([], dtype=torch.int, device="cuda")',
    ("distributed/megatron_cpu.py", "random.py", 41): "def _get_cuda_rng_state(",
    ("distributed/megatron_cpu.py", "random.py", 72): "def _set_cuda_rng_state(",
    ("distributed/megatron_cpu.py", "random.py", 217): "def add(",
    ("distributed/megatron_cpu.py", "random.py", 243): "def fork(",
    ("engine/deepspeed_patches.py", "comm/torch.py", 207): "self.shm_comm_op = build_shm_op()",
    ("engine/deepspeed_patches.py", "comm/torch.py", 293): "torch.ops.deepspeed, 'inference_all_reduce_'",
    ("engine/deepspeed_patches.py", "comm/torch.py", 369): "def all_gather_into_tensor(",
    ("engine/deepspeed_patches.py", "comm/torch.py", 435): "def reduce_scatter_tensor(",
    ("engine/deepspeed_patches.py", "zero/utils.py", 59): "def get_norm_dtype(",
    ("engine/deepspeed_patches.py", "zero/utils.py", 114): "def assert_ints_same_as_other_ranks(",
    ("engine/gather.py", "parameter_offload.py", 438): "module.ds_grads_remaining = 0",
    ("engine/gather.py", "partitioned_param_coordinator.py", 498): "if self.is_complete_trace() else set(",
    ("engine/mpu.py", "engine.py", 3132): "using ZeRO stage 0",
    ("engine/deepspeed_patches.py", "zero/stage_1_and_2.py", 3050): "if self.overflow:",
    ("engine/deepspeed_patches.py", "zero/stage3.py", 2891): "self._loss_scale_update_and_overflow_cleanup()",
    ("engine/deepspeed_patches.py", "bf16_optimizer.py", 402): "is_invalid_grad_norm(all_groups_norm)",
    ("model/norms.py", "torch_norm.py", 32): "assert not config.sequence_parallel",
}
"""(our file, the vendor's file, line) and what must stand there."""
CITATION = re.compile(r"((?:\w+/)?\w+\.py):(\d+(?:, \d+)*)|\(:(\d+)\)")


@cache
def lines(file: str) -> list[str]:
    package, path = FILES[file]
    return Path(str(distribution(package).locate_file(path))).read_text(encoding="utf-8").splitlines()


def function(file: str, name: str, within: str | None = None) -> str:
    """Source of a function, or of the method of a class."""
    source = "\n".join(lines(file))
    scope: ast.AST = ast.parse(source)
    if within is not None:
        scope = next(node for node in ast.walk(scope) if isinstance(node, ast.ClassDef) and node.name == within)
    found = next(node for node in ast.walk(scope) if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_source_segment(source, found) or ""


@pytest.mark.parametrize(("ours", "file", "line"), CITED)
def test_the_line_is_there(ours: str, file: str, line: int) -> None:
    assert CITED[ours, file, line] in lines(file)[line - 1]


def test_every_line_that_we_name_is_known_here() -> None:
    root = Path(bigtrain.__file__).parent
    named: set[tuple[str, str, int]] = set()
    for path in [*root.glob("distributed/*.py"), *root.glob("engine/*.py"), *root.glob("model/*.py")]:
        file = ""
        for match in CITATION.finditer(path.read_text(encoding="utf-8")):
            file = match[1] or file
            numbers = (match[2] or match[3]).split(", ")
            named |= {(str(path.relative_to(root)), file, int(number)) for number in numbers}
    assert named == set(CITED)


def test_megatrons_schedules_ask_for_cuda_by_name() -> None:
    """And nowhere but in the `torch.zeros` that `_CpuTorch` answers."""
    device = re.compile(r"""device=["']cuda""")
    assert [number for number, line in enumerate(lines("schedules.py"), 1) if device.search(line)] == [596, 983, 2138]


def test_megatrons_tracker_keeps_states_of_the_gpu() -> None:
    assert "torch.cuda.get_rng_state()" in function("random.py", "add", within="CudaRNGStatesTracker")
    assert "CPU RNG state changed" in function("random.py", "fork", within="CudaRNGStatesTracker")
    assert "torch.cuda.random.get_rng_state" in function("random.py", "_get_cuda_rng_state")
    assert "torch.cuda.default_generators" in function("random.py", "_set_cuda_rng_state")
    for name in ("_CUDA_RNG_STATE_TRACKER = None", "_CUDA_RNG_STATE_TRACKER_INITIALIZED = False"):
        assert name in lines("random.py"), "what `apply` sets is no longer what Megatron reads"


def test_deepspeed_compiles_a_shared_memory_all_reduce_at_start() -> None:
    assert "build_shm_op()" in function("comm/torch.py", "__init__", within="TorchBackend")
    uses = [line for line in lines("comm/torch.py") if "self.shm_comm_op" in line]
    constructor = function("comm/torch.py", "__init__", "TorchBackend").splitlines()
    assert len(uses) == sum("self.shm_comm_op" in line for line in constructor), (
        "something beside the constructor uses it now, so it must not be left out"
    )


def test_deepspeed_compares_over_the_whole_world() -> None:
    assert "dist.broadcast(lst_tensor, src=0, async_op=False)" in function("zero/utils.py", "get_lst_from_rank0")
    assert "group" not in function("zero/utils.py", "assert_ints_same_as_other_ranks")


def test_without_a_trace_zero_3_releases_persistent_weights_too() -> None:
    """`held` keeps them."""
    release = function("partitioned_param_coordinator.py", "release_sub_module")
    without_trace = release[release.index("else set(") : release.index("if not forward:")]
    assert "ds_persist" not in without_trace


def test_a_forward_sets_the_count_of_the_next_backward_anew() -> None:
    """`Releases` gives each backward the count of a forward."""
    hook = function("parameter_offload.py", "_post_backward_module_hook")
    assert hook.count("module.ds_grads_remaining = 0") == 1
    assert "module.ds_grads_remaining += 1" in function(
        "parameter_offload.py", "setup_context", "PostBackwardFunctionModule"
    )


def test_deepspeed_takes_norms_in_fp64_where_there_is_fp64() -> None:
    assert "return torch.double" in function("zero/utils.py", "get_norm_dtype")


def test_the_coordinator_reads_the_name_that_we_replace() -> None:
    path = distribution(DEEPSPEED).locate_file("deepspeed/runtime/zero/partitioned_param_coordinator.py")
    tree = ast.parse(Path(str(path)).read_text(encoding="utf-8"))
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "assert_ints_same_as_other_ranks" in called


def test_the_installed_versions_are_known() -> None:
    vendors.check_versions()


@pytest.mark.parametrize("package", [MEGATRON, DEEPSPEED])
def test_another_version_is_refused(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = vendors.version
    monkeypatch.setattr(vendors, "version", lambda name: "99.0" if name == package else real(name))
    with pytest.raises(UserError, match=rf"{package} 99\.0 is installed, .*pip install {package}=={real(package)}"):
        vendors.check_versions()


def test_garbage_is_collected_again_behind_an_import() -> None:
    with pytest.raises(ImportError), vendors.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()


def test_only_what_the_first_import_of_torch_makes_is_never_garbage() -> None:
    program = (
        "import gc\nfrom bigtrain.config.vendors import importing\nwith importing(): import torch\n"
        "assert gc.get_freeze_count() > 10_000\ngc.unfreeze()\nwith importing(): pass\nassert not gc.get_freeze_count()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("command", ["launch", "train", "generate"])
def test_another_version_is_refused_before_anything_is_imported(tmp_path: Path, command: str) -> None:
    """A vendor that has moved a name would end in an ImportError."""
    installed = tmp_path / "deepspeed-99.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 99.0\n")
    for package in ("deepspeed", "megatron", "torch"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('too early')")
    arguments = {"launch": ["dry_run=true"], "train": ["nowhere"], "generate": ["checkpoint=nowhere"]}[command]
    done = subprocess.run(
        [sys.executable, "-m", f"bigtrain.{command}", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: deepspeed 99.0 is installed, and bigtrain works around lines of 0.19.8")


def test_zero_3_overwrites_a_gradient_only_in_the_first_backward_of_a_step() -> None:
    """The engine zeroes the buffer behind each step, for a chunk whose first backward comes later."""
    assert "if self.micro_step_id == 0:  # don't accumulate" in function("zero/stage3.py", "partition_grads")


def test_the_loss_scale_changes_before_the_gradients_are_divided_by_it() -> None:
    """So the scale is ours (optim/loss_scale.py)."""
    step = function("zero/stage_1_and_2.py", "step", within="DeepSpeedZeroOptimizer")
    assert step.index("_update_scale") < step.index("unscale_and_clip_grads")
