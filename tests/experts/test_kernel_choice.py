"""Which kernel computes the experts, what it is refused for, its tiles, and the plan that it is given."""

import pytest
import torch
from cases import Case

from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.kernels import choice
from fairseq_moe_ext.kernels.choice import Hardware, best_kernel

triton = pytest.importorskip("triton")
triton_mlp = pytest.importorskip("fairseq_moe_ext.kernels.triton_mlp")

SMALL = Case(rows=3, positions=8, model_dim=32, hidden_dim=48)


@pytest.mark.parametrize("hardware, dtype, dims, kernel", [
    (Hardware((9, 0), True), torch.float16, (8192, 2048), "triton"),  # H100, H200
    (Hardware((8, 9), True), torch.bfloat16, (8192, 2048), "triton"),  # 4090
    (Hardware((8, 6), True), torch.float32, (33, 17), "triton"),  # 3090
    (Hardware((8, 0), True), torch.float64, (64, 64), "loop"),
    (Hardware((8, 6), False), torch.bfloat16, (64, 64), "grouped-mm"),
    (Hardware((8, 6), False), torch.bfloat16, (64, 33), "loop"),
    (Hardware((8, 6), False), torch.float16, (64, 64), "loop"),
    (Hardware((7, 5), True), torch.float16, (64, 64), "loop"),  # 2080
    (Hardware((7, 0), True), torch.float16, (8192, 2048), "loop"),  # V100
    (Hardware(None, True), torch.float32, (64, 64), "loop"),
])
def test_the_kernel_is_chosen_by_what_the_device_can_do(hardware, dtype, dims, kernel):
    assert best_kernel(hardware, dtype, dims) == kernel


@pytest.mark.grouped_mm
def test_choose_kernel_takes_the_loop_where_another_cannot_run():
    case = SMALL
    layer, x = case.layer(), case.batch()[0].flatten(0, 1)
    assert layer.experts.kernel_for(x.device, x.dtype) == "loop"
    layer.experts.use_kernel("grouped-mm")
    assert layer.experts.kernel_for(x.device, x.dtype) == "grouped-mm"
    assert layer.experts(x[:4], [4, *[0] * (case.num_experts - 1)]).requires_grad


def test_a_kernel_that_cannot_run_is_refused(monkeypatch):
    layer = SMALL.with_(hidden_dim=33).layer()
    layer.experts.use_kernel("grouped-mm")
    monkeypatch.setattr(choice, "has_grouped_mm", lambda: True)
    with torch.no_grad(), pytest.raises(ValueError, match="grouped-mm needs dims .* dim 32 and hidden dim 33"):
        layer(SMALL.batch()[0])
    monkeypatch.setattr(choice, "has_grouped_mm", lambda: False)
    with torch.no_grad(), pytest.raises(ValueError, match="grouped-mm needs .*grouped_mm, which PyTorch .* not have"):
        layer(SMALL.batch()[0])
    layer.experts.use_kernel("triton")
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with torch.no_grad(), pytest.raises(ValueError, match="kernel triton needs the package triton"):
        layer(SMALL.batch()[0])
    monkeypatch.undo()
    monkeypatch.setattr(choice, "triton_is_interpreted", lambda: False)
    with torch.no_grad(), pytest.raises(ValueError, match="kernel triton needs a GPU, got tokens on cpu"):
        layer(SMALL.batch()[0])


def test_plan_on_the_device_sorts_assignments_by_expert():
    """Assignments in expert order, those that are not kept last; offsets that say where each expert begins."""
    case = SMALL.with_(padding="scattered", skew=3.0)
    layer = case.layer()
    x, mask = case.batch()
    routing = layer.gate(x.flatten(0, 1), mask.flatten())
    plan = plan_by_expert(routing, routing.weights)
    ids = [e if kept else case.num_experts for e, kept in zip(routing.expert_ids.flatten().tolist(),
                                                              routing.kept.flatten().tolist(), strict=True)]
    assert plan.assignments.tolist() == sorted(range(len(ids)), key=lambda number: (ids[number], number))
    assert plan.offsets.on_device.tolist() == [sum(e < expert for e in ids) for expert in range(case.num_experts + 1)]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("memory", [48 * 1024, 64 * 1024, 96 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("rows", [0.1, 16, 40, 64, 500])
def test_tiles_fit_the_shared_memory(rows, itemsize, memory):
    tiles = triton_mlp.tiles_for(rows, itemsize, memory)
    stage = (tiles.rows + tiles.columns) * tiles.inner * itemsize
    assert stage * tiles.stages <= memory
    assert tiles.stages >= 2 or memory < 64 * 1024
