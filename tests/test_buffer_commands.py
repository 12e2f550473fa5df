"""fairseq's commands with a buffer, as a user starts them."""

import json

import commands
import pytest

SETS = {
    "eval-lm": ("lm_top2", ("--batch-size", 8, *commands.LM)),
    "generate": ("mt_plain", ("--batch-size", 36, "--max-len-b", 8, *commands.MT)),
}
BUFFERS = {
    "one": ("--expert-buffer-size", 1, "--expert-store", "disk"),
    "papers": ("--expert-buffer-size", 2, "--expert-eviction", "lifo", "--expert-order", "ascending"),
}


def run(goldens, command, *flags, **kwargs):
    name, arguments = SETS[command]
    path = goldens / name / "checkpoint_last.pt"
    return commands.run(command, goldens / name / "data-bin", "--path", path, *arguments, *flags, **kwargs)


def results(done) -> list[str]:
    """stdout, and eval-lm's line."""
    return done.stdout.splitlines() + [line for line in done.stderr.splitlines() if "Loss (base 2)" in line]


@pytest.mark.parametrize(("command", "buffer"), [
    pytest.param("eval-lm", "one", marks=pytest.mark.slow), ("generate", "papers"),
    pytest.param("eval-lm", "papers", marks=pytest.mark.slow), pytest.param("generate", "one", marks=pytest.mark.slow),
])
def test_a_buffer_changes_no_line(shared_goldens, tmp_path, command, buffer):
    report = ("--moe-report", tmp_path / "report.json")
    done = run(shared_goldens, command, *BUFFERS[buffer], *report)
    assert results(done) == results(run(shared_goldens, command))
    written = json.loads((tmp_path / "report.json").read_text())
    rank = written["ranks"][0]
    assert rank["misses"] > 0
    missed = rank["misses"] / (rank["hits"] + rank["misses"])
    assert f"{missed:.1%} of experts missed in the buffer" in done.stderr


@pytest.mark.parametrize("flags, words", [
    (
        ("--expert-buffer-size", "0"),
        "--expert-buffer-size must be a whole number of at least 1, a size with its unit as 20G, 500MB or 120000B, or "
        "auto, got '0'",
    ),
    pytest.param(("--expert-buffer-size", "2", "--expert-store", "disk", "--expert-store-dir", __file__ + "/x"),
                 "the expert store cannot be written", marks=pytest.mark.slow),
])
def test_wrong_buffer_flags_end_the_command_in_one_sentence(shared_goldens, flags, words):
    done = run(shared_goldens, "eval-lm", *flags, check=False)
    assert done.returncode != 0 and words in done.stderr.splitlines()[-1]


def test_interactive_with_a_buffer_prints_the_resident_results(shared_goldens):
    golden = shared_goldens / "mt_plain"
    arguments = [part for part in commands.MT if part not in ("--gen-subset", "test", "--scoring", "sacrebleu")]
    arguments += ["--path", golden / "checkpoint_last.pt", "-s", "en", "-t", "de", "--buffer-size", 1]
    stdin = "▁a ▁man .\n▁two ▁dogs .\n▁a ▁man .\n"
    wanted = commands.run("interactive", golden / "data-bin", *arguments, stdin=stdin, fresh=True)
    flags = ("--expert-buffer-size", 1, "--expert-store", "disk")
    found = commands.run("interactive", golden / "data-bin", *arguments, *flags, stdin=stdin)

    def hypotheses(done):
        return [line for line in done.stdout.splitlines() if line[:2] in ("S-", "H-", "D-", "P-")]

    assert hypotheses(found) == hypotheses(wanted) and len(hypotheses(wanted)) == 12
    assert "of experts missed in the buffer" in found.stderr
