"""The C functions of cpu/routing.h: what happens to a token's row before its experts and after them.

Legend: T = tokens, K = choices per token, E = experts, N = rows, D = model dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, Kernel, address_of, can_be_read, load_kernel


def routing_for(*tensors: Tensor) -> CRouting | None:
    """What C does for these tensors; None where PyTorch must."""
    kernel = load_kernel() if can_be_read(*tensors) else None
    return None if kernel is None else _routing(kernel)


class CRouting:
    """The compiled functions; all tensors lie on the CPU."""

    def __init__(self, kernel: Kernel):
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._instructions = kernel.number

        def function(name: str, result: type | None, *arguments: type) -> Callable[..., int]:
            found = getattr(kernel.library, name)
            found.argtypes, found.restype = arguments, result
            return found

        self._choose = function("choose_experts", None, *[pointer] * 3, size, size, *[pointer] * 3)
        self._normalize = function("normalize_choices", None, pointer, pointer, size, size, ctypes.c_float, pointer)
        self._sort = function("sort_assignments", size, pointer, pointer, size, size, *[pointer] * 3)
        self._add = function("add_choices", size, pointer, size, *[pointer] * 3, *[size] * 3, pointer, size, size)

    def choose(
        self, probabilities: Tensor, logits: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As choosing.py's `choose_experts` has it, of float32."""
        tokens, experts = probabilities.shape
        if experts == 0 or logits is not None and logits.shape != probabilities.shape:
            raise ValueError(f"probabilities must be of experts, and logits alike, got {tuple(probabilities.shape)}")
        if padding_mask is not None and padding_mask.shape != (tokens,):
            raise ValueError(f"padding_mask must be of {tokens} tokens, got {tuple(padding_mask.shape)}")
        shape = tokens, 1 if logits is None else 2
        ids, weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        kept = torch.empty(shape, dtype=torch.bool)
        mask = None if padding_mask is None else padding_mask.contiguous()  # a name, which keeps it alive
        given = (
            address_of(probabilities, "probabilities", torch.float32),
            None if logits is None else address_of(logits, "logits", torch.float32),
            None if mask is None else address_of(mask, "padding_mask", torch.bool),
        )
        self._choose(*given, tokens, experts, ids.data_ptr(), weights.data_ptr(), kept.data_ptr())
        return ids, kept, weights

    def normalize(self, weights: Tensor, kept: Tensor, least: float) -> Tensor:
        """As choosing.py has it, of float32."""
        kept = kept.contiguous()
        if kept.shape != weights.shape:
            raise ValueError(f"kept must be of the weights' shape {tuple(weights.shape)}, got {tuple(kept.shape)}")
        normalized = torch.empty_like(weights)
        given = address_of(weights, "weights", torch.float32), address_of(kept, "kept", torch.bool)
        self._normalize(*given, *weights.shape, least, normalized.data_ptr())
        return normalized

    def sort(self, ids: Tensor, kept: Tensor, num_ids: int) -> tuple[Tensor, Tensor, Tensor]:
        """As sorting.py's `sort_assignments` has it."""
        ids, kept = ids.contiguous(), kept.contiguous()
        if kept.shape != ids.shape:
            raise ValueError(f"ids and kept must be alike in shape, got {tuple(ids.shape)} and {tuple(kept.shape)}")
        given, count = (address_of(ids, "ids", torch.int64), address_of(kept, "kept", torch.bool)), ids.numel()
        assignments, rows = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        offsets = torch.empty(num_ids + 1, dtype=torch.int32)
        if self._sort(*given, count, num_ids, assignments.data_ptr(), offsets.data_ptr(), rows.data_ptr()):
            raise ValueError(f"ids that are kept must be from 0 to below {num_ids}")
        return assignments, offsets, rows

    def add_choices(self, outputs: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """As combine.py's `weighted_sum` has it; outputs are of one of DTYPES."""
        (tokens, choices), dim = rows.shape, outputs.size(1)
        outputs, rows, weights = outputs.contiguous(), rows.contiguous(), weights.float().contiguous()
        if weights.shape != rows.shape:
            raise ValueError(f"row ids must be of the weights' shape {tuple(weights.shape)}, got {tuple(rows.shape)}")
        sums, total = outputs.new_empty(tokens, dim), torch.empty(dim)
        given = (
            *(address_of(outputs, "outputs", outputs.dtype), len(outputs), address_of(rows, "row ids", torch.int64)),
            *(address_of(weights, "weights", torch.float32), sums.data_ptr()),
        )
        if self._add(*given, tokens, choices, dim, total.data_ptr(), DTYPES[outputs.dtype], self._instructions):
            raise ValueError(f"row ids must be below the {len(outputs)} outputs")
        return sums


@lru_cache
def _routing(kernel: Kernel) -> CRouting:
    return CRouting(kernel)
