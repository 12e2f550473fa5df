"""Resident experts on a GPU without waiting for the host: sizes stay on the device, as offsets of grouped products.

The assignments are sorted on the device, those that are not kept behind the last expert's; what then runs knows T, K
and E alone. Which kernel runs is chosen by what the device can do:

    triton      gather, bias, activation and scatter fused into two products (triton_experts.py)
    grouped-mm  PyTorch's `grouped_mm`, with passes of their own for all of these
    loop        one product per expert (dispatch.py, experts.py): waits for the sizes, and works everywhere

Legend: T = tokens, E = experts, K = choices per token, N = T * K assignments, kept or not, D = model dim,
F = hidden dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe_ext.experts.resident import ResidentExperts, activate_rows, wants_gradients
from fairseq_moe_ext.gating.routing import Routing
from fairseq_moe_ext.torch_versions import has_grouped_mm, triton_is_interpreted

logger = logging.getLogger("fairseq_moe_ext")

KERNELS = ("auto", "triton", "grouped-mm", "loop")
AMPERE = (8, 0)  # the oldest compute capability with bfloat16, and the oldest that Triton supports
GROUPED_MM_ALIGNMENT = 16  # bytes, of every row


@dataclass(frozen=True)
class Hardware:
    """capability: a GPU's compute capability, None for any other device. triton: whether Triton compiles for it."""

    capability: tuple[int, int] | None
    triton: bool


@dataclass(frozen=True)
class GroupedPlan:
    """The assignments of T tokens in expert order, on the device.

    assignments: (N,) int64, which assignment (token * K + choice) each row is; within an expert in rising order; those
    that are not kept come last. offsets: (E + 1,) int32, where each expert's rows begin; the last is where those of the
    last expert end. num_choices: K.
    """

    assignments: Tensor
    offsets: Tensor
    num_choices: int

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int32 on the device."""
        return self.offsets.diff()


def plan_grouped(routing: Routing) -> GroupedPlan:
    """Sort the assignments by expert; the host learns nothing of it."""
    ids = routing.expert_ids.masked_fill(~routing.kept, routing.num_experts).view(-1)  # (N,)
    ordered, assignments = ids.sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(routing.num_experts + 1, device=ids.device), out_int32=True)
    return GroupedPlan(assignments, offsets, routing.expert_ids.size(1))


def choose_kernel(experts: nn.Module, tokens: Tensor, *weights: Tensor) -> str:
    """`triton`, `grouped-mm` or `loop` for `tokens` (T, D): as `experts.kernel` says, or for `auto` what fits best.

    weights: the gate's (T, K), where there are some. Experts in a buffer and whatever needs dropout or gradients, be it
    for one parameter of gate or experts, go by the loop. ValueError where a kernel that was asked for cannot run.
    """
    if not isinstance(experts, ResidentExperts):
        return "loop"
    drops_out = experts.training or experts.retain_dropout
    if experts.kernel == "loop" or drops_out or wants_gradients(tokens, *weights, *experts.parameters()):
        return "loop"
    dims, dtype = experts.fc1_weight.shape[1:], tokens.dtype
    if experts.kernel == "auto":
        return best_kernel(hardware_of(tokens.device), dtype, dims) if tokens.device.type == "cuda" else "loop"
    if experts.kernel == "grouped-mm" and not has_grouped_mm():
        raise ValueError(
            f"kernel grouped-mm needs torch.nn.functional.grouped_mm, which PyTorch {torch.__version__} does not have"
        )
    if experts.kernel == "grouped-mm" and not _fits_grouped_mm(dtype, dims):
        raise ValueError(
            f"kernel grouped-mm needs dims whose rows are multiples of {GROUPED_MM_ALIGNMENT} bytes, got model dim "
            f"{dims[1]} and hidden dim {dims[0]} in {dtype}"
        )
    if experts.kernel == "triton" and find_spec("triton") is None:
        raise ValueError("kernel triton needs the package triton, which is not installed")
    if experts.kernel == "triton" and tokens.device.type != "cuda" and not triton_is_interpreted():
        raise ValueError(f"kernel triton needs a GPU, got tokens on {tokens.device}")
    return experts.kernel


def best_kernel(hardware: Hardware, dtype: torch.dtype, dims: Sequence[int]) -> str:
    """What runs on that hardware without waiting for the host, or else `loop`; dims: F and D.

    >>> best_kernel(Hardware((7, 0), True), torch.float16, (8192, 2048))
    'loop'
    """
    if hardware.capability is None or hardware.capability < AMPERE:
        return "loop"
    if hardware.triton and dtype in (torch.float16, torch.bfloat16, torch.float32):
        return "triton"
    if dtype == torch.bfloat16 and _fits_grouped_mm(dtype, dims):  # in other dtypes it reads the offsets on the host
        return "grouped-mm"
    return "loop"


def _fits_grouped_mm(dtype: torch.dtype, dims: Sequence[int]) -> bool:
    return has_grouped_mm() and all(dim * dtype.itemsize % GROUPED_MM_ALIGNMENT == 0 for dim in dims)


@lru_cache
def hardware_of(device: torch.device) -> Hardware:
    """What `device` can do; Triton is tried, since it needs a C compiler as well."""
    if device.type != "cuda":
        return Hardware(None, False)
    capability = torch.cuda.get_device_capability(device)
    if find_spec("triton") is None or capability < AMPERE:
        return Hardware(capability, False)
    from fairseq_moe_ext.kernels.triton_experts import weighted_sum

    try:
        weighted_sum(torch.ones(1, 16, device=device), torch.ones(1, 1, device=device))
    except Exception as error:  # whatever a missing compiler or driver makes of it
        logger.warning("Triton does not work on %s, experts run without it: %s", device, error)
        return Hardware(capability, False)
    return Hardware(capability, True)


def run_grouped(
    kernel: str, experts: ResidentExperts, tokens: Tensor, plan: GroupedPlan, weights: Tensor, scale: float = 1.0
) -> Tensor:
    """tokens (T, D), weights (T, K), zero where an assignment is not kept -> `scale` times the experts' weighted sum
    per token (T, D), zero for a token without experts.

    A token's result is summed in the order of its choices, whoever shares the batch.
    """
    parameters = [parameter.detach() for parameter in experts.weights_for(tokens)]
    if tokens.size(0) == 0:
        return tokens
    if kernel == "triton":
        from fairseq_moe_ext.kernels.triton_experts import run_triton  # imports triton, which may not be there

        return run_triton(tokens, plan, weights, parameters, experts.activation, scale)
    return run_grouped_mm(tokens, plan, weights, parameters, experts.activation, scale)


def run_grouped_mm(
    tokens: Tensor,
    plan: GroupedPlan,
    weights: Tensor,
    parameters: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor],
    scale: float,
) -> Tensor:
    """`run_grouped` by PyTorch's own grouped product; parameters: packed, in the order of EXPERT_KEYS."""
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
    num_rows, num_experts = plan.assignments.numel(), fc1_weight.size(0)
    ends = plan.offsets[1:]
    places = torch.arange(num_rows, device=tokens.device, dtype=ends.dtype)
    owners = torch.searchsorted(ends, places, right=True).clamp_(max=num_experts - 1)  # (N,) the expert of each row
    rows = tokens.index_select(0, plan.assignments // plan.num_choices)
    hidden = F.grouped_mm(rows, fc1_weight.transpose(1, 2), offs=ends)
    hidden = activate_rows(hidden + fc1_bias.index_select(0, owners), activation)
    outputs = F.grouped_mm(hidden, fc2_weight.transpose(1, 2), offs=ends) + fc2_bias.index_select(0, owners)
    by_assignment = torch.empty_like(outputs).index_copy_(0, plan.assignments, outputs)
    by_assignment = by_assignment.view(*weights.shape, -1)  # (T, K, D); what is not kept was never computed
    weighted = torch.where(weights.unsqueeze(2) != 0, by_assignment * weights.unsqueeze(2), 0)
    return (weighted.sum(dim=1, dtype=torch.float32) * scale).to(tokens.dtype)
