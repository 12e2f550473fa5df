"""Whatever stands in padding, and whatever memory held before, comes nowhere: NaN and infinities among it."""

from contextlib import contextmanager

import pytest
import torch
from cases import Case

from fairseq_moe_ext.gating.capacity import Capacity, CapacityRules
from fairseq_moe_ext.gating.cmr import CMRGate
from fairseq_moe_ext.gating.layer import MOELayer
from fairseq_moe_ext.gating.limit import Limit

BROKEN = (float("nan"), float("inf"), float("-inf"))
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
KERNELS = ["loop", "grouped-mm", pytest.param("triton", marks=INTERPRETED)]
CASE = Case(rows=3, positions=8, model_dim=32, hidden_dim=48, skew=2.0)


@contextmanager
def unwritten_memory_is_nan():
    """PyTorch fills what torch.empty and its like give out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def output_of(layer: MOELayer, x, mask, value: float):
    layer.gate.seed(0)
    with torch.no_grad(), unwritten_memory_is_nan():
        return layer(x.masked_fill(mask.unsqueeze(2), value), mask)


def assert_padding_is_zero(layer: MOELayer, case: Case) -> None:
    x, mask = case.batch()
    assert mask.any()
    clean = output_of(layer, x, mask, 0.0)
    assert clean.isfinite().all() and not clean[mask].any()
    assert case.padding == "all" or clean[~mask].any(dim=1).any()
    for value in BROKEN:
        assert torch.equal(output_of(layer, x, mask, value), clean), value


def quick_or_slow(kernel: str, padding: str, num_choices: int, normalize: bool):
    """An interpreted kernel takes 0.3 s; each of its paddings and choices is among the quick ones."""
    slow = kernel == "triton" and (num_choices, normalize) != QUICK[padding]
    marks = [*([INTERPRETED] if kernel == "triton" else []), *([pytest.mark.slow] if slow else [])]
    return pytest.param(kernel, padding, num_choices, normalize, marks=marks)


QUICK = {"left": (1, False), "scattered": (2, False), "one row": (2, True), "all": (2, False)}


@pytest.mark.parametrize(("kernel", "padding", "num_choices", "normalize"), [
    quick_or_slow(kernel, padding, *choices) for kernel in ("loop", "grouped-mm", "triton") for padding in QUICK
    for choices in ((1, False), (2, False), (2, True))
])
def test_padding_is_zero_under_dynamic_gating(kernel, padding, num_choices, normalize):
    case = CASE.with_(padding=padding, num_choices=num_choices, normalize_before_dropping=normalize)
    layer = case.layer()
    layer.experts.use_kernel(kernel)
    assert_padding_is_zero(layer, case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("policy", ["random", "sampling"])
@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.functional.gelu], ids=["tanh", "gelu"])
def test_random_policies_and_activations_of_their_own(kernel, policy, activation):
    case = CASE.with_(padding="left", use_fp32=True)
    layer = case.layer(policy=policy, activation=activation)
    layer.experts.use_kernel(kernel)
    assert_padding_is_zero(layer, case)


@pytest.mark.parametrize("dtype, kernel", [
    (torch.float16, "loop"), (torch.bfloat16, "loop"), (torch.float64, "loop"),
    (torch.float16, "grouped-mm"), (torch.bfloat16, "grouped-mm"),
], ids=str)
def test_padding_is_zero_in_every_dtype(dtype, kernel):
    case = CASE.with_(padding="scattered", dtype=dtype)
    layer = case.layer()
    layer.experts.use_kernel(kernel)
    assert_padding_is_zero(layer, case)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("overflow", ["drop", "reroute", "expand"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_padding_is_zero_under_a_capacity(kernel, overflow, renormalize):
    case = CASE.with_(padding="scattered", skew=4.0)
    layer = case.layer()
    layer.experts.use_kernel(kernel)
    rules = CapacityRules(1.0, overflow, renormalize=renormalize)
    layer.use(rules=[Limit(Capacity(rules, [0] * case.num_experts, 1))])
    assert_padding_is_zero(layer, case)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("prioritized", [True, False])
@pytest.mark.parametrize("padding", ["left", "one row", "all"])
def test_padding_is_zero_under_static_gating(sparse, prioritized, padding):
    case = CASE.with_(padding=padding)
    static = {"capacity_fraction": 0.3, "count_padding": False, "sparse": sparse, "batch_prioritized": prioritized}
    assert_padding_is_zero(case.layer("static", **static), case)


def test_cmr_gate_gives_padding_a_share_of_zero():
    x, mask = CASE.with_(padding="left").batch()
    gate = CMRGate(CASE.model_dim)
    with torch.no_grad():
        for value in BROKEN:
            share = gate(x.masked_fill(mask.unsqueeze(2), value), mask)
            assert not share[mask].any() and torch.equal(share[~mask], gate(x, mask)[~mask])
