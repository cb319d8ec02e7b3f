"""Prompts from a file, and what became of them into a file. No torch."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from bigtrain.config.errors import UserError


@dataclass(frozen=True)
class Prompt:
    text: str
    line: int = 1
    """Of the file that it came from."""


def read_prompts(path: str | Path) -> tuple[list[Prompt], int]:
    """The prompts of a UTF-8 file, one a line, and how many empty lines were skipped. In a file .jsonl each line is an
    object with a "prompt", which may hold line ends and be empty.

    Raises UserError where it cannot be read, holds none, or a line is wrong: it names the line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"prompts={path}: it cannot be read: {error.strerror}") from error
    found = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"prompts={path}: it holds no prompt. Write one a line, or JSON lines into a file .jsonl.")
    return found, len(lines) - len(found)


def _prompt(path: str | Path, number: int, line: bytes) -> Prompt:
    where = f"prompts={path}: line {number}"
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 (byte {error.start + 1} of it)") from error
    if Path(path).suffix != ".jsonl":
        return Prompt(text, number)
    try:
        given: Any = json.loads(text)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{where} is no JSON object with a "prompt": {text[:60]!a}') from error
    if not isinstance(given, str) or not _is_unicode(given):
        raise UserError(f'{where}: "prompt" is {str(given)[:60]!a}, no text')
    return Prompt(given, number)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Answer:
    prompt: Prompt
    text: str
    """What was added."""
    num_tokens: int
    ended: str


class Answers:
    """Where the answers to several prompts go, in their order: a new file, JSON lines where its name ends so, else text
    under headings; without a file, stdout. Raises UserError where the file is there or cannot be written."""

    def __init__(self, out: str) -> None:
        self._is_jsonl = out.endswith(".jsonl")
        try:
            self._file: TextIO = open(out, "x", encoding="utf-8") if out else sys.stdout  # noqa: SIM115
        except OSError as error:
            raise UserError(refusal(out, error)) from error
        self._out = out

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._out:
            self._file.close()

    def write(self, answer: Answer) -> None:
        """Written through, so that a kill loses none that is done."""
        prompt = answer.prompt
        if self._is_jsonl:
            record = {
                "line": prompt.line,
                "prompt": prompt.text,
                "text": answer.text,
                "tokens": answer.num_tokens,
                "ended": answer.ended,
            }
            said = json.dumps(record, ensure_ascii=False)
        else:
            said = f"==> line {prompt.line} <==\n{prompt.text}{answer.text}\n"
        try:
            self._file.write(said + "\n")
            self._file.flush()
        except BrokenPipeError:  # who read it has seen enough
            raise
        except OSError as error:
            raise UserError(refusal(self._out or "stdout", error)) from error


def refusal(out: str, error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return f"out={out}: there is such a file already. Name another, or remove it."
    return f"out={out}: it cannot be written: {error.strerror}"


def check_out(out: str) -> None:
    """Raise UserError where `out` is there already, or its folder is not."""
    if out and Path(out).exists():
        raise UserError(refusal(out, FileExistsError()))
    if out and not Path(out).parent.is_dir():
        raise UserError(f"out={out}: there is no folder {Path(out).parent}")
