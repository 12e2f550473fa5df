"""The experts' weights, packed, and their computation on tokens in expert order.

Legend: E = experts of the layer, H = experts held here, N = rows in expert order, D = model dim, F = hidden dim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe_ext.gating.autocast import autocast_dtype
from fairseq_moe_ext.kernels.grouped_linear import aligned, grouped_linear

# packed parameter -> its name under `experts.{j}.` in upstream's state dict
EXPERT_KEYS = {"fc1_weight": "fc1.weight", "fc1_bias": "fc1.bias", "fc2_weight": "fc2.weight", "fc2_bias": "fc2.bias"}
ROWS_AT_ONCE = 512  # of hidden features at a time
# Of PyTorch's elementwise functions on a CPU: values that the widest loop takes at once (two AVX-512 vectors of 16-bit
# numbers), and up to how many values one thread computes alone (gelu's; the others' limits lie above it).
VECTOR_VALUES = 64
VALUES_OF_ONE_THREAD = 16_384


@dataclass(frozen=True)
class BufferCall:
    """What one call, or several together, took where not all experts are resident.

    hits, misses: active experts that were resident at their turn, and those that were not. bytes_copied: into fast
    memory. host_reads, disk_reads: misses by where they came from. bytes_read: from disk. seconds: the host waited.
    """

    hits: int = 0
    misses: int = 0
    bytes_copied: int = 0
    host_reads: int = 0
    disk_reads: int = 0
    bytes_read: int = 0
    seconds: float = 0.0

    def __add__(self, other: BufferCall) -> BufferCall:
        return BufferCall(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def run_experts(
    rows: Tensor, rows_per_expert: Sequence[int], weights: Sequence[Tensor], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """rows (N, D) in expert order, H counts, packed weights in the order of EXPERT_KEYS -> (N, D); no gradients.

    An expert's result is the same bit by bit in whatever place of the packed weights it lies, and with whatever others
    it is called; the activation changes nothing about that.
    """
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    if sum(rows_per_expert) != rows.size(0):
        raise ValueError(f"rows_per_expert must sum to the {rows.size(0)} rows, got {sum(rows_per_expert)}")
    is_relu = activation in (F.relu, torch.relu)
    outputs = [rows[:0]]
    for first, end in _spans(rows_per_expert):
        counts = rows_per_expert[first:end]
        part, rows = rows.split([sum(counts), rows.size(0) - sum(counts)])
        hidden = grouped_linear(part, counts, fc1_weight[first:end], fc1_bias[first:end], is_relu)
        if not is_relu:
            hidden = activate_rows(hidden, activation)
        outputs.append(grouped_linear(hidden, counts, fc2_weight[first:end], fc2_bias[first:end]))
    return torch.cat(outputs) if len(outputs) != 2 else outputs[1]


def activate_rows(hidden: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """hidden (N, F), which may be overwritten on a CPU -> the activation of every row as if it were alone.

    On a CPU PyTorch computes some of a tensor's values with vector instructions and the last few of each thread's part
    without, and rounds them differently: of many rows at once a value's bits would depend on where its row lies. Here
    no value is left over, and no part is shared by threads.
    """
    if hidden.device.type != "cpu":
        return activation(hidden)
    dim = hidden.size(1)
    padded = F.pad(hidden, (0, -dim % VECTOR_VALUES)).contiguous()
    for part in padded.view(-1).split(VALUES_OF_ONE_THREAD):
        part.copy_(activation(aligned(part)))
    return padded[:, :dim].contiguous()


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether what is computed from any of them must be differentiable."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _NoBackward(torch.autograd.Function):
    """outputs, and what they were computed from without gradients -> outputs, whose gradient is an error."""

    @staticmethod
    def forward(ctx, who: str, outputs: Tensor, *sources: Tensor) -> Tensor:
        ctx.who = who
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"{ctx.who} have no gradients: serve them under torch.no_grad()")


def without_gradients(who: str, outputs: Tensor, rows: Tensor) -> Tensor:
    """outputs of `rows`, which nothing can be trained through; a gradient through them would silently lack a part.

    RuntimeError naming `who`, a plural, where one is asked for.
    """
    return _NoBackward.apply(who, outputs, rows) if wants_gradients(rows) else outputs


def _spans(rows_per_expert: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of experts that are called together: more rows at a time would only take more memory, and leave the cache
    between the two layers."""
    first = rows = 0
    for expert, count in enumerate(rows_per_expert):
        rows += count
        if rows >= ROWS_AT_ONCE or expert == len(rows_per_expert) - 1:
            yield first, expert + 1
            first, rows = expert + 1, 0


def packed_shapes(experts: int, model_dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    """Of the packed parameters for so many experts, in the order of EXPERT_KEYS."""
    return {
        "fc1_weight": (experts, hidden_dim, model_dim),
        "fc1_bias": (experts, hidden_dim),
        "fc2_weight": (experts, model_dim, hidden_dim),
        "fc2_bias": (experts, model_dim),
    }


class ExpertKeys:
    """Which keys of a state dict are a layer's experts, and what is wrong with them.

    held: the numbers of the experts that are wanted. shapes: of the packed parameters.
    """

    def __init__(self, num_experts: int, held: Sequence[int], shapes: Mapping[str, tuple[int, ...]]):
        self._num_experts = num_experts
        self._held = held
        self._shapes = shapes

    def fitting(
        self, state_dict: Mapping[str, Tensor], prefix: str, missing_keys: list[str], error_msgs: list[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """(packed parameter, index in it, the state dict's tensor) of every expert; the rest goes to the two lists."""
        for name, key in EXPERT_KEYS.items():
            shape = self._shapes[name][1:]
            for index, expert in enumerate(self._held):
                full_key = f"{prefix}{expert}.{key}"
                if full_key not in state_dict:
                    missing_keys.append(full_key)
                elif state_dict[full_key].shape != shape:
                    error_msgs.append(
                        f"{full_key}: expected shape {tuple(shape)}, got {tuple(state_dict[full_key].shape)}"
                    )
                else:
                    yield name, index, state_dict[full_key]

    def unexpected(self, state_dict: Mapping[str, Tensor], prefix: str) -> list[str]:
        """Keys under `prefix` that are no expert's of this layer."""
        known = re.compile(rf"{re.escape(prefix)}(\d+)\.(?:{'|'.join(map(re.escape, EXPERT_KEYS.values()))})$")
        matches = {key: known.match(key) for key in state_dict if key.startswith(prefix)}
        return [key for key, match in matches.items() if match is None or int(match.group(1)) >= self._num_experts]


class ResidentExperts(nn.Module):
    """A rank's experts of one layer in fast memory: fc1 -> activation -> fc2, each with bias.

    Parameters are packed, (H, F, D), (H, F), (H, D, F), (H, D); the state dict has upstream's names and shapes
    (`{j}.fc1.weight` (F, D), ..., j the expert's number in the layer), so that checkpoints go both ways.

    held: the numbers of the experts that lie here, rising; None holds all. A state dict's other experts are left alone.

    activation: elementwise, Tensor -> Tensor.
    activation_dropout: probability, in training, whether or not gradients are wanted, and where it is retained.
    initialize: False leaves the weights as the memory was, for a model that is loaded at once; a state dict that lacks
        one of them is then an error, strict or not.
    """

    totals = BufferCall()  # of all calls: nothing is fetched
    kernel = "auto"  # what computes them inside a layer, one of device_experts.KERNELS
    retain_dropout = False  # in evaluation, too

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
        shapes = packed_shapes(len(self.held), model_dim, hidden_dim)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._keys = ExpertKeys(num_experts, self.held, shapes)
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
    def expert_bytes(self) -> int:
        """Of one expert."""
        return sum(math.prod(parameter.shape[1:]) for parameter in self.parameters()) * self.dtype.itemsize

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

    @property
    def total_bytes(self) -> int:
        """Of the weights of all experts held here."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def resident_bytes(self) -> int:
        """Of the weights in fast memory."""
        return self.total_bytes

    @property
    def resident_experts(self) -> list[int]:
        """The numbers of the experts in fast memory."""
        return list(self.held)

    def announce(self, tokens_per_expert: Sequence[int]) -> None:
        """The H counts of the next call, as soon as they are known; nothing to do where all experts are resident."""

    def weights_for(self, rows: Tensor) -> list[Tensor]:
        """The packed parameters, in the order of EXPERT_KEYS, as `rows` need them: in their dtype under autocast."""
        packed = list(self.parameters())
        return packed if autocast_dtype(rows) is None else [parameter.to(rows.dtype) for parameter in packed]

    def forward(self, rows: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """rows (N, D) in expert order, tokens_per_expert H counts that sum to N -> outputs (N, D)."""
        packed = self.weights_for(rows)
        dropout = self.activation_dropout if self.training or self.retain_dropout else 0.0
        if dropout == 0 and not wants_gradients(rows, *packed):
            return run_experts(rows, tokens_per_expert, packed, self.activation)
        outputs = []
        chunks, weights = rows.split(list(tokens_per_expert)), zip(*(each.unbind(0) for each in packed), strict=True)
        for chunk, (fc1_weight, fc1_bias, fc2_weight, fc2_bias) in zip(chunks, weights, strict=True):
            if chunk.size(0) > 0:
                hidden = self.activation(F.linear(chunk, fc1_weight, fc1_bias))
                outputs.append(F.linear(F.dropout(hidden, dropout, dropout > 0), fc2_weight, fc2_bias))
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
        missing: list[str] = []
        for name, index, tensor in self._keys.fitting(state_dict, prefix, missing, error_msgs):
            getattr(self, name).detach()[index].copy_(tensor)
        missing_keys += missing
        if not self._initialized:  # PyTorch leaves missing keys be where it is not strict
            error_msgs += [f"{key}: missing, and these experts have no values of their own" for key in missing]
        if strict:
            unexpected_keys += self._keys.unexpected(state_dict, prefix)
