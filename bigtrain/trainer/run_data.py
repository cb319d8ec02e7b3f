"""The data of a run, for one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from bigtrain.config.derive import sequences_of_evaluation
from bigtrain.config.schema import Config
from bigtrain.data.baseline import unigram_cross_entropies
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.data.loader import StepBatch, batches, evaluation_batches
from bigtrain.data.microbatch import Microbatch
from bigtrain.data.order import Cursor, Order, training_order
from bigtrain.data.passed_over import Window
from bigtrain.data.shards import Dataset, tokenizer_of
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.topology import Topology
from bigtrain.trainer.evaluator import Evaluator


@dataclass(frozen=True)
class RunData:
    config: Config
    topology: Topology
    order: Order
    held_out: dict[str, HeldOut]
    """By the name of the evaluation set ("": the only one, without a name); none where nothing is evaluated."""
    tokenizer: Tokenizer

    @staticmethod
    def open(config: Config, topology: Topology) -> RunData:
        """Raises UserError for data that are missing, damaged, too few, or of another tokenizer."""
        tokenizer = tokenizer_of(config)
        length = config.train.sequence_length
        order = training_order(config.data, seed=config.run.seed, sequence_length=length, tokenizer=tokenizer)
        valid: dict[str, HeldOut] = {}
        if config.data.valid:
            wanted = sequences_of_evaluation(config)
            valid = held_out(config.data, sequence_length=length, max_sequences=wanted, tokenizer=tokenizer)
            for sequences in valid.values():
                sequences.check()
        return RunData(config, topology, order, valid, tokenizer)

    def batches(self, start: Cursor, passed_over: Sequence[Window] = ()) -> Iterator[StepBatch]:
        """This data rank's share of every step from `start` on, without end, but what is `passed_over`."""
        train, data = self.config.train, self.config.data
        return batches(
            self.order,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            start=start,
            num_workers=data.num_workers,
            passed_over=passed_over,
        )

    def evaluators(self) -> dict[str, Evaluator]:
        """One for each evaluation set, by its name."""
        return {
            name: Evaluator.of(partial(self._evaluation_batches, sequences), self.tokenizer)
            for name, sequences in self.held_out.items()
        }

    def unigram_nats(self) -> dict[str, float]:
        """What a model scores on each evaluation set that knows only how often each token occurs in the training data.
        Empty where that is not known: all training data are raw text."""
        counted = [dataset for dataset in self.order.datasets if isinstance(dataset, Dataset)]
        predicted = {name: sequences.predicted_tokens() for name, sequences in self.held_out.items()}
        return unigram_cross_entropies(counted, predicted) if predicted and counted else {}

    def _evaluation_batches(self, held_out: HeldOut) -> Iterator[tuple[Microbatch, ...]]:
        train = self.config.train
        return evaluation_batches(
            held_out,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
        )
