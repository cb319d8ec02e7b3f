"""Let a checkpoint go on from a prompt, on one process.

    python -m bigtrain.generate checkpoint=RUN [prompt=TEXT] [max_tokens=100] [temperature=0.8] [top_k=50] [seed=0]

checkpoint    a checkpoint, or a run's folder (then its newest)
prompt        the text to go on from
max_tokens    tokens to add, fewer where the model ends the document
temperature   0 always takes the likeliest token; higher is more varied
top_k         draw from this many likeliest tokens; 0 draws from all
seed          the same seed, the same text
device        auto | cpu | cuda
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from bigtrain.config.errors import UserError
from bigtrain.config.vendors import check_versions


@dataclass(frozen=True)
class Arguments:
    checkpoint: str
    prompt: str = ""
    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    device: str = "auto"


def parse(arguments: list[str]) -> Arguments:
    """Raises UserError for what is no key=value, an unknown key, or a value of another type or out of range."""
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Arguments)}
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in kinds:
            near = get_close_matches(key, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(kinds)}"
            raise UserError(f"{argument!r} is no setting of bigtrain.generate{hint}")
        try:
            value.encode()  # what is no UTF-8 arrives as half of a surrogate pair
            values[key] = kinds[key](value)
        except UnicodeEncodeError as error:
            raise UserError(f"{key}={value!a}: it is no UTF-8") from error
        except ValueError as error:
            raise UserError(f"{key}={value}: it takes {kinds[key].__name__}") from error
    if "checkpoint" not in values:
        raise UserError("checkpoint=... is missing: a checkpoint, or a run's folder. --help tells more.")
    found = Arguments(**values)  # type: ignore[arg-type]
    for key, sound, words in _rules(found):
        if not sound:
            raise UserError(f"{key}={values[key]!s:.80}: it takes {words}")
    return found


def _rules(arguments: Arguments) -> list[tuple[str, bool, str]]:
    """(key, whether its value is sound, what it takes)."""
    temperature = arguments.temperature
    return [
        ("max_tokens", arguments.max_tokens >= 1, "1 or more"),
        ("temperature", temperature == 0 or 1e-3 <= temperature < math.inf, "0, or a number from 0.001 up"),
        ("top_k", arguments.top_k >= 0, "0 (all tokens) or more"),
        ("seed", 0 <= arguments.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        ("device", arguments.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    ]


def _check_gpu(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.device_count():
        raise UserError("device=cuda: PyTorch sees no GPU here. Set device=cpu or leave it out.")


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip() if __doc__ else "")
        return 0
    try:
        arguments = parse(argv)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        check_versions()
        _check_gpu(arguments.device)
        from bigtrain.engine.inference import continue_text, load

        loaded = load(Path(arguments.checkpoint), device=arguments.device)
        tokens = continue_text(
            loaded,
            arguments.prompt,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
        print(arguments.prompt + loaded.tokenizer.decode(tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
