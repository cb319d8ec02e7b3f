"""Let a model go on from a prompt, or from many.

    python -m bigtrain.generate checkpoint=RUN [prompt=TEXT | prompts=FILE] [key=value ...]

    python -m bigtrain.generate checkpoint=runs/default prompt='def '
    python -m bigtrain.generate checkpoint=runs/default prompt='def ' temperature=0               # the likeliest
    python -m bigtrain.generate checkpoint=runs/default prompts=prompts.txt out=texts.jsonl       # one prompt a line
    python -m bigtrain.generate checkpoint=runs/default/checkpoints/step-00000300 tensor=2        # on two ranks
    python -m bigtrain.generate checkpoint=Llama-3.2-1B prompt='Once'                       # of Hugging Face

what
  checkpoint    a checkpoint of any layout, a run's folder (then its newest), or a Hugging Face folder
  prompt        the text to go on from; without one, a new document begins
  prompts       a file of prompts: one a line, or in a file .jsonl an object a line: {"prompt": "..."}
  out           a new file for the texts of `prompts`; .jsonl: an object a line with line, prompt, text, tokens, ended
                (eos: so the model chose, max_tokens, positions: the model has no more). Default: the console

how
  max_tokens    tokens to add (100), fewer where the model ends the document or has no more positions
  temperature   0 always takes the likeliest token; higher is more varied (0.8)
  top_k         draw from this many likeliest tokens (50); 0: from all
  top_p         and of these from the fewest that have this much of the probability together (1: all)
  seed          the same seed, the same text (0); it depends neither on the ranks nor on the other prompts

where
  batch_size    prompts at a time (16)
  tensor        ranks that share the model (1); each reads and holds its part. Also spelt parallel.tensor
  device        auto | cpu | cuda
  dtype         fp32 | bf16 | fp16: numbers of the weights (fp32)
  cache         true | false: false reads the whole text again for each token, to compare with (true)

One prompt is printed as it is written. Tokens a second, and what did not fit, are told on stderr. Exit status: 0, 2
for a mistake, 130 for Ctrl-C.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from bigtrain.config import arguments
from bigtrain.config.arguments import Rule
from bigtrain.config.vendors import check_versions, importing


@dataclass(frozen=True)
class Arguments:
    checkpoint: str
    prompt: str = ""
    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    prompts: str = ""
    out: str = ""
    batch_size: int = 16
    tensor: int = 1
    device: str = "auto"
    dtype: str = "fp32"
    cache: bool = True


def parse(argv: list[str]) -> Arguments:
    """Raises UserError for what is no key=value, an unknown key, or a value of another type or out of range."""
    aliases = {"parallel.tensor": "tensor"}
    return arguments.parse(Arguments, argv, command="bigtrain.generate", aliases=aliases, rules=_rules)


def _rules(given: Arguments) -> list[Rule]:
    temperature = given.temperature
    return [
        ("max_tokens", given.max_tokens >= 1, "1 or more"),
        ("temperature", temperature == 0 or 1e-3 <= temperature < math.inf, "0, or a number from 0.001 up"),
        ("top_k", given.top_k >= 0, "0 (all tokens) or more"),
        ("top_p", 0 < given.top_p <= 1, "more than 0, at most 1 (all tokens)"),
        ("seed", 0 <= given.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        ("prompts", not (given.prompts and given.prompt), "a file, and prompt=... is not given beside it"),
        ("out", not given.out or bool(given.prompts), "a file, and prompts=FILE beside it"),
        ("batch_size", given.batch_size >= 1, "1 or more"),
        *arguments.place_rules(given),
    ]


def main(argv: Sequence[str]) -> int:
    return arguments.run(argv, __doc__ or "", _main)


def _main(argv: list[str]) -> int:
    given = parse(argv)
    check_versions()
    with importing():
        from bigtrain.engine import prompts
        from bigtrain.engine.open_model import open_model
        from bigtrain.launching import ranks

    asked = prompts.read_prompts(given.prompts) if given.prompts else ([prompts.Prompt(given.prompt)], 0)
    prompts.check_out(given.out if not ranks.is_rank() else "")
    opened = open_model(given.checkpoint)
    opened.check_tensor(given.tensor)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    ranks.check_gpu(given.device)
    if given.tensor > 1 and not ranks.is_rank():
        return ranks.run("bigtrain.generate", argv, world=given.tensor, device=given.device)
    with importing():
        from bigtrain.engine.inference import Sampling, load
        from bigtrain.engine.writing import Writer

    writer = Writer(
        load(opened, tensor=given.tensor, device=given.device, dtype=given.dtype),
        Sampling(given.temperature, given.top_k, given.top_p, given.seed),
        max_tokens=given.max_tokens,
        use_cache=given.cache,
    )
    if given.prompts:
        writer.answer(*asked, out=given.out, batch_size=given.batch_size)
    else:
        writer.stream(asked[0][0].text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
