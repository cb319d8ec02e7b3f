"""A fine-tune by its command: from the weights of a run, on pairs of prompt and completion."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.frozen import load
from tests.integration.runs import config_of, records, run, run_well
from tests.integration.test_data import audited
from tests.integration.test_launch_cli import launch

WORDS = ["def", "return", "self", "import", "for", "in", "range", "print"]


def write_pairs(path: Path) -> Path:
    """Nobody can know the question; the answer is always the same."""
    rng = random.Random(0)
    asked = [rng.choices(WORDS, k=4) for _ in range(400)]
    pairs = [{"prompt": " ".join(words), "completion": "\n" + "# of the same\n" * 3} for words in asked]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.mark.slow
def test_from_a_run_to_a_model_that_answers(built: Path, tmp_path: Path) -> None:
    base = config_of(tmp_path / "runs" / "base", built)  # ZeRO-3 x tensor 2
    run_well(replace(base, train=replace(base.train, num_steps=6), data=replace(base.data, valid=[])))
    write_pairs(tmp_path / "qa.jsonl")
    model = base.model
    command = [
        *("+experiment=finetune", "checkpoint.init_from=runs/base", "data.prepare.inputs=[qa.jsonl]"),
        *(f"model.{name}={getattr(model, name)}" for name in ("num_layers", "hidden_size", "num_attention_heads")),
        *(f"model.{name}={getattr(model, name)}" for name in ("num_query_groups", "ffn_hidden_size", "vocab_size")),
        *("parallel.zero_stage=1", "cluster.procs_per_node=1", "cluster.device=cpu", "tracker=none"),
        *("train.num_steps=20", "train.sequence_length=64", "optim.lr=1e-2", "schedule.warmup_steps=2"),
        *("train.global_batch_size=8", "checkpoint.interval=10", "eval.interval=10"),
    ]
    frozen = launch(tmp_path, *command, "--freeze", "train.stop_after=10")
    assert frozen.returncode == 0, frozen.stdout + frozen.stderr
    assert "of them prompts, not learned" in frozen.stdout
    folder = tmp_path / "runs" / "finetune"
    begun = run(load(folder))
    source = tmp_path / "runs" / "base" / "checkpoints" / "step-00000006"
    assert begun.status == 0, begun.output
    assert f"weights from {source} (step 6); optimizer, schedule and data begin anew" in begun.output

    shutil.rmtree(tmp_path / "runs" / "base")  # the run has its own weights and tokenizer by now
    ended = launch(tmp_path, *command, OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "weights from" not in ended.stdout and "step 10 of 20" in ended.stdout

    steps, evaluations = records(folder, "train"), records(folder, "eval")
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert steps[9]["loss"] < 0.7 * steps[0]["loss"] and steps[10]["loss"] < 0.7 * steps[0]["loss"]
    assert steps[19]["loss"] < 0.3 * steps[0]["loss"], "what is learned can be known, the prompts cannot"
    assert evaluations[-1]["loss"] < 0.85 * evaluations[0]["loss"]
    (init,) = (event for event in records(folder, "event") if event["name"] == "init")
    assert (init["step"], init["from"], init["from_step"]) == (0, str(source), 6)
    state = json.loads((folder / "checkpoints" / "step-00000020" / "state.json").read_text())
    assert state["init_from"] == {"from": str(source), "from_step": 6}
    assert "proven" in audited(folder)
