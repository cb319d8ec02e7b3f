"""Which documents are held out: those whose text hashes below a share of all hashes; where there is none, the smallest.

The hash knows nothing but the text, so copies of a document are on the same side, in this and in every other build.
The second half of the rule matters to small corpora only: two different documents are enough for a train/ and a valid/.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bigtrain.config.errors import UserError
from bigtrain.data.readers import DOCUMENTS, Drops


@dataclass
class Census:
    """Documents of a corpus."""

    train: int = 0
    valid: int = 0
    dropped: Drops = field(default_factory=Drops)

    def check(self, share: float, *, num_lanes: int = 1, needs_valid: bool = True) -> None:
        """Raises UserError, with the counts and what to change, where train/ has fewer documents than `num_lanes`, or
        valid/ has none though a share of the documents is to be held out."""
        total, problems = self.train + self.valid, list[str]()
        if self.train < num_lanes:
            problems.append(f"train/ needs {num_lanes:,}" + f" (data.num_lanes={num_lanes})" * (num_lanes > 1))
        if needs_valid and share and not self.valid:
            problems.append("valid/ needs one that is not in train/")
        if not problems:
            return
        if not total:
            reasons = f"no document is left. Dropped: {self.dropped}"
            raise UserError(reasons if self.dropped.counts else "the inputs hold no document")
        fixes = [f"add text: {DOCUMENTS}"]
        if self.valid and total > num_lanes:
            fixes.insert(0, f"lower data.prepare.held_out={share} (--held-out)")
        if num_lanes > self.train > 0:
            fixes.insert(0, f"set data.num_lanes to at most {self.train} (a multiple of the data-parallel size)")
        dropped = f" Dropped: {self.dropped}" if self.dropped.counts else ""
        raise UserError(
            f"too few documents: {total:,}, of which {self.train:,} for train/ and {self.valid:,} for valid/; "
            f"{' and '.join(problems)}. To mend it, {', or '.join(fixes)}.{dropped}"
        )


def hash_of(encoded: bytes) -> int:
    """64 bits of the text in UTF-8, the same on every machine."""
    digest = new_digest()
    digest.update(encoded)
    return number_of(digest)


def new_digest() -> hashlib.blake2b:
    """For a text that comes in parts: update it with each, and `number_of` it is the hash of the whole."""
    return hashlib.blake2b(digest_size=8)


def number_of(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def check_share(share: float) -> None:
    """Raises UserError for what is no share."""
    if not 0 <= share < 1:
        raise UserError(f"held_out is {share}: a share of the documents, from 0 to below 1")


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool[n]: the documents, by their hashes (uint64[n]), that go to valid/."""
    below = hashes < np.uint64(_limit(share))
    if not share or below.any() or not len(hashes) or hashes.min() == hashes.max():
        return below
    return hashes == hashes.min()


def training_side(texts: Iterable[str], share: float, census: Census) -> Iterator[str]:
    """The texts that `held_out` leaves to train/, in one pass, counted in `census`.

    While none is below the share, the text with the smallest hash so far waits, with its copies, and comes last."""
    smallest, waiting = 1 << 64, list[str]()
    for text in texts:
        number = hash_of(text.encode())
        if number < _limit(share):
            census.valid += 1
            continue
        census.train += 1
        if census.valid or not share or number > smallest:
            yield text
            continue
        if number < smallest:
            yield from waiting
            smallest, waiting = number, []
        waiting.append(text)
    if census.valid or len(waiting) == census.train:
        yield from waiting
    else:
        census.valid, census.train = len(waiting), census.train - len(waiting)


def _limit(share: float) -> int:
    return math.ceil(share * 2**64)
