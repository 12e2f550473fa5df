"""Resident experts by grouped products against the naive twin and the loop: on a GPU, and on the CPU under Triton's
interpreter, which is slow (hence the small cases) and gets bfloat16 wrong (hence none there)."""

from unittest.mock import patch

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import TOLERANCE, Case, expert_list
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_ext.gating.capacity import Capacity, CapacityRules
from fairseq_moe_ext.gating.limit import Limit
from fairseq_moe_ext.gating.plan import plan_by_expert
from fairseq_moe_ext.kernels.combine import weighted_sum
from fairseq_moe_ext.kernels.cpu_kernel import VARIABLE
from fairseq_moe_ext.kernels.grouped_mlp import grouped_mlp
from fairseq_moe_ext.kernels.offsets import DeviceCounts, Offsets, fetch

triton = pytest.importorskip("triton")
triton_mlp = pytest.importorskip("fairseq_moe_ext.kernels.triton_mlp")

CUDA = torch.cuda.is_available()
GPU = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
INTERPRETED = pytest.mark.skipif(CUDA, reason="kernels are compiled here, not interpreted")
BOTH = [pytest.param(("triton", "cpu"), marks=INTERPRETED), ("grouped-mm", "cpu"),
        pytest.param(("triton", "cuda"), marks=GPU), pytest.param(("grouped-mm", "cuda"), marks=GPU)]
SMALL = Case(rows=3, positions=8, model_dim=32, hidden_dim=48)
CASES = {
    "uneven": SMALL.with_(skew=2.0),
    "one choice": SMALL.with_(num_choices=1),
    "padding": SMALL.with_(padding="scattered", skew=4.0),
    "left padding": SMALL.with_(padding="left", num_choices=1),
    "one expert takes all": SMALL.with_(skew=40.0, num_choices=1),
    "idle experts": SMALL.with_(rows=1, positions=2, num_experts=9),
    "padding alone": SMALL.with_(padding="all"),
    "no tokens": SMALL.with_(rows=0),
    "one token": SMALL.with_(rows=1, positions=1),
}


def on(layer, kernel, device):
    """The layer in serving on `device` by that kernel, and the calls that its observer hears of."""
    layer.experts.use_kernel(kernel)
    calls = []
    layer.prepare_for_serving(seed=1, observer=calls.append)
    return layer.to(device), calls


def run(layer, x, mask):
    device = next(layer.parameters()).device
    with torch.no_grad():
        return layer(x.to(device), None if mask is None else mask.to(device)).cpu()


@pytest.mark.parametrize("path", BOTH, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_the_naive_twins_layer_output(name, path):
    case = CASES[name]
    layer, calls = on(case.layer(), *path)
    x, mask = case.batch()
    output = run(layer, x, mask)
    layer = layer.cpu()
    expected = reference.moe_layer(
        x, layer.gate.wg.weight.detach(), expert_list(layer), num_choices=case.num_choices, padding_mask=mask
    )
    torch.testing.assert_close(output, expected.output, **TOLERANCE[torch.float32])
    load = expected.load(case.num_experts)
    assert list(calls[0].load) == load
    assert (calls[0].assignments, calls[0].dropped) == (sum(load), 0)


@pytest.mark.parametrize("path", BOTH, ids="-".join)
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh], ids=["gelu", "tanh"])
def test_kernels_compute_every_activation(activation, path):
    """gelu runs inside Triton's first product, tanh between the two."""
    case = SMALL.with_(padding="right", skew=1.0)
    plain, _ = on(case.layer(activation=activation), "loop", "cpu")
    layer, _ = on(case.layer(activation=activation), *path)
    torch.testing.assert_close(run(layer, *case.batch()), run(plain, *case.batch()), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dims", [(33, 17), (6, 5), (50, 130)])
def test_triton_takes_odd_dims(dims, device):
    case = SMALL.with_(model_dim=dims[0], hidden_dim=dims[1], skew=1.0)
    plain, _ = on(case.layer(), "loop", "cpu")
    layer, _ = on(case.layer(), "triton", device)
    torch.testing.assert_close(run(layer, *case.batch()), run(plain, *case.batch()), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", BOTH, ids="-".join)
def test_kernels_under_output_masking(path):
    case = SMALL.with_(padding="left")
    plain, _ = on(case.layer(output_masking=0.2), "loop", "cpu")
    layer, _ = on(case.layer(output_masking=0.2), *path)
    torch.testing.assert_close(run(layer, *case.batch()), run(plain, *case.batch()), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("path", BOTH, ids="-".join)
@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_kernels_under_a_capacity(overflow, path):
    case = SMALL.with_(padding="right", skew=4.0)
    plain, calls = on(case.layer(), "loop", "cpu")
    layer, others = on(case.layer(), *path)
    for each in (plain, layer):
        each.use(rules=[Limit(Capacity(CapacityRules(1.0, overflow), [0] * case.num_experts, 1))])
    torch.testing.assert_close(run(layer, *case.batch()), run(plain, *case.batch()), **TOLERANCE[torch.float32])
    for name in ("assignments", "dropped", "rerouted", "load_before"):
        assert getattr(others[0], name) == getattr(calls[0], name), name
    assert list(others[0].load) == calls[0].load and others[0].dropped + others[0].rerouted > 0


@pytest.mark.parametrize("path", BOTH, ids="-".join)
def test_a_token_does_not_depend_on_its_batch_mates(path):
    case = SMALL.with_(skew=2.0)
    layer, _ = on(case.layer(), *path)
    x, _ = case.batch()
    torch.testing.assert_close(run(layer, x[1:2], None), run(layer, x, None)[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tiles", [(16, 32, 64), (32, 16, 16)], ids=str)
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=GPU)])
def test_many_tiles_per_expert_and_more_tiles_than_neighbours(tiles, device):
    """Tiles that are full, begun and missing, several steps of the inner dim, more than one band of neighbours."""
    torch.manual_seed(0)
    counts = [0, 40, 1, 16, 33, 0, 17]
    owners = torch.repeat_interleave(torch.tensor(counts)).to(device)
    rows = torch.randn(len(owners), 36, device=device)
    pool = [torch.randn(len(counts), *shape, device=device) for shape in ((40, 36), (40,), (36, 40), (36,))]
    sizes, found = triton_mlp.Tiles(*tiles, warps=4, stages=2), torch.empty_like(rows)
    triton_mlp.run_triton(rows, Offsets.of_counts(counts, device), None, pool, F.relu, found, tiles=sizes)
    torch.testing.assert_close(found, row_by_row(rows, owners, pool), rtol=1e-4, atol=1e-3)


def row_by_row(rows, slots, pool):
    """What the expert in each row's slot makes of it."""
    fc1, bias1, fc2, bias2 = (parameter[slots] for parameter in pool)
    hidden = F.relu(torch.einsum("tfd,td->tf", fc1, rows) + bias1)
    return torch.einsum("tdf,tf->td", fc2, hidden) + bias2


SLOTTED = [pytest.param(("triton", "cpu"), marks=INTERPRETED), ("loop", "cpu"),
           ("grouped-mm", "cpu"),
           *(pytest.param((kernel, "cuda"), marks=GPU) for kernel in ("triton", "loop", "grouped-mm"))]


@pytest.mark.parametrize("path", SLOTTED, ids="-".join)
def test_experts_lie_in_any_slot_and_some_are_not_computed(path):
    """Two calls fill one output: what the first leaves alone the second computes, from a middle part of the experts."""
    kernel, device = path
    torch.manual_seed(0)
    counts, slots = [3, 0, 21, 4, 1, 6], [4, 0, -1, 1, 6, -1]
    offsets, owners = Offsets.of_counts(counts, device), torch.repeat_interleave(torch.tensor(counts))
    rows = torch.randn(sum(counts), 32, device=device)
    pool = [torch.randn(7, *shape, device=device) for shape in ((48, 32), (48,), (32, 48), (32,))]
    table = torch.tensor(slots, dtype=torch.int32)
    found = grouped_mlp(kernel, rows, offsets, table, pool, F.relu, torch.full_like(rows, float("nan")))
    where = torch.tensor(slots)[owners]
    assert found[where < 0].isnan().all() and not found[where >= 0].isnan().any()
    other = torch.tensor([5, -1, -1, 2], dtype=torch.int32)
    grouped_mlp(kernel, rows, offsets.part(2, 6), other, pool, F.relu, found)
    where = torch.tensor([4, 0, 5, 1, 6, 2])[owners].to(device)
    torch.testing.assert_close(found, row_by_row(rows, where, pool), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("dim", [5, 32, 600])
def test_the_weighted_sum_is_pytorchs(device, dim):
    """Rows that are not there count nothing, whatever they weigh; a row that is NaN makes its own token NaN."""
    torch.manual_seed(0)
    row_ids = torch.randperm(2 * 9).view(9, 2).masked_fill(torch.rand(9, 2) < 0.3, -1)
    outputs, weights = torch.randn(18, dim), torch.rand(9, 2)
    outputs[row_ids[2, 1]] = float("nan")
    weights[row_ids < 0] = float("nan")
    with torch.no_grad():
        expected = weighted_sum(outputs, row_ids, weights)
        found = triton_mlp.weighted_sum(outputs.to(device), row_ids.to(device), weights.to(device))
    torch.testing.assert_close(found.cpu(), expected, equal_nan=True)
    assert expected[2].isnan().all() and expected.isnan().sum() == dim


@pytest.mark.parametrize("path, dtype", [
    pytest.param(("triton", "cpu"), torch.float16, marks=INTERPRETED),
    (("grouped-mm", "cpu"), torch.float16),
    (("grouped-mm", "cpu"), torch.bfloat16),
    pytest.param(("triton", "cuda"), torch.float16, marks=GPU),
    pytest.param(("triton", "cuda"), torch.bfloat16, marks=GPU),
    pytest.param(("grouped-mm", "cuda"), torch.bfloat16, marks=GPU),
], ids=str)
@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_error_is_at_most_twice_pytorchs_own(path, dtype, num_choices):
    """Both against the same values computed in float32."""
    kernel, device = path
    dims = {"model_dim": 512, "hidden_dim": 1024, "positions": 64} if device == "cuda" else {"positions": 6}
    case = SMALL.with_(num_choices=num_choices, dtype=dtype, **dims)
    layer = case.layer().to(device)
    x = case.batch()[0].flatten(0, 1).to(device)
    with torch.no_grad():
        routing = layer.gate(x)
        weights = layer.gate.combine_weights(routing).to(dtype)
        plan = plan_by_expert(routing, weights)
        layer.experts.use_kernel(kernel)
        outputs = layer.experts.run(x[plan.token_ids], plan.offsets)
        found = weighted_sum(outputs, plan.row_ids, plan.weights).float()
        own, exact = pytorchs(layer.experts, x, routing, weights), None
        exact = pytorchs(layer.experts.float(), x.float(), routing, weights.float())
    for error in (lambda values: (values - exact).abs().max(), lambda values: (values - exact).abs().mean()):
        assert error(found) <= 2 * error(own.float()) + 1e-6


def pytorchs(experts, tokens, routing, weights):
    """What a plain loop over experts gives, in the dtype of its arguments."""
    result = torch.zeros_like(tokens)
    fc1, bias1, fc2, bias2 = experts.parameters()
    for expert in range(experts.num_experts):
        token, choice = (routing.expert_ids == expert).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(tokens[token], fc1[expert], bias1[expert]))
        result.index_add_(0, token, F.linear(hidden, fc2[expert], bias2[expert]) * weights[token, choice].unsqueeze(1))
    return result


@pytest.mark.grouped_mm
def test_kernels_keep_nan_in_its_tokens_alone():
    """An expert that breaks must be seen, and must not touch the tokens of others."""
    for path in BOTH[:2]:
        kernel, device = path.values[0] if hasattr(path, "values") else path
        if kernel == "triton" and CUDA:
            continue
        case = SMALL.with_(num_choices=1)
        layer, _ = on(case.layer(), kernel, device)
        x, _ = case.batch()
        broken = run(on(case.layer(), "loop", "cpu")[0], x, None)
        with torch.no_grad():
            layer.experts.fc1_bias[2] = float("nan")
        chosen = layer.gate(x.flatten(0, 1)).expert_ids.view(3, 8) == 2
        assert chosen.any()
        found = run(layer, x, None)
        assert found[chosen].isnan().all()
        torch.testing.assert_close(found[~chosen], broken[~chosen], **TOLERANCE[torch.float32])


class Waits(TorchDispatchMode):
    """Refuses what waits for a GPU: values that the host reads, shapes that depend on values, copies from the host."""

    REFUSED = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "repeat_interleave.Tensor",
               "equal.default", "lift_fresh", "is_nonzero")

    def __enter__(self):
        def on_host(offsets):
            if offsets._on_host is None or offsets._on_host is offsets._on_device:  # nobody has brought them
                raise RuntimeError("on_host waits for the device")
            return offsets._on_host

        self._offsets = patch.object(Offsets, "on_host", property(on_host))
        self._offsets.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._offsets.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        indices = args[1] if name.startswith(("index.", "index_put")) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name.startswith(self.REFUSED) or by_mask:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", ["triton", "grouped-mm"])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_nothing_waits_for_the_host(monkeypatch, kernel, num_choices):
    if kernel == "triton" and CUDA:
        pytest.skip("the test below looks at the device itself")
    monkeypatch.setenv(VARIABLE, "off")  # what a device runs, on the CPU
    case = SMALL.with_(padding="left", num_choices=num_choices, use_fp32=True)
    layer, calls = on(case.layer(), kernel, "cpu")
    x, mask = case.batch()
    with torch.no_grad(), Waits():
        output = layer(x, mask)
    assert isinstance(calls[0].load, DeviceCounts) and sum(calls[0].load) == num_choices * int((~mask).sum())
    layer.experts.use_kernel("loop")
    torch.testing.assert_close(output, run(layer, x, mask), **TOLERANCE[torch.float32])
    with torch.no_grad(), Waits(), pytest.raises(RuntimeError, match="waits for the device"):
        layer(x, mask)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_choices", [1, 2])
def test_on_the_device_nothing_waits_and_a_graph_can_be_captured(dtype, num_choices):
    case = SMALL.with_(padding="left", num_choices=num_choices, dtype=dtype, use_fp32=True)
    layer, calls = on(case.layer(), "auto", "cuda")
    x, mask = (tensor.cuda() for tensor in case.batch())
    with torch.no_grad():
        expected = layer(x, mask)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = layer(x, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x, mask)
        x.copy_(x.flip(0))
        graph.replay()
        eager = layer(x, mask)
    torch.testing.assert_close(again, expected, **TOLERANCE[dtype])
    torch.testing.assert_close(captured, eager, **TOLERANCE[dtype])
    assert not torch.equal(captured, expected)
    assert sum(calls[0].load) == num_choices * int((~mask).sum())


def on_device(values):
    offsets = Offsets(torch.tensor(values))
    offsets._on_host = None  # as a GPU's
    return DeviceCounts(offsets)


def test_counts_come_from_the_device_together():
    first, second = on_device([0, 2, 2, 3]), on_device([0, 5, 11])
    fetch([first, [1, 2], second])
    with Waits():
        assert list(first) == [2, 0, 1] and second[1] == 6
    fetch([])
    assert len(first) == 3 and sum(on_device([0, 4, 8])) == 8
