"""All of a layer's experts in fast memory. Legend: H = local experts, N = rows in expert order, D = model dim,
F = hidden dim.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe_ext.experts.called_by_counts import CalledByCounts
from fairseq_moe_ext.experts.formats import Float
from fairseq_moe_ext.experts.gradients import wants_gradients
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.experts.schedule import AllResident, Schedule
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.autocast import autocast_dtype
from fairseq_moe_ext.kernels.numa import converted_near, touch_new
from fairseq_moe_ext.kernels.offsets import DeviceCounts, Offsets


class ResidentExperts(CalledByCounts):
    """A rank's experts of one layer in fast memory: fc1 -> activation -> fc2, each with bias.

    Parameters are packed, (H, F, D), (H, F), (H, D, F), (H, D); the state dict has upstream's names and shapes
    (`{j}.fc1.weight` (F, D), ..., j the expert's number in the layer), so that checkpoints go both ways.

    local: the numbers of the experts that lie here, rising; None: all. A state dict's other experts are left alone.

    activation: elementwise, Tensor -> Tensor.
    activation_dropout: probability, in training, whether or not gradients are wanted, and where it is retained.
    kernel, schedule: what computes them where nothing is trained (CalledByCounts), and in what order.
    initialize: False leaves the weights as the memory was, for a model that is loaded at once; a state dict that lacks
        one of them is then an error, strict or not.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Activation = F.relu,
        activation_dropout: float = 0.0,
        initialize: bool = True,
        local: Sequence[int] | None = None,
        kernel: str = "auto",
        schedule: Schedule = AllResident(),
    ):
        super().__init__(num_experts, Float(model_dim, hidden_dim), activation, local, kernel)
        self._schedule = schedule
        self.retains_dropout = False
        for name, shape in self.format.shapes(len(self.local)).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._touch_new()
        self.activation_dropout = activation_dropout
        self._initialized = initialize
        if initialize:
            self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.fc1_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.fc1_weight.device

    def share(self, local: Sequence[int]) -> ResidentExperts:
        """A module for the experts `local` alone, its weights not set: a state dict is to follow."""
        kept = self.activation, self.activation_dropout
        return ResidentExperts(
            self.num_experts, self.model_dim, self.hidden_dim, *kept, initialize=False, local=local, kernel=self.kernel
        )

    def _touch_new(self) -> None:
        touch_new(self.format.pool([self._parameters[name].detach() for name in EXPERT_KEYS]))

    def _apply(self, fn, recurse=True):
        on_meta = self.device.type == "meta"
        super()._apply(fn if on_meta else converted_near(fn), recurse)
        if on_meta:
            self._touch_new()
        return self

    def retain_dropout(self) -> None:
        """From here on the dropout stays on in evaluation, too."""
        self.retains_dropout = True

    def reset_parameters(self) -> None:
        """torch.nn.Linear's own initialisation, for every expert."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.size(2))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def input_dtype(self, tokens: Tensor) -> torch.dtype:
        """In which `tokens` must come: under autocast in its dtype, as to a dense layer."""
        return autocast_dtype(tokens) or tokens.dtype

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> str:
        """As `CalledByCounts` has it."""
        return "loop" if self.retains_dropout else super().kernel_for(device, dtype)

    def compute(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        """As `CalledByCounts` has it, with gradients where they are wanted; outputs have the dtype of `rows`."""
        pool = [self._parameters[name] for name in EXPERT_KEYS]  # ten times as fast as parameters()
        if rows.dtype != pool[0].dtype:  # autocast's
            pool = [parameter.to(rows.dtype) for parameter in pool]
        dropout = self.activation_dropout if self.training or self.retains_dropout else 0.0
        steps = self._schedule.steps(DeviceCounts(offsets))
        if dropout > 0 or wants_gradients(rows, *pool):
            deque(self._watched(steps, rows, offsets, pool, row_ids), maxlen=0)
            rows = rows if row_ids is None else rows.index_select(0, row_ids)
            return self._run_with_gradients(rows, offsets.on_host.tolist(), pool, dropout)
        if torch.is_grad_enabled():
            pool = [parameter.detach() for parameter in pool]
        return self._run_steps(steps, rows, offsets, pool, row_ids)

    def _run_with_gradients(self, rows: Tensor, offsets: list[int], pool: list[Tensor], dropout: float) -> Tensor:
        outputs = []
        weights = zip(*(each.unbind(0) for each in pool), strict=True)
        for first, end, expert in zip(offsets, offsets[1:], weights, strict=False):
            if end > first:
                fc1_weight, fc1_bias, fc2_weight, fc2_bias = expert
                hidden = self.activation(F.linear(rows[first:end], fc1_weight, fc1_bias))
                outputs.append(F.linear(F.dropout(hidden, dropout, dropout > 0), fc2_weight, fc2_bias))
        outputs.append(rows[offsets[-1] :])
        return torch.cat(outputs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, key in EXPERT_KEYS.items():
            parameter = getattr(self, name)
            packed = parameter if keep_vars else parameter.detach()
            for expert, weight in zip(self.local, packed.unbind(0), strict=True):
                destination[f"{prefix}{expert}.{key}"] = weight

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        missing: list[str] = []
        for name, index, tensor in self._keys.fitting(state_dict, prefix, missing, error_msgs):
            getattr(self, name).detach()[index].copy_(tensor)
        missing_keys += missing
        if not self._initialized:  # PyTorch leaves missing keys be where it is not strict
            error_msgs += [f"{key}: missing, and these experts have no values of their own" for key in missing]
        if strict:
            unexpected_keys += self._keys.unexpected(state_dict, prefix)
