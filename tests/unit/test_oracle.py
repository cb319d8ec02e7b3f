"""The reference is itself held against computations written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bigtrain.config.schema import ModelConfig, OptimConfig
from tests import oracle

LLAMA = ModelConfig(
    num_layers=2, hidden_size=24, num_attention_heads=6, num_query_groups=2, ffn_hidden_size=40, vocab_size=31,
    max_positions=16, rope_theta=100.0, norm_eps=1e-3,
)  # fmt: skip
GPT2 = replace(
    LLAMA, num_query_groups=6, position="learned", norm="layernorm", activation="gelu", bias=True, tie_embeddings=True
)
MODELS = [LLAMA, replace(LLAMA, tie_embeddings=True), replace(LLAMA, bias=True), GPT2]
MODELS.append(replace(GPT2, tie_embeddings=False))


@dataclass
class Batch:
    tokens_BS: Tensor
    targets_BS: Tensor
    loss_mask_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor


def make_batch(seed: int = 0, *, num_sequences: int = 2, lengths: tuple[int, ...] = (5, 7)) -> Batch:
    """Sequences of documents of these lengths; nothing is predicted across a document's end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(31, (num_sequences, sum(lengths) + 1), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    mask = torch.cat([torch.arange(n) < n - 1 for n in lengths])
    rows = [x.expand(num_sequences, -1).clone() for x in (mask, positions, documents)]
    return Batch(tokens[:, :-1].clone(), tokens[:, 1:].clone(), *rows)


def make_state(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random global tensors under our names; norms and biases too, so that a lost one shows."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * (h // model.num_attention_heads)
    gated = 2 if model.activation == "swiglu" else 1
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (v, h)}
    norms = ["decoder.final_layernorm"]
    if model.position == "learned":
        shapes["embedding.position_embeddings.weight"] = (model.max_positions, h)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (v, h)
    for n in range(model.num_layers):
        layer = f"decoder.layers.{n}"
        norms += [f"{layer}.input_layernorm", f"{layer}.pre_mlp_layernorm"]
        matrices = {"self_attention.linear_qkv": (qkv, h), "self_attention.linear_proj": (h, h),
                    "mlp.linear_fc1": (gated * f, h), "mlp.linear_fc2": (h, f)}  # fmt: skip
        for name, shape in matrices.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if model.bias:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    for norm in norms:
        shapes[f"{norm}.weight"] = (h,)
        if model.norm == "layernorm":
            shapes[f"{norm}.bias"] = (h,)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def logits_by_hand(state: dict[str, Tensor], batch: Batch, model: ModelConfig) -> Tensor:
    """The model written out in our layout, one head and one document at a time. Returns [B, S, V]."""
    heads, groups, dim = (
        model.num_attention_heads,
        model.num_query_groups,
        model.hidden_size // model.num_attention_heads,
    )

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        if model.norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], model.norm_eps)
        return x / (x.square().mean(-1, keepdim=True) + model.norm_eps).sqrt() * state[f"{name}.weight"]

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        if model.position == "learned":
            return x
        angle = positions[:, None] * model.rope_theta ** (-torch.arange(0, dim, 2) / dim)
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    def attention(layer: str, x: Tensor, positions: Tensor) -> Tensor:
        rows = linear(f"{layer}.linear_qkv", x).split(dim, dim=-1)
        outputs: list[Tensor] = []
        for head in range(heads):
            first = head // (heads // groups) * (heads // groups + 2)  # of this head's group, in heads
            q, k = rows[first + head % (heads // groups)], rows[first + heads // groups]
            scores = rotate(q, positions) @ rotate(k, positions).t() / math.sqrt(dim)
            unseen = torch.ones_like(scores).triu(1).bool()
            outputs.append(scores.masked_fill(unseen, -math.inf).softmax(-1) @ rows[first + heads // groups + 1])
        return linear(f"{layer}.linear_proj", torch.cat(outputs, dim=-1))

    def document(tokens: Tensor, positions: Tensor) -> Tensor:
        x = state["embedding.word_embeddings.weight"][tokens]
        if model.position == "learned":
            x = x + state["embedding.position_embeddings.weight"][positions]
        for n in range(model.num_layers):
            layer = f"decoder.layers.{n}"
            x = x + attention(f"{layer}.self_attention", norm(f"{layer}.input_layernorm", x), positions)
            up = linear(f"{layer}.mlp.linear_fc1", norm(f"{layer}.pre_mlp_layernorm", x))
            if model.activation == "swiglu":
                gate, up = up.split(model.ffn_hidden_size, dim=-1)
                up = gate * gate.sigmoid() * up
            else:
                up = 0.5 * up * (1 + (math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)).tanh())
            x = x + linear(f"{layer}.mlp.linear_fc2", up)
        output = state["embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"]
        return norm("decoder.final_layernorm", x) @ output.t()

    sequences: list[Tensor] = []
    for tokens, positions, documents in zip(batch.tokens_BS, batch.positions_BS, batch.documents_BS, strict=True):
        parts = [document(tokens[documents == d], positions[documents == d]) for d in documents.unique()]
        sequences.append(torch.cat(parts))
    return torch.stack(sequences)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", MODELS)
def test_logits_equal_a_model_written_by_hand(model: ModelConfig, attention: str) -> None:
    state, batch = make_state(model), make_batch()
    hf = oracle.build(model, attention=attention)
    oracle.load(hf, state, model)
    torch.testing.assert_close(oracle.logits(hf, batch), logits_by_hand(state, batch, model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_names_go_there_and_back(model: ModelConfig) -> None:
    state = make_state(model)
    back = oracle.from_hf(oracle.to_hf(state, model), model)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("model", MODELS)
def test_gradients_come_back_under_our_names(model: ModelConfig) -> None:
    """Autograd through the model written by hand, in our layout, is what the oracle reports."""
    state, batch = make_state(model), make_batch()
    hf = oracle.build(model)
    oracle.load(hf, state, model)
    trace = oracle.train(hf, [[batch]], optim=OptimConfig(), lr_of_step=lambda _: 0.0, grad_clip=1.0)

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    mask = batch.loss_mask_BS
    loss = F.cross_entropy(logits_by_hand(leaves, batch, model)[mask], batch.targets_BS[mask])
    loss.backward()
    gradients = oracle.from_hf(trace.gradients[0], model)
    assert gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves.values() if leaf.grad is not None))
    assert trace.losses == pytest.approx([loss.item()], rel=1e-5)
    assert trace.grad_norms == pytest.approx([norm], rel=1e-5)


@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_a_document_does_not_see_the_one_before(model: ModelConfig) -> None:
    hf = oracle.build(model)
    batch = make_batch(lengths=(5, 7))
    before = oracle.logits(hf, batch)
    batch.tokens_BS[:, :5] = (batch.tokens_BS[:, :5] + 1) % 31
    after = oracle.logits(hf, batch)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.allclose(before[:, :5], after[:, :5])


def test_the_cut_into_microbatches_does_not_matter() -> None:
    """The loss is a mean over tokens, so microbatches with different numbers of predicted tokens weigh accordingly."""
    one, two = make_batch(1, num_sequences=1), make_batch(2, num_sequences=1, lengths=(1, 1, 1, 9))
    whole = Batch(*(torch.cat([getattr(one, f), getattr(two, f)]) for f in Batch.__dataclass_fields__))
    traces = []
    for cut in ([whole], [one, two], [two, one]):
        hf = oracle.build(LLAMA)
        oracle.load(hf, make_state(LLAMA), LLAMA)
        traces.append(oracle.train(hf, [cut] * 3, optim=OptimConfig(), lr_of_step=lambda _: 1e-3, grad_clip=1.0))
    for trace in traces[1:]:
        assert trace.losses == pytest.approx(traces[0].losses, rel=1e-5)
        assert trace.grad_norms == pytest.approx(traces[0].grad_norms, rel=1e-4)
    assert len({round(loss, 3) for loss in traces[0].losses}) == 3


def test_adamw_by_hand() -> None:
    """Two steps of AdamW: decay on matrices only, moments of the clipped gradient, the learning rate of each step."""
    optim = OptimConfig(lr=123.0, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    rates, clip, batch = [0.01, 0.003], 0.1, make_batch()
    hf = oracle.build(LLAMA)
    oracle.load(hf, make_state(LLAMA), LLAMA)
    trace = oracle.train(hf, [[batch]] * 2, optim=optim, lr_of_step=lambda step: rates[step], grad_clip=clip)

    weights = {name: tensor.clone() for name, tensor in oracle.to_hf(make_state(LLAMA), LLAMA).items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    model = oracle.build(LLAMA)
    for step, rate in enumerate(rates):
        model.load_state_dict(weights)
        model.zero_grad()
        (oracle.loss_sum(model, batch) / batch.loss_mask_BS.sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == weights.keys()
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert trace.grad_norms[step] == pytest.approx(norm, rel=1e-5)
        assert norm > clip
        for name, gradient in gradients.items():
            gradient = gradient * (clip / norm)
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            update = first[name] / (1 - 0.8 ** (step + 1)) / ((second[name] / (1 - 0.9 ** (step + 1))).sqrt() + 1e-6)
            decay = 0.5 if weights[name].ndim == 2 else 0.0
            weights[name] = weights[name] * (1 - rate * decay) - rate * update
    for name, tensor in weights.items():
        torch.testing.assert_close(trace.final_weights[name], tensor, rtol=1e-4, atol=1e-4)


def test_shapes_that_transformers_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm is 'layernorm', not 'rmsnorm'"):
        oracle.build(replace(LLAMA, norm="layernorm"))
    with pytest.raises(ValueError, match=r"bias is False, not True"):
        oracle.build(replace(GPT2, bias=False))


def test_weights_of_another_shape_are_refused() -> None:
    state = make_state(LLAMA)
    del state["output_layer.weight"]
    with pytest.raises(RuntimeError, match=r"missing \['lm_head.weight'\]"):
        oracle.load(oracle.build(LLAMA), state, LLAMA)
