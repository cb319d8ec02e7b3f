"""Tasks of EleutherAI's lm-eval on a model of ours, without an export: its `LM` interface over `bigtrain.engine`."""

# pyright: reportMissingImports=false
# (lm-eval is optional)

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config.errors import UserError

if TYPE_CHECKING:
    from bigtrain.engine.inference import Loaded

_SEED = 1234
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_MAX_GEN_TOKENS = 256
"""As lm-eval has it, where a task does not say."""


@dataclass(frozen=True)
class Tasks:
    """A job for `bigtrain.trainer.evaluation.run`. Raises UserError where lm-eval is not installed."""

    names: Sequence[str]
    include_path: str = ""
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if find_spec("lm_eval") is None:
            raise UserError("--lm-eval: lm-eval is not installed here. Install it: pip install lm-eval")
        if self.include_path and not Path(self.include_path).is_dir():
            raise UserError(f"include_path={self.include_path}: there is no such folder")

    def records(self, loaded: Loaded) -> Iterator[dict[str, Any]]:
        """A record a task, on rank 0, its metrics as lm-eval names them. Raises UserError for an unknown task."""
        import lm_eval
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.include_path or None)
        unknown = [name for name in self.names if not manager.match_tasks([name])]
        if unknown:
            raise UserError(f"--lm-eval: it has no task {', '.join(unknown)}. `lm-eval ls tasks` lists them.")
        model = adapter(loaded, batch_size=self.batch_size)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(self.names),
            task_manager=manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            log_samples=False,
        )
        if model.num_cut and loaded.runtime.is_main:
            positions = loaded.model.max_positions
            print(
                f"{model.num_cut:,} contexts were cut at their left to the model's {positions:,} positions",
                file=sys.stderr,
            )
        results = found["results"] if found else {}  # lm-eval gives them to local rank 0 alone
        for name, metrics in results.items():
            values = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
            yield {"kind": "lm_eval", "step": loaded.step, "task": name, **values}

    def shown(self, record: Mapping[str, Any]) -> str:
        values = {key: value for key, value in record.items() if key not in ("kind", "step", "task")}
        return f"{record['task']}: " + ", ".join(
            f"{key.removesuffix(',none')} {value:.6g}" for key, value in values.items()
        )


def adapter(loaded: Loaded, *, batch_size: int) -> Any:
    """An `lm_eval.api.model.LM` that asks `loaded`. Documents begin with `bos_id`, as in training.

    What does not fit into the model's positions is cut at its left, as lm-eval does, and counted in `num_cut`. Its
    methods are collective: tensor ranks make the same calls."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    from bigtrain.engine.inference import Sampling, Text, go_on
    from bigtrain.engine.scoring import score

    tokenizer, room = loaded.tokenizer, loaded.model.max_positions

    class Adapter(TemplateLM):
        def __init__(self) -> None:
            super().__init__()
            self.num_cut = 0

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id

        @property
        def max_length(self) -> int:
            return room

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            begin = [] if add_special_tokens is False else [tokenizer.bos_id]
            return [*begin, *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
            pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
            scores = score(loaded, pairs, batch_size=batch_size)
            answers = [(each.log_likelihood, each.is_greedy) for each in scores]
            for (key, *_ids), answer in zip(requests, answers, strict=True):
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
            return answers

        def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
            if len(continuation) > room:
                raise UserError(
                    f"--lm-eval: a task scores {len(continuation):,} tokens at once, the model has {room:,} positions"
                )
            kept = context[-(room + 1 - len(continuation)) :]
            self.num_cut += len(kept) < len(context)
            return kept, continuation

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            totals: list[float] = []
            for (string,) in [request.args for request in requests]:
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(string, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=room,
                    context_len=1,
                )
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                total = sum(value for value, _ in self._loglikelihood_tokens(pairs))
                self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
                totals.append(total)
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            asked = [request.args for request in requests]
            found: dict[int, str] = {}
            alike: dict[str, list[int]] = {}
            for number, (_, settings) in enumerate(asked):
                alike.setdefault(repr(sorted(settings.items())), []).append(number)
            for numbers in alike.values():
                for first in range(0, len(numbers), batch_size):
                    batch = numbers[first : first + batch_size]
                    texts = self._generate([asked[number][0] for number in batch], asked[batch[0]][1], batch)
                    found.update(zip(batch, texts, strict=True))
            for number, request in enumerate(asked):
                self.cache_hook.add_partial("generate_until", request, found[number])
            return [found[number] for number in range(len(asked))]

        def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any], numbers: Sequence[int]) -> list[str]:
            stops, max_tokens, sampling = _settings(settings)
            max_tokens = min(max_tokens, room - 1)
            texts = [
                Text.of(self._cut(self.tok_encode(context), room - max_tokens), seed=_SEED, number=number)
                for context, number in zip(contexts, numbers, strict=True)
            ]
            for grown in go_on(loaded, texts, max_tokens=max_tokens, sampling=sampling):
                for text in grown:
                    if any(stop in tokenizer.decode(text.ids, at_start=False) for stop in stops):
                        text.ended = "stop"
            return [_before(tokenizer.decode(text.ids, at_start=False), stops) for text in texts]

        def _cut(self, context: list[int], length: int) -> list[int]:
            self.num_cut += len(context) > length
            return context[-length:]

    def _settings(settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """(what ends a text, tokens, how to draw). Raises UserError for a setting that is not known."""
        unknown = [key for key in settings if key not in _GENERATION]
        if unknown:
            raise UserError(f"--lm-eval: a task wants {', '.join(unknown)}, which is not known here")
        until = settings.get("until") or []
        draws = settings.get("do_sample", bool(settings.get("temperature", 0)))
        sampling = Sampling(
            temperature=float(settings.get("temperature", 1.0)) if draws else 0.0,
            top_k=int(settings.get("top_k", 0)) if draws else 0,
            top_p=float(settings.get("top_p", 1.0)) if draws else 1.0,
        )
        stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
        return [stop for stop in stops if stop], int(settings.get("max_gen_toks", _MAX_GEN_TOKENS)), sampling

    return Adapter()


def _before(text: str, stops: Sequence[str]) -> str:
    """What stands before the first of `stops`."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
