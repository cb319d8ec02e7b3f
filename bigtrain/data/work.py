"""What lies in the working folder of a build, and what of it the next build goes on with.

    build.json           the options, and the input files with their sizes and times
    the tokenizer's files
    spool documents commits                   the tokens (`spool`)
    shards               a journal: the shards that are whole (`writing`)
    out/                 what takes the name of the data set at the very end

Documents count as tokenised up to the first input file that is another than then (repaired, say); shards count where
all documents do.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigtrain.data import claim, inputs
from bigtrain.data.inputs import Stat
from bigtrain.data.journal import write_whole
from bigtrain.data.readers import Position
from bigtrain.data.spool import Spool
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.writing import Written


class Work:
    """The folder, open. Left by an error, it stays for the next build if there is something in it to go on with."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], files: Sequence[str], stats: Sequence[Stat], tokenizer: Tokenizer
    ) -> None:
        """`identity` is what the result depends on besides the files."""
        self.folder, self.out = folder, folder / "out"
        self.total_bytes = sum(stat.size_bytes for stat in stats)
        before = _enter(folder, identity)
        now = [
            [inputs.without_secrets(name), stat.size_bytes, stat.version]
            for name, stat in zip(files, stats, strict=True)
        ]
        unchanged = _common(before, now)
        self.changed_input: str | None = before[unchanged][0] if unchanged < len(before) else None
        """The first input file of the earlier build that is not the same now."""
        self.spool = Spool(folder, unchanged_files=unchanged)
        if before != now or self.spool.position != Position(len(files), 0):
            (folder / "shards").unlink(missing_ok=True)
            shutil.rmtree(self.out, ignore_errors=True)
        self.written = Written(self.out, folder / "shards")
        tokenizer.save(folder)
        for torn in folder.glob("inputs-*"):
            shutil.rmtree(torn, ignore_errors=True)
        write_whole(folder / claim.MANIFEST, json.dumps({"build": identity, "files": now}) + "\n")

    @property
    def num_written(self) -> int:
        """Shards that an earlier build wrote, or this one so far."""
        return self.written.number

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk again; all that counts has been committed
            self.spool.close()
            self.written.close()
        if kind and not self.spool.has_commits:
            claim.discard(self.folder)


def _enter(folder: Path, identity: dict[str, Any]) -> list[Any]:
    """Make the folder, or find it as an earlier build left it. Returns the input files of that build."""
    try:
        found = json.loads((folder / claim.MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found.get("build") == identity:
        return found["files"]
    claim.discard(folder)
    folder.mkdir()
    return []


def _common(first: list[Any], second: list[Any]) -> int:
    """How many entries are equal, from the first."""
    shorter = min(len(first), len(second))
    return next((number for number in range(shorter) if first[number] != second[number]), shorter)
