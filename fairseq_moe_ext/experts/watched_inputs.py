"""What a layer's experts are given, summed up while they are computed: of fc1 every row, of fc2 the first ones.

Kernels keep hidden features to themselves, so that fc2's inputs are computed a second time, of a bounded number of rows
of every expert: from the weights as they lie in the pool while the expert's step is computed, whether it is resident,
in a buffer or quantised. fc1's inputs wait until there are many, since a sum of few rows costs as much.

Legend: E = experts of the layer, H = local experts, N = rows in expert order, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.experts.schedule import Step
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.block import QuantizedPool
from fairseq_moe_ext.kernels.grouped_mlp import Pool
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.kernels.quantized import apply_layer
from fairseq_moe_ext.recording import MOST_CALLS, MOST_HIDDEN, Inputs

ROWS_AT_ONCE = 512  # of fc1's inputs that wait


class InputSums:
    """Means of x and x^2 of `num_experts` experts' inputs of `dim` features, as rows come. Memory is touched only for
    experts that have rows."""

    def __init__(self, num_experts: int, dim: int):
        self._rows = np.zeros(num_experts, np.int64)
        self._mean, self._square = (np.zeros((num_experts, dim), np.float32) for _ in range(2))

    def add(self, rows: Tensor, experts: np.ndarray, counts: np.ndarray) -> None:
        """rows (N, X) in any dtype; experts: their numbers, each once; counts: how many rows of each follow one
        another."""
        values = rows.float()
        owners = torch.from_numpy(np.repeat(np.arange(len(experts)), counts)).to(rows.device)
        sums = [
            values.new_zeros(len(experts), values.size(1)).index_add_(0, owners, each).cpu().numpy()
            for each in (values, values * values)
        ]
        self._rows[experts] += counts
        total = self._rows[experts][:, None].astype(np.float32)
        for mean, added in zip((self._mean, self._square), sums, strict=True):
            old = mean[experts]
            mean[experts] = old + (added - counts[:, None].astype(np.float32) * old) / total

    @property
    def result(self) -> Inputs:
        """So far."""
        return Inputs(self._rows.copy(), self._mean.copy(), self._square.copy())


class WatchedInputs:
    """Watches one layer's experts (CalledByCounts.watch).

    local: the numbers of the experts that lie here. Rows of a call that breaks off may have been counted.
    """

    def __init__(self, num_experts: int, model_dim: int, hidden_dim: int, local: Sequence[int], activation: Activation):
        self._fc1, self._fc2 = InputSums(num_experts, model_dim), InputSums(num_experts, hidden_dim)
        self._local, self._activation = np.array(local, np.int64), activation
        self._hidden_rows = np.zeros(len(local), np.int64)
        self._hidden_calls = np.zeros(len(local), np.int64)
        self._has_room = np.ones(len(local), bool)  # for more rows of hidden features
        self._waiting: list[tuple[Tensor, Offsets, Tensor | None]] = []
        self._num_waiting = 0

    def steps(
        self, steps: Iterable[Step], rows: Tensor, offsets: Offsets, pool: Pool, row_ids: Tensor | None
    ) -> Iterator[Step]:
        """The steps of a call of run_steps (schedule.py), which has these arguments."""
        for step in steps:
            yield step
            # the step is computed, and its experts lie in their slots until the next one is asked for
            if self._has_room.any():
                self._take_hidden(step, rows, offsets, pool, row_ids)
        self._waiting.append((rows.detach(), offsets, row_ids))
        self._num_waiting += rows.size(0) if row_ids is None else row_ids.size(0)
        if self._num_waiting >= ROWS_AT_ONCE:
            self._take_in()

    def result(self) -> tuple[Inputs, Inputs]:
        """Of fc1 and of fc2, so far."""
        self._take_in()
        return self._fc1.result, self._fc2.result

    @torch.no_grad()
    def _take_in(self) -> None:
        """fc1's inputs of the calls that wait."""
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        values, counts = [], []
        for rows, offsets, row_ids in waiting:
            bounds = offsets.on_host.numpy().astype(np.int64)
            counts.append(np.diff(bounds))
            ours = slice(int(bounds[0]), int(bounds[-1]))  # rows behind the last expert's are nobody's
            values.append(rows[ours] if row_ids is None else rows.index_select(0, row_ids[ours]))
        if not waiting or not any(map(len, values)):
            return
        every = np.stack(counts)
        calls, experts = every.nonzero()
        active, places = np.unique(experts, return_inverse=True)
        joined = torch.cat(values)
        if len(waiting) > 1:  # from calls, each by expert, to the experts' rows of all calls
            owners = np.repeat(places, every[calls, experts])
            joined = joined.index_select(0, torch.from_numpy(np.argsort(owners, kind="stable")).to(joined.device))
        self._fc1.add(joined, self._local[active], every.sum(0)[active])

    @torch.no_grad()
    def _take_hidden(self, step: Step, rows: Tensor, offsets: Offsets, pool: Pool, row_ids: Tensor | None) -> None:
        bounds, part = offsets.on_host.numpy(), slice(step.first, step.end)
        wanted = self._has_room[part] & (np.diff(bounds)[part] > 0)
        for place in (step.first + np.flatnonzero(wanted)).tolist():
            slot = place if step.slots is None else step.slots[place - step.first]
            if slot < 0:
                continue
            first, end = int(bounds[place]), int(bounds[place + 1])
            end = min(end, first + MOST_HIDDEN - int(self._hidden_rows[place]))
            its = rows[first:end] if row_ids is None else rows.index_select(0, row_ids[first:end])
            hidden = _hidden_features(pool, slot, its, self._activation)
            self._fc2.add(hidden, self._local[place : place + 1], np.array([end - first]))
            self._hidden_rows[place] += end - first
            self._hidden_calls[place] += 1
            is_full = self._hidden_rows[place] == MOST_HIDDEN or self._hidden_calls[place] == MOST_CALLS
            self._has_room[place] = not is_full


def _hidden_features(pool: Pool, slot: int, rows: Tensor, activation: Activation) -> Tensor:
    """rows (n, D) -> fc2's inputs (n, F)."""
    if isinstance(pool, QuantizedPool):
        fc1, _ = pool.block.layers(pool.blocks[slot : slot + 1])
        return activation(apply_layer(fc1, rows.float()))
    fc1_weight, fc1_bias, *_ = pool
    return activation(F.linear(rows, fc1_weight[slot], fc1_bias[slot]))
