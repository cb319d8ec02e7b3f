"""One thing that is wrong with a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing to fix."""

    key: str
    value: Any
    message: str
    """What is wrong, as the end of a sentence that begins with the key."""
    fix: str
    """What to do, as a sentence."""

    def __str__(self) -> str:
        return f"{self.key}={_shown(self.value)}: {self.message}. {self.fix}."


def _shown(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false", "": "''"}.get(value, str(value)) if _plain(value) else str(value)
    )


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str))
