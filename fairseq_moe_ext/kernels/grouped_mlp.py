"""fc1, activation and fc2 of many experts, each on its own rows: the one signature that all kernels have.

    rows        (N, D) in expert order
    offsets     where the rows of each of E experts begin and end, on their device or on the host (offsets.py)
    slots       (E,) int32 on the CPU: where expert e lies in the pool; negative where it is not computed. None: expert
                e lies in slot e
    pool        fc1_weight (S, F, D), fc1_bias (S, F), fc2_weight (S, D, F), fc2_bias (S, D), without gradients; or of
                quantised experts their blocks (block.py)
    activation  elementwise
    outputs     (N, D), filled where an expert is computed; all other rows are left as they are
    row_ids     (N,) int64: which of `rows`, then (T, D), each row is; None: they lie in expert order. For kernels that
                `reads_row_ids` names, which need no copy of the rows

Which kernel runs is a name:

    loop        one product per expert, few rows by the C kernel (loop.py): waits for the offsets, works everywhere
    triton      bias and activation fused into two products (triton_mlp.py)
    grouped-mm  PyTorch's `grouped_mm` (grouped_mm.py)
    quantized   quantised experts on rows that are quantised alike (quantized.py)
    widened     quantised experts as floats, on rows as they are: the reference (quantized.py)

A row's outputs depend on the row and its expert alone, not on the rows beside it nor on the slot; on a CPU bit by bit,
except that more rows of an expert than crossing.py says are rounded otherwise.

Legend: N = rows, E = experts, S = slots, D = model dim, F = hidden dim.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.block import QuantizedPool
from fairseq_moe_ext.kernels.cpu_kernel import DTYPES, can_be_read, load_kernel
from fairseq_moe_ext.kernels.grouped_mm import run_grouped_mm
from fairseq_moe_ext.kernels.loop import run_loop
from fairseq_moe_ext.kernels.offsets import Offsets
from fairseq_moe_ext.kernels.quantized import run_quantized, run_widened

Pool = list[Tensor] | QuantizedPool


def grouped_mlp(
    kernel: str,
    rows: Tensor,
    offsets: Offsets,
    slots: Tensor | None,
    pool: Pool,
    activation: Activation,
    outputs: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """Run `kernel`, one of the names above that takes such a pool; gives `outputs`, a new tensor where it is None."""
    if outputs is None:
        outputs = rows.new_empty(len(rows) if row_ids is None else len(row_ids), rows.size(1))
    if outputs.size(0) == 0:
        return outputs
    more = {} if row_ids is None else {"row_ids": row_ids}
    _function(kernel)(rows, offsets, slots, pool, activation, outputs, **more)
    return outputs


def reads_row_ids(kernel: str, rows: Tensor) -> bool:
    """Whether `kernel` takes row ids for these rows: where the C kernel computes."""
    return kernel in ("loop", "quantized") and rows.dtype in DTYPES and can_be_read(rows) and load_kernel() is not None


def _function(kernel: str) -> Callable[..., None]:
    if kernel == "triton":
        from fairseq_moe_ext.kernels.triton_mlp import run_triton  # imports triton, which may not be there

        return run_triton
    return _FUNCTIONS[kernel]


_FUNCTIONS = {
    "loop": run_loop,
    "grouped-mm": run_grouped_mm,
    "quantized": run_quantized,
    "widened": run_widened,
}
