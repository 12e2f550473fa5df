"""Served models by every kernel: the same results, report and trace as the loop over experts."""

import numpy as np
import pytest
import torch
from served_models import Loader, logits

from fairseq_moe_ext.experts.resident import ResidentExperts


@pytest.fixture(scope="module")
def loader(shared_goldens):
    return Loader(shared_goldens)


@pytest.mark.grouped_mm
@pytest.mark.parametrize("name", ["lm_top2", "mt_nllb_ws2"])
def test_results_report_and_trace_are_the_loops(loader, name, tmp_path):
    found = {}
    for kernel in ("loop", "grouped-mm"):
        model = loader.load(name, {}, "--moe-kernel", kernel, "--moe-trace", str(tmp_path / "trace.npz"))
        assert {layer.experts.kernel for layer in model.moe_layers().values()} == {kernel}
        observer = model.observer
        values = logits(model)
        found[kernel] = values, observer.report.layers, observer._recorder.trace()
    values, layers, phases = found["grouped-mm"]
    expected, expected_layers, expected_phases = found["loop"]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    assert phases.keys() == expected_phases.keys() and phases
    for phase, recorded in phases.items():
        assert recorded.names == expected_phases[phase].names
        assert np.array_equal(recorded.load, expected_phases[phase].load)
    assert layers.keys() == expected_layers.keys() and layers
    for layer, other in zip(layers.values(), expected_layers.values(), strict=True):
        assert (layer.load, layer.assignments, layer.calls) == (other.load, other.assignments, other.calls)
        assert sum(layer.load) > 0


@pytest.mark.grouped_mm
@pytest.mark.parametrize("kernel", ["loop", "grouped-mm"])
def test_experts_in_a_buffer_go_by_the_same_kernels(loader, kernel):
    expected = logits(loader.load("lm_top2", {}))
    model = loader.load("lm_top2", {}, "--moe-kernel", kernel, "--expert-buffer-size", "2")
    cpu = torch.device("cpu"), torch.float32
    assert {layer.experts.kernel_for(*cpu) for layer in model.moe_layers().values()} == {kernel}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_by_default_the_device_decides(loader):
    model = loader.load("lm_top2", {})
    assert all(isinstance(layer.experts, ResidentExperts) for layer in model.moe_layers().values())
    assert {layer.experts.kernel for layer in model.moe_layers().values()} == {"auto"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kernel", ["auto", "triton", "grouped-mm", "loop"])
@pytest.mark.parametrize("name", ["lm_top2", "mt_nllb_ws2"])
def test_on_a_gpu_results_are_the_cpus(loader, name, kernel):
    expected = logits(loader.load(name, {}))
    model = loader.load(name, {}, "--moe-kernel", kernel).cuda()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert all(sum(layer.load) > 0 for layer in model.observer.report.layers.values())
