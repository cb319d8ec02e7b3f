"""A checkpoint, its export and the import of that are one model to `evaluate` and `generate`; mistakes are told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtrain import evaluate, generate
from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_folder, hf_names
from bigtrain.checkpoint.reader import tensors_in
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.data.build import BuildOptions, build
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer_training import train
from bigtrain.distributed.sharding import Block, Shard
from bigtrain.distributed.start import stop
from bigtrain.engine import inference
from bigtrain.engine.open_model import open_model
from tests.unit.data.conftest import load_tool, make_texts
from tests.unit.hf_models import GPT2, LLAMA, weights, write

FIELDS = ("loss", "perplexity", "bits_per_byte", "tokens")
tool = load_tool("checkpoint").main


@dataclass(frozen=True)
class Places:
    data: Path
    llama: dict[str, Path]
    """run: a checkpoint of random weights; hf: its export; imported: the import of that, its vocabulary padded."""
    gpt2: dict[str, Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("places")
    texts = make_texts(150)
    tokenizer = SentencePieceTokenizer(train(texts, vocab_size=LLAMA.vocab_size))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = BuildOptions([str(root / "text.jsonl")], held_out=0.3)
    build(options, tokenizer=tokenizer, out=root / "data", num_workers=0, progress=False)

    def of(model: ModelConfig, name: str) -> dict[str, Path]:
        there = {kind: root / name / kind for kind in ("run", "hf", "imported")}
        write(there["run"] / "checkpoints", model, weights(model), files=tokenizer.files)
        assert tool(["export-hf", str(there["run"]), str(there["hf"]), "--shard-gb", "0.00005"]) == 0
        assert tool(["import-hf", str(there["hf"]), str(there["imported"]), "--vocab-multiple", "64"]) == 0
        assert folders.state_of(folders.resolve(there["imported"]))["config"]["model"]["vocab_size"] == 448
        return there

    return Places(root / "data", of(LLAMA, "llama"), of(GPT2, "gpt2"))


@pytest.fixture(autouse=True)
def _own_groups() -> Any:
    yield
    stop()


def evaluated(folder: Path, data: Path, out: Path) -> list[float]:
    arguments = [f"data={data / 'valid'}", "sequence_length=64", "micro_batch_size=4", f"out={out}", "device=cpu"]
    assert evaluate.main([f"checkpoint={folder}", *arguments]) == 0
    stop()
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    return [record[field] for field in FIELDS]


def greedy(folder: Path, out: Path) -> list[dict[str, Any]]:
    prompts = out.with_suffix(".txt")
    prompts.write_text("def return\nimport\n")
    asked = [f"prompts={prompts}", f"out={out}", "temperature=0", "max_tokens=20", "device=cpu"]
    assert generate.main([f"checkpoint={folder}", *asked]) == 0
    stop()
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_one_model_in_three_places(which: str, places: Places, tmp_path: Path) -> None:
    there: dict[str, Path] = getattr(places, which)
    numbers = {kind: evaluated(folder, places.data, tmp_path / f"{kind}.jsonl") for kind, folder in there.items()}
    assert numbers["hf"] == pytest.approx(numbers["run"], rel=1e-5)
    assert numbers["imported"] == pytest.approx(numbers["run"], rel=1e-5)
    assert numbers["run"][0] > 4 and numbers["run"][3] > 500
    texts = {kind: greedy(folder, tmp_path / f"{kind}-texts.jsonl") for kind, folder in there.items()}
    assert texts["run"] == texts["hf"] == texts["imported"]
    assert all(each["tokens"] > 3 for each in texts["run"])


def test_padding_takes_no_part(places: Places) -> None:
    """Where it is not hidden, the numbers differ by more than rounding: rows of the mean are as likely as any."""
    loaded = inference.load(open_model(places.llama["imported"]), device="cpu")
    hidden_NH = torch.randn(5, LLAMA.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        shown = loaded.decoder.logits(hidden_NH)
        loaded.decoder.num_tokens = None
        whole = loaded.decoder.logits(hidden_NH)
    assert torch.equal(shown[:, :420], whole[:, :420]) and bool((shown[:, 420:] == -torch.inf).all())
    assert (whole.logsumexp(-1) - shown.logsumexp(-1)).min() > 1e-3


@pytest.mark.parametrize("model", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
def test_any_part_of_any_tensor_is_read(model: ModelConfig, places: Places) -> None:
    """Runs of elements that begin and end in the middle of rows, of each of three tensor ranks."""
    folder = places.llama["hf"] if model is LLAMA else places.gpt2["hf"]
    settings = hf_folder.load_settings(folder)
    found, _ = hf_folder.check_tensors(folder, settings)
    whole = weights(model)
    for name, shape in hf_names.our_shapes(settings).items():
        for dim in range(len(shape)):
            blocks = (Block(0, shape[dim] // 5, shape[dim] // 4), Block(shape[dim] // 4, shape[dim] // 2, 3))
            blocks = blocks if dim == 0 else blocks[:1]
            shard = Shard(name, shape, dim, blocks)
            local = torch.cat([whole[name].narrow(dim, block.start, block.length) for block in blocks], dim).flatten()
            start, size = 7, local.numel() - 12
            flat = torch.full((size,), torch.nan, dtype=torch.bfloat16)
            hf_folder.fill([hf_folder.Fragment(shard, start, {"weight": flat}, owned=False)], settings, found)
            assert torch.equal(flat, local[start : start + size].bfloat16()), (name, dim)


def test_a_tokenizer_of_other_meaning_is_still_refused(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = SentencePieceTokenizer(train(make_texts(80), vocab_size=400))
    (tmp_path / "text.txt").write_text("x = 1\n" * 50)
    build(
        BuildOptions([str(tmp_path / "text.txt")], held_out=0.0),
        tokenizer=other,
        out=tmp_path / "d",
        num_workers=0,
        progress=False,
    )
    assert evaluate.main([f"checkpoint={places.llama['hf']}", f"data={tmp_path / 'd' / 'train'}"]) == 2
    assert "was made by the tokenizer" in capsys.readouterr().err


NORM = "model.norm.weight"


def _no_file(folder: Path) -> str:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / index[NORM]).unlink()
    first = next(name for name, file in index.items() if file == index[NORM])
    return f"tensor {first}: there is no file {index[NORM]}"


def _wrong_shape(folder: Path) -> str:
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][NORM]
    save_file(load_file(file) | {NORM: torch.ones(65)}, file, metadata={"format": "pt"})
    return f"tensor {NORM} has shape (65,), config.json asks for (64,)"


def _cut_off(folder: Path) -> str:
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][NORM]
    os.truncate(file, file.stat().st_size - 4)
    return "tensor "


def _another_model(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "mistral"}))
    return "model_type=mistral: llama and gpt2 can be read"


def _larger_model(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    return "tensor model.layers.2.input_layernorm.weight is missing, which config.json asks for"


def _no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "the folder has no tokenizer.model, tokenizer.json or tokenizer.tiktoken"


def _few_rows(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"vocab_size": 400}))
    for file in folder.glob("*.safetensors"):
        tensors = {name: tensor[:400] if len(tensor) == 420 else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return "the tokenizer has 420 ids, the model 400 rows"


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir(parents=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(
    "damage", [_no_file, _wrong_shape, _cut_off, _another_model, _larger_model, _no_tokenizer, _few_rows]
)
def test_mistakes_in_a_hugging_face_folder(
    damage: Callable[[Path], str], places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _copy(places.llama["hf"], tmp_path / "hf")
    refused(folder, damage(folder), tmp_path, places, capsys, tool_command="import-hf")


def _nothing(checkpoint: Path) -> tuple[Path, str]:
    return checkpoint.parent.parent / "empty", "no committed checkpoint (step-NNNNNNNN/COMMITTED) in there"


def _uncommitted(checkpoint: Path) -> tuple[Path, str]:
    (checkpoint / "COMMITTED").unlink()
    return checkpoint, "it was never committed (no COMMITTED in it)"


def _of_other_width(checkpoint: Path) -> tuple[Path, str]:
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["ffn_hidden_size"] = 128
    (checkpoint / "state.json").write_text(json.dumps(state))
    name = "weight.decoder.layers.0.mlp.linear_fc1.weight"
    return checkpoint, f"{name} has shape (192, 64), this model wants (256, 64)"


def _of_more_layers(checkpoint: Path) -> tuple[Path, str]:
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"]["num_layers"] = 3
    (checkpoint / "state.json").write_text(json.dumps(state))
    return checkpoint, "it has no tensor weight.decoder.layers.2."


def _other_bits(checkpoint: Path) -> tuple[Path, str]:
    """In the middle of a weight; moments are not read."""
    stored = tensors_in(checkpoint)["weight.embedding.word_embeddings.weight"].chunks[0]
    with (checkpoint / stored.file).open("r+b") as file:
        file.seek(stored.start + 4000)
        file.write(b"\xff\x3f")
    return checkpoint, "weight.embedding.word_embeddings.weight"


@pytest.mark.parametrize("damage", [_nothing, _uncommitted, _of_other_width, _of_more_layers, _other_bits])
def test_mistakes_in_a_checkpoint(
    damage: Callable[[Path], tuple[Path, str]], places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    original = folders.resolve(places.llama["run"])
    folder, message = damage(_copy(original, tmp_path / "checkpoints" / original.name))
    refused(folder, message, tmp_path, places, capsys, tool_command="export-hf")


def refused(
    folder: Path, message: str, tmp_path: Path, places: Places, capsys: pytest.CaptureFixture[str], *, tool_command: str
) -> None:
    """By three commands with one line, status 2, and nothing written."""
    before = sorted(path.name for path in tmp_path.iterdir())
    for status in (
        lambda: tool([tool_command, str(folder), str(tmp_path / "out")]),
        lambda: generate.main([f"checkpoint={folder}", "prompt=x", "max_tokens=2", "device=cpu"]),
        lambda: evaluate.main([f"checkpoint={folder}", f"data={places.data / 'valid'}", "device=cpu"]),
    ):
        capsys.readouterr()
        assert status() == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, said
        assert message in said.err, said.err
        stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_checkpoint_says_of_its_import_is_checked(places: Places, tmp_path: Path) -> None:
    original = folders.resolve(places.llama["imported"])
    folder = _copy(original, tmp_path / original.name)
    state = json.loads((folder / "state.json").read_text())
    for wrong in (449, 0, "420", None, True):
        (folder / "state.json").write_text(json.dumps(state | {"imported": {"vocab_size": wrong}}))
        with pytest.raises(UserError, match=r"imported\.vocab_size="):
            open_model(folder)
    assert open_model(original).padded(3) == replace(open_model(original).model, vocab_size=450)
