"""The data of a run, for one rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bigtrain.config.schema import Config
from bigtrain.data.baseline import unigram_cross_entropy
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.data.loader import StepBatch, batches, evaluation_batches
from bigtrain.data.order import Cursor, Order, training_order
from bigtrain.data.shards import Dataset, tokenizer_of
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.topology import Topology
from bigtrain.trainer.evaluator import Evaluator


@dataclass(frozen=True)
class RunData:
    config: Config
    topology: Topology
    order: Order
    held_out: HeldOut | None
    """None where data.valid is empty: then nothing is evaluated."""
    tokenizer: Tokenizer

    @staticmethod
    def open(config: Config, topology: Topology) -> RunData:
        """Raises UserError for data that are missing, damaged, too few, or of another tokenizer."""
        tokenizer = tokenizer_of(config)
        length, evaluation = config.train.sequence_length, config.eval
        order = training_order(config.data, seed=config.run.seed, sequence_length=length, tokenizer=tokenizer)
        wanted = evaluation.num_batches * config.train.global_batch_size
        valid = None
        if config.data.valid and wanted:
            valid = held_out(config.data, sequence_length=length, max_sequences=wanted, tokenizer=tokenizer)
        return RunData(config, topology, order, valid, tokenizer)

    def batches(self, start: Cursor) -> Iterator[StepBatch]:
        """This data rank's share of every step from `start` on, without end."""
        train, data = self.config.train, self.config.data
        return batches(
            self.order,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            start=start,
            num_workers=data.num_workers,
        )

    def evaluator(self) -> Evaluator | None:
        train, held_out = self.config.train, self.held_out
        if held_out is None:
            return None
        return Evaluator(
            lambda: evaluation_batches(
                held_out,
                data_rank=self.topology.data_rank,
                data_size=self.topology.data,
                global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size,
            ),
            self.tokenizer.bytes_of_tokens(),
            bytes_at_start=self.tokenizer.bytes_of_tokens(at_start=True),
            bos_id=self.tokenizer.bos_id,
        )

    def unigram_nats(self) -> float | None:
        """What a model scores on the evaluation's tokens that knows only how often each occurs in the training data.
        None where that is not known: there is no evaluation, or all training data are raw text."""
        counted = [dataset for dataset in self.order.datasets if isinstance(dataset, Dataset)]
        if self.held_out is None or not counted:
            return None
        return unigram_cross_entropy(counted, self.held_out.predicted_tokens())
