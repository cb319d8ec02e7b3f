"""From overrides to a Config, and what a user reads when a name, a type or a preset is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bigtrain import config as configs
from bigtrain.config import keys
from bigtrain.config.check import check
from bigtrain.config.compose import APPENDED_GROUPS, compose, group_names, presets
from bigtrain.config.derive import world_size
from bigtrain.config.errors import UserError
from bigtrain.config.help import help_text, keys_text
from bigtrain.config.schema import ClusterConfig, Config, RunConfig


def test_defaults_are_the_schema_where_the_groups_do_not_differ() -> None:
    config = compose([])
    assert config.model == Config().model
    assert config.optim == Config().optim
    assert config.run.dir == "runs/default"
    assert config.data.train and config.tokenizer.path


def test_overrides_reach_every_layer() -> None:
    config = compose(["model=gpt_1b", "+cluster=slurm", "+cluster.sbatch.qos=high", "run.name=x", "optim.lr=3e-4"])
    assert (config.model.hidden_size, config.optim.lr, config.run.dir) == (2048, 3e-4, "runs/x")
    assert config.cluster.kind == "slurm" and config.cluster.sbatch == {"qos": "high"}
    assert config.precision.dtype == "bf16"


@pytest.mark.parametrize(
    ("name", "non_finite", "spike"),
    [("off", "off", "off"), ("skip", "skip", "off"), ("rewind", "skip", "rewind"), ("stop", "stop", "stop")],
)
def test_what_is_done_where_the_numbers_go_wrong(name: str, non_finite: str, spike: str) -> None:
    anomaly = compose([f"anomaly={name}"]).anomaly
    assert (anomaly.non_finite, anomaly.spike) == (non_finite, spike)


@pytest.mark.parametrize(
    "group", ["model", "optim", "schedule", "parallel", "precision", "checkpoint", "anomaly", "tracker"]
)
def test_every_preset_composes_and_is_sound(group: str) -> None:
    for name in presets(group):
        config = compose([f"{group}={name}", "cluster.procs_per_node=4", "cluster.device=cpu"])
        problems = [p for p in check(config, 4) if group != "model" or p.key != "model.vocab_size"]
        assert problems == [], name


@pytest.mark.parametrize("override", [f"+{group}={name}" for group in APPENDED_GROUPS for name in presets(group)])
def test_every_cluster_and_experiment_is_sound(override: str) -> None:
    named = {"+experiment=finetune": ["checkpoint.init_from=runs/x", "cluster.procs_per_node=4"]}
    config = compose([override, *named.get(override, [])])
    assert check(config, world_size(config)) == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hiden_size=3", "model.hidden_size"),
        ("lr=1e-3", "optim.lr"),
        ("zero_stage=2", "parallel.zero_stage"),
        ("train.nonsense=1", "train.num_steps"),
        ("modle=tiny", "Nearest: model"),
        ("model=gpt_2b", "gpt_1b"),
        ("model=gpt_2b", "There are: gpt_125m, gpt_350m"),
        ("+cluster=slrm", "Nearest: slurm"),
        ("cluster=slurm", "Write +cluster=slurm"),
        ("+model=tiny", "Write model=tiny"),
        ("train.num_steps=abc", "train.num_steps takes a whole number"),
        ("model.tie_embeddings=maybe", "true or false"),
        ("run.name=null", "run.name takes text"),
        ("data.train=[{path: x, wieght: 1}]", "wieght"),
        ("data.train.0.path=x", "data.train=[...]"),
        ("cluster.sbatch.qos=high", "Write +cluster.sbatch.qos=high"),
        ("num_steps", "key=value"),
        ("train.num_steps=[1", "train.num_steps=[1"),
        ("run.name=${nothing}", "nothing"),
        ("run.name=日本", """Write 'run.name="日本"'."""),
        ("data.prepare.inputs=[a, é b]", """Write 'data.prepare.inputs=[a, "é b"]'."""),
        ("data.valid=[{path: é}]", """Write 'data.valid=[{path: "é"}]'."""),
        ("data.prepare.inputs=my corpus", "takes a list, each text. Write 'data.prepare.inputs=[...]'."),
        ("data.train=[FOLDER]", "Write 'data.train=[{path: ...}]'."),
        ("cluster.sbatch=x", "Write 'cluster.sbatch={name: ...}'."),
        ("train.num_steps=1.5", "train.num_steps takes a whole number"),
        ("hydra.run.dir=/tmp", "do nothing here"),
    ],
)
def test_wrong_name_or_type_is_one_clear_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert override.split("=")[0].lstrip("+") in str(caught.value)


def test_what_the_error_says_about_quoting_works() -> None:
    assert compose(['run.name="日本"', 'data.prepare.inputs=[a, "é b"]']).data.prepare.inputs == ["a", "é b"]


def test_a_number_or_a_word() -> None:
    assert [compose([f"checkpoint.interval={each}"]).checkpoint.interval for each in ("auto", "7", "1e2")] == [
        "auto", 7, 100,
    ]  # fmt: skip
    with pytest.raises(
        UserError, match=r"^checkpoint\.interval=2\.5: checkpoint\.interval takes a whole number or auto\.$"
    ):
        compose(["checkpoint.interval=2.5"])


def test_whole_numbers_may_be_written_as_1e3() -> None:
    train = compose(["train.num_steps=1e3", "+train.num_tokens=2.5e6", "optim.lr=1e-3"]).train
    assert (train.num_steps, train.num_tokens) == (1000, 2_500_000)


def test_all_wrong_names_at_once() -> None:
    with pytest.raises(UserError, match=r"(?s)model\.hidden_size.*\nerror: .*gpt_1b"):
        compose(["model.hiden_size=3", "model=gpt_2b"])


def test_presets_of_the_user(tmp_path: Path) -> None:
    tmp_path = tmp_path / "my présets"
    (tmp_path / "model").mkdir(parents=True)
    (tmp_path / "model" / "mine.yaml").write_text("# Mine\nname: mine\nnum_layers: 2\n", encoding="utf-8")
    (tmp_path / "model" / "wrong.yaml").write_text("num_layer: 2\n", encoding="utf-8")
    assert compose(["model=mine"], [tmp_path]).model.num_layers == 2
    assert "mine" in help_text([tmp_path])
    with pytest.raises(UserError, match="num_layer"):
        compose(["model=wrong"], [tmp_path])


def test_frozen_file_comes_back_as_it_was_and_is_not_evaluated(tmp_path: Path) -> None:
    config = compose(["+cluster=slurm", "model=llama3_8b", "train.num_tokens=1000000"])
    cluster = dataclasses.replace(config.cluster, setup=["export A=${HOME} B=${oc.env:PATH}"], sbatch={"qos": "1"})
    config = dataclasses.replace(config, cluster=cluster, run=RunConfig(name="1", dir=str(tmp_path)))
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("text", ["model: {num_layer: 3}", "train: {num_steps: many}", "a: [", "- 1", ""])
def test_frozen_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    if not text:
        assert configs.load(tmp_path) == dataclasses.replace(Config(), run=RunConfig(dir="runs/default"))
        return
    with pytest.raises(UserError, match=r"config\.yaml"):
        configs.load(tmp_path)


def test_no_frozen_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: no such file"):
        configs.load(tmp_path)


def test_every_key_is_documented() -> None:
    assert [key.path for key in keys.all_keys() if not key.doc] == []
    assert all(key.path in keys_text() for key in keys.all_keys())


def test_help_teaches_groups_presets_keys_and_examples() -> None:
    text = help_text()
    for group in group_names():
        assert f"\n  {'+' if group in APPENDED_GROUPS else ''}{group}" in text
        assert all(f"    {name} " in text for name in presets(group)), group
    assert all(
        file.read_text(encoding="utf-8").startswith("#") for group in group_names() for file in presets(group).values()
    )
    assert keys.by_path()["optim.lr"].doc in text
    assert all(told in text for told in ("Ctrl-C", "cluster.max_restarts", "watchdog.*", "anomaly.*"))
    assert max(map(len, text.splitlines())) <= 120


def test_paths_into_lists_and_mappings() -> None:
    assert keys.find("cluster.sbatch.qos") is keys.by_path()["cluster.sbatch"]
    assert keys.find("data.train.0.weight") is keys.by_path()["data.train"]
    assert keys.find("data.train.0.wait") is None
    assert keys.find("data.train.x") is None
    assert keys.find("model") is None
    assert ClusterConfig().sbatch == {}
