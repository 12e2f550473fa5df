#!/usr/bin/env python3
"""Count the zeros that the activation leaves of every MoE layer's hidden features, on a model's own data.

    python scripts/benchmarks/measure_sparsity.py examples/output/translation/model.pt \
        examples/output/translation/data-bin --subset test

After ReLU a column of fc2 whose hidden feature is zero need not be read: worth it where most are zero. At one row a
call reads what that row needs, at two what either needs; columns that none of them needs are the last two figures.
Rows are in the order of the model's batches, so that two of them are neighbours in an expert.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from fairseq import utils
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fairseq_moe_ext as moe  # noqa: E402
from fairseq_moe_ext.command_line.parsing import positive  # noqa: E402


class Counted:
    """An expert's activation that counts, of its rows (N, F), zeros, and pairs of neighbours that are both zero."""

    def __init__(self, activation):
        self._activation = activation
        self.values = self.zeros = self.pairs = self.zero_pairs = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        result = self._activation(hidden)
        zero = result == 0
        both = zero[:-1] & zero[1:]
        self.values += zero.numel()
        self.zeros += int(zero.sum())
        self.pairs += both.numel()
        self.zero_pairs += int(both.sum())
        return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="as for --path")
    parser.add_argument("data", help="fairseq's binarized data")
    parser.add_argument("--subset", default="test")
    parser.add_argument("--source-lang", help="of a multilingual model")
    parser.add_argument("--target-lang", help="of a multilingual model")
    parser.add_argument("--batches", type=positive, default=20, help="at most so many of 16 sentences or blocks")
    args = parser.parse_args()
    languages = {name: getattr(args, name) for name in ("source_lang", "target_lang") if getattr(args, name)}
    with moe.load(args.checkpoint, args.data, cpu=True, **languages) as served:
        parts = served._parts
        model, task = parts.models[0], parts.task
        counts = {}
        for name, layer in model.moe_layers().items():
            counts[name] = layer.experts.activation = Counted(layer.experts.activation)
        task.load_dataset(args.subset)
        batches = task.get_batch_iterator(task.dataset(args.subset), max_sentences=16).next_epoch_itr(shuffle=False)
        for sample, _ in zip(batches, range(args.batches), strict=False):
            model(**utils.move_to_cpu(sample)["net_input"])
    body = [
        (name, each.values, f"{each.zeros / each.values:.0%}", f"{each.zero_pairs / max(1, each.pairs):.0%}")
        for name, each in counts.items()
        if each.values
    ]
    print(tabulate(body, ("layer", "hidden values", "zero", "zero in two rows"), "github"))


if __name__ == "__main__":
    main()
