"""Best-fit packing on the corpus that every machine has: under 1 % of the places stay empty."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.compose import compose
from bigtrain.data import prepare
from bigtrain.data.data_report import packing_of
from bigtrain.data.order import training_order

pytestmark = pytest.mark.slow


def test_under_one_percent_is_padding_and_the_launch_says_so(tmp_path: Path) -> None:
    config = compose([f"data.prepare.out={tmp_path / 'stdlib'}", "data.pack=best_fit"])
    prepare.prepare(config.data, config.tokenizer, progress=False, say=lambda line: print(line, file=sys.stderr))
    for length in (256, 1024, 2048):
        order = training_order(config.data, seed=1, sequence_length=length)
        padding = packing_of(order, 0).padding
        assert 0 < padding < 0.01, length
        told = prepare.check(replace(config, train=replace(config.train, sequence_length=length)))
        assert f"best_fit: {padding:.2%} padding, " in told[1]
