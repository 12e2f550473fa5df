"""An error on one rank, wherever in a round, ends the calls of all ranks with its cause; no half round is left."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import Case
from rank_group import ranks
from rank_layers import contiguous, split_layer

from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.process_group import start_group

CASE = Case(num_experts=6, rows=4)
SECONDS = 20  # for all ranks to end, on a machine that does much else
# where -> what is called there: before the sizes, between sizes and tokens, in the experts, on the way back
PLACES = {
    "dynamic": {
        "gate": lambda layer: (layer.gate, "forward"),
        "dispatch": lambda layer: (layer.dispatcher.exchange.replicas, "fold"),
        "prefetch": lambda layer: (layer.experts, "prefetch"),
        "experts": lambda layer: (layer.experts, "forward"),
        "combine": lambda layer: (layer, "_mask_outputs"),
    },
    "static": {
        "gate": lambda layer: (layer.gate, "forward"),
        "slots": lambda layer: (layer.dispatcher.exchange.replicas, "chosen_whole"),
        "experts": lambda layer: (layer.experts, "forward"),
        "combine": lambda layer: (layer, "_mask_outputs"),
    },
}


@pytest.fixture(scope="module")
def group():
    with ranks(3) as group:
        yield group


MESSAGE = "boom \udcff"  # as a file's name may be that is not UTF-8
CAUSE = "of 3 failed: ValueError: boom ?"


def boom(*_args, **_more):
    raise ValueError(MESSAGE)


def error_of(call) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error.with_traceback(None)
    return None


def fail(rank, world_size, file, gating, place, failing, calling):
    """Calls of a layer, of which `failing`'s second breaks at `place`; ranks not in `calling` compute for the others.

    -> per rank (its first error, the seconds until it came, the error of one more call)
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    exchange = Exchange(start_group())
    layer = CASE.layer(gating, **({"capacity_fraction": 1.0} if gating == "static" else {}))
    split_layer(layer, contiguous(6, world_size), rank, world_size, exchange)
    x, _ = CASE.with_(seed=rank).batch()

    def call():
        with torch.no_grad():
            return layer(x) if rank in calling else exchange.idle_round(alive=True)

    call()
    if rank == failing:
        setattr(*PLACES[gating][place](layer), boom)
    start = time.monotonic()
    errors = (error_of(call) for _ in range(3))  # the others may learn of it in the next round
    first = next(error for error in errors if error is not None)
    return first, time.monotonic() - start, error_of(call)


@pytest.mark.parametrize(("gating", "place"), [(gating, place) for gating in PLACES for place in PLACES[gating]])
def test_all_ranks_end_with_the_cause(group, tmp_path, gating, place):
    found = group(fail, str(tmp_path / "group"), gating, place, 1, (0, 1))
    for rank, (error, seconds, after) in enumerate(found):
        assert seconds < SECONDS
        if rank == 1:
            assert isinstance(error, ValueError) and str(error) == MESSAGE
        else:
            assert isinstance(error, ExchangeError) and f"rank 1 {CAUSE}" in str(error)
        assert isinstance(after, ExchangeError)
        assert "cannot be used any more" in str(after) and "rank 1 of 3 failed: ValueError: boom" in str(after)


def test_a_rank_that_computes_for_the_others_fails(group, tmp_path):
    """In its experts, in a round of its own that sends nothing."""
    found = group(fail, str(tmp_path / "group"), "dynamic", "experts", 2, (0, 1))
    assert [type(error) for error, _, _ in found] == [ExchangeError, ExchangeError, ValueError]
    for error, seconds, _ in found[:2]:
        assert f"rank 2 {CAUSE}" in str(error) and seconds < SECONDS
