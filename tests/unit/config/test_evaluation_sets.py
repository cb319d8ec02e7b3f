"""Named evaluation sets: from the command line to the config and its frozen file, and what is no set."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain import config as configs
from bigtrain.config.check import check
from bigtrain.config.compose import compose, conf_dir
from bigtrain.config.errors import UserError
from bigtrain.config.evaluation_sets import as_list, by_name
from bigtrain.config.schema import RunConfig, SourceConfig
from bigtrain.launching.machine import resolve


def test_a_mapping_of_names_to_folders() -> None:
    found = compose(["data.valid={stdlib: data/stdlib/valid, books: data/books/valid}"]).data.valid
    assert found == [SourceConfig("data/stdlib/valid", set="stdlib"), SourceConfig("data/books/valid", set="books")]


def test_a_set_of_several_sources() -> None:
    found = compose(["data.valid={all: [{path: a, weight: 2}, {path: b}], b: b}"]).data.valid
    a, b = SourceConfig("a", 2.0, set="all"), SourceConfig("b", set="all")
    assert found == [a, b, SourceConfig("b", set="b")]
    assert by_name(found) == {"all": [a, b], "b": [SourceConfig("b", set="b")]}


def test_the_list_form_is_one_set_without_a_name() -> None:
    assert list(by_name(compose([]).data.valid)) == [""]
    assert by_name(compose(["data.valid=[{path: a}, {path: b}]"]).data.valid) == {
        "": [SourceConfig("a"), SourceConfig("b")]
    }


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket/folder",
        "https://$USER:$PASSWORD@host/folder?$QUERY",
        'pipe:curl -sf "https://host/it\'s {file}?x=1"',
        "back\\slash\\",
        "é, {x: [1]}",
        "${run.name}",
    ],
)
def test_any_place_comes_through_as_it_was_written(place: str, tmp_path: Path) -> None:
    quoted = '"' + place.replace('"', '\\"') + '"' if not place.endswith("\\") else f'"{place}\\"'
    config = compose([f"data.valid={{a: {quoted}, b: [{{path: {quoted}}}]}}"])
    expected = "default" if place == "${run.name}" else place
    assert [source.path for source in config.data.valid] == [expected, expected]
    config = replace(config, run=RunConfig(dir=str(tmp_path)))
    configs.save(config, tmp_path)
    assert configs.load(tmp_path) == config


def test_folders_of_every_set_become_absolute() -> None:
    config = resolve(compose(["data.valid={a: x, b: 's3://b/x'}"]), cwd=Path("/here"))
    assert [(source.path, source.set) for source in config.data.valid] == [("/here/x", "a"), ("s3://b/x", "b")]


def test_presets_of_the_user_name_sets_in_a_list(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    preset = tmp_path / "data" / "mine.yaml"
    start = "# @package _global_\n# mine\ndata:\n  train: [{path: t}]\n  valid: "
    preset.write_text(start + "[{path: x, set: a}, {path: y, set: b}]\n")
    assert list(by_name(compose(["data=mine"], [tmp_path]).data.valid)) == ["a", "b"]
    assert list(by_name(compose(["data=mine", "data.valid={c: z}"], [tmp_path]).data.valid)) == ["c"]
    preset.write_text(start + "{a: x, b: y}\n")
    with pytest.raises(UserError, match=r"mine.*valid: \[\{path: PATH, set: NAME\}\]"):
        compose(["data=mine"], [tmp_path])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{path: x}", "path is no name of a set"),
        ("{a: 3}", "the set a is 3"),
        ("{a: null}", "the set a is null"),
        ("{a: {path: x}}", "a list of {path: FOLDER}"),
        ("{a: [x]}", 'the set a is ["x"]'),
        ("{a: []}", "the set a is empty"),
        ("{a: [{path: x, wieght: 1}]}", "wieght"),
        ("{a: é}", shlex.quote('data.valid={a: "é"}')),
        ("{a: 'https://me:hunter2@host/x', b: 3}", "the set b is 3"),
        ("{a: ['https://me:hunter2@host/x']}", "the set a is"),
    ],
)
def test_what_is_no_set_is_one_clear_line(value: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        compose([f"data.valid={value}"])
    assert says in str(caught.value) and "data.valid" in str(caught.value)
    assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)


def test_other_settings_are_left_alone() -> None:
    for override in ("data.valid=[{path: a}]", "data.valid={a: ", "cluster.sbatch={qos: high}", "data.train={a: b}"):
        assert as_list(override) == override
    assert compose(["data.valid={}"]).data.valid == []


def test_the_example_of_the_readme() -> None:
    lines = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    (command,) = [line for line in lines if "then: [{from_tokens" in line]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "bigtrain.launch"]
    config = compose([*words[3:], "cluster.device=cpu", "cluster.procs_per_node=4"])
    assert check(config, 4) == []
    assert [source.weight for source in config.data.train] == [1.0, 0.0]
    assert list(by_name(config.data.valid)) == ["web", "code"]


def test_the_examples_of_the_preset() -> None:
    text = (conf_dir() / "data" / "shards.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    settings = re.findall(r"'(data\.(?:train|valid)=[^']*)'", text)
    assert len(settings) == 4
    for setting in settings:
        assert check(compose(["data=shards", setting, "cluster.device=cpu", "cluster.procs_per_node=4"]), 4) == []
