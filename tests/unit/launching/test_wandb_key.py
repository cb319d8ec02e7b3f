"""Where a W&B key may be; none of these is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.launching.wandb_key import has_wandb_key


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a machine without a key."""
    monkeypatch.chdir(tmp_path)
    return {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}


def test_none(environ: dict[str, str]) -> None:
    assert not has_wandb_key(environ)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_in_the_environment(environ: dict[str, str], name: str) -> None:
    assert has_wandb_key({**environ, name: "x"})
    assert not has_wandb_key({**environ, name: ""})


def test_in_netrc_for_the_host(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert has_wandb_key(environ)
    assert not has_wandb_key({**environ, "WANDB_BASE_URL": "https://wandb.example.org"})
    (tmp_path / "netrc").write_text("machine other\n  login user\n  password x\n")
    assert not has_wandb_key(environ)
    (tmp_path / "netrc").write_text("machine")
    assert not has_wandb_key(environ)


def test_for_the_host_of_the_settings(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org\n  login user\n  password x\n")
    assert not has_wandb_key(environ)
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert has_wandb_key(environ)


def test_in_the_settings(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "settings").write_text("no section")
    assert not has_wandb_key(environ)
    (tmp_path / "settings").write_text("[default]\napi_key = x\n")
    assert has_wandb_key(environ)
