"""scripts/reproduce_capacity_aware.sh's Python: tables, plot, runs that are reused, and what it refuses."""

import csv
import sys

import commands
import processes
import pytest

from reproduction import capacity_figures as figures


def reproduce(*arguments):
    command = [sys.executable, "-m", "reproduction", "capacity_aware", *arguments]
    return processes.run(command, env=commands.reproduction_environment())


def rows():
    """A model that translates: expand is better than drop at gamma 2 and worse at 1; `order` never."""
    found = [figures.Row("small", None, "drop", "score", 0.0, 0.0, 0.0, 4.0, 2.0, 8.0, bleu=30.0, chrf=60.0)]
    for overflow, bonus in (("drop", 0), ("expand", 1)):
        for metric, malus in (("score", 0), ("order", 5)):
            for gamma in (2.0, 1.0):
                bleu = 20 + 4 * gamma - malus + bonus * (1 if gamma == 2 else -1)
                shares, loads = (0.1, 0.1, 0.0), (gamma, gamma / 2)
                setting = ("small", gamma, overflow, metric)
                found.append(figures.Row(*setting, *shares, *loads, 4 * gamma, bleu=bleu, chrf=50.0))
    return found


def test_tables_findings_and_plot(tmp_path):
    text = figures.write_figures(tmp_path, rows(), ranks=4)
    assert "| drop | score | 28.0 / 50.0 | 24.0 / 50.0 |" in text
    assert "| expand | order | 24.0 / 50.0 | 18.0 / 50.0 |" in text
    # half the load of the busiest rank, half the time
    assert "| 1 | drop | 10.0% | 10.0% | 0.0% | 1.00 | 0.50 | 4.00 | 4.00 | 2.00 |" in text
    assert "- **Confirmed**: who stays is best chosen by score (small, expand)" in text and "at 2 of 2 gammas" in text
    assert "- **Contradicted**: a second choice (expand) is better than to drop (small)" in text
    assert "in 2 of 4 pairs" in text and "choice (reroute)" not in text
    beside = [line for line in text.splitlines() if "OLMoE: mean accuracy, drop by order, gamma 2" in line]
    assert len(beside) == 1 and "| 60.8% | 23.0 / 50.0 |" in beside[0]
    assert "| olmoe: layer speedup, drop, gamma 1 | 1.46x | 4.00x |" in text  # the busiest rank: 2.0 before, 0.5 now
    assert "gamma 1.5" not in text
    with open(tmp_path / "capacity.csv", newline="") as opened:
        table = list(csv.DictReader(opened))
    assert len(table) == 9 and table[0]["gamma"] == "" and table[1]["bleu"] == "28.0" and table[1]["perplexity"] == ""
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")


def test_the_lower_a_perplexity_the_better():
    low, high = (
        figures.Row("m", 1.0, "drop", "score", 0, 0, 0, 1, 1, 1, perplexity=value) for value in (20.0, 30.0)
    )
    assert low.goodness() > high.goodness() and low.quality == "20.00"


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(shared_goldens, tmp_path):
    golden = shared_goldens / "lm_top2"
    arguments = ("--checkpoint", golden / "checkpoint_last.pt", "--data", golden / "data-bin", "--output", tmp_path)
    flags = (*arguments, "--gammas", "1.0", "--ranks", "2", "--flags=--tokens-per-sample 128")
    done = reproduce(*flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "capacity.md").read_text() in done.stdout
    with open(tmp_path / "capacity.csv", newline="") as opened:
        table = list(csv.DictReader(opened))
    assert [row["gamma"] for row in table] == ["", *["1.0"] * 12]
    assert all(float(row["layer_ms"]) > 0 for row in table)
    free, *capped = table
    assert float(free["dropped"]) == 0 and all(float(row["dropped"]) > 0 for row in capped)
    assert all(float(row["largest_expert"]) < float(free["largest_expert"]) for row in capped)
    assert all(float(row["perplexity"]) > float(free["perplexity"]) for row in capped if row["metric"] != "score")
    runs = sorted((tmp_path / "runs" / "checkpoint_last").iterdir())
    assert len(runs) == 14
    (tmp_path / "runs" / "checkpoint_last" / "drop-random-1.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in runs if file.exists()}
    again = reproduce(*flags)
    assert again.stdout == done.stdout  # the random metric follows the seed
    assert {file: file.stat().st_mtime_ns for file in before} == before and runs[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), [
    (("--checkpoint", "missing.pt", "--data", "data"), "missing.pt"),
    (("--checkpoint", "missing.pt"), "must be given together"),
    (("--ranks", "0"), "--ranks must be at least 1, got 0"),
    (("--gammas", "1.0", "0"), "--gammas must be above 0, got 0"),
])
def test_what_it_refuses(arguments, words, tmp_path):
    done = reproduce(*arguments, "--output", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
