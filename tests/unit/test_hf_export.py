"""An exported checkpoint is the same model to Transformers as it is to us."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bigtrain.checkpoint import hf_config, hf_export, hf_names
from bigtrain.checkpoint.hf_export import Text, export
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.data.hf_files import hf_files
from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer
from bigtrain.data.tokenizer_training import train
from bigtrain.distributed.start import stop
from bigtrain.engine import inference
from bigtrain.engine.open_model import open_model
from tests import oracle
from tests.unit.data.conftest import make_texts
from tests.unit.hf_models import GPT2, LLAMA, logits, params, weights, write


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train(make_texts(150), vocab_size=LLAMA.vocab_size))


@pytest.fixture
def loaded(model: ModelConfig, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Iterator[inference.Loaded]:
    """Our own model of the checkpoint that is exported, at tmp_path / "run"."""
    write(tmp_path / "run", model, weights(model), files=tokenizer.files)
    yield inference.load(open_model(tmp_path / "run"), device="cpu")
    stop()


def text_of(tokenizer: SentencePieceTokenizer) -> Text:
    return Text(hf_files(tokenizer), tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)


def some_tokens(length: int = 80) -> torch.Tensor:
    return torch.randint(0, LLAMA.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", params())
def test_logits_and_greedy_text_are_the_same(
    model: ModelConfig, loaded: inference.Loaded, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    export(tmp_path / "run", tmp_path / "hf", text=text_of(tokenizer), shard_bytes=30_000)
    tokens_BS = some_tokens()
    with torch.inference_mode():
        ours = loaded.decoder(tokens_BS, torch.arange(80).expand(2, -1), None)
    assert ours.std() > 0.3, "logits that are all alike would prove nothing"
    torch.testing.assert_close(logits(tmp_path / "hf", tokens_BS), ours, rtol=1e-5, atol=1e-5)

    prompt = "def return"
    text = inference.Text.of([tokenizer.bos_id, *tokenizer.encode(prompt)], seed=0, number=0)
    for _ in inference.go_on(loaded, [text], max_tokens=20, sampling=inference.Sampling()):
        pass
    our_ids = text.ids
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "hf")(prompt, return_tensors="pt")
    found = theirs.generate(**inputs, do_sample=False, max_new_tokens=20, pad_token_id=3)[0]
    new = found[inputs["input_ids"].shape[1] :].tolist()
    assert len(our_ids) > 3
    assert new == our_ids or new == [*our_ids, tokenizer.eos_id]


@pytest.mark.parametrize("model", params())
def test_names_are_those_of_the_oracle(model: ModelConfig) -> None:
    """Which maps weights to Transformers' models for the certificate, by code of its own."""
    tensors = weights(model)
    wanted = oracle.to_hf(tensors, model)
    found = {part.name: hf_export.theirs(part, tensors[part.ours]) for part in hf_names.parts(model)}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(tuple(found[part.name].shape) == part.shape for part in hf_names.parts(model))


@pytest.mark.parametrize("model", [pytest.param(LLAMA, id="llama")])
def test_a_wrong_mapping_shows(
    loaded: inference.Loaded, tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up swapped: every name and shape is right, and the numbers are not."""
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def parts(model: ModelConfig, vocab_size: int | None = None) -> Iterator[hf_names.Part]:
        for part in hf_names.parts(model, vocab_size):
            kind = part.name.split(".")[-2]
            yield dataclasses.replace(part, name=part.name.replace(kind, swapped.get(kind, kind)))

    monkeypatch.setattr(hf_export, "parts", parts)
    export(tmp_path / "run", tmp_path / "hf", text=Text())
    tokens_BS = some_tokens()
    with torch.inference_mode():
        ours = loaded.decoder(tokens_BS, torch.arange(80).expand(2, -1), None)
    assert (logits(tmp_path / "hf", tokens_BS) - ours).abs().max() > 1e-2


def test_files_are_safetensors_with_an_index(tmp_path: Path) -> None:
    """As the library of that name reads them."""
    tensors = weights(LLAMA)
    write(tmp_path / "run", LLAMA, tensors, dtype="bf16")
    done = export(tmp_path / "run", tmp_path / "hf", text=Text(), shard_bytes=30_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    wanted = oracle.to_hf(tensors, LLAMA)
    found: dict[str, str] = {}
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        size = 0
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                assert torch.equal(tensor, wanted[name].bfloat16())
                found[name] = file.name
                size += tensor.nbytes
        assert size <= 30_000 or len([name for name in found if found[name] == file.name]) == 1
    assert found == index["weight_map"] and found.keys() == wanted.keys()
    assert index["metadata"]["total_size"] == done.num_bytes == 2 * sum(t.numel() for t in tensors.values())
    assert (done.num_files, done.dtype, done.num_tensors) == (len(set(found.values())), "bf16", len(wanted))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_transformers_opens_it_in_its_dtype(dtype: str, tmp_path: Path) -> None:
    write(tmp_path / "run", GPT2, weights(GPT2))
    export(tmp_path / "run", tmp_path / "hf", text=Text(), dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == hf_export.DTYPES[dtype]
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_padding_of_the_vocabulary_can_be_left_out(tmp_path: Path) -> None:
    write(tmp_path / "run", LLAMA, weights(LLAMA))
    export(tmp_path / "run", tmp_path / "all", text=Text())
    export(tmp_path / "run", tmp_path / "some", text=Text(vocab_size=400), vocab_size=400)
    tokens_BS = some_tokens() % 400
    assert torch.equal(logits(tmp_path / "some", tokens_BS), logits(tmp_path / "all", tokens_BS)[..., :400])
    for size in (399, 421):
        with pytest.raises(UserError, match=f"{size} rows .* the model has 420, its tokenizer needs 400"):
            export(tmp_path / "run", tmp_path / "x", text=Text(vocab_size=400), vocab_size=size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "model.activation=gelu: no counterpart .* it is Llama"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        (
            {"position": "learned"},
            "model.norm=rmsnorm and model.activation=swiglu and model.bias=false and .*: no counterpart",
        ),
        ({**dataclasses.asdict(GPT2), "num_query_groups": 4}, "model.num_query_groups=4 with 8 heads"),
        ({**dataclasses.asdict(GPT2), "bias": False}, "model.bias=false"),
    ],
)
def test_a_model_that_transformers_lacks_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    write(tmp_path / "run", dataclasses.replace(LLAMA, **change), {"x": torch.ones(1)})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "hf", text=Text())
    assert not (tmp_path / "hf").exists()


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path / "run", LLAMA, weights(LLAMA))
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match="there already"):
        export(tmp_path / "run", tmp_path / "hf", text=Text())
    assert list((tmp_path / "hf").iterdir()) == []


def test_what_a_killed_export_left_goes_with_the_next(tmp_path: Path) -> None:
    """Unless it may be written at this moment: by a living process, or on another machine."""
    write(tmp_path / "run", LLAMA, weights(LLAMA))
    host, ended = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = [f".hf.{host}.{ended.pid}.partial", f".hf.{host}.99999999999999999999.partial"]
    kept = [
        f".hf.{host}.{os.getppid()}.partial",
        f".hf.elsewhere.{ended.pid}.partial",
        f".other.{host}.{ended.pid}.partial",
        f".hf.{host}.x.partial",
    ]
    for name in gone + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    export(tmp_path / "run", tmp_path / "hf", text=Text())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "hf", "run"])


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = weights(LLAMA)
    tensors["decoder.final_layernorm.weight"][3] = 1e6
    checkpoint = write(tmp_path / "run", LLAMA, tensors)
    with pytest.raises(UserError, match=r"model.norm.weight has numbers up to 1e\+06, which fp16 cannot hold"):
        export(tmp_path / "run", tmp_path / "hf", text=Text(), dtype="fp16")
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match=r"weight\.\S+ cannot be read"):
        export(tmp_path / "run", tmp_path / "hf", text=Text())
    data.unlink()
    with pytest.raises(UserError, match=r"weight\.\S+ cannot be read"):
        export(tmp_path / "run", tmp_path / "hf", text=Text())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    tensors = weights(LLAMA)
    write(tmp_path / "wide", dataclasses.replace(LLAMA, ffn_hidden_size=128), tensors)
    with pytest.raises(UserError, match=r"weight.decoder.layers.0.mlp.linear_fc1.weight has shape \(192, 64\)"):
        export(tmp_path / "wide", tmp_path / "hf", text=Text())
    del tensors["decoder.layers.1.mlp.linear_fc2.weight"]
    write(tmp_path / "less", LLAMA, tensors)
    with pytest.raises(UserError, match=r"it has no tensor weight.decoder.layers.1.mlp.linear_fc2.weight"):
        export(tmp_path / "less", tmp_path / "hf", text=Text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 2_000_000_000}, "fewer tensors than its 2000000000 layers"),
        ({"num_layers": "2"}, "model.num_layers='2'"),
        ({"num_attention_heads": 0}, "model.num_attention_heads=0"),
        ({"bias": 1}, "model.bias=1"),
        ({"depth": 2}, "not one that this version knows"),
    ],
)
def test_a_state_that_is_wrong_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run", LLAMA, weights(LLAMA))
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["model"] |= change
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "hf", text=Text())
    (checkpoint / ".metadata").write_bytes(b"x")
    with pytest.raises(UserError):
        export(tmp_path / "run", tmp_path / "hf", text=Text())


def test_dropout_that_llama_lacks_is_said(tmp_path: Path) -> None:
    model = dataclasses.replace(LLAMA, hidden_dropout=0.1, attention_dropout=0.2)
    write(tmp_path / "run", model, weights(model))
    done = export(tmp_path / "run", tmp_path / "hf", text=Text())
    assert [note.split(":")[0] for note in done.notes] == ["model.hidden_dropout=0.1"]


MEASURE = """
import sys
from pathlib import Path
from bigtrain.checkpoint import hf_export, hf_import
from tests.unit.hf_models import LLAMA, weights, write

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def there_and_back(folder, name):
    hf_import.import_folder(folder, folder.parent / f"{name}.checkpoint", files={})
    after_import = peak()
    hf_export.export(folder.parent / f"{name}.checkpoint", folder.parent / f"{name}.hf", text=hf_export.Text())
    return after_import, peak()

there_and_back(Path(sys.argv[1]), "warm")
before = peak()
after_import, after_export = there_and_back(Path(sys.argv[2]), "big")
print(after_import - before, after_export - before)
"""


@pytest.mark.slow
def test_memory_is_a_few_tensors(tmp_path: Path) -> None:
    """Four times as many weights of the same shapes go in and out within the same memory, and a few tensors."""
    small = dataclasses.replace(LLAMA, num_layers=4, hidden_size=256, ffn_hidden_size=2048)
    large = dataclasses.replace(small, num_layers=16)
    largest = 4 * 2 * 2048 * 256
    for name, model in (("small", small), ("large", large)):
        (tmp_path / name).mkdir()
        config = hf_config.to_theirs(model, dtype="fp32", vocab_size=model.vocab_size, bos_id=1, eos_id=2)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        save_file(oracle.to_hf(weights(model), model), tmp_path / name / "model.safetensors")
    total = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    imported, exported = map(int, done.stdout.split())
    assert total > 25 * largest
    assert max(imported, exported) < 4 * largest, f"{imported=} {exported=} {largest=} {total=}"
    assert (tmp_path / "big.hf" / "model.safetensors").stat().st_size == pytest.approx(total, abs=20_000)
