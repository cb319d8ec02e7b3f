"""Whether W&B would find a key: it is looked for where W&B looks, without importing it, and never shown."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

CLOUD = "https://api.wandb.ai"


def has_wandb_key(environ: Mapping[str, str] = os.environ) -> bool:
    """In the environment, in the netrc file for W&B's host, or in W&B's own settings files."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _settings(environ)
    host = urlsplit(environ.get("WANDB_BASE_URL") or settings.get("base_url") or CLOUD).netloc
    return bool(settings.get("api_key")) or _is_in_netrc(host, environ)


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """What `wandb login --host` and its like wrote: of the user, then of this folder."""
    folder = Path(environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([folder / "settings", Path("wandb") / "settings"])
    return dict(parser["default"]) if parser.has_section("default") else {}


def _is_in_netrc(host: str, environ: Mapping[str, str]) -> bool:
    path = Path(environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        found = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None and bool(found[2])
