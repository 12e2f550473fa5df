"""`fairseq_moe_ext.load` on several ranks: what goes wrong on one is an error on all, and ends no program."""

import os
import signal
from pathlib import Path

import pytest
import torch
from python_served import PIECES, lines_of
from rank_group import ranks
from rank_programs import error_of, run_ranks

import fairseq_moe_ext as moe
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.ranks.process_group import GRACE


@pytest.fixture(scope="module")
def two():
    """Programs that have a default group of their own."""
    with ranks(2) as group:
        yield group


def load(folder: Path, **options):
    return moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options)


def differ(rank, world_size, folder):
    """Calls that are not the same ones; the model goes on afterwards."""
    name = ("mt_plain", "mt_nllb_ws2")[rank]
    said = [error_of(lambda: moe.load(folder / f"{name}.pt", cpu=True))]
    with load(folder, **PIECES) as served:
        lines = lines_of(served)[:3]
        calls = [
            lambda: served.translate(lines, beam=2 + rank),
            lambda: served.translate([*lines[:2], lines[2 * rank]]),
            lambda: served.score(lines, lines) if rank else served.generate(lines),
            lambda: served.generate(lines, **({"nbest": 2} if rank else {})),
            lambda: served.translate(lines, **({"beam": 0} if rank else {})),
            lambda: served.translate(lines, beam=0),
            lambda: served.engine(),
        ]
        said += map(error_of, calls)
        assert len(served.translate(lines)) == 3
    return said


def test_calls_that_differ_are_one_error_on_all_ranks(shared_goldens, two):
    folder = shared_goldens / "mt_plain"
    first, second = two(differ, folder)
    path, *of_model = first
    assert first == second and [kind for kind, _ in first] == ["ValueError"] * 6 + ["OptionError", "ValueError"]
    assert path[1].startswith("path must be the same on all ranks, got PosixPath(")
    assert [said for _, said in of_model] == [
        "beam must be the same on all ranks, got 2 on rank 0 and 3 on rank 1",
        "sentences must be the same on all ranks, got 3 texts on rank 0 and 3 texts others on rank 1",
        "all ranks must make the same call, got generate() on rank 0 and score() on rank 1",
        "nbest must be the same on all ranks, got none on rank 0 and 2 on rank 1",
        "beam must be the same on all ranks, got none on rank 0 and 0 on rank 1",
        "beam must be at least 1, got 0",
        "engine() must be called where one process serves, got 2 ranks",
    ]


def name_ranks(rank, world_size, folder):
    said = error_of(lambda: load(folder, **PIECES, distributed_world_size=3))
    with load(folder, **PIECES, distributed_world_size=2) as served:
        return said, served.report()["world_size"]


def test_distributed_world_size_must_be_that_of_the_running_ranks(shared_goldens, two):
    said = ("OptionError", "distributed_world_size must be the number of the ranks, 2, got 3")
    assert two(name_ranks, shared_goldens / "mt_plain") == [(said, 2)] * 2


def miss_data(rank, world_size, folder, elsewhere):
    os.chdir(folder if rank == 0 else elsewhere)
    return error_of(lambda: moe.load(str(folder / "checkpoint_last.pt"), data="data-bin", **PIECES))


def test_a_rank_that_cannot_load_ends_the_loading_of_all(shared_goldens, two, tmp_path):
    first, second = two(miss_data, shared_goldens / "mt_plain", tmp_path)
    missing = "data must be a folder with the model's dictionaries, got data-bin"
    assert second[0] == "OptionError" and second[1].startswith(missing)
    assert first == ("ExchangeError", f"load() broke off: rank 1 of 2 failed: OptionError: {second[1]}")


def fail(rank, world_size, folder, failing):
    """An error in one rank's experts; then further calls, the end, and another model."""
    served = load(folder, **PIECES)
    lines = lines_of(served)[:6]
    forward = ResidentExperts.forward

    def broken(*_):
        raise MemoryError("no room for the experts")

    if rank == failing:
        ResidentExperts.forward = broken
    try:
        said = [error_of(lambda: served.translate(lines, batch_size=2)) for _ in range(2)]
    finally:
        ResidentExperts.forward = forward
    served.close()
    with load(folder, **PIECES) as again:
        return said, again.translate(lines)


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_error_on_one_rank_is_one_on_all_and_the_model_can_only_be_closed(shared_goldens, two, failing):
    results = two(fail, shared_goldens / "mt_plain", failing)
    cause = f"rank {failing} of 2 failed: MemoryError: no room for the experts"
    for rank, ((first, then), translated) in enumerate(results):
        own = ("MemoryError", "no room for the experts")
        assert first == (own if rank == failing else ("ExchangeError", f"translate() broke off: {cause}"))
        assert then == ("ExchangeError", f"the model can only be closed: {cause}")
        assert translated == results[0][1] and len(translated) == 6


def break_experts(rank, world_size, folder):
    """Experts of one rank give no numbers; without them the model is as before."""
    with load(folder, **PIECES) as served:
        lines = lines_of(served)[:6]
        parameters = [p for layer in served._parts.models[0].moe_layers().values() for p in layer.experts.parameters()]
        before = [parameter.clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters if rank == 1 else ():
                parameter.fill_(float("nan"))
            said = error_of(lambda: served.translate(lines, batch_size=2))
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
        return said, served.translate(lines, batch_size=2)


def test_results_that_are_no_numbers_are_an_error_on_all_ranks(shared_goldens, two):
    (said, translated), second = two(break_experts, shared_goldens / "mt_plain")
    assert second == (said, translated) and len(translated) == 6
    assert said[0] == "NotFiniteError"
    assert said[1].startswith("6 of 6 results are not numbers (sentence 0, 1, 2, 3, 4, ...): values in float32 are not")
    assert "first in encoder.layers.1" in said[1]


# --- programs that torchrun or a user starts

PROGRAM = """
import os, signal, sys, time
import torch.distributed as dist
import fairseq_moe_ext as moe
from fairseq_moe_ext.experts.resident import ResidentExperts

path, data = sys.argv[1:]
rank = int(os.environ["RANK"])
served = moe.load(path, data=data, cpu=True, post_process="sentencepiece")
print(served.translate(["▁A ▁man ▁in ▁an ▁orange ▁hat .", "▁Two ▁dogs ▁run ."], beam=4, batch_size=1))
if os.environ.get("KILLED") == str(rank):
    ResidentExperts.forward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
start = time.monotonic()
try:
    if "KILLED" in os.environ:
        served.translate(["▁Two ▁dogs ▁run ."] * 6, batch_size=1)
except Exception as error:
    print(type(error).__name__, error)
print(time.monotonic() - start, dist.is_initialized())
served.close()
"""


def test_a_rank_that_is_killed_ends_the_others_calls_and_no_program(shared_goldens):
    folder = shared_goldens / "mt_plain"
    program = ("-c", PROGRAM, folder / "checkpoint_last.pt", folder / "data-bin")
    ended = run_ranks(program, 3, KILLED="1")
    assert [each.returncode for each in ended] == [0, -signal.SIGKILL, 0]
    for each in (ended[0], ended[2]):
        translated, error, (seconds, initialized) = *each.stdout.splitlines()[:2], each.stdout.split()[-2:]
        assert translated == ended[1].stdout.splitlines()[0]
        assert error == "ExchangeError translate() broke off: rank 1 of 3 vanished"
        assert float(seconds) < GRACE + 2 and initialized == "False"
        assert "Traceback" not in each.stderr
