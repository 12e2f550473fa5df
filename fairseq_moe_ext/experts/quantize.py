"""An expert's weights -> its block of int8 or int4 (kernels/block.py): which scales, and the nearest codes.

int8: a group's scale is its largest magnitude over 127. int4: of CANDIDATES, each with the scale that fits its codes
best, the one with the least sum of s_k * (w_k - scale * q_k)^2 over the group. s_k says what an error in input column
k costs: the mean of its squares over recorded rows, 1 where nothing is recorded. The largest element goes to the
negative side, which has one value more.

What is quantised is always the original: a quantised expert is never quantised again.

The C kernel (kernels/cpu/quantizing.h) does this; where it cannot, PyTorch does here, with the same bytes: each
product, quotient and sum is rounded by itself, and sums have one order.

Legend: M = outputs, K = inputs, G = groups, n = rows of a weight at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.kernels.block import GROUP, LARGEST, SMALLEST, Block, QuantizedLinear
from fairseq_moe_ext.kernels.quantizing_kernel import quantizer_for

# To how many steps a group's largest magnitude would come: above 8, the most that there are, it is cut off for the
# others' sake.
CANDIDATES = tuple(6.0 + 0.4 * number for number in range(20))
VALUES_AT_ONCE = 1 << 18  # stay in a processor's cache
LEAST_EXPONENT = -126  # of a unit: smaller powers of two are no normal float32
TINY, HUGE = 1e-30, 1e30
SUM_LANES = 8  # of a sum over a group, as of the C kernel

VERSION = 2  # of what is chosen for the same weights: a store that another version has written is built anew

Columns = Sequence[Tensor | None]  # s_k of fc1 (D,) and of fc2 (F,), at least 0; None: 1


def quantize_expert(
    block: Block, parts: Sequence[Tensor], target: Tensor, name: str = "", columns: Columns = (None, None)
) -> None:
    """parts, in the order of EXPERT_KEYS and of any float dtype, into `target` (nbytes,) uint8 on the CPU.

    name: what stands before a part's own name in the state dict, for errors. ValueError naming the tensor where a value
    is a NaN or infinite, also when only float32 has no such number.
    """
    target.zero_()
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = EXPERT_KEYS.values()
    names = ((fc1_weight, fc1_bias), (fc2_weight, fc2_bias))
    for number, layer in enumerate(block.layers(target[None])):
        quantize_linear(layer, parts[2 * number], parts[2 * number + 1], name, names[number], columns[number])


def quantize_linear(
    layer: QuantizedLinear,
    weight: Tensor,
    bias: Tensor | None,
    name: str = "",
    names: Sequence[str] = ("weight", "bias"),
    columns: Tensor | None = None,
) -> None:
    """weight (M, K) and bias (M,), None: zero, into a layer of one slot on the CPU; errors as of `quantize_expert`."""
    fill_bias(layer, bias, name + names[1])
    _quantize_weight(layer, _values_of(weight), name + names[0], columns)


def fill_bias(layer: QuantizedLinear, bias: Tensor | None, name: str) -> None:
    """bias (M,), None: zero, into a layer of one slot that has zeros; ValueError naming it as of `quantize_expert`."""
    if bias is not None:
        values = _values_of(bias).float()
        _check_finite(values, name)
        layer.bias[0].copy_(values)


class QuantizedPart(Tensor):
    """An expert's block that has no values yet: `slot.copy_(part)` quantises into the slot, (nbytes,) uint8.

    originals: the expert's parts, which may lie in a file. ValueError, when it is copied, as `quantize_expert`.
    """

    @staticmethod
    def __new__(cls, block: Block, originals: Sequence[Tensor], name: str):
        """As `quantize_expert`."""
        part = Tensor._make_wrapper_subclass(cls, (block.nbytes,), dtype=torch.uint8, device="cpu")
        part._block, part.originals, part._name = block, originals, name
        return part

    def copy_to(self, target: Tensor) -> None:
        """`target.copy_(self)`, in between on the CPU."""
        direct = target.device.type == "cpu" and target.is_contiguous()
        block = target if direct else torch.empty(self.shape, dtype=torch.uint8)
        with torch.no_grad():
            quantize_expert(self._block, self.originals, block, self._name)
            if not direct:
                target.copy_(block)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and not isinstance(args[0], QuantizedPart):
            args[1].copy_to(args[0])
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise TypeError(f"a part that is not quantised yet can only be copied, got {func}")


def _values_of(part: Tensor) -> Tensor:
    """An ordinary tensor, read once where it lies in a file."""
    if type(part) is Tensor:
        return part
    values = torch.empty(part.shape, dtype=part.dtype)
    values.copy_(part)
    return values


def _check_finite(values: Tensor, name: str) -> None:
    if not values.isfinite().all():
        _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name}: weights must be finite numbers to be quantised, got a NaN or an infinity")


def _quantize_weight(layer: QuantizedLinear, weight: Tensor, name: str, columns: Tensor | None) -> None:
    """weight (M, K) into a layer of one slot."""
    costs = None if columns is None else _costs_of(columns)
    kernel = quantizer_for(layer, weight)
    if kernel is None:
        _quantize_by_pytorch(layer, weight, name, costs)
    elif not kernel.run(layer, weight, CANDIDATES, costs):
        _refuse(name)


def _costs_of(columns: Tensor) -> Tensor:
    """columns (K,) -> (G, 64) float32, the largest from 0.5 to 1, so that sums neither overflow nor vanish."""
    columns = columns.detach().float()
    if not (columns.isfinite() & (columns >= 0)).all():
        raise ValueError("columns must be finite numbers of at least 0")
    near_one = _near_one(columns[None], torch.frexp(columns.amax(0, keepdim=True)).exponent)
    return F.pad(near_one[0], (0, -columns.size(0) % GROUP)).view(-1, GROUP)


def _quantize_by_pytorch(layer: QuantizedLinear, weight: Tensor, name: str, costs: Tensor | None) -> None:
    """weight (M, K), a few rows at a time, into a layer of one slot."""
    bits = 8 if layer.codes.dtype == torch.int8 else 4
    padding = (0, -weight.size(1) % GROUP)
    rows = max(1, VALUES_AT_ONCE // weight.size(1))
    for start in range(0, weight.size(0), rows):
        part = slice(start, start + rows)
        values = weight[part].float()
        largest = values.abs().amax(1)
        _check_finite(largest, name)
        exponents = torch.frexp(largest).exponent
        groups = F.pad(_near_one(values, exponents), padding).unflatten(1, (-1, GROUP))
        wanted = _absmax_scales(groups) if bits == 8 else _searched_scales(groups, costs)
        units, scales = _units_and_scales(wanted, exponents)
        steps = (scales.float() * _power(units - exponents)[:, None])[..., None]
        codes = torch.where(steps == 0, 0.0, groups / steps).round_().clamp_(SMALLEST[bits], LARGEST[bits])
        layer.units[0, part] = _power(units)
        layer.scales[0, part] = scales
        layer.codes[0, part] = codes.to(torch.int8) if bits == 8 else _nibbles(codes)


def _near_one(values: Tensor, exponents: Tensor) -> Tensor:
    """values (n, K) with each row's largest magnitude from 0.5 to 1, so that squares neither overflow nor vanish: by a
    power of two, which rounds nothing that counts, in two steps, since 2^149 is no float32."""
    half = exponents // 2
    return values * _power(-half)[:, None] * _power(half - exponents)[:, None]


def _absmax_scales(groups: Tensor) -> Tensor:
    """groups (n, G, 64) -> scales (n, G) of int8."""
    largest = groups.abs().amax(2)
    return largest / torch.full_like(largest, LARGEST[8])  # by a number PyTorch would multiply by its reciprocal


def _searched_scales(groups: Tensor, costs: Tensor | None) -> Tensor:
    """groups (n, G, 64), costs (G, 64) or None for 1 -> scales (n, G) of int4."""
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    steps = torch.where(largest == 0, 0.0, -1.0 / largest).clamp_(-HUGE, HUGE)
    weighted = groups if costs is None else groups * costs
    codes, products = torch.empty_like(groups), torch.empty_like(groups)
    scales = -largest[..., 0] / -SMALLEST[4]  # of columns that cost nothing
    best = torch.zeros_like(scales)
    for candidate in CANDIDATES:
        torch.mul(groups, steps * candidate, out=codes).round_().clamp_(SMALLEST[4], LARGEST[4])
        with_weights = _sums(torch.mul(codes, weighted, out=products))
        squares = codes.square_()  # whole numbers, exact in any order
        with_codes = (squares.sum(2) if costs is None else _sums(squares.mul_(costs))).clamp_(min=TINY)
        fitting = with_weights / with_codes
        gain = fitting * with_weights  # by so much the error is less than that of zeros
        is_better = gain > best
        scales, best = torch.where(is_better, fitting, scales), torch.where(is_better, gain, best)
    return scales


def _sums(products: Tensor) -> Tensor:
    """products (n, G, 64) -> (n, G): lane l adds up those at l, l + 8, l + 16, ..., then neighbours are added."""
    first, *others = products.split(SUM_LANES, 2)
    total = first.clone()
    for lanes in others:
        total += lanes
    while total.size(2) > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]


def _units_and_scales(wanted: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (n, G) of rows that were divided by 2^exponents -> the units' exponents (n,) and scales (n, G) float16, of
    which a row's largest magnitude lies from 1 to below 2."""
    largest = wanted.abs().amax(1)
    own = torch.frexp(largest).exponent - 1
    own += (largest * _power(-own)).half() == 2  # rounded up
    units = torch.where(largest == 0, 0, (own + exponents).clamp(min=LEAST_EXPONENT))
    return units, (wanted * _power(exponents - units)[:, None]).half()


def _power(exponents: Tensor) -> Tensor:
    """2^exponents as float32, exactly; from -126 to 127."""
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32)


def _nibbles(codes: Tensor) -> Tensor:
    """codes (..., 64) whole numbers -> (..., 32) uint8."""
    shifted = (codes - SMALLEST[4]).to(torch.uint8)
    low, high = shifted.split(GROUP // 2, -1)
    return low | high << 4
