"""An evaluation outside a run: of a checkpoint of any layout, on held-out shards. No torch until it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bigtrain.config import evaluation_sets
from bigtrain.config.data_rules import data_problems
from bigtrain.config.derive import sequences_of_evaluation
from bigtrain.config.errors import UserError
from bigtrain.config.schema import (
    CacheConfig,
    Config,
    DataConfig,
    EvalConfig,
    PrecisionConfig,
    RemoteConfig,
    SourceConfig,
    TrainConfig,
)
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.engine.open_model import OpenModel

if TYPE_CHECKING:
    from bigtrain.engine.inference import Loaded

T = TypeVar("T")


class Job(Protocol):
    """What is measured."""

    def records(self, loaded: Loaded) -> Iterator[dict[str, Any]]:
        """A record of each set or task, on rank 0 at least. Collective."""
        ...

    def shown(self, record: Mapping[str, Any]) -> str:
        """A record for a person."""
        ...


@dataclass(frozen=True)
class HeldOutSets:
    """Held-out shards, measured as a run measures its own."""

    sets: Mapping[str, HeldOut]
    micro_batch_size: int

    @staticmethod
    def of(
        opened: OpenModel,
        *,
        data: str = "",
        num_tokens: int | None = None,
        sequence_length: int | None = None,
        micro_batch_size: int | None = None,
    ) -> HeldOutSets:
        """The sets that `data` names (empty: the run's own), of each as many sequences as hold `num_tokens` (0: all;
        None: what the run took). Raises UserError for data that are missing, of another tokenizer, or too few."""
        of_run = _settings(opened)
        length = sequence_length or of_run.train.sequence_length
        if opened.model.position == "learned" and length > opened.model.max_positions:
            positions = opened.model.max_positions
            raise UserError(f"sequence_length={length}: the model has learned positions for {positions} tokens only")
        sources = evaluation_sets.parse(data) if data else of_run.data.valid
        if not sources:
            raise UserError(f"data=... is missing: {opened.folder} names none. Give a folder of shards to measure on.")
        settings = DataConfig(train=sources, valid=sources, cache=of_run.data.cache, remote=of_run.data.remote)
        _refuse_bad(settings)
        wanted: int | None = sequences_of_evaluation(of_run)
        if num_tokens is not None:
            wanted = -(-num_tokens // length) or None
        sets = held_out(settings, sequence_length=length, max_sequences=wanted, tokenizer=opened.tokenizer)
        return HeldOutSets(sets, micro_batch_size or of_run.train.micro_batch_size)

    def records(self, loaded: Loaded) -> Iterator[dict[str, Any]]:
        from bigtrain.data.loader import evaluation_batches
        from bigtrain.engine.inference import Scorer
        from bigtrain.trainer.evaluator import Evaluator

        topology, scorer = loaded.runtime.topology, Scorer(loaded)
        for name, sequences in self.sets.items():
            evaluator = Evaluator.of(
                lambda sequences=sequences: evaluation_batches(
                    sequences,
                    data_rank=topology.data_rank,
                    data_size=topology.data,
                    global_batch_size=topology.data * self.micro_batch_size,
                    micro_batch_size=self.micro_batch_size,
                ),
                loaded.tokenizer,
            )
            found = evaluator.evaluate(scorer)
            named = {"set": name} if name else {}
            yield {"kind": "eval", "step": loaded.step, **named, **found.as_record(), "tokens": found.tokens}

    def shown(self, record: Mapping[str, Any]) -> str:
        name = f"{record['set']}: " if "set" in record else ""
        return (
            f"{name}loss {record['loss']:.6f} nats a token, perplexity {record['perplexity']:.4f}, "
            f"{record['bits_per_byte']:.6f} bits a byte, {record['tokens']:,} tokens predicted"
        )


def run(opened: OpenModel, job: Job, *, tensor: int, device: str, dtype: str, out: str) -> None:
    """Load the model on this rank, do `job`, and say what was found: on stdout, and as JSON lines at the end of `out`.
    Collective. `dtype` auto: the run's own."""
    from bigtrain.engine.inference import load

    dtype = _settings(opened).precision.dtype if dtype == "auto" else dtype
    loaded = load(opened, tensor=tensor, device=device, dtype=dtype)
    is_main = loaded.runtime.is_main
    if is_main:
        print(f"{opened.folder}, step {opened.step:,}, {dtype}, {loaded.runtime.topology}", flush=True)
    for record in job.records(loaded):
        if is_main:
            print(job.shown(record), flush=True)
            _add(out, record)


def check_out(out: str) -> None:
    """Raise UserError where `out` cannot be added to."""
    if out and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise UserError(f"out={out}: it cannot be written: {'a folder' if Path(out).is_dir() else 'no such folder'}")


def _add(out: str, record: Mapping[str, Any]) -> None:
    try:
        if out:
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(f"out={out}: it cannot be written: {error.strerror}") from error


def _settings(opened: OpenModel) -> Config:
    """What the run that made the model took for its own evaluations; defaults where that is not known."""
    groups = opened.config
    train, data = groups.get("train", {}), groups.get("data", {})
    try:
        return Config(
            model=opened.model,
            train=_of(TrainConfig, train),
            eval=_of(EvalConfig, groups.get("eval", {})),
            precision=_of(PrecisionConfig, groups.get("precision", {})),
            data=DataConfig(
                valid=[SourceConfig(path=each["path"], set=each.get("set", "")) for each in data.get("valid", [])],
                cache=_of(CacheConfig, data.get("cache", {})),
                remote=_of(RemoteConfig, data.get("remote", {})),
            ),
        )
    except (TypeError, AttributeError, KeyError) as error:
        raise UserError(f"checkpoint {opened.folder}: its settings are not those of a run ({error})") from error


def _of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A group with the `values` that this version knows."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})


def _refuse_bad(data: DataConfig) -> None:
    """What a launch would refuse in data.valid."""
    found = [each for each in data_problems(Config(data=data), 1) if each.key.startswith("data.valid")]
    if found:
        raise UserError(str(found[0]))
