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
import sys
import warnings
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from bigtrain.config.errors import UserError


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
    """Raises UserError for what is no key=value, an unknown key, or a value of another type."""
    kinds = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Arguments)}
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in kinds:
            near = get_close_matches(key, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys are {', '.join(kinds)}"
            raise UserError(f"{argument!r} is no setting of bigtrain.generate{hint}")
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"{key}={value}: it takes {kinds[key].__name__}") from error
    if "checkpoint" not in values:
        raise UserError("checkpoint=... is missing: a checkpoint, or a run's folder. --help tells more.")
    return Arguments(**values)  # type: ignore[arg-type]


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip() if __doc__ else "")
        return 0
    try:
        arguments = parse(argv)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
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
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
