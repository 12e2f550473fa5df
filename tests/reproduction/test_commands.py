"""The modules that scripts/reproduce_*.sh start: on a checkpoint that upstream trained, and what they refuse."""

import csv
import json
import sys

import commands
import processes
import pytest

from reproduction import balancing, buffering

MODULES = (
    *("configurations", "characterization", "activation", "throughput", "memory"),
    *("buffering", "balancing", "scaling", "capacity_aware"),
)


def start(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return processes.run(command, timeout=300, env=commands.reproduction_environment(), cwd=commands.REPOSITORY)


@pytest.mark.parametrize("name", MODULES)
def test_each_script_starts_its_module(name):
    script = (commands.REPOSITORY / "scripts" / f"reproduce_{name}.sh").read_text()
    assert f'/reproduce.sh" {name} "$@"' in script
    assert (commands.REPOSITORY / "scripts" / "reproduction" / f"{name}.py").is_file()


@pytest.mark.parametrize("main", [balancing.main, buffering.main])
def test_a_batch_size_of_zero_does_not_pass_for_none(main, capsys):
    with pytest.raises(SystemExit):
        main(["--batch-size", "0"])
    assert "argument --batch-size: must be a whole number of at least 1, got '0'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(shared_goldens, tmp_path):
    golden = shared_goldens / "mt_plain"
    model = ["--checkpoint", golden / "checkpoint_merged.pt", "--data", golden / "data-bin", "--results", tmp_path]
    calls = (
        ("activation", ["--batches", "12", "24"]),
        ("balancing", ["--ranks", "2", "--time-limit", "0.1"]),
        ("buffering", ["--ranks", "2", "--shares", "0.5"]),
    )
    code = (
        "import importlib, json, sys\n"
        "for name, options in json.loads(sys.argv[1]):\n"
        "    done = importlib.import_module(f'reproduction.{name}').main(sys.argv[2:] + options)\n"
        "    assert done == 0, name\n"
    )
    done = start(code, json.dumps(calls), *model)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, _ in calls:
        text = (tmp_path / name / f"{name}.md").read_text()
        assert text in done.stdout and "## The paper's findings" in text
        assert "**Confirmed**" in text or "**Contradicted**" in text
        assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "activation" / "activation.csv", newline="") as opened:
        found = list(csv.DictReader(opened))
    assert [(row["kind"], row["batch"]) for row in found] == [
        ("MT encoder", "12"), ("MT encoder", "24"), ("MT decoder", "12"), ("MT decoder", "24")
    ]
    with open(tmp_path / "buffering" / "buffering-served.csv", newline="") as opened:
        whole, half = csv.DictReader(opened)
    assert whole["quality"] == half["quality"] and half["size"] == "4"
    assert int(half["misses"]) == int(half["simulated_misses"]) > 0  # a served run has the simulated misses
    runs = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs" / "checkpoint_merged").iterdir()}
    assert len(runs) == 2 * (2 + 1 + 2)
    again = start(code, json.dumps(calls), *model)
    assert again.stdout == done.stdout
    assert {file: file.stat().st_mtime_ns for file in runs} == runs


REFUSED = [
    ("activation", ["--batches", "0"], "--batches must be at least 1, got 0"),
    ("balancing", ["--ranks", "1"], "--ranks must be at least 2, got 1"),
    ("balancing", ["--time-limit", "0"], "--time-limit must be above 0, got 0"),
    ("buffering", ["--shares", "1"], "--shares must be above 0 and below 1, got 1"),
    ("scaling", ["--network", "0"], "--network must be above 0 GB/s, got 0"),
    ("scaling", ["--checkpoint", "a.pt"], "--checkpoint (CHECKPOINT) and --data (DATA) must be given together"),
]


def test_what_they_refuse(tmp_path):
    """All in one process, which takes seconds to start."""
    code = (
        "import contextlib, importlib, io, json, sys\n"
        "for name, options, _ in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):\n"
        "        module = importlib.import_module(f'reproduction.{name}')\n"
        "        module.main([*options, '--results', sys.argv[2]])\n"
        "    print(said.getvalue().strip().splitlines()[-1])\n"
    )
    done = start(code, json.dumps(REFUSED), tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [line.split("error: ")[1] for line in done.stdout.splitlines()] == [words for *_, words in REFUSED]
    assert not (tmp_path / "out").exists()
