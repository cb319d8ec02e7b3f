"""Hugging Face folders become checkpoints, and the same bytes again; what is no such folder is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint import folder as folders
from bigtrain.checkpoint import hf_config, store
from bigtrain.checkpoint.hf_export import Text, export
from bigtrain.checkpoint.hf_folder import load_settings
from bigtrain.checkpoint.hf_import import PRESET, import_folder
from bigtrain.checkpoint.reader import tensors_in
from bigtrain.checkpoint.slices import Fragment
from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from bigtrain.distributed.sharding import Shard
from tests import oracle
from tests.torch_reader import weights_by_torch
from tests.unit.hf_models import GPT2, LLAMA, logits, params, weights, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def saved_by_transformers(
    folder: Path, model: ModelConfig, *, dtype: str = "fp32", shard: str = "5GB"
) -> dict[str, torch.Tensor]:
    """A folder that Transformers wrote; returns its tensors."""
    theirs = oracle.build(model)
    oracle.load(theirs, weights(model), model)
    theirs.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard)  # type: ignore[arg-type]
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", params())
def test_there_and_back_is_the_same(model: ModelConfig, dtype: str, tmp_path: Path) -> None:
    there = saved_by_transformers(tmp_path / "there", model, dtype=dtype, shard="60KB")
    done = import_folder(tmp_path / "there", tmp_path / "run", files={})
    export(tmp_path / "run", tmp_path / "back", text=Text())
    assert as_bytes(tensors_of(tmp_path / "back")) == as_bytes(there)
    assert done.model == dataclasses.replace(model, name="there")
    assert (done.dtype, done.num_tensors, done.left_out) == (dtype, len(there), [])
    tokens_BS = torch.randint(0, 400, (2, 40))
    assert torch.equal(logits(tmp_path / "back", tokens_BS), logits(tmp_path / "there", tokens_BS))


@pytest.mark.parametrize("model", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
def test_back_and_there_is_the_same(model: ModelConfig, tmp_path: Path) -> None:
    """A run of ours, out and in again: its weights, bit for bit."""
    tensors = weights(model)
    write(tmp_path / "run", model, tensors)
    export(tmp_path / "run", tmp_path / "hf", text=Text())
    done = import_folder(tmp_path / "hf", tmp_path / "again", files={"tokenizer.model": b"t"})
    found = weights_by_torch(done.folder)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert done.model == dataclasses.replace(model, name="hf")
    assert (done.folder / "tokenizer.model").read_bytes() == b"t"
    assert done.folder == folders.resolve(tmp_path / "again")
    assert ModelConfig(**yaml.safe_load((done.folder / PRESET).read_text())) == done.model


def test_the_vocabulary_is_padded_and_cut_again(tmp_path: Path) -> None:
    there = saved_by_transformers(tmp_path / "there", LLAMA)
    done = import_folder(tmp_path / "there", tmp_path / "run", files={}, vocab_multiple=128)
    assert (done.vocab_size, done.model.vocab_size) == (420, 512)
    for name, theirs in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        rows = weights_by_torch(done.folder)[name]
        assert rows.shape == (512, 64)
        assert torch.equal(rows[:420], there[theirs])
        torch.testing.assert_close(rows[420:], there[theirs].mean(dim=0).expand(92, -1), rtol=0, atol=1e-6)
    export(tmp_path / "run", tmp_path / "back", text=Text())
    assert as_bytes(tensors_of(tmp_path / "back")) == as_bytes(there)
    export(tmp_path / "run", tmp_path / "padded", text=Text(), vocab_size=512)
    assert json.loads((tmp_path / "padded" / "config.json").read_text())["vocab_size"] == 512


def test_a_tokenizer_that_needs_more_rows_is_refused(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA)
    with pytest.raises(UserError, match="the tokenizer has 421 ids, the model 420 rows"):
        import_folder(tmp_path / "there", tmp_path / "run", files={}, tokenizer_vocab_size=421)


def test_mixed_dtypes_lose_nothing(tmp_path: Path) -> None:
    there = saved_by_transformers(tmp_path / "there", LLAMA, dtype="bf16")
    there["model.norm.weight"] = torch.full((64,), 1 / 3)
    save_file(there, tmp_path / "there" / "model.safetensors")
    done = import_folder(tmp_path / "there", tmp_path / "run", files={})
    assert done.dtype == "fp32"
    assert torch.equal(weights_by_torch(done.folder)["decoder.final_layernorm.weight"], there["model.norm.weight"])


def test_openais_names_and_buffers(tmp_path: Path) -> None:
    """The first GPT-2 files have no prefix, and the causal masks in them."""
    there = saved_by_transformers(tmp_path / "there", GPT2)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in there.items()}
    masks = {f"h.{n}.attn.bias": torch.ones(96, 96).tril().view(1, 1, 96, 96) for n in range(2)}
    save_file(bare | masks, tmp_path / "there" / "model.safetensors")
    done = import_folder(tmp_path / "there", tmp_path / "run", files={})
    assert done.left_out == [f"transformer.{name}" for name in masks]
    export(tmp_path / "run", tmp_path / "back", text=Text())
    assert as_bytes(tensors_of(tmp_path / "back")) == as_bytes(there)


def test_a_tied_output_layer_may_be_there_twice_but_not_differ(tmp_path: Path) -> None:
    there = saved_by_transformers(tmp_path / "there", GPT2)
    there["lm_head.weight"] = there["transformer.wte.weight"].clone()
    save_file(there, tmp_path / "there" / "model.safetensors")
    assert import_folder(tmp_path / "there", tmp_path / "run", files={}).left_out == ["lm_head.weight"]
    there["lm_head.weight"][5, 5] += 1
    save_file(there, tmp_path / "there" / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding"):
        import_folder(tmp_path / "there", tmp_path / "other", files={})


def test_a_run_of_any_layout_loads_the_weights(tmp_path: Path) -> None:
    """As the fragments of the second of two tensor ranks; and nothing goes on from it as from a run."""
    saved_by_transformers(tmp_path / "there", LLAMA)
    done = import_folder(tmp_path / "there", tmp_path / "run", files={})
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    shard = Shard.of(name, (96, 64), dim=0, rank=1, size=2, parts=2)
    tensors = {kind: torch.full((96 * 64 - 100,), 7.0) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    fragments = [Fragment(shard, 100, tensors, owned=False)]
    state = store.load_weights(done.folder, fragments)
    whole = weights(LLAMA)[name]
    local = torch.cat([whole[48:96], whole[144:192]]).flatten()
    assert torch.equal(tensors["weight"], local[100:])
    assert bool((tensors["exp_avg"] == 7).all()) and state["step"] == 0
    with pytest.raises(UserError, match=r"weights only.* checkpoint\.init_from"):
        store.load(done.folder, fragments)
    assert {key.split(".")[0] for key in tensors_in(done.folder)} == {"weight"}


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA)
    import_folder(tmp_path / "there", tmp_path / "run", files={})
    with pytest.raises(UserError, match="step-00000000: it is there already"):
        import_folder(tmp_path / "there", tmp_path / "run", files={})


LLAMA_JSON = hf_config.to_theirs(LLAMA, dtype="fp32", vocab_size=420, bos_id=1, eos_id=2)
GPT2_JSON = hf_config.to_theirs(GPT2, dtype="fp32", vocab_size=420, bos_id=1, eos_id=2)


@pytest.mark.parametrize("model", params())
def test_settings_go_there_and_back(model: ModelConfig) -> None:
    json_of = hf_config.to_theirs(model, dtype="bf16", vocab_size=model.vocab_size, bos_id=1, eos_id=2)
    assert hf_config.from_theirs(json_of, "x") == dataclasses.replace(model, name="imported")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA_JSON, {"model_type": "mistral"}, "model_type=mistral: llama and gpt2 can be read"),
        (LLAMA_JSON, {"model_type": None}, "model_type=null: llama and gpt2"),
        (
            LLAMA_JSON,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling=.*llama3.* without scaling",
        ),
        (LLAMA_JSON, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters=.*yarn"),
        (LLAMA_JSON, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters=.*partial"),
        (LLAMA_JSON, {"sliding_window": 4096}, "sliding_window=4096: bigtrain has no such setting"),
        (LLAMA_JSON, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (LLAMA_JSON, {"num_local_experts": 8}, "num_local_experts=8"),
        (LLAMA_JSON, {"attention_bias": True}, "attention_bias=true: mlp_bias is false"),
        (LLAMA_JSON, {"hidden_act": "gelu"}, "hidden_act=gelu: bigtrain has silu only"),
        (LLAMA_JSON, {"head_dim": 16}, "head_dim=16: bigtrain has 8 only"),
        (
            LLAMA_JSON,
            {"num_attention_heads": 7, "head_dim": None},
            "7 attention heads do not divide the hidden size 64",
        ),
        (LLAMA_JSON, {"num_key_value_heads": 3}, "3 key and value heads do not divide 8 heads"),
        (LLAMA_JSON, {"hidden_size": "64"}, "hidden_size=64: it takes a whole number"),
        (LLAMA_JSON, {"num_hidden_layers": -2}, "num_hidden_layers=-2: it takes a whole number above 0"),
        (LLAMA_JSON, {"num_hidden_layers": None}, "num_hidden_layers=null"),
        (LLAMA_JSON, {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: it takes a number"),
        (LLAMA_JSON, {"tie_word_embeddings": 1}, "tie_word_embeddings=1: it takes true or false"),
        (GPT2_JSON, {"activation_function": "gelu"}, "activation_function=gelu: bigtrain has gelu_new or gelu_pytorch"),
        (GPT2_JSON, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        (GPT2_JSON, {"scale_attn_weights": False}, "scale_attn_weights=false"),
        (GPT2_JSON, {"add_cross_attention": True}, "add_cross_attention=true"),
        (GPT2_JSON, {"embd_pdrop": 0.3}, "embd_pdrop=0.3: bigtrain has 0.0 only"),
    ],
)
def test_settings_that_we_lack_are_refused(
    config: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        load_settings(tmp_path)


def test_settings_of_older_and_newer_transformers() -> None:
    older = {**LLAMA_JSON, "rope_theta": 5e5, "rope_scaling": None}
    newer = {key: value for key, value in LLAMA_JSON.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert hf_config.from_theirs(older, "x") == hf_config.from_theirs(newer, "x")
    assert hf_config.from_theirs(newer, "x").rope_theta == 5e5


def entry(**change: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]} | change


def rewritten(file: Path, change: dict[str, Any], *, length: int | None = None, cut: int = 0) -> None:
    """A safetensors file with another header."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8 : 8 + size]), **change}).encode()
    content = (len(header) if length is None else length).to_bytes(8, "little") + header + content[8 + size :]
    file.write_bytes(content[: len(content) - cut])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: entry(dtype="NaN")}, f"tensor {NORM} has dtype 'NaN'; weights are F32, BF16, F16"),
        ({NORM: entry(dtype="F8_E4M3", data_offsets=[0, 64])}, f"tensor {NORM} has dtype 'F8_E4M3'"),
        ({NORM: entry(dtype=None)}, f"tensor {NORM}: its entry"),
        ({NORM: entry(shape=[32])}, f"tensor {NORM}: bytes 0 to 256 of .* are not those of shape \\(32,\\)"),
        ({NORM: entry(shape=[32], data_offsets=[0, 128])}, rf"tensor {NORM} has shape \(32,\), config.json asks for"),
        ({NORM: entry(shape=[-64])}, f"tensor {NORM}: its entry"),
        ({NORM: entry(shape=[1 << 62, 1 << 62])}, f"tensor {NORM}: bytes 0 to 256"),
        ({NORM: entry(data_offsets=[1 << 40, (1 << 40) + 256])}, f"tensor {NORM}: bytes 1099511627776"),
        ({NORM: entry(data_offsets=[256, 0])}, f"tensor {NORM}: bytes 256 to 0"),
        ({NORM: entry(data_offsets="x")}, f"tensor {NORM}: its entry"),
        ({NORM: 7}, f"tensor {NORM}: its entry 7"),
        ({"../../etc/passwd": entry()}, "tensor ../../etc/passwd is none of this model"),
        ({"model.layers.7.input_layernorm.weight": entry()}, "tensor model.layers.7.input_layernorm.weight is none of"),
    ],
)
def test_hostile_headers(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA)
    rewritten(tmp_path / "there" / "model.safetensors", change)
    refused(tmp_path, message)


def refused(tmp_path: Path, message: str) -> None:
    """With one error, and nothing written."""
    with pytest.raises(UserError, match=message):
        import_folder(tmp_path / "there", tmp_path / "run", files={})
    assert not (tmp_path / "run" / "step-00000000").exists()
    assert list((tmp_path / "run").glob(".*")) == []


def test_damaged_files(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA)
    file = tmp_path / "there" / "model.safetensors"
    whole = file.read_bytes()
    rewritten(file, {}, length=1 << 40)
    refused(tmp_path, f"{file}: it is no safetensors file, or cut off")
    file.write_bytes(whole)
    rewritten(file, {}, cut=4)
    refused(tmp_path, r"tensor \S+: bytes \d+ to \d+ of \d+ are not")
    file.write_bytes(b"")
    refused(tmp_path, "no safetensors file")
    file.write_bytes((4).to_bytes(8, "little") + b"[1]x")
    refused(tmp_path, "its header cannot be read")
    file.write_bytes((4).to_bytes(8, "little") + b"[11]")
    refused(tmp_path, "no JSON object")
    twice = b'{"a": 1, "a": 2}'
    file.write_bytes(len(twice).to_bytes(8, "little") + twice)
    refused(tmp_path, "'a' is there twice")
    deep = b"[" * 100_000
    file.write_bytes(len(deep).to_bytes(8, "little") + deep)
    refused(tmp_path, "its header cannot be read")
    file.write_bytes(whole)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2_000_000_000}))
    refused(tmp_path, "config.json has 2000000000 layers, there are 21 tensors")
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(tmp_path, r"tensor model.layers.2.\S+ is missing, which config.json asks for")
    (tmp_path / "there" / "config.json").write_text("{")
    refused(tmp_path, "config.json: it is no JSON")
    (tmp_path / "there" / "config.json").unlink()
    refused(tmp_path, "there is no config.json in it, so it is no Hugging Face folder")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", 7, None, "x.bin"]
)
def test_an_index_names_no_file_elsewhere(name: Any, tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA, shard="60KB")
    save_file({NORM: torch.ones(64)}, tmp_path / "secret.safetensors")
    index = tmp_path / "there" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][NORM] = name
    index.write_text(json.dumps(content))
    refused(tmp_path, f"tensor {NORM}: .* is no name of a safetensors file in that folder")


def test_indexes_that_are_wrong(tmp_path: Path) -> None:
    there = saved_by_transformers(tmp_path / "there", LLAMA, shard="60KB")
    index = tmp_path / "there" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {NORM: "gone.safetensors"}}))
    refused(tmp_path, f"tensor {NORM}: there is no file gone.safetensors")
    wrong = next(file for file in content["weight_map"].values() if file != content["weight_map"][NORM])
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {NORM: wrong}}))
    refused(tmp_path, f"{wrong}: tensor {NORM} is missing, which")
    for text in ("[]", '{"weight_map": {}}', '{"weight_map": []}', "{}"):
        index.write_text(text)
        refused(tmp_path, "it has no weight_map")
    with index.open("wb") as file:  # sparse: 200 MB that are not read
        file.truncate(200_000_000)
    refused(tmp_path, "200000000 bytes are no file of settings")
    index.write_text(json.dumps({"weight_map": {name: "all.safetensors" for name in there}}))
    del there["model.layers.0.mlp.up_proj.weight"]
    save_file(there, tmp_path / "there" / "all.safetensors")
    refused(tmp_path, "tensor model.layers.0.mlp.up_proj.weight is missing")


def test_pickles_are_refused_with_the_reason(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "there", LLAMA)
    (tmp_path / "there" / "model.safetensors").rename(tmp_path / "there" / "pytorch_model.bin")
    refused(tmp_path, r"pytorch_model.bin, a pickle, which may run code .*save_pretrained")
    (tmp_path / "there" / "pytorch_model.bin").unlink()
    refused(tmp_path, "there is no model.safetensors and no model.safetensors.index.json")
    with pytest.raises(UserError, match="there is no such folder"):
        load_settings(tmp_path / "nowhere")
