"""The experts' weights, packed, and their computation on tokens in expert order.

Legend: E = experts of the layer, H = experts held here, N = rows in expert order, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# packed parameter -> its name under `experts.{j}.` in upstream's state dict
EXPERT_KEYS = {"fc1_weight": "fc1.weight", "fc1_bias": "fc1.bias", "fc2_weight": "fc2.weight", "fc2_bias": "fc2.bias"}


class ResidentExperts(nn.Module):
    """A rank's experts of one layer in fast memory: fc1 -> activation -> fc2, each with bias.

    Parameters are packed, (H, F, D), (H, F), (H, D, F), (H, D); the state dict has upstream's names and shapes
    (`{j}.fc1.weight` (F, D), ..., j the expert's number in the layer), so that checkpoints go both ways.

    held: the numbers of the experts that lie here, rising; None holds all. A state dict's other experts are left alone.

    activation: elementwise, Tensor -> Tensor.
    activation_dropout: probability, in training only.
    initialize: False leaves the weights as the memory was, for a model that is loaded at once; a state dict that lacks
        one of them is then an error, strict or not.
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
        activation_dropout: float = 0.0,
        initialize: bool = True,
        held: Sequence[int] | None = None,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.held = tuple(range(num_experts) if held is None else held)
        if list(self.held) != sorted(set(self.held) & set(range(num_experts))):
            raise ValueError(f"held must be rising numbers of experts below {num_experts}, got {self.held}")
        self.fc1_weight = nn.Parameter(torch.empty(len(self.held), hidden_dim, model_dim))
        self.fc1_bias = nn.Parameter(torch.empty(len(self.held), hidden_dim))
        self.fc2_weight = nn.Parameter(torch.empty(len(self.held), model_dim, hidden_dim))
        self.fc2_bias = nn.Parameter(torch.empty(len(self.held), model_dim))
        self.model_dim = model_dim
        self.activation = activation
        self.activation_dropout = activation_dropout
        self._initialized = initialize
        if initialize:
            self.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.fc1_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.fc1_weight.device

    @property
    def bytes_per_expert(self) -> int:
        hidden_dim = self.fc1_weight.size(1)
        return (2 * self.model_dim * hidden_dim + hidden_dim + self.model_dim) * self.dtype.itemsize

    def share(self, held: Sequence[int]) -> ResidentExperts:
        """A module for the experts `held` alone, its weights not set: a state dict is to follow."""
        hidden_dim, kept = self.fc1_weight.size(1), (self.activation, self.activation_dropout)
        return ResidentExperts(self.num_experts, self.model_dim, hidden_dim, *kept, initialize=False, held=held)

    def reset_parameters(self) -> None:
        """torch.nn.Linear's own initialisation, for every expert."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            bound = 1 / math.sqrt(weight.size(2))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, rows: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """rows (N, D) in expert order, tokens_per_expert H counts that sum to N -> outputs (N, D)."""
        packed = [parameter.unbind(0) for parameter in self.parameters()]
        outputs = []
        for expert, chunk in enumerate(rows.split(list(tokens_per_expert))):
            if chunk.size(0) == 0:
                continue
            fc1_weight, fc1_bias, fc2_weight, fc2_bias = (weights[expert] for weights in packed)
            hidden = self.activation(F.linear(chunk, fc1_weight, fc1_bias))
            if self.training and self.activation_dropout > 0:
                hidden = F.dropout(hidden, self.activation_dropout)
            outputs.append(F.linear(hidden, fc2_weight, fc2_bias))
        return torch.cat(outputs) if outputs else rows

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, key in EXPERT_KEYS.items():
            parameter = getattr(self, name)
            packed = parameter if keep_vars else parameter.detach()
            for expert, weight in zip(self.held, packed.unbind(0), strict=True):
                destination[f"{prefix}{expert}.{key}"] = weight

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        for name, key in EXPERT_KEYS.items():
            parameter = getattr(self, name)
            for expert, weight in zip(self.held, parameter.detach().unbind(0), strict=True):
                full_key = f"{prefix}{expert}.{key}"
                if full_key not in state_dict:
                    missing_keys.append(full_key)
                    if not self._initialized:  # PyTorch leaves missing keys be where it is not strict
                        error_msgs.append(f"{full_key}: missing, and these experts have no values of their own")
                elif state_dict[full_key].shape != weight.shape:
                    error_msgs.append(
                        f"{full_key}: expected shape {tuple(weight.shape)}, got {tuple(state_dict[full_key].shape)}"
                    )
                else:
                    weight.copy_(state_dict[full_key])
        if strict:
            known = re.compile(rf"{re.escape(prefix)}(\d+)\.(?:{'|'.join(map(re.escape, EXPERT_KEYS.values()))})$")
            for full_key in state_dict:
                if full_key.startswith(prefix):
                    match = known.match(full_key)
                    if match is None or int(match.group(1)) >= self.num_experts:
                        unexpected_keys.append(full_key)
