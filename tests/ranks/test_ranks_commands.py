"""fairseq's own commands under several ranks: one complete result, equal to one rank's, and one report of all.

What one rank finds is computed in this process. Figures: upstream's own, from ../shared/goldens.
"""

import math

import commands
import numpy as np
import pytest
from rank_commands import (
    AS_UPSTREAM,
    LM_LAYERS,
    MT_LAYERS,
    UPSTREAM,
    Told,
    arguments_of,
    assert_report_of_all_ranks,
    assert_same_lines,
    assert_same_trace,
    assert_translated_once,
    assignments_that_leave,
    loss_of,
    shuffled,
    telling,
    upstreams_order,
)

from fairseq_moe_ext.balancing.placement import Placement, contiguous, experts_of_rank, save_placement

STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction")
SHORT = ("--max-len-b", 10)  # of some sentences the search ends before, of others there
# --- language models


def eval_lm(goldens, *flags, ranks=2, rows: int = 8, **how):
    arguments = arguments_of(goldens, "lm_top2_ws2", "--batch-size", rows, *flags)
    return commands.run("eval-lm", *arguments, ranks=ranks, **how)


@pytest.fixture(scope="module")
def one_lm(shared_goldens, tmp_path_factory):
    """(loss, what was told) of one rank."""
    folder = tmp_path_factory.mktemp("one")
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 8, *telling(folder))
    return commands.eval_lm(*arguments).loss, Told.read(folder)


@pytest.mark.slow
def test_eval_lm_on_two_ranks(shared_goldens, tmp_path, one_lm):
    loss, _ = loss_of(done := eval_lm(shared_goldens, *telling(tmp_path)))
    assert float(loss) == pytest.approx(one_lm[0], abs=6e-5)
    assert loss == "7.4446" and "Perplexity: 174.20" in done.stderr
    told = Told.read(tmp_path)
    assert_same_trace(told, one_lm[1])
    assert_report_of_all_ranks(told, one_lm[1], upstreams_order(LM_LAYERS, 2), ranks=2, model_dim=64)


def test_eval_lm_on_three_ranks_with_shuffled_experts(shared_goldens, tmp_path, one_lm):
    """Three does not divide eight experts, nor the fifteen batches of eight rows evenly by what they hold."""
    placement = shuffled(LM_LAYERS, 3)
    save_placement(tmp_path / "placement.json", Placement(3, placement))
    flags = ("--expert-placement", tmp_path / "placement.json")
    assert loss_of(eval_lm(shared_goldens, *flags, *telling(tmp_path), ranks=3)) == ("7.4446", "174.20")
    told = Told.read(tmp_path)
    assert_same_trace(told, one_lm[1])
    assert_report_of_all_ranks(told, one_lm[1], placement, ranks=3, model_dim=64)


@pytest.mark.parametrize(
    ("fraction", "slots", "shards", "perplexity", "by_torchrun"),
    # upstream's documented flags start the ranks by themselves; slots: of each expert for two rows of 128 tokens
    [
        pytest.param(1.0, 256, 1, "174.20", True, marks=pytest.mark.slow),
        pytest.param(0.05, 13, 1, "197.81", False, marks=pytest.mark.slow),
        (0.05, 13, 4, None, True),
    ],
)
def test_static_gating_on_two_ranks_equals_upstreams(
    shared_goldens, tmp_path, fraction, slots, shards, perplexity, by_torchrun
):
    """Of a shard every fourth batch is scored."""
    scores: dict[int, np.ndarray] = {}
    for rank in (0, 1):  # upstream's second rank scores a batch of the first's again, to have as many
        file = shared_goldens / "lm_top2_ws2" / "golden" / f"eval_ws2_b2_cap{fraction}.rank{rank}.npz"
        with np.load(file) as arrays:
            numbers = [number for number in range(int(arrays["n_batches"])) if (2 * number + rank) % shards == 0]
            for batch in (f"b{number}" for number in numbers):
                rows = zip(arrays[f"{batch}/scores"], arrays[f"{batch}/target"], strict=True)
                ids = arrays[f"{batch}/id"].tolist()
                scores |= {number: row[target != 1] for number, (row, target) in zip(ids, rows, strict=True)}
    recorded = np.concatenate(list(scores.values()))
    batches = math.ceil(59 / shards)
    assert len(recorded) == {1: 15035, 4: 3771}[shards]
    flags, ranks = ((*STATIC, fraction), 2) if by_torchrun else ((*STATIC[:2], *AS_UPSTREAM), None)
    part = ("--num-shards", shards, "--shard-id", 0) if shards > 1 else ()
    done = eval_lm(shared_goldens, *flags, *part, *telling(tmp_path), ranks=ranks, rows=2)
    loss, found = loss_of(done)
    assert float(loss) == pytest.approx(-recorded.mean(dtype=np.float64) / math.log(2), abs=1e-4)
    assert perplexity in (found, None)
    report = Told.read(tmp_path).report
    assert (report["world_size"], report["gating"]) == (2, "static")
    # of 8 experts 4 lie elsewhere, whatever was routed to them
    assert [layer["bytes_exchanged"] for layer in report["layers"]] == [batches * 4 * slots * 64 * 4] * 2


def test_static_gating_sends_more_at_the_same_checkpoint(one_lm):
    """All of its figures are written by hand above: dynamic's are the assignments that leave."""
    held = [experts_of_rank(contiguous(8, 2), rank) for rank in range(2)]
    for name in LM_LAYERS:
        assert 2 * assignments_that_leave(one_lm[1], name, held) < 59 * 4 * 256


@pytest.mark.slow
def test_shards_that_the_user_asked_for_on_two_ranks(shared_goldens, tmp_path):
    parts = ("--num-shards", "2", "--shard-id", "1")
    one, two = (tmp_path / name for name in ("one", "two"))
    one.mkdir(), two.mkdir()
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 8, *parts, *telling(one))
    wanted = commands.eval_lm(*arguments)
    loss, _ = loss_of(eval_lm(shared_goldens, *parts, *telling(two)))
    assert float(loss) == pytest.approx(wanted.loss, abs=6e-5)
    assert_same_trace(Told.read(two), Told.read(one))
    assert 0 < Told.read(two).report["decoder"]["tokens"] < 15035


@pytest.mark.slow
def test_bfloat16_on_two_ranks(shared_goldens, tmp_path):
    """lm_top2_ws2 scores 7.4446 in float32; bfloat16 may cost 0.01 bits."""
    loss, _ = loss_of(eval_lm(shared_goldens, "--moe-dtype", "bfloat16", *telling(tmp_path)))
    assert float(loss) == pytest.approx(7.4446, abs=0.01)
    assert Told.read(tmp_path).report["dtype"] == "bfloat16"


# --- translation models


def generate(goldens, name: str, *flags, ranks=2, rows: int = 36, **how):
    arguments = arguments_of(goldens, name, "--batch-size", rows, *flags)
    return commands.run("generate", *arguments, ranks=ranks, **how)


def generated_alone(goldens, name: str, *flags, rows: int = 36, overrides=None) -> commands.Generation:
    return commands.generate(*arguments_of(goldens, name, "--batch-size", rows, *flags), overrides=overrides)


def test_generate_on_four_ranks(shared_goldens, tmp_path):
    """Nine batches; a report and a trace as of one rank; beam 5."""
    one, four = (tmp_path / name for name in ("one", "four"))
    one.mkdir(), four.mkdir()
    flags = ("--beam", "5", *SHORT)
    wanted = generated_alone(shared_goldens, "mt_plain", *flags, *telling(one), rows=12)
    done = generate(shared_goldens, "mt_plain", *flags, *telling(four), ranks=4, rows=12)
    assert_same_lines(done.stdout, wanted)
    assert_translated_once(done)
    assert_same_trace(Told.read(four), Told.read(one))
    placement = upstreams_order(MT_LAYERS, 4)
    assert_report_of_all_ranks(Told.read(four), Told.read(one), placement, ranks=4, model_dim=64)
    assert sorted(file.name for file in four.iterdir()) == ["report.json", "trace.npz"]


def test_upstreams_command_as_written_starts_two_ranks_and_writes_one_file(shared_goldens, tmp_path):
    wanted = generated_alone(shared_goldens, "mt_nllb_ws2", *SHORT, overrides=UPSTREAM)
    arguments = (*AS_UPSTREAM, *SHORT, "--results-path", tmp_path / "results", *telling(tmp_path))
    done = generate(shared_goldens, "mt_nllb_ws2", *arguments, ranks=None)
    assert done.stdout == ""
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["generate-test.txt"]
    assert_same_lines((tmp_path / "results" / "generate-test.txt").read_text(encoding="utf-8"), wanted)
    assert_translated_once(done)
    told = Told.read(tmp_path)
    assert told.report["world_size"] == 2
    assert all(rank["tokens"] > 500 for rank in told.report["ranks"])  # each has worked


@pytest.mark.slow
def test_more_ranks_than_batches(shared_goldens):
    """One batch of 96 sentences and one of 4 for three ranks; beam 1."""
    wanted = generated_alone(shared_goldens, "mt_plain", "--beam", 1, *SHORT, rows=100)
    done = generate(shared_goldens, "mt_plain", "--beam", 1, *SHORT, ranks=3, rows=100)
    assert_same_lines(done.stdout, wanted)
    assert_translated_once(done)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "flags"),
    [
        ("mt_nllb_ws2", 4, ("--batch-size", 8)),
        ("mt_nllb_ws2", 2, ("--score-reference",)),
        ("mt_plain", 3, ("--score-reference", "--batch-size", 100)),
        ("mt_plain", 2, ("--prefix-size", 2)),
        ("mt_plain", 2, (*STATIC, 1.0)),
        ("mt_nllb_ws2", 3, (*STATIC, 1.0, "--batch-size", 17)),
        ("mt_plain", 1, ()),
        ("mt_plain", 2, ("--nbest", 2, "--distributed-world-size", 2)),
    ],
)
def test_generate_equals_one_ranks(shared_goldens, name, ranks, flags):
    short = () if "--score-reference" in flags else SHORT
    alone = flags[:2] if "--distributed-world-size" in flags else flags
    wanted = generated_alone(shared_goldens, name, *short, *alone, overrides=commands.NLLB_OVERRIDES)
    overrides = ("--model-overrides", repr(commands.NLLB_OVERRIDES))
    done = generate(shared_goldens, name, *short, *flags, *overrides, ranks=ranks)
    assert_same_lines(done.stdout, wanted)
    assert_translated_once(done)


@pytest.mark.slow
def test_a_placement_with_replicas_on_more_ranks_than_some_experts_need(shared_goldens, tmp_path):
    """Expert 0 on every rank, the others shuffled: less travels than by the same placement without replicas."""
    told, wanted = [], generated_alone(shared_goldens, "mt_plain", *SHORT, rows=12)
    for replicas in (False, True):
        layers = shuffled(MT_LAYERS, 3)
        if replicas:
            layers = {name: ((0, 1, 2), *layer[1:]) for name, layer in layers.items()}
        folder = tmp_path / str(replicas)
        folder.mkdir()
        save_placement(folder / "placement.json", Placement(3, layers))
        flags = ("--expert-placement", folder / "placement.json", *telling(folder))
        done = generate(shared_goldens, "mt_plain", *SHORT, *flags, ranks=3, rows=12)
        assert_same_lines(done.stdout, wanted)
        told.append(Told.read(folder))
    assert_same_trace(*told)
    memory = told[1].report["memory"]
    assert memory["expert_bytes_resident"] == memory["expert_bytes_total"] * 10 // 8
    for name in MT_LAYERS:
        before, after = (each.layers()[name] for each in told)
        assert sum(after["load_per_rank"]) == sum(before["load_per_rank"]) == sum(before["load"])
    assert sum(layer["bytes_exchanged"] for layer in told[1].report["layers"]) != sum(
        layer["bytes_exchanged"] for layer in told[0].report["layers"]
    )


@pytest.mark.slow
def test_fairseqs_own_scripts_start_ranks_too(shared_goldens):
    arguments = arguments_of(shared_goldens, "lm_top2_ws2", "--batch-size", 8, "--distributed-world-size", 2)
    done = commands.run("eval-lm", *arguments, script=True, fresh=True)
    assert loss_of(done) == ("7.4446", "174.20")
    assert "2 ranks serve" in done.stderr
