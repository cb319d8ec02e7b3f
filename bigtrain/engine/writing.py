"""Texts for people and files: one that is shown while it is written, or many, in batches."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator, Sequence

from bigtrain.config.errors import UserError
from bigtrain.engine.inference import Clock, Loaded, Sampling, Text, go_on
from bigtrain.engine.prompts import Answer, Answers, Prompt


class Writer:
    """Rank 0 speaks; all ranks call the same."""

    def __init__(self, loaded: Loaded, sampling: Sampling, *, max_tokens: int, use_cache: bool = True) -> None:
        """Raises UserError where there are more ranks than share the model."""
        topology = loaded.runtime.topology
        if topology.world != topology.tensor:
            raise UserError(
                f"{topology.world} ranks were started for tensor={topology.tensor}: start as many as share it"
            )
        self.loaded, self.sampling = loaded, sampling
        self.max_tokens, self.use_cache = max_tokens, use_cache

    def stream(self, prompt: str) -> None:
        """The text on stdout as it is written, from the prompt on."""
        tokenizer, clock = self.loaded.tokenizer, Clock()
        text = self._texts([Prompt(prompt)], 0)[0]
        shown = Shown(prompt, enabled=self.loaded.runtime.is_main)
        for grown in self._go_on([text], clock):
            for one in grown:
                first = len(one.ids) == 1 and not prompt
                shown.write(tokenizer.decode_bytes(one.ids[-1:], at_start=first))
        shown.end()
        self._tell_end([text], clock)

    def answer(self, prompts: Sequence[Prompt], skipped: int, *, out: str, batch_size: int) -> None:
        """Every prompt's text, in their order, into `out` or on stdout."""
        is_main, clock = self.loaded.runtime.is_main, Clock()
        texts = self._texts(prompts, 0)
        with Answers(out) if is_main else contextlib.nullcontext() as answers:
            for first in range(0, len(texts), batch_size):
                batch = texts[first : first + batch_size]
                for _ in self._go_on(batch, clock):
                    pass
                for prompt, text in zip(prompts[first:], batch, strict=False):
                    if answers is not None:
                        said = self.loaded.tokenizer.decode(text.ids, at_start=not prompt.text)
                        answers.write(Answer(prompt, said, len(text.ids), text.ended))
        if skipped:
            self._tell(f"{skipped:,} empty lines of the prompts were skipped")
        self._tell_end(texts, clock)

    def _go_on(self, texts: Sequence[Text], clock: Clock) -> Iterator[list[Text]]:
        for grown in go_on(
            self.loaded, texts, max_tokens=self.max_tokens, sampling=self.sampling, use_cache=self.use_cache
        ):
            clock.num_tokens += len(grown)
            yield grown

    def _texts(self, prompts: Sequence[Prompt], first: int) -> list[Text]:
        """Raises UserError for a prompt that the model has no positions for."""
        tokenizer, room = self.loaded.tokenizer, self.loaded.model.max_positions
        texts: list[Text] = []
        for number, prompt in enumerate(prompts, first):
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt.text)]
            if len(ids) > room:
                where = f"the prompt of line {prompt.line}" if len(prompts) > 1 else "the prompt"
                raise UserError(
                    f"{where} has {len(ids):,} tokens, and the model has {room:,} positions. Shorten it; "
                    f"it begins with {prompt.text[:40]!a}"
                )
            texts.append(Text.of(ids, seed=self.sampling.seed, number=number))
        return texts

    def _tell_end(self, texts: Sequence[Text], clock: Clock) -> None:
        full = sum(text.ended == "positions" for text in texts)
        if full:
            which = f"{full:,} of {len(texts):,} texts end" if len(texts) > 1 else "the text ends"
            positions = self.loaded.model.max_positions
            self._tell(
                f"{which} before max_tokens={self.max_tokens}: the model has {positions:,} positions, and no more"
            )
        self._tell(str(clock))

    def _tell(self, line: str) -> None:
        if self.loaded.runtime.is_main:
            print(line, file=sys.stderr, flush=True)


class Shown:
    """Bytes on stdout as text: a character is shown when its last byte is there."""

    def __init__(self, begin: str, *, enabled: bool) -> None:
        self._enabled = enabled
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._print(begin)

    def write(self, more: bytes) -> None:
        self._print(self._decoder.decode(more))

    def end(self) -> None:
        self._print(self._decoder.decode(b"", final=True) + "\n")

    def _print(self, text: str) -> None:
        if self._enabled and text:
            print(text, end="", flush=True)
