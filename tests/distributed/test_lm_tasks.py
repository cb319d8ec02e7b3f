"""lm-eval's tasks on a checkpoint of ours, against Transformers on the same weights. Needs lm-eval; skipped without."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.schema import ModelConfig
from bigtrain.data.hf_files import hf_files
from bigtrain.data.tokenizer import Tokenizer
from tests import oracle
from tests.distributed import small
from tests.distributed.harness import PoolFactory
from tests.distributed.test_inference import LOUD, saved

pytest.importorskip("lm_eval")

MODEL = replace(LOUD, num_layers=2, vocab_size=292, max_positions=24)
CHOICES = ["return x", " import", "+ 1 + 1 + 1"]
QUESTIONS = ["def f(x):", "x + 1", "    return", "f"]
LONG = "def f(x):\n    return x + 1\n" * 3
"""Does not fit into the model's positions."""
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
{rest}
"""


def write_task(folder: Path, name: str, kind: str, text: str, documents: list[dict[str, Any]], *rest: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind, text=text, rest="\n".join(rest)))


def records_of(checkpoint: Path, tasks: Path, names: list[str], home: Path, tensor: int) -> list[dict[str, Any]]:
    """On a rank."""
    import os

    os.environ["HF_HOME"] = str(home / os.environ["RANK"])
    from bigtrain.engine.inference import load
    from bigtrain.engine.open_model import open_model
    from bigtrain.trainer.lm_tasks import Tasks

    loaded = load(open_model(checkpoint), device="cpu", tensor=tensor)
    return list(Tasks(names, include_path=str(tasks), batch_size=3).records(loaded))


def metrics_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """By task and name."""
    return {
        f"{record['task']} {key}": value
        for record in records
        for key, value in record.items()
        if key.endswith(",none") and "stderr" not in key
    }


def hf_of(checkpoint: Path, model: ModelConfig) -> Any:
    import torch.distributed.checkpoint as dcp

    hf: Any = oracle.build(model)
    plain = {f"weight.{name}": value.clone() for name, value in oracle.from_hf(hf.state_dict(), model).items()}
    dcp.load(plain, checkpoint_id=checkpoint, no_dist=True)
    oracle.load(hf, {name.removeprefix("weight."): value for name, value in plain.items()}, model)
    return hf.eval()


def log_likelihood(hf: Any, ids: list[int], scored: int) -> float:
    """Of the last `scored` tokens."""
    with torch.no_grad():
        logs = hf(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(len(ids) - scored, len(ids)))


@pytest.mark.parametrize("tensor", [1, 2])
def test_tasks_have_the_numbers_of_transformers(pool: PoolFactory, tmp_path: Path, tensor: int) -> None:
    pool(1).run(saved, small.config(MODEL, zero_stage=1), tmp_path)
    checkpoint = tmp_path / "step-00000001"
    hf, tokenizer = hf_of(checkpoint, MODEL), Tokenizer.load(checkpoint)

    best: list[int] = []
    for question in QUESTIONS:
        begin, totals = [tokenizer.bos_id, *tokenizer.encode(question)], []
        for choice in CHOICES:
            whole = [tokenizer.bos_id, *tokenizer.encode(f"{question} {choice}")]
            totals.append(log_likelihood(hf, whole, len(whole) - len(begin)))
        best.append(max(range(len(CHOICES)), key=totals.__getitem__))
    answers = [best[0], best[1], best[2], (best[3] + 1) % len(CHOICES)]
    documents = [{"q": q, "choices": CHOICES, "a": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    rest = ['doc_to_choice: "{{choices}}"', 'doc_to_target: "{{a}}"', "metric_list: [{metric: acc}]"]
    write_task(tmp_path, "own_choice", "multiple_choice", "{{q}}", documents, *rest)

    texts, nats, size = ["f(x)", "return x + 1", LONG], 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        room = MODEL.max_positions
        for first in range(1, len(ids), room):  # each token once, with as much before it as fits
            end = min(first + room, len(ids))
            start = 0 if first == 1 else end - room - 1
            nats -= log_likelihood(hf, ids[start:end], end - first)
        size += len(text.encode())
    rest = ['doc_to_target: "{{t}}"', "metric_list: [{metric: bits_per_byte}]"]
    write_task(tmp_path, "own_text", "loglikelihood_rolling", "", [{"t": text} for text in texts], *rest)

    goals: list[str] = []
    for question in QUESTIONS:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(question)]])
        found = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
        written = tokenizer.decode(found[0, ids.shape[1] :].tolist(), at_start=False)
        goals.append(written.partition("e")[0])
    goals[3] += " not this"
    rest = [
        'doc_to_target: "{{goal}}"',
        "generation_kwargs: {until: ['e'], max_gen_toks: 8, do_sample: false}",
        "metric_list: [{metric: exact_match}]",
    ]
    documents = [{"q": q, "goal": goal} for q, goal in zip(QUESTIONS, goals, strict=True)]
    write_task(tmp_path, "own_writing", "generate_until", "{{q}}", documents, *rest)

    names = ["own_choice", "own_text", "own_writing"]
    ranks = pool(tensor).run(records_of, checkpoint, tmp_path, names, tmp_path / "home", tensor, timeout_s=300.0)
    found = {record["task"]: record for record in ranks[0]}
    assert found["own_choice"]["acc,none"] == 0.75 and found["own_choice"]["step"] == 1
    assert found["own_text"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["own_writing"]["exact_match,none"] == 0.75

    hf.save_pretrained(tmp_path / "hf")
    for name, content in hf_files(tokenizer).items():
        (tmp_path / "hf" / name).write_bytes(content)
    ranks = pool(tensor).run(records_of, tmp_path / "hf", tmp_path, names, tmp_path / "home", tensor, timeout_s=300.0)
    assert [record["step"] for record in ranks[0]] == [0, 0, 0]
    assert metrics_of(ranks[0]) == pytest.approx(metrics_of(list(found.values())), rel=1e-5), "as it lies there"


def test_a_task_that_is_not_there(pool: PoolFactory, tmp_path: Path) -> None:
    from tests.distributed.harness import RankError

    pool(1).run(saved, small.config(MODEL, zero_stage=1), tmp_path)
    with pytest.raises(RankError, match="--lm-eval: it has no task own_nothing"):
        pool(1).run(records_of, tmp_path / "step-00000001", tmp_path, ["own_nothing"], tmp_path, 1)
