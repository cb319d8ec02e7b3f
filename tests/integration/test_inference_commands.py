"""`bigtrain.evaluate` and `bigtrain.generate` on a run that real ranks made, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.schema import EvalConfig, SourceConfig
from tests.integration.runs import DEADLINE_S, LAYOUTS, build_shards, config_of, records, run_well
from tests.unit.data.conftest import load_tool

pytestmark = pytest.mark.slow
FIELDS = ("loss", "perplexity", "bits_per_byte")
STEPS = 6
BATCHES, TOKENS = 5, 5 * 8 * 64
"""Global batches of an evaluation, and the tokens in them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def run_of(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A short run of a layout, which evaluates two sets at its end."""
    made: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in made:
            config = config_of(tmp_path_factory.mktemp("runs") / layout, data, layout)
            sets = [SourceConfig(str(data / "valid"), set="held-out"), SourceConfig(str(data / "train"), set="seen")]
            config = replace(
                config,
                train=replace(config.train, num_steps=STEPS),
                data=replace(config.data, valid=sets),
                eval=EvalConfig(interval=0, num_batches=BATCHES),
            )
            made[layout] = run_well(config)
        return made[layout]

    return of


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"bigtrain.{name}", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def evaluated(folder: Path, out: Path, *arguments: str) -> list[dict[str, float]]:
    done = command("evaluate", f"checkpoint={folder}", f"out={out}", "device=cpu", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(f"{each['loss']:.6f} nats a token" in done.stdout for each in found)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_those_of_the_run(run_of: Callable[[str], Path], layout: str, tmp_path: Path) -> None:
    folder = run_of(layout)
    expected = records(folder, "eval")
    assert [(each["set"], each["step"]) for each in expected] == [("held-out", STEPS), ("seen", STEPS)]
    ways = [[], ["ranks=2", "micro_batch_size=3"], ["tensor=2"]] if layout == "zero3-tensor2" else [[]]
    for number, arguments in enumerate(ways):
        found = evaluated(folder, tmp_path / f"{number}.jsonl", *arguments)
        assert [each["set"] for each in found] == ["held-out", "seen"]
        for mine, its in zip(found, expected, strict=True):
            assert [mine[key] for key in FIELDS] == pytest.approx([its[key] for key in FIELDS], rel=1e-5)


def test_the_export_and_its_import_have_the_numbers_of_the_run(
    run_of: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    folder, tool = run_of("zero3-tensor2"), load_tool("checkpoint").main
    theirs, again = tmp_path / "hf", tmp_path / "imported"
    assert tool(["export-hf", str(folder), str(theirs)]) == 0
    assert tool(["import-hf", str(theirs), str(again), "--vocab-multiple", "100"]) == 0
    expected = [[each[key] for key in FIELDS] for each in records(folder, "eval")]
    asked = [
        f"data={{held-out: {data / 'valid'}, seen: {data / 'train'}}}",
        "sequence_length=64",
        f"num_tokens={TOKENS}",
    ]
    for place, tensor in ((theirs, 2), (again, 1)):
        found = evaluated(place, tmp_path / f"{tensor}.jsonl", *asked, f"tensor={tensor}")
        for mine, its in zip(found, expected, strict=True):
            assert [mine[key] for key in FIELDS] == pytest.approx(its, rel=1e-5)


def test_a_folder_and_how_much_of_it(run_of: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    folder, index = run_of("zero3-tensor2"), json.loads((data / "valid" / "index.json").read_text())
    (whole,) = evaluated(folder, tmp_path / "a.jsonl", f"data={data / 'valid'}", "num_tokens=0")
    assert "set" not in whole and whole["tokens"] == index["num_tokens"] - index["num_documents"]
    (part,) = evaluated(folder, tmp_path / "b.jsonl", f"data={data / 'valid'}", "num_tokens=640")
    assert 600 < part["tokens"] <= 640


def test_prompts_of_a_file_on_one_rank_and_on_two(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, prompts = run_of("zero3-tensor2"), tmp_path / "prompts.txt"
    prompts.write_text("import os\n\ndef f(x):\nclass A\n")
    asked = [f"checkpoint={folder}", f"prompts={prompts}", "max_tokens=12", "top_p=0.95", "device=cpu"]
    alone = command("generate", *asked, f"out={tmp_path / 'alone.jsonl'}", "batch_size=2")
    shared = command("generate", *asked, f"out={tmp_path / 'shared.jsonl'}", "parallel.tensor=2")
    for done in (alone, shared):
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert done.stderr.startswith("1 empty lines of the prompts were skipped\n") and "tokens/s" in done.stderr
    written = (tmp_path / "alone.jsonl").read_text()
    assert written == (tmp_path / "shared.jsonl").read_text() and written.count("\n") == 3

    again = command("generate", *asked, f"out={tmp_path / 'alone.jsonl'}")
    assert again.returncode == 2 and "there is such a file already" in again.stderr
    assert (tmp_path / "alone.jsonl").read_text() == written


def test_a_mistake_on_many_ranks_is_one_line(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    asked = [f"checkpoint={run_of('zero3-tensor2')}", f"prompt={'x ' * 300}", "tensor=2", "device=cpu"]
    done = command("generate", *asked)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the prompt has ") and "the model has 128 positions" in done.stderr
