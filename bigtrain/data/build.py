"""Text -> a folder with train/ and valid/ shard sets.

1. Read the inputs one after the other, cut them into batches of documents, and tokenise the batches in many processes
   (`tokenising`). The tokens go, in the order of the inputs, into scratch files (`spool`).
2. `sides` tells from the texts which documents are valid/.
3. Each side is shuffled as a whole by `seed`, cut into shards, and the shards are written in parallel (`writing`).
4. All of it happens in a folder beside the wanted one (`claim`), which gives it its name at the very end, in one step.

The same inputs, tokenizer and options give the same bytes, whatever the number of workers, and however often the build
was killed: the same command goes on behind the last documents that were tokenised and the last shard that was written.

Memory grows with the number of documents only: 34 bytes for each in step 3, and 24 of a mapped file, which the system
may take back. Beyond that at most 256 MiB of text is on its way to the workers, or one longer document. Where a
document has n bytes, the process that reads takes up to 3 n (6 n from parquet) and a worker up to 4 n, or 10 n where a
character lies beyond U+FFFF. Disk: the tokens lie there twice until the end.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config.errors import UserError
from bigtrain.data import claim, inputs, readers, sides, writing
from bigtrain.data.encoding import token_dtype
from bigtrain.data.journal import sync
from bigtrain.data.readers import Drops
from bigtrain.data.shard_format import Index
from bigtrain.data.tokenising import Recipe, tokenize_all
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.work import Work
from bigtrain.data.workers import Workers

SHARD_TOKENS = 50_000_000
_VERSION = 1
"""Of what lies in the working folder and how bytes are made from it: raise it, and nothing older is gone on with."""
_GOES_ON = "What is done is kept: the same command goes on with it."
Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """What to build from. All of it is kept in index.json."""

    inputs: Sequence[str]
    """Files, folders, globs or URLs."""
    exclude: Sequence[str] = ()
    """Patterns of paths to leave out."""
    field: str = "text"
    """Key of JSON lines, or column of parquet, that holds the text."""
    prompt_field: str = ""
    """Key of JSON lines that holds a prompt, which stands before the text and is not learned; empty: none."""
    held_out: float = 0.05
    """Share of the documents that goes to valid/."""
    seed: int = 0
    """Of the shuffle."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens after which a new shard begins."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is secret in a URL."""
        made = dataclasses.asdict(self)
        made["inputs"] = [inputs.without_secrets(name) for name in self.inputs]
        made["exclude"] = list(self.exclude)
        if not self.prompt_field:  # as versions that know no prompts write it
            del made["prompt_field"]
        return made


@dataclass(frozen=True)
class BuildReport:
    """What `build` made: the index of each split, and what was left out."""

    splits: dict[str, Index]
    dropped: Drops

    def lines(self) -> list[str]:
        """What to tell the user."""
        sizes = [
            f"{split}/ {index.num_documents:,} documents, {index.num_tokens:,} tokens, {index.text_bytes / 1e6:,.1f} "
            f"MB of text ({index.text_bytes / index.num_tokens:.2f} bytes a token), {len(index.shards)} shards"
            for split, index in self.splits.items()
        ]
        return [*sizes, f"dropped documents: {self.dropped}"]


def build(
    options: BuildOptions,
    *,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    num_workers: int,
    num_lanes: int = 1,
    progress: bool = True,
    fresh: bool = False,
    say: Say = lambda line: None,
) -> BuildReport:
    """Build OUT/train and OUT/valid (no valid/ where held_out is 0). `num_workers` 0 tokenises in this process.

    Goes on with what a build of the same inputs, options and tokenizer left, and says so in a line through `say`;
    `fresh` discards that, and what builds with other options left. Raises claim.Busy where another process builds OUT;
    UserError where OUT has something in it already, an input names nothing, train/ gets fewer documents than
    `num_lanes`, or valid/ none.
    """
    target = Path(out)
    _check(options, target)
    files = readers.find_files(options.inputs, options.exclude)
    readers.check_prompts(files, options.prompt_field)
    identity = {"version": _VERSION, "tokenizer": tokenizer.fingerprint, **options.to_dict()}
    folder = claim.folder_of(target, identity)
    try:
        with claim.locked(target):
            _check(options, target)  # another build may have been faster
            _tidy(target, folder, fresh, say)
            with Work(folder, identity, files, inputs.stat(files), tokenizer) as work, _told(work, target):
                _announce(work, target, say)
                with Workers(num_workers) as workers:
                    report = _run(work, files, options, tokenizer, num_lanes, workers, progress)
                os.replace(work.out, target)
                sync(target.parent)
            for begun in claim.begun(target):
                claim.discard(begun)
    except OSError as error:
        raise _cannot_write(error, target) from error
    return report


def _check(options: BuildOptions, target: Path) -> None:
    sides.check_share(options.held_out)
    if options.seed < 0:
        raise UserError(f"seed is {options.seed}: at least 0")
    if options.shard_tokens < 1:
        raise UserError(f"shard_tokens is {options.shard_tokens}: at least 1")
    if target.name in ("", ".."):
        raise UserError(f"{target}: give the folder to make a name of its own")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        left = "".join(f" {folder} is left of a build of it, and can go too." for folder in claim.begun(target))
        raise UserError(f"{target} is already there. Remove it, or choose another folder.{left}")


def _tidy(target: Path, folder: Path, fresh: bool, say: Say) -> None:
    """Discard what was begun where `fresh`; else tell of what was begun with other options."""
    for begun in claim.begun(target):
        if fresh:
            claim.discard(begun)
        elif begun != folder:
            say(f"{target}: {begun} was begun with other options; it is not used, and goes when this build is done")


def _announce(work: Work, target: Path, say: Say) -> None:
    """Say what this build goes on with."""
    spool, begun = work.spool, f"{target}: goes on with a build that was stopped"
    reason = f"; {work.changed_input} and what follows is read again, for it has changed" if work.changed_input else ""
    if work.num_written:
        say(f"{begun}: all {spool.num_documents:,} documents are tokenised, {work.num_written:,} shards are written")
    elif spool.has_commits or work.changed_input:
        done = spool.bytes_read / max(work.total_bytes, 1)
        say(f"{begun}: {spool.num_documents:,} documents are tokenised ({done:.0%} of the inputs){reason}")


def _run(
    work: Work,
    files: Sequence[str],
    options: BuildOptions,
    tokenizer: Tokenizer,
    num_lanes: int,
    workers: Workers,
    progress: bool,
) -> BuildReport:
    spool, dtype = work.spool, token_dtype(tokenizer.vocab_size)
    recipe = Recipe(options.field, options.prompt_field, str(work.folder), tokenizer.fingerprint, dtype)
    tokenize_all(files, recipe, spool, workers, total_bytes=work.total_bytes, progress=progress)
    try:
        splits = writing.plan(
            spool,
            held_out=options.held_out,
            seed=options.seed,
            shard_tokens=options.shard_tokens,
            num_lanes=num_lanes,
        )
    except UserError:  # the same inputs would give the same error: nothing to go on with
        claim.discard(work.folder)
        raise
    writing.write_shards(splits, spool, dtype, work.out, work.written, workers, progress)
    made, counts = options.to_dict(), dict(sorted(spool.dropped.counts.items()))
    indexes: dict[str, Index] = {}
    for split in splits:
        folder = work.out / split.name
        indexes[split.name] = writing.write_index(
            split, work.written, folder, tokenizer, dtype, made=made, dropped=counts
        )
    return BuildReport(indexes, spool.dropped)


@contextmanager
def _told(work: Work, target: Path) -> Iterator[None]:
    """Errors as the user sees them: with what is kept."""
    try:
        yield
    except (UserError, OSError, BrokenProcessPool) as error:
        told = UserError(str(error))
        if isinstance(error, BrokenProcessPool):
            told = UserError("a worker process was killed; out of memory? Try fewer workers.")
        elif isinstance(error, OSError):
            told = _cannot_write(error, target)
        kept = work.spool.has_commits and work.folder.exists()
        raise UserError(f"{told} {_GOES_ON}" if kept else str(told)) from error


def _cannot_write(error: OSError, target: Path) -> UserError:
    return UserError(f"cannot write {error.filename or target}: {error.strerror or error}.")
