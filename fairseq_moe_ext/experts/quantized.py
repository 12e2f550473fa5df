"""All of a layer's experts in fast memory, quantised while they are loaded.

Legend: H = local experts, N = rows in expert order, D = model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.formats import Format, format_named
from fairseq_moe_ext.experts.gradients import without_gradients
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.experts.schedule import AllResident
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.autocast import autocast_dtype
from fairseq_moe_ext.kernels.numa import touch_new
from fairseq_moe_ext.kernels.offsets import DeviceCounts, Offsets


class QuantizedExperts(CalledByCounts):
    """Stands in for ResidentExperts in serving: the same state-dict keys and calls, the weights as the format has them.

    They come by `load_state_dict`, of any float dtype; a state dict that lacks one of them is an error, strict or not,
    and so is one whose weights are not finite. The model's dtype is that of rows and results, and changes no weight.
    """

    def __init__(
        self,
        num_experts: int,
        form: Format,
        activation: Activation,
        local: Sequence[int] | None = None,
        kernel: str = "auto",
    ):
        super().__init__(num_experts, form, activation, local, kernel)
        for name, shape in form.shapes(len(self.local)).items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8), persistent=False)
        # follows the model's dtype and device
        self.register_buffer("_like", torch.empty(0), persistent=False)
        self._schedule = AllResident()
        self._touch_new()

    @classmethod
    def in_place_of(cls, experts: ResidentExperts, name: str) -> QuantizedExperts:
        """With room for the same experts in the format of that name; `experts` need have no memory."""
        form = format_named(name, experts.model_dim, experts.hidden_dim)
        found = cls(experts.num_experts, form, experts.activation, experts.local, experts.kernel)
        return found.train(experts.training)

    def _touch_new(self) -> None:
        touch_new(self.format.pool([self.blocks]))

    def _apply(self, fn, recurse=True):
        on_meta = self.device.type == "meta"
        super()._apply(fn, recurse)
        if on_meta:
            self._touch_new()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """As `CalledByCounts` has it."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks lie, and rows must come from."""
        return self._like.device

    def input_dtype(self, tokens: Tensor) -> torch.dtype:
        """In which `tokens` must come: under autocast in the model's own dtype."""
        return tokens.dtype if autocast_dtype(tokens) is None else self.dtype

    def compute(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        """As `CalledByCounts` has it."""
        return without_gradients("quantised experts", self._run(rows, offsets, row_ids), rows)

    @torch.no_grad()
    def _run(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        if self.training:
            raise RuntimeError("quantised experts cannot be trained: call eval() first")
        steps = self._schedule.steps(DeviceCounts(offsets))
        return self._run_steps(steps, rows, offsets, self.format.pool([self.blocks]), row_ids)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.format.unpack([self.blocks])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        lists = missing_keys, unexpected_keys, error_msgs
        weights = self._keys.of_every_expert(state_dict, prefix, strict, *lists)
        for block, expert, parts in zip(self.blocks, self.local, weights or (), strict=weights is not None):
            block.copy_(*self.format.pack(parts, f"{prefix}{expert}."))
