"""What ranks send to rank 0: real processes over gloo and a real store, messages beyond every limit of one value."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq_moe_ext.ranks.faults import ExchangeError
from fairseq_moe_ext.ranks.group import served_ranks
from fairseq_moe_ext.ranks.messages import CHUNK, pack, unpack
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.trace import load_trace

fork = multiprocessing.get_context("fork")
LIMIT = 8 << 20  # bytes of one value in torch's store


def run_ranks(function, size: int, *arguments, killed: tuple[int, ...] = ()) -> list:
    """What `function(ranks, *arguments)` gives on each rank of a group as torchrun starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    answers = [fork.SimpleQueue() for _ in range(size)]
    processes = [
        fork.Process(target=_serve, args=({**meeting, "RANK": str(rank)}, answers[rank], function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join(180)  # of which two cores that others use may take most
        alive = process.is_alive()
        process.kill()
        assert not alive and process.exitcode == (-signal.SIGKILL if rank in killed else 0), (rank, process.exitcode)
    return [None if rank in killed else queue.get() for rank, queue in enumerate(answers)]


def _serve(environment: dict[str, str], answers, function, arguments: tuple) -> None:
    os.environ.update(environment)
    served_ranks.cache_clear()  # of the process that was forked
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, exit=True, file=sys.__stderr__)  # whoever hangs says where
    try:
        answers.put(function(served_ranks(), *arguments))
    except SystemExit:  # of a rank that leaves
        answers.put(None)
    os._exit(0)  # it is no end of pytest


def hypotheses(sentences: int, beam: int, length: int) -> list[list[dict]]:
    generator = torch.Generator().manual_seed(sentences)
    return [
        [
            {
                "tokens": torch.randint(9, (length,), generator=generator),
                "score": torch.rand((), generator=generator),
                "attention": torch.rand(length, length, generator=generator),
                "alignment": [(number, 2 * number) for number in range(length)],
                "positional_scores": torch.rand(length, generator=generator),
            }
            for _ in range(beam)
        ]
        for _ in range(sentences)
    ]


def assert_same(found, wanted) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_same(*pair)
    else:
        assert found == wanted


# --- packing


@pytest.mark.parametrize(
    "tree",
    [
        [],
        [[]],
        None,
        {"a": None, "b": [1, 2.5, "x", True], "c": (1, (2, [3]))},
        [torch.tensor(3.5), torch.empty(0), torch.empty(2, 0, 3), torch.ones(3, dtype=torch.bool)],
        [torch.arange(n, dtype=dtype) for n in (1, 2, 3, 5) for dtype in (torch.uint8, torch.int64, torch.float16)],
        {"strided": torch.arange(12).view(3, 4).t(), "bf16": torch.ones(3, dtype=torch.bfloat16)},
        hypotheses(2, 2, 3),
    ],
    ids=["empty", "no hypothesis", "nothing", "plain", "odd shapes", "odd sizes", "layouts", "hypotheses"],
)
def test_what_is_packed_comes_back(tree):
    assert_same(unpack(bytearray(pack(tree))), tree)


def test_packing_costs_little_beside_the_values():
    tree = hypotheses(32, 4, 20)
    parts = [part for sentence in tree for each in sentence for part in each.values()]
    values = sum(part.nbytes for part in parts if torch.is_tensor(part))
    assert len(pack(tree)) < 1.5 * values


# --- messages


def _exchange_results(ranks, nbest):
    """Eight batches, of which two are large; on rank 0, bytes of the largest that another rank has sent."""

    def result(number: int) -> list[list[dict]]:
        return hypotheses(number + 1, 4, 400 if number % 4 == 3 else 5)

    found = []
    for number in range(8):
        rank_batch = ranks.rank_batch(number, of_all=True)
        if rank_batch.is_ours or ranks.rank == 0:
            found.append(rank_batch.result(partial(result, number), nbest))
    ranks.drain()
    if ranks.rank > 0:
        return ranks.leave()
    sent = []
    for number, batch in enumerate(found):
        own = number % ranks.world_size == 0
        assert_same(batch, result(number) if own else [sentence[:nbest] for sentence in result(number)])
        sent += [] if own else [len(pack(batch))]
    return max(sent)


@pytest.mark.parametrize(("size", "nbest"), [(2, None), (3, 2)])
def test_results_of_any_size_arrive_on_rank_0_cut_to_what_is_given_out(size, nbest):
    assert run_ranks(_exchange_results, size, nbest)[0] > LIMIT


def _finish(ranks, folder: Path):
    observer = Observer("dynamic", str(folder / "report.json"), str(folder / "trace.npz"), ranks)
    generator = np.random.default_rng(ranks.rank)
    for batch in range(ranks.rank, 3 * ranks.world_size, ranks.world_size):
        observer.begin_batch(batch)
        for _ in range(1200):
            observer._recorder.begin_step("decode", batch)
            observer._recorder.add("layer", generator.integers(0, 1 << 16, 2048))
    ranks.drain()
    observer.finish()
    ranks.leave()


def test_reports_and_traces_beyond_the_limit_arrive(tmp_path):
    run_ranks(_finish, 2, tmp_path)
    assert (tmp_path / "trace.npz").stat().st_size > 2.5 * LIMIT
    decode = load_trace(tmp_path / "trace.npz")["decode"]
    assert decode.batch.tolist() == [batch for batch in range(6) for _ in range(1200)]
    assert json.loads((tmp_path / "report.json").read_text())["world_size"] == 2


def _die_while_sending(ranks):
    if ranks.rank == 1:
        ranks.send(bytes(20 * CHUNK))
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        ranks.receive(1)
    except ExchangeError as error:
        return str(error), time.monotonic() - start
    return "all came", 0.0


def test_a_rank_that_dies_while_its_message_is_under_way():
    said, seconds = run_ranks(_die_while_sending, 2, killed=(1,))[0]
    assert "the exchange between the ranks broke off" in said and seconds < 10


def _finish_without_rank_1(ranks, folder: Path):
    """Rank 1 ends within its trace."""
    if ranks.rank == 1:
        observer = Observer("dynamic", str(folder / "report.json"), str(folder / "trace.npz"), ranks)
        observer.report.close(ranks.exchange)
        ranks.send(json.dumps(observer.report.figures()).encode())
        ranks._outbox.wait()
        ranks.send(bytes(20 * CHUNK))
        os.kill(os.getpid(), signal.SIGKILL)
    observer = Observer("dynamic", str(folder / "report.json"), str(folder / "trace.npz"), ranks)
    observer._recorder.begin_step("decode", ranks.rank)
    observer._recorder.add("layer", [1, 2])
    observer.finish()
    return ranks.leave() if ranks.rank > 0 else observer._exit_code._failed


def test_a_trace_that_does_not_come_takes_neither_the_report_nor_the_results_with_it(tmp_path, capfd):
    assert run_ranks(_finish_without_rank_1, 3, tmp_path, killed=(1,))[0]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: rank 1 of 3 ended before its trace came, which is not written")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def _die_before_receiving(ranks):
    ranks.exchange.group.gather(b"")  # the other one has joined, for which it needs rank 0
    if ranks.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        ranks.send(bytes(20 * CHUNK))
        ranks.leave()
    except ExchangeError:
        return time.monotonic() - start
    return None


def test_rank_0_dies_before_it_has_everything():
    assert run_ranks(_die_before_receiving, 2, killed=(0,))[1] < 10
