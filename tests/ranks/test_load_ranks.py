"""`fairseq_moe_ext.load` on several ranks: each runs a program of its own, and all have the results of one process."""

import json
import os
import threading
from pathlib import Path

import commands
import pytest
import torch
import torch.distributed as dist
from python_served import PIECES, lines_of
from rank_commands import MT_LAYERS, shuffled
from rank_group import ranks
from rank_programs import assert_same, error_of, state_of_process

import fairseq_moe_ext as moe
from fairseq_moe_ext.balancing.placement import Placement, save_placement
from fairseq_moe_ext.trace import load_trace

MULTILINGUAL = {"source_lang": "en", "target_lang": "fr", "model_overrides": commands.NLLB_OVERRIDES, **PIECES}
MODELS = {
    "lm_top2_ws2": ("test", {"cpu": True}),
    "mt_plain": ("test.en-de.en", PIECES),
    "mt_nllb_ws2": ("test.en-fr.en", MULTILINGUAL),
}
SEARCHES = {  # three batches: two for rank 0, one for rank 1
    "lm_top2_ws2": {"beam": 2, "max_len_a": 0, "max_len_b": 20, "batch_size": 3},
    "mt_plain": {"beam": 4, "nbest": 2, "batch_size": 3},
    "mt_nllb_ws2": {"beam": 2, "batch_size": 3},
}


@pytest.fixture(scope="module")
def two():
    """Programs that have a default group of their own."""
    with ranks(2) as group:
        yield group


def load(folder: Path, **options):
    return moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", **options)


def answers(served, name: str) -> list:
    """What a program may ask of a served model: hypotheses of a search, of scoring, and the best texts."""
    lines = [" ".join(line.split()[:12]) for line in lines_of(served, MODELS[name][0])[:8]]
    found = served.generate(lines, **SEARCHES[name])
    targets = None if name.startswith("lm") else [sentence[0].words for sentence in found]
    scored = [[each] for each in served.score(lines, targets, batch_size=3)]
    return found + scored


def serve(rank, world_size, folder, name, options):
    with load(folder, **options) as served:
        return answers(served, name), served.translate([]), served.report()


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_the_results_of_one_process(shared_goldens, two, name):
    folder, options = shared_goldens / name, MODELS[name][1]
    (found, empty, report), second = two(serve, folder, name, options)
    assert second == (found, empty, report) and empty == []
    with load(folder, **options) as served:
        assert_same(found, answers(served, name))
        one = served.report()
    assert report["world_size"] == len(report["ranks"]) == 2
    assert all(each["tokens"] > 0 and each["bytes_exchanged"] > 0 for each in report["ranks"])
    for totals in {"encoder", "decoder", "generation"} & set(one):
        for figure in {"tokens", "steps", "sentences", "hypothesis_tokens"} & set(one[totals]):
            assert report[totals][figure] == one[totals][figure]
    assert report["memory"]["expert_bytes_total"] == one["memory"]["expert_bytes_total"]
    assert [each["expert_bytes"] for each in report["ranks"]] == [one["memory"]["expert_bytes_total"] // 2] * 2


def replicated(layers: tuple[str, ...]) -> Placement:
    """Expert 0 on both ranks, the others here and there."""
    return Placement(2, {name: ((0, 1), *places[1:]) for name, places in shuffled(layers, 2).items()})


STATIC = {"moe_gating": "static", "moe_eval_capacity_token_fraction": 1.0}
WAYS = [
    pytest.param({"expert_placement": "placement.json"}, id="replicas", marks=pytest.mark.slow),
    pytest.param({"expert_placement": "placement.json", "expert_buffer_size": 1}, id="replicas in buffers"),
    pytest.param(STATIC, id="static", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", WAYS)
def test_flags_of_ranks_are_obeyed(shared_goldens, two, tmp_path, options):
    folder, options = shared_goldens / "mt_plain", dict(options)
    if "expert_placement" in options:
        options["expert_placement"] = str(tmp_path / "placement.json")
        save_placement(tmp_path / "placement.json", replicated(MT_LAYERS))
    (found, _, report), _ = two(serve, folder, "mt_plain", {**PIECES, **options})
    with load(folder, **PIECES) as served:
        assert_same(found, answers(served, "mt_plain"))
    held = sum(each["expert_bytes"] for each in report["ranks"])
    total = report["memory"]["expert_bytes_total"]
    assert held == total * (9 / 8 if "expert_placement" in options else 1)
    assert all((each["misses"] > 0) == ("expert_buffer_size" in options) for each in report["ranks"])


def score(rank, world_size, folder, options, batch_size):
    with load(folder, **options) as served:
        return [[each] for each in served.score(lines_of(served, "test")[:6], batch_size=batch_size)]


@pytest.mark.slow
def test_a_capacity_is_counted_for_each_rank(shared_goldens, two):
    """Batches of 3 on two ranks are the halves of one of 6 in a process that counts as two."""
    folder, options = shared_goldens / "lm_top2_ws2", {"cpu": True, "moe_capacity_factor": 0.5}
    options |= {"moe_capacity_scope": "rank", "moe_overflow": "reroute"}
    found, second = two(score, folder, options, 3)
    assert found == second
    assert_same(found, score(0, 1, folder, {**options, "moe_virtual_ranks": 2}, 6))


def draw(rank, world_size, folder):
    torch.manual_seed(rank)  # a program's own numbers
    with load(folder, **PIECES) as served:
        lines = lines_of(served)[:8]
        drawn = [served.translate(lines, sampling=True, beam=2, batch_size=3, **seed) for seed in ({"seed": 5}, {})]
    return drawn, int(torch.randint(1 << 30, ()))


def test_random_numbers_are_drawn_as_one_process_draws_them(shared_goldens, two):
    results = two(draw, shared_goldens / "mt_plain")
    (drawn, number), (second, other) = results
    with torch.random.fork_rng():
        assert draw(0, 1, shared_goldens / "mt_plain") == (drawn, number)
    assert second == drawn and other != number


def write(rank, world_size, folder, files):
    with load(folder, **PIECES, moe_report=str(files / "report.json"), moe_trace=str(files / "trace.npz")) as served:
        lines = lines_of(served)[:8]
        for size in (3, 8):
            served.translate(lines, beam=2, batch_size=size)
    return (files / "report.json").exists()


def test_rank_0_writes_report_and_trace_of_all(shared_goldens, two, tmp_path):
    (tmp_path / "one").mkdir()
    assert two(write, shared_goldens / "mt_plain", tmp_path)[0]
    assert write(0, 1, shared_goldens / "mt_plain", tmp_path / "one")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 2 and report["generation"]["sentences"] == 16
    found, wanted = load_trace(tmp_path / "trace.npz"), load_trace(tmp_path / "one" / "trace.npz")
    for phase, recorded in wanted.items():
        assert found[phase].load.tolist() == recorded.load.tolist()
        assert found[phase].batch.tolist() == recorded.batch.tolist()


# --- what becomes of the group


def several(rank, world_size, goldens):
    """Two models at once, and one of them again afterwards; what is left of it in the process."""
    with load(goldens / "mt_plain", **PIECES):
        pass  # fairseq's own imports leave what they leave
    before, threads = state_of_process(), len(os.listdir("/proc/self/task"))
    first, second = load(goldens / "mt_plain", **PIECES), load(goldens / "lm_top2_ws2", cpu=True)
    lines, texts = lines_of(first)[:5], lines_of(second, "test")[:3]
    found = [first.translate(lines, batch_size=2), second.score(texts), first.translate(lines, batch_size=2)]
    first.close()
    found.append(second.score(texts))
    second.close()
    with load(goldens / "mt_plain", **PIECES) as third:
        found.append(third.translate(lines, batch_size=2))
    numbers = torch.tensor([rank + 1])
    dist.all_reduce(numbers)  # in the program's own group
    assert state_of_process() == before and int(numbers) == 3
    return found, len(os.listdir("/proc/self/task")) - threads


def test_models_at_once_and_in_turn_leave_the_programs_own_group_alone(shared_goldens, two):
    for (a, b, a_again, b_again, a_later), threads in two(several, shared_goldens):
        assert a == a_again == a_later and b == b_again and threads <= 0


def forget(rank, world_size, folder):
    """A model that a program does not close is given back as well, without the other ranks."""
    served = load(folder, **PIECES)
    lines = lines_of(served)[:2]
    threads = len(os.listdir("/proc/self/task"))
    dist.barrier()
    if rank == 1:
        del served
        return len(os.listdir("/proc/self/task")) < threads
    return error_of(lambda: served.translate(lines))


def test_a_rank_that_has_left_is_named(shared_goldens, two):
    (kind, said), gone = two(forget, shared_goldens / "mt_plain")
    assert gone
    assert (kind, said) == ("ExchangeError", "translate() broke off: rank 1 of 2 has closed the model")


def call_from_a_thread(rank, world_size, folder):
    """Threads of one rank that share the model do so as before."""
    with load(folder, **PIECES) as served:
        lines = lines_of(served)[:4]
        found: list = []
        thread = threading.Thread(target=lambda: found.append(served.translate(lines)))
        thread.start()
        thread.join()
        return found[0] == served.translate(lines)


@pytest.mark.slow
def test_any_thread_may_make_the_call(shared_goldens, two):
    assert two(call_from_a_thread, shared_goldens / "mt_plain") == [True, True]


@pytest.mark.slow
def test_results_are_those_of_the_command_on_as_many_ranks(shared_goldens):
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.MT, "--batch-size", "16")
    done = commands.run("generate", *arguments, ranks=2)
    wanted = commands.Generation(done.stdout.splitlines())
    with ranks(2) as group:
        first, second = group(translate_all, folder)
    assert first == second
    found = dict(enumerate(first))
    assert {number: words for number, (_, words) in wanted.of_kind("H")} == {
        number: each.words for number, each in found.items()
    }


def translate_all(rank, world_size, folder):
    with load(folder, **PIECES) as served:
        return [sentence[0] for sentence in served.generate(lines_of(served), beam=4, batch_size=16)]
