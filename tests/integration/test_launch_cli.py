"""`python -m bigtrain.launch` as a user runs it: what it answers without starting a rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain import config as configs
from bigtrain.checkpoint import folder as folders
from bigtrain.config.compose import compose, conf_dir
from bigtrain.launching import machine

LAUNCH = [sys.executable, "-m", "bigtrain.launch"]
SOURCE = str(Path(__file__).resolve().parents[2])


def launch(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": SOURCE, **environment}
    return subprocess.run([*LAUNCH, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


def refused(cwd: Path, *arguments: str, **environment: str) -> str:
    """The error of a command that must be refused: status 2, error lines only, nothing written."""
    before = sorted(cwd.rglob("*"))
    done = launch(cwd, *arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), done.stderr
    assert sorted(cwd.rglob("*")) == before
    return done.stderr


def data(folder: Path, *, documents: int = 1000, vocab_size: int = 4096) -> list[str]:
    """Overrides that name data with these totals."""
    for split in ("train", "valid"):
        (folder / split).mkdir()
        index = {"num_documents": documents, "vocab_size": vocab_size}
        (folder / split / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "t.model").write_bytes(b"")
    return [
        "data.train=[{path: train}]",
        "data.valid=[{path: valid}]",
        "tokenizer.path=t.model",
        "data.prepare.inputs=[]",
    ]


CPU = "cluster.device=cpu"


def test_help_teaches(tmp_path: Path) -> None:
    done = launch(tmp_path, "--help")
    assert done.returncode == 0
    for part in ("gpt_1b", "llama3_8b", "+cluster", "train.num_steps=300", "Sequences an optimizer step", "examples:"):
        assert part in done.stdout
    assert "model.rope_theta" in launch(tmp_path, "--keys").stdout


def test_cfg_shows_the_config(tmp_path: Path) -> None:
    done = launch(tmp_path, "model=gpt_1b", "--cfg", "job", "train.num_steps=7")
    assert "num_steps: 7" in done.stdout, "settings may stand on both sides of a flag"
    assert done.returncode == 0
    assert "name: gpt_1b" in done.stdout and "num_lanes: 64" in done.stdout
    resolved = launch(tmp_path, "--cfg", "job", "--resolve", "train.num_steps=1e3")
    assert resolved.returncode == 0, resolved.stderr
    assert "dir: runs/default" in resolved.stdout and "num_steps: 1000" in resolved.stdout
    assert "model.hidden_size" in refused(tmp_path, "--cfg", "job", "model.hiden_size=1")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_every_number_and_starts_nothing(tmp_path: Path) -> None:
    done = launch(tmp_path, "dry_run=true", "cluster.procs_per_node=4", CPU, "parallel.tensor=2")
    assert done.returncode == 0, done.stderr
    for part in (
        "4 ranks = tensor 2 x pipeline 1 x data 2",
        "6,524,160",
        "1,024 tokens a rank",
        "2 microbatches a rank a step",
        "4,096 tokens",
        "300 steps",
        "1,228,800 tokens",
        "bytes) a rank",
        "FLOP",
        "RANK=3 LOCAL_RANK=3",
        f"-m bigtrain.train {tmp_path}/runs/default",
        "-m bigtrain.data.prepare",
        "nothing was started",
    ):
        assert part in done.stdout, part
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_the_script_for_slurm(tmp_path: Path) -> None:
    done = launch(tmp_path, "+cluster=slurm", "model=gpt_1b", "dry_run=true")
    assert done.returncode == 0, done.stderr
    for part in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "srun", "16 ranks", "1,315,819,520", "ZeRO-3"):
        assert part in done.stdout, part
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_gpu_of_the_site_holds_is_refused(tmp_path: Path) -> None:
    """6.66 G weights on 16 GPUs: 54 GiB with ZeRO-1, 7 GiB with ZeRO-3."""
    small = ["+cluster=slurm", "model=gpt_7b", "parallel.zero_stage=1", "cluster.device_memory_gib=40"]
    said = refused(tmp_path, *small)
    taken, fix = said.split(" (58,", 1)
    assert taken == "error: model.name=gpt_7b: its weights, gradients and optimizer state take 54.3 GiB"
    assert fix.partition(" bytes) ")[2] == (
        "on each rank (bf16, ZeRO-1 over 16 data ranks), activations not counted, and a GPU "
        "(cluster.device_memory_gib) has 40.0 GiB (42,949,672,960 bytes). Set parallel.zero_stage=2, which takes "
        "18.6 GiB, or choose a smaller model; where the run is for other machines, set cluster.device_memory_gib to "
        "what theirs have.\n"
    )
    shown = launch(tmp_path, *small, "dry_run=true")
    assert shown.returncode == 0, shown.stderr
    warning = f"warning: without dry_run this is refused: {said.removeprefix('error: ')}"
    assert warning in shown.stdout and "would submit this script" in shown.stdout
    two = ["--multirun", "run.seed=1,2"]
    assert refused(tmp_path, *small, *two) == said
    shown = launch(tmp_path, *small, *two, "dry_run=true")
    assert shown.returncode == 0 and warning in shown.stdout, shown.stderr
    site = ["+cluster=slurm", "model=gpt_7b", "dry_run=true"]
    for gib, share in ((80, "67.8%"), (56, "96.9%")):
        shown = launch(tmp_path, *site, "parallel.zero_stage=1", f"cluster.device_memory_gib={gib}")
        assert f"without activations: {share} of {gib}.0 GiB" in shown.stdout, shown.stderr
        assert shown.returncode == 0 and ("\nwarning: a GPU (" in shown.stdout) == (gib == 56)
    assert "what a GPU has is not known: cluster.device_memory_gib" in launch(tmp_path, *site).stdout


def test_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """One that has finished is not asked whether it fits; one that goes on is told what its checkpoint lost."""
    command = ["run.name=r", CPU, *data(tmp_path), "train.num_steps=30"]
    folder = tmp_path / "runs" / "r"
    folders.prepare(folder / "checkpoints", 30, 0)
    made = folders.commit(folder / "checkpoints", 30, {"format": folders.FORMAT}, {"tokenizer.model": b"t"})
    (folder / "summary.json").write_text('{"steps": 30}', encoding="utf-8")
    too_small = "cluster.device_memory_gib=0.001"
    done = launch(tmp_path, *command, too_small)
    assert done.returncode == 0 and done.stdout.startswith("already finished: 30 steps"), done.stderr
    (made / "tokenizer.model").unlink()
    assert launch(tmp_path, *command).stdout.startswith(
        "warning: runs/r/checkpoints/step-00000030 has lost what a run "
    )
    (folder / "summary.json").unlink()
    assert "0.001" not in refused(tmp_path, *command, too_small)
    done = launch(tmp_path, *command, "--freeze")
    assert done.stdout.startswith(
        "warning: runs/r/checkpoints/step-00000030 has lost what a run does not need to go on"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["dry_run=true", CPU], ["+cluster=slurm", "dry_run=true"]])
def test_a_login_node_imports_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from bigtrain import launch; status = launch.main(sys.argv[1:]); "
        "print(status, [name for name in ('torch', 'deepspeed', 'megatron', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model.hiden_size=3"], "model.hidden_size"),
        (["model=gpt_2b"], "Nearest: gpt_"),
        (["modle=tiny"], "model"),
        (["train.num_steps=many"], "whole number"),
        (["--bogus"], "--bogus"),
        (["--config-dir", "nowhere"], "nowhere"),
        ([CPU, "cluster.procs_per_node=4", "parallel.tensor=3"], "4 ranks"),
        ([CPU, "model.num_attention_heads=6", "model.hidden_size=252", "parallel.tensor=4"], "num_attention_heads=6"),
        ([CPU, "train.global_batch_size=18"], "train.global_batch_size=18"),
        ([CPU, "parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=2"], "virtual_pipeline=2"),
        ([CPU, "data.prepare.inputs=[nowhere/*.txt]", "data.prepare.out=new"], "nowhere/*.txt"),
    ],
)
def test_wrong_settings(tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in refused(tmp_path, *arguments)


def test_missing_data_path(tmp_path: Path) -> None:
    overrides = data(tmp_path)
    assert f"data.train.0.path={tmp_path}/elsewhere" in refused(
        tmp_path, CPU, *overrides, "data.train=[{path: elsewhere}]"
    )


def test_too_few_documents(tmp_path: Path) -> None:
    assert "63 documents" in refused(tmp_path, CPU, *data(tmp_path, documents=63))


def test_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    assert "model.vocab_size=4096" in refused(tmp_path, CPU, *data(tmp_path, vocab_size=5000))


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    message = refused(
        tmp_path, *data(tmp_path), "cluster.device=cuda", "cluster.procs_per_node=4", CUDA_VISIBLE_DEVICES=""
    )
    assert "cluster.device=cpu" in message


def test_run_folder_of_another_config(tmp_path: Path) -> None:
    overrides = [*data(tmp_path), CPU]
    config = machine.resolve(compose(overrides), cwd=tmp_path)
    configs.save(config, config.run.dir)
    (tmp_path / "runs" / "default" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert launch(tmp_path, *overrides, "dry_run=true").returncode == 0
    message = refused(tmp_path, *overrides, "optim.lr=0.5")
    assert "optim.lr is 0.001 there, 0.5 now" in message and "run.name" in message


def test_slurm_without_slurm(tmp_path: Path) -> None:
    message = refused(tmp_path, *data(tmp_path), "+cluster=slurm", PATH=str(Path(sys.executable).parent))
    assert "there is no sbatch" in message


def corpus(folder: Path) -> list[str]:
    """Overrides that make real data from a few small texts."""
    (folder / "corpus").mkdir()
    for number in range(200):
        text = " ".join(f"word{number * word % 97}" for word in range(50))
        (folder / "corpus" / f"{number}.txt").write_text(text, encoding="utf-8")
    return ["data=text", "data.prepare.inputs=[corpus]", "data.num_lanes=16", "tokenizer.vocab_size=280"]


def test_submits_what_the_dry_run_showed(tmp_path: Path) -> None:
    """Slurm's programs are stand-ins here: the script that arrives is the one shown, and the job is named."""
    programs, nothing = tmp_path / "bin", [("srun", ""), ("scontrol", ""), ("squeue", "")]
    programs.mkdir()
    for name, text in (("sbatch", f"cp $1 {tmp_path}/got; echo Submitted batch job 4711"), *nothing):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    overrides = [*corpus(tmp_path), "+cluster=slurm", "model=gpt_1b"]
    path = f"{programs}:{os.environ['PATH']}"
    shown = launch(tmp_path, *overrides, "dry_run=true", PATH=path).stdout
    done = launch(tmp_path, *overrides, PATH=path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got").read_text() in shown
    assert "job 4711" in done.stdout and "squeue -j 4711" in done.stdout
    assert configs.load(tmp_path / "runs" / "default").data.prepare.inputs == [f"{tmp_path}/corpus"]
    changed = launch(tmp_path, *overrides, "optim.lr=0.5", PATH=path)
    assert changed.returncode == 2 and "optim.lr is 0.001 there, 0.5 now" in changed.stderr


def test_freeze_makes_the_folder_ready_and_starts_nothing(tmp_path: Path) -> None:
    done = launch(tmp_path, "--freeze", *corpus(tmp_path), "+cluster=slurm")
    assert done.returncode == 0, done.stderr
    config = configs.load(tmp_path / "runs" / "default")
    assert (Path(config.data.train[0].path) / "index.json").is_file() and Path(config.tokenizer.path).is_file()
    assert not (tmp_path / "runs" / "default" / "logs").exists()
    assert (tmp_path / "runs" / "default" / "code" / "bigtrain" / "train.py").is_file()


def test_presets_are_found(tmp_path: Path) -> None:
    assert (conf_dir() / "model" / "tiny.yaml").is_file()
