"""Ranks that vanish, bad files and wrong placements: all ranks end, one message says why, no result looks complete."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import commands
import pytest
from rank_commands import LM_LAYERS, MT_LAYERS, arguments_of, upstreams_order
from started_ranks import START, Started, assert_incomplete, children_of, rank_of

from fairseq_moe_ext.balancing.placement import Placement, save_placement

# --- a rank vanishes


@pytest.fixture
def started(shared_goldens, tmp_path):
    started = Started(shared_goldens, tmp_path)
    yield started
    started.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_rank_that_is_killed_ends_those_that_were_started_by_hand(started, victim):
    started.start_by_hand(3)
    started.wait_for_a_translation()
    started.processes[victim].kill()
    assert all(code not in (0, -signal.SIGKILL) for code in started.all_end(but=victim))
    for rank in {0, 1, 2} - {victim}:
        assert f"rank {rank} of 3 ends: rank {victim} of 3 vanished" in started.said(rank).splitlines()[-1]
        assert "Traceback" not in started.said(rank)
    assert "Translated" not in started.said(0)
    assert_incomplete(started)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_torchrun(started, victim):
    started.start(ranks=2)
    started.wait_for_a_translation()
    pids = {rank_of(child): child for child in children_of(started.processes[0].pid)}
    os.kill(pids[victim], signal.SIGKILL)
    (code,) = started.all_end()
    assert code not in (0, -signal.SIGKILL)
    said = started.said(0)
    assert re.search(rf"rank +: {victim} \(local_rank: {victim}\)\s+exitcode +: -9 \(pid: {pids[victim]}\)", said)
    assert "Translated" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert_incomplete(started)


# --- a rank fails in a layer

FAILING = """
import os
import fairseq_moe_ext.models.moe_transformer
import fairseq_moe_ext.tasks.moe_translation_multi_simple_epoch
from fairseq_moe_ext.experts.resident import ResidentExperts

def forward(*_):
    raise MemoryError("no room for the experts")

if os.environ["RANK"] == "1":
    ResidentExperts.forward = forward
"""


@pytest.mark.slow
def test_an_error_in_one_ranks_experts_ends_all_with_its_cause(started, tmp_path):
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "__init__.py").write_text(FAILING, encoding="utf-8")
    started.user_dir = tmp_path / "failing"
    started.start_by_hand(3)
    assert all(process.wait(timeout=START) != 0 for process in started.processes)
    cause = "MemoryError: no room for the experts"
    assert "rank 1 of 3 failed:" in started.said(1) and started.said(1).splitlines()[-1] == cause
    for rank in (0, 2):
        assert started.said(rank).splitlines()[-1].endswith(f"rank {rank} of 3 ends: rank 1 of 3 failed: {cause}")
        assert "Traceback" not in started.said(rank)


# --- a bad file


def copied(goldens: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """(its second rank file, its path as --path has it)."""
    for file in (goldens / name).glob("checkpoint_last-*.pt"):
        shutil.copy(file, folder)
    return folder / "checkpoint_last-rank-1.pt", folder / "checkpoint_last.pt"


def generate(goldens, *flags, ranks=2, name: str = "mt_nllb_ws2", command: str = "generate"):
    """A run that must fail, and soon; its one error line."""
    start = time.monotonic()
    arguments = arguments_of(goldens, name, "--batch-size", 36, *flags)
    done = commands.run(command, *arguments, ranks=ranks, check=False)
    assert done.returncode != 0
    assert time.monotonic() - start < START
    assert done.stdout == "" and "Translated" not in done.stderr
    return done.stderr


def error_line(said: str, *words: str) -> str:
    """The one line of all that was said that holds every word; tracebacks and torchrun's summary do not."""
    (line,) = [line for line in said.splitlines() if all(word in line for word in words)]
    return line


def test_a_damaged_rank_file_that_one_rank_reads_ends_all(shared_goldens, tmp_path):
    file, path = copied(shared_goldens, "mt_nllb_ws2", tmp_path)
    weight = commands.read_state(file)["model"]["decoder.layers.1.moe_layer.experts.2.fc1.weight"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    place = bytes(content).index(weight) + len(weight) // 2
    content[place] ^= 1
    file.write_bytes(content)
    said = generate(shared_goldens, "--path", path, "--results-path", tmp_path / "results")
    assert "rank 1 of 2 failed:" in said and "rank 0 of 2 failed:" not in said
    error_line(said, "error: ", "checkpoint_last-rank-1.pt", "is damaged")
    results = tmp_path / "results" / "generate-test.txt"
    assert not results.is_file() or "Generate test" not in results.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_missing_rank_file(shared_goldens, tmp_path):
    file, path = copied(shared_goldens, "mt_nllb_ws2", tmp_path)
    file.unlink()
    said = generate(shared_goldens, "--path", path)
    error_line(said, "error: ", str(path.parent), "1 rank files with 4 experts each", "8 experts")


# --- what several ranks cannot do


def refused(goldens, *flags, ranks=2, **how) -> str:
    """What was said by ranks that have not begun to load."""
    said = generate(goldens, *flags, ranks=ranks, **how)
    assert "ranks serve" not in said
    return said


def test_interactive_under_torchrun(shared_goldens):
    said = refused(shared_goldens, command="interactive")
    error_line(said, "error: interactive is served by one process, got 2 ranks: start it without torchrun")
    assert said.count("Traceback (most recent call last)") == 1  # torchrun's own


@pytest.mark.slow
def test_a_world_size_that_is_not_torchruns(shared_goldens):
    said = refused(shared_goldens, "--distributed-world-size", 4)
    error_line(said, "error: argument --distributed-world-size: ", "that torchrun started, 2, got 4")


GOOD = upstreams_order(MT_LAYERS, 2)
SHORT = {**GOOD, MT_LAYERS[1]: GOOD[MT_LAYERS[1]][:7]}
FOREIGN = {**GOOD, LM_LAYERS[1]: GOOD[MT_LAYERS[0]]}
HOLE = {"world_size": 2, "layers": {MT_LAYERS[0]: [[0], []]}}


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        pytest.param(
            Placement(3, upstreams_order(MT_LAYERS, 3)),
            ("must be for the ranks that serve, 2, got 3",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Placement(2, SHORT),
            ("must place the 8 experts of decoder.layers.1.moe_layer, got 7",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Placement(2, FOREIGN),
            ("it has decoder.layers.3.moe_layer, which the model lacks",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Placement(2, {MT_LAYERS[0]: GOOD[MT_LAYERS[0]]}),
            ("must name the model's 2 MoE layers; it lacks decoder.layers.1.moe_layer",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            HOLE, ("placement.json", "expert 1 must lie on at least one rank, got none"), marks=pytest.mark.slow
        ),
        pytest.param("{", ("placement.json: not a placement file",), marks=pytest.mark.slow),
    ],
    ids=["ranks", "experts", "foreign layer", "missing layer", "an expert nowhere", "no JSON"],
)
def test_a_placement_that_does_not_fit(shared_goldens, tmp_path, placement, words):
    file = tmp_path / "placement.json"
    if isinstance(placement, Placement):
        save_placement(file, placement)
    else:
        file.write_text(placement if isinstance(placement, str) else json.dumps(placement), encoding="utf-8")
    said = generate(shared_goldens, "--expert-placement", file, name="mt_plain")
    error_line(said, "error: --expert-placement", *words)
    assert re.findall(r"^rank \d of 2 failed:", said, flags=re.MULTILINE) == ["rank 0 of 2 failed:"]


@pytest.mark.slow
def test_more_ranks_than_experts_need_replicas(shared_goldens):
    said = generate(shared_goldens, ranks=9, name="mt_plain")
    error_line(said, "error: ", "must not outnumber the experts", "9 ranks, 8 experts")
