"""Tokens travel between real processes: where each went and came back, how many bytes, and whose result it is."""

import pytest
import torch
from cases import TOLERANCE, Case
from rank_group import ranks
from rank_layers import Call, Job, alone, contiguous, replicated, serve, shuffled, split_layer

from fairseq_moe_ext.gating import Routing
from fairseq_moe_ext.gating import call as of_layer
from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group

STATIC = {"capacity_fraction": 0.3, "count_padding": False}
PLACEMENTS = {"contiguous": contiguous, "shuffled": shuffled, "replicated": replicated}


@pytest.fixture(scope="module", params=[2, 3, 4])
def group(request):
    with ranks(request.param) as group:
        yield group


def assert_as_alone(job: Job, served) -> None:
    """Every output and every load is what one rank with all experts finds."""
    for rank, found in enumerate(served):
        outputs, calls = alone(job, rank)
        assert len(outputs) == len(found.outputs)
        for output, wanted in zip(found.outputs, outputs, strict=True):
            torch.testing.assert_close(output, wanted, **TOLERANCE[output.dtype])
        for call, wanted in zip(found.calls, calls, strict=True):
            assert (call.load, call.assignments, call.dropped) == (wanted.load, wanted.assignments, wanted.dropped)


def uneven(world_size: int, rows: int = 3) -> list[list[Call]]:
    """Rank r has r batches, so that rank 0 has none."""
    return [[Call(10 * rank + number, rows=rows) for number in range(rank)] for rank in range(world_size)]


# --- the result is one rank's


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_result_is_one_ranks(group, gating, num_choices, where):
    case = Case(num_choices=num_choices, num_experts=7, skew=2.0, padding="left")
    placement = PLACEMENTS[where](7, group.world_size)
    job = Job([case], [placement], uneven(group.world_size), gating, STATIC if gating == "static" else {})
    assert_as_alone(job, group(serve, job))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_the_result_is_one_ranks_in_every_dtype(group, gating, dtype):
    case = Case(num_experts=5, model_dim=9, padding="right", dtype=dtype)
    static = STATIC if gating == "static" else {}
    job = Job([case], [shuffled(5, group.world_size)], uneven(group.world_size), gating, static)
    served = group(serve, job)
    assert_as_alone(job, served)
    assert all(output.dtype is dtype for found in served for output in found.outputs)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_batches_of_different_sizes_and_without_a_token(group, gating):
    sizes = (0, 4, 1, 0, 2, 3)
    calls = [
        [Call(rank, rows=sizes[(rank + number) % len(sizes)]) for number in range(4 + rank)]
        for rank in range(group.world_size)
    ]
    static = STATIC if gating == "static" else {}
    job = Job([Case(num_experts=5)], [contiguous(5, group.world_size)], calls, gating, static)
    assert_as_alone(job, group(serve, job))


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_no_rank_has_a_token(group, gating):
    calls = [[Call(0, rows=0)] * 2] * group.world_size
    static = STATIC if gating == "static" else {}
    job = Job([Case()], [contiguous(5, group.world_size)], calls, gating, static)
    for found in group(serve, job):
        assert [output.shape for output in found.outputs] == [(0, 7, 6)] * 2
        assert [call.bytes_exchanged for call in found.calls] == [0, 0]
        assert found.rows_computed == [0]


@pytest.mark.parametrize("padding", ["all", "scattered", "one row"])
def test_padding_does_not_travel(group, padding):
    case = Case(padding=padding)
    job = Job([case], [shuffled(5, group.world_size)], uneven(group.world_size))
    served = group(serve, job)
    assert_as_alone(job, served)
    kept = sum(int((~job.batch(call)[1]).sum()) for calls in job.calls for call in calls)
    assert sum(found.rows_computed[0] for found in served) == kept * case.num_choices
    if padding == "all":
        assert all(call.bytes_exchanged == 0 for found in served for call in found.calls)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_more_ranks_than_experts(group, gating):
    """Two experts, one of them on two ranks; of four ranks one holds nothing."""
    placement = [[0, group.world_size - 1], [1]]
    static = STATIC if gating == "static" else {}
    job = Job([Case(num_experts=2)], [placement], uneven(group.world_size), gating, static)
    served = group(serve, job)
    assert_as_alone(job, served)
    assert sum(found.rows_computed[0] for found in served) > 0
    for rank, found in enumerate(served):
        assert found.rows_computed == [0] or any(rank in on for on in placement)


def test_a_rank_whose_experts_get_nothing(group):
    """All tokens choose the same expert, which is rank 0's; the last rank's experts never run."""
    case = Case(num_choices=1, num_experts=5, skew=40.0)
    call = Call(3)
    (load,) = (call.load for call in alone(Job([case], [], [[call]]), 0)[1])
    assert sorted(load)[:4] == [0] * 4
    placement = [[0] if count else [1 + number % (group.world_size - 1)] for number, count in enumerate(load)]
    calls = [[Call(seed) for seed in range(3, 3 + 2 * rank)] for rank in range(group.world_size)]
    served = group(serve, job := Job([case], [placement], calls))
    assert_as_alone(job, served)
    rows = [found.rows_computed[0] for found in served]
    assert rows == [sum(21 * len(each) for each in calls)] + [0] * (group.world_size - 1)


# --- ranks need not be in the same layer


def different_layers(world_size: int, dtype_of_second: torch.dtype = torch.float32) -> Job:
    """Two layers of different shapes; the ranks call them in different orders and numbers."""
    first = Case(num_experts=5, model_dim=6)
    second = Case(num_experts=7, model_dim=9, hidden_dim=4, num_choices=1, seed=1, dtype=dtype_of_second)
    orders = ([0, 1, 0, 1, 1], [1, 1, 0], [0], [1, 0, 1, 0, 1, 0, 1])
    calls = [[Call(rank, layer=layer) for layer in orders[rank]] for rank in range(world_size)]
    return Job([first, second], [contiguous(5, world_size), shuffled(7, world_size)], calls)


def test_ranks_in_different_layers_in_the_same_round(group):
    job = different_layers(group.world_size)
    served = group(serve, job)
    assert_as_alone(job, served)
    longest = max(map(len, job.calls))
    for found, calls in zip(served, job.calls, strict=True):
        assert found.rounds == longest + 1  # one more, in which all find that all are done
        assert found.idle_rounds == longest + 1 - len(calls)


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_ranks_in_layers_of_different_dtypes(group, gating, dtype):
    """Rows of 9 half-precision numbers end where no float32 may begin."""
    dynamic = different_layers(group.world_size, dtype)
    static = STATIC if gating == "static" else {}
    job = Job(dynamic.layers, dynamic.placements, dynamic.calls, gating, static)
    assert_as_alone(job, group(serve, job))


def test_ranks_in_different_layers_under_static_gating(group):
    dynamic = different_layers(group.world_size)
    job = Job(dynamic.layers, dynamic.placements, dynamic.calls, "static", STATIC)
    assert_as_alone(job, group(serve, job))


# --- the bytes


def leaving(job: Job, rank: int) -> list[int]:
    """Per call of `rank` the assignments whose expert lies elsewhere; without replicas."""
    layers, numbers = job.build(), []
    for call in job.calls[rank]:
        x, mask = job.batch(call)
        routing = layers[call.layer].gate(x.flatten(0, 1), None if mask is None else mask.flatten())
        experts = routing.expert_ids[routing.kept].tolist()
        numbers.append(sum(job.placements[call.layer][expert] != [rank] for expert in experts))
    return numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["contiguous", "shuffled"])
def test_dynamic_gating_sends_exactly_the_assignments_that_leave(group, where, dtype):
    case = Case(num_experts=7, model_dim=9, padding="scattered", skew=1.0, dtype=dtype)
    job = Job([case], [PLACEMENTS[where](7, group.world_size)], uneven(group.world_size))
    served = group(serve, job)
    for rank, found in enumerate(served):
        wanted = [number * 9 * dtype.itemsize for number in leaving(job, rank)]
        assert [call.bytes_exchanged for call in found.calls] == wanted
        assert all(call.load and set(call.seconds) >= {"sizes", "exchange", "experts"} for call in found.calls)
    assert any(call.bytes_exchanged for found in served for call in found.calls)


def test_dynamic_gating_sends_exactly_the_assignments_that_leave_in_every_layer(group):
    job = different_layers(group.world_size)
    row_bytes = [case.model_dim * 4 for case in job.layers]
    for rank, found in enumerate(group(serve, job)):
        wanted = [
            number * row_bytes[call.layer] for number, call in zip(leaving(job, rank), job.calls[rank], strict=True)
        ]
        assert [call.bytes_exchanged for call in found.calls] == wanted


def test_static_gating_sends_all_slots_padded_to_the_largest_capacity(group):
    """Rank r has r + 1 rows of 7 tokens in its only batch; 0.3 of them is the capacity; E * C * D floats, less one's
    own experts', leave each rank, C the largest of all ranks'."""
    world_size = group.world_size
    calls = [[Call(rank, rows=rank + 1)] for rank in range(world_size)]
    placement = contiguous(7, world_size)
    served = group(serve, job := Job([Case(num_experts=7)], [placement], calls, "static", STATIC))
    assert_as_alone(job, served)
    largest = {2: 5, 3: 7, 4: 9}[world_size]  # ceil(0.3 * 14), ceil(0.3 * 21), ceil(0.3 * 28)
    received = []
    for rank, found in enumerate(served):
        others = sum(on != [rank] for on in placement)
        assert [call.bytes_exchanged for call in found.calls] == [others * largest * 6 * 4]
        received.append((7 - others) * largest * world_size)
    assert [found.rows_computed for found in served] == [[rows] for rows in received]


def test_a_rank_without_a_batch_sends_no_slots(group):
    calls = [[] for _ in range(group.world_size - 1)] + [[Call(0)]]
    job = Job([Case(num_experts=4)], [contiguous(4, group.world_size)], calls, "static", STATIC)
    served = group(serve, job)
    assert_as_alone(job, served)
    # ceil(0.3 * 21) slots of each expert
    assert [found.rows_computed[0] for found in served] == [
        7 * sum(on == [rank] for on in job.placements[0]) for rank in range(group.world_size)
    ]


# --- where each token went: experts that multiply by their number and their rank's


FACTOR = 100  # between ranks


def scaled_identity(layer, rank: int) -> None:
    """Expert e, held on `rank`, multiplies by FACTOR * rank + e + 1; relu lets positive inputs pass."""
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
        for place, expert in enumerate(layer.experts.local):
            layer.experts.fc1_weight[place] = torch.eye(layer.experts.model_dim)
            layer.experts.fc2_weight[place] = torch.eye(layer.experts.model_dim) * (FACTOR * rank + expert + 1)


def travel(rank, world_size, placement, expert_ids_of_ranks, kept_of_ranks):
    """Send rows that say where they are from; what came back, the plan and the bytes."""
    layer = Case(model_dim=4, hidden_dim=4, num_experts=len(placement)).layer()
    exchange = Exchange(start_group())
    split_layer(layer, placement, rank, world_size, exchange)
    scaled_identity(layer, rank)
    expert_ids, kept = expert_ids_of_ranks[rank], kept_of_ranks[rank]
    tokens = 1.0 + 1000 * rank + torch.arange(expert_ids.size(0)).unsqueeze(1).repeat(1, 4)
    routing = Routing(expert_ids, kept, kept.float(), torch.zeros(expert_ids.size(0), len(placement)))
    call = of_layer.Call(tokens, None, 1, False, False, layer.gate, layer.experts, of_layer.Clock(False))
    planned = layer.dispatcher.plan(routing, call)
    assignments = planned.by_replica.assignments[: sum(planned.counts)]
    rows = tokens[assignments // kept.size(1)]
    with torch.no_grad():
        outputs = layer.dispatcher.run(planned, call)
    exchange.idle_round(alive=False)
    scale = outputs / rows
    assert torch.equal(scale, scale[:, :1].expand_as(scale)) and torch.equal(scale, scale.round())
    return assignments, scale[:, 0].long() - 1, call.bytes_exchanged


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("num_choices", [1, 2])
def test_every_assignment_ran_in_a_copy_of_its_expert_and_came_back_to_its_token(group, where, num_choices):
    world_size, num_experts = group.world_size, 5
    generator = torch.Generator().manual_seed(num_choices)
    shapes = [(tokens, num_choices) for tokens in (19, 0, 40, 1)[:world_size]]
    expert_ids = [torch.randint(num_experts, shape, generator=generator) for shape in shapes]
    kept = [torch.rand(shape, generator=generator) < 0.8 for shape in shapes]
    placement = PLACEMENTS[where](num_experts, world_size)
    results = group(travel, placement, expert_ids, kept)
    for rank, (assignments, found, num_bytes) in enumerate(results):
        ran_on, ran_in = found // FACTOR, found % FACTOR
        assert sorted(assignments.tolist()) == kept[rank].flatten().nonzero().flatten().tolist()
        assert torch.equal(ran_in, expert_ids[rank].flatten()[assignments])
        assert all(on in placement[expert] for on, expert in zip(ran_on.tolist(), ran_in.tolist(), strict=True))
        assert num_bytes == int((ran_on != rank).sum()) * 4 * 4


def scaled_layer(rank, world_size, case, gating, placement):
    """The layer's output on positive tokens, by scaled identity experts."""
    layer = case.layer(gating, **({"capacity_fraction": 1.0} if gating == "static" else {}))
    exchange = Exchange(start_group())
    split_layer(layer, placement, rank, world_size, exchange)
    scaled_identity(layer, 0)
    x = case.with_(seed=rank, rows=1 + rank).batch()[0].abs()
    with torch.no_grad():
        output = layer(x)
    exchange.idle_round(alive=False)
    return x, output


@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_the_layers_output_is_its_weights_times_its_experts_numbers(group, gating, num_choices):
    case = Case(num_choices=num_choices, hidden_dim=6, dtype=torch.float64)
    for x, output in group(scaled_layer, case, gating, shuffled(5, group.world_size)):
        gate = case.layer().gate
        with torch.no_grad():
            routing = gate(x.flatten(0, 1), None)
            weights = gate.combine_weights(routing).to(torch.float64)
        scale = (weights * (routing.expert_ids + 1)).sum(dim=1)
        torch.testing.assert_close(output, x * scale.view(x.shape[:2]).unsqueeze(2))
