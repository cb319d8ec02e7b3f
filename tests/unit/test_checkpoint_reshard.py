"""reshard: the same tensors in other files. torch's own tools read the result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import layout, manifest, store
from bigtrain.checkpoint import reshard as resharding
from bigtrain.checkpoint.hf_names import our_shapes
from bigtrain.checkpoint.layout import Layout
from bigtrain.checkpoint.reader import tensors_in
from bigtrain.checkpoint.slices import Fragment
from bigtrain.checkpoint.verify import verify
from bigtrain.config.errors import UserError
from bigtrain.distributed.sharding import Shard
from tests.torch_reader import read_by_torch
from tests.unit.checkpoints import flip, main, place_of, save, tensors
from tests.unit.hf_models import GPT2, LLAMA

EMBEDDING = "weight.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "checkpoints", tensors())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small matrix is cut as a large one is."""
    real = layout.cut
    monkeypatch.setattr(layout, "cut", lambda piece, size: real(piece, size, 2000))


def hashes(folder: Path) -> dict[str, str]:
    fields = json.loads((folder / manifest.MANIFEST).read_bytes())
    return {name: tensor["hash"] for name, tensor in fields["tensors"].items()}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "wanted",
    [
        Layout(tensor=2, data=3, zero=3),
        Layout(tensor=4, data=2, zero=1),
        Layout(pipeline=2, data=2, zero=2),
        Layout(data=3, zero=0),
        Layout(tensor=2, pipeline=2, data=2, zero=2),
        None,
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_torch_reads_the_same_tensors(tmp_path: Path, model: Any, wanted: Layout | None) -> None:
    content = tensors(model)
    source = save(tmp_path / "a", content, model=model)
    planned = resharding.plan(source, layout_=wanted, num_files=0 if wanted else 5)
    written = resharding.reshard(planned, tmp_path / "b")
    assert hashes(written) == hashes(source) and verify(written).problems == []
    found = read_by_torch(written)
    assert found.keys() == content.keys() and all(torch.equal(found[name], content[name]) for name in content)
    names = {path.name for path in written.glob("*.distcp")}
    assert names == {f"__{rank}_0.distcp" for rank, file in enumerate(planned.files) if file}
    assert (written / folders.STATE).read_bytes() == (source / folders.STATE).read_bytes()
    assert (written / "tokenizer.model").read_bytes() == b"pieces"
    assert planned.largest_chunk_bytes <= 2000


def test_torch_converts_it_into_one_file(saved: Path, tmp_path: Path) -> None:
    written = resharding.reshard(resharding.plan(saved, layout_=Layout(tensor=2, data=2)), tmp_path / "b")
    dcp_to_torch_save(written, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    flat = {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    assert all(torch.equal(flat[name], tensor) for name, tensor in tensors().items())


def test_a_rank_finds_all_that_it_reads_in_its_own_file(saved: Path, tmp_path: Path) -> None:
    wanted = Layout(tensor=2, data=2, zero=3)
    written = resharding.reshard(resharding.plan(saved, layout_=wanted), tmp_path / "b")
    there = tensors_in(written)
    shape = our_shapes(LLAMA)["decoder.layers.1.mlp.linear_fc1.weight"]
    for rank in range(4):
        local = (shape[0] // 2, shape[1])
        shard = Shard.of("decoder.layers.1.mlp.linear_fc1.weight", local, dim=0, rank=rank % 2, size=2, parts=2)
        half = -(-shard.numel // 2)
        chunks = [(chunk.offsets, chunk.sizes, chunk.file) for chunk in there[f"exp_avg.{shard.name}"].chunks]
        for piece in shard.rectangles(half * (rank // 2), half):
            assert (piece.offsets, piece.sizes, f"__{rank}_0.distcp") in chunks


def test_files_of_equal_size(saved: Path, tmp_path: Path) -> None:
    planned = resharding.plan(saved, num_files=4)
    written = resharding.reshard(planned, tmp_path / "b")
    sizes = [path.stat().st_size for path in written.glob("*.distcp")]
    assert len(sizes) == 4 and max(planned.file_bytes) - min(planned.file_bytes) <= 2 * 4 * 96
    assert max(sizes) / min(sizes) < 1.1
    again = resharding.reshard(resharding.plan(written), tmp_path / "c")
    assert len(list(again.glob("*.distcp"))) == 4, "as many as it has"


def test_weights_alone_start_a_run(saved: Path, tmp_path: Path) -> None:
    written = resharding.reshard(resharding.plan(saved, weights_only=True), tmp_path / "b")
    weights = {name: tensor for name, tensor in tensors().items() if name.startswith("weight.")}
    assert read_by_torch(written).keys() == weights.keys()
    state = folders.state_of(written)
    assert state["weights_only"] and state["step"] == 300 and state["loss"] == 4.25 and state["config"]["model"]
    assert not {"cursor", "adam_step", "loss_scale"} & state.keys()
    loaded = load(written)
    assert all(torch.equal(loaded[name], weights[f"weight.{name}"]) for name in loaded)
    with pytest.raises(UserError, match="weights only"):
        store.load(written, [])


def load(folder: Path) -> dict[str, torch.Tensor]:
    """As a run that starts from its weights reads them."""
    flats = {name: torch.zeros(shape).flatten() for name, shape in our_shapes(LLAMA).items()}
    fragments = [
        Fragment(Shard.of(name, shape, dim=None, rank=0, size=1), 0, {"weight": flats[name]}, owned=True)
        for name, shape in our_shapes(LLAMA).items()
    ]
    store.load_weights(folder, fragments)
    return {name: flats[name].view(shape) for name, shape in our_shapes(LLAMA).items()}


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_weights_in_another_dtype(saved: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    planned = resharding.plan(saved, layout_=Layout(tensor=2, data=2), weights_only=True, dtype=dtype)
    written = resharding.reshard(planned, tmp_path / "b")
    assert verify(written).problems == []
    found = read_by_torch(written)
    assert len(found) == 15
    for name, tensor in found.items():
        assert tensor.dtype == kind and torch.equal(tensor, tensors()[name].to(kind))
    assert torch.equal(load(written)["output_layer.weight"], tensors()["weight.output_layer.weight"].to(kind).float())


def test_a_dtype_of_what_a_run_goes_on_from_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dtype bf16: .* fp32 master weights and moments.* Add --weights-only"):
        resharding.plan(saved, dtype="bf16")


def test_numbers_that_fp16_cannot_hold(tmp_path: Path) -> None:
    source = save(tmp_path / "a", {"weight.a": torch.tensor([1.0, 1e6])})
    with pytest.raises(UserError, match=r"weight\.a has numbers up to 1e\+06, which fp16 cannot hold"):
        resharding.reshard(resharding.plan(source, weights_only=True, dtype="fp16"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_tensors_of_no_model_still_go_into_files(tmp_path: Path) -> None:
    content = {"weight.a": torch.arange(5.0), "weight.b": torch.tensor(3.0), "weight.c": torch.empty(0, 4)}
    source = save(tmp_path / "a", content)
    written = resharding.reshard(resharding.plan(source, num_files=2), tmp_path / "b")
    found = read_by_torch(written)
    assert all(torch.equal(found[name], content[name]) for name in content)
    with pytest.raises(UserError, match="no tensor of this model, so no layout says who writes it; use --files"):
        resharding.plan(source, layout_=Layout())


def reword(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))


def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy" / saved.name))


@pytest.mark.parametrize("options", [[], ["--weights-only", "--dtype", "bf16"], ["--tensor", "2", "--data", "2"]])
def test_a_source_that_changed_is_never_committed(
    saved: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(saved, tmp_path)
    file, at = place_of(source, EMBEDDING)
    flip(file, at + 100)
    assert main(["reshard", str(source), str(tmp_path / "b"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: checkpoint {source}: {EMBEDDING} is not what was saved") and said.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: (source / "__0_0.distcp").unlink(), "cannot be read: .*is missing"),
        (lambda source: (source / "__0_0.distcp").write_bytes(b"x" * 4000), "cannot be read"),
        (lambda source: flip(source / "tokenizer.model", 1), "tokenizer.model has changed since it was saved"),
        (lambda source: (source / "tokenizer.model").unlink(), "tokenizer.model cannot be read"),
        (lambda source: flip(source / ".metadata", 500), "its bytes have changed"),
        (lambda source: flip(source / "manifest.json", 500), "not the one that was committed"),
        (lambda source: (source / "COMMITTED").unlink(), "never committed"),
        (lambda source: (source / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda source: reword(source / "state.json", "4.25", "4.26"), "state.json has changed since it was saved"),
    ],
)
def test_a_damaged_source_is_one_error(
    saved: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    source = copy(saved, tmp_path)
    damage(source)
    assert main(["reshard", str(source), str(tmp_path / "b"), "--files", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said), said
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor", "3"], "--tensor 3: the model has 4 key/value heads"),
        (["--pipeline", "3"], "2 layers do not fill 3 chunks: lower --pipeline"),
        (["--files", "0"], "--files 0: it takes 1 or more"),
        (["--files", "2", "--data", "2"], "exclude each other"),
        (["--zero", "9"], "--zero 9: it takes 0, 1, 2 or 3"),
    ],
)
def test_a_plan_that_cannot_be(
    saved: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", str(saved), str(tmp_path / "b"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_another_models_settings(tmp_path: Path) -> None:
    deeper = save(tmp_path / "a", tensors(replace(LLAMA, num_layers=3)), model=LLAMA)
    with pytest.raises(UserError, match=r"decoder.layers.2.*is no tensor of this model"):
        resharding.plan(deeper, layout_=Layout())
    unknown = save(tmp_path / "b", tensors(), config={"model": {"width": 3}})
    with pytest.raises(UserError, match=r"its model is not one that this version knows.*use --files"):
        resharding.plan(unknown, layout_=Layout())


def test_a_folder_that_is_there_is_left_as_it_is(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b" / ".step-00000300.partial").mkdir(parents=True)
    assert main(["reshard", str(saved), str(tmp_path / "b")]) == 2
    assert "it is there already" in capsys.readouterr().err
    assert (tmp_path / "b" / ".step-00000300.partial").is_dir()


def test_the_plan_is_shown_and_nothing_written(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "reshard",
        str(saved),
        str(tmp_path / "b"),
        "--data",
        "4",
        "--zero",
        "0",
        "--weights-only",
        "--dry-run",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "15, 462 kB, in 15 chunks" in said and "1 of 462 kB; 3 ranks have copies" in said
    assert "largest chunk  108 kB" in said and "nothing was written" in said
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_left(saved: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the same error of a write."""
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1)); "
    program = f"{limited}runpy.run_path('tools/checkpoint.py', run_name='__main__')"
    command = [sys.executable, "-c", program, "reshard", str(saved), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr and not (tmp_path / "b").exists()


def test_one_that_is_stopped_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resharding.reshard(resharding.plan(saved), tmp_path / "b", stop)
    assert not (tmp_path / "b").exists()
