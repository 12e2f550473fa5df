"""benchmark_generate.py: made models are the published shapes, what it measures, and what it refuses."""

import json
import sys

import commands
import processes
import pytest

SCRIPTS = commands.REPOSITORY / "scripts" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_generate

    return benchmark_generate


def run(*arguments):
    command = [sys.executable, SCRIPTS / "benchmark_generate.py", *arguments]
    return processes.run(command, env=commands.environment())


def figures(encoder: float, decoder: float) -> dict:
    """One run's, at so many tokens per second."""
    return {
        "encoder": {"tokens_per_second": encoder},
        "decoder": {"tokens_per_second": decoder, "tokens": 60, "steps": 8},
        "command_seconds": 2.0,
        "loop_seconds": 0.5,
        "device": "cpu",
        "memory": {"peak_rss_bytes": 3_000_000, "peak_device_bytes": 0},
        "active_experts_mean": 5.25,
        "dropped": 0.125,
    }


def test_the_table_has_medians_and_their_ratios(benchmark):
    model = benchmark.Model("a shape: batch 3", True, {})
    model.runs = {
        "static": [figures(10, 20), figures(1000, 1000), figures(8, 16)],
        "dynamic": [figures(50, 40), figures(60, 50), figures(1, 1)],
    }
    text = benchmark.table(model)
    assert text.startswith("**a shape: batch 3**\n\n| variant | encoder tok/s | decoder tok/s | encoder / static |")
    assert "| static | 10 | 20 |  |  | 8 | 7.5 | 0.5 | 2.0 | 3 MB | 5.2 | 12.5% |" in text
    assert "| dynamic | 50 | 40 | 5.00 | 2.00 | 8 | 7.5 |" in text


def test_a_made_models_vocabulary_keeps_its_share(benchmark):
    lm, mt = benchmark.SHAPES["lm"], benchmark.SHAPES["mt"]
    assert benchmark.scaled_vocabulary(lm, 1024, 24) == 51200
    assert benchmark.scaled_vocabulary(lm, 128, 4) == 51200 // 48
    assert benchmark.scaled_vocabulary(mt, 64, 12) == 256206 // 64


@pytest.mark.slow
def test_the_quick_run(tmp_path):
    done = run("--quick", "--models", "mt", "--variants", "dynamic", "continuous", "dense", "--output", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "benchmark_generate.md").read_text()
    assert text in done.stdout and "**NLLB-54B's shape: model dim 64, 4 layers each" in text
    (model,) = json.loads((tmp_path / "benchmark_generate.json").read_text())["models"]
    runs = {variant: run for variant, (run,) in model["runs"].items()}
    assert list(runs) == ["dynamic", "continuous", "dense"]
    assert runs["dense"]["active_experts_mean"] is None and 1 < runs["dynamic"]["active_experts_mean"] < 128
    for side in ("encoder", "decoder"):
        assert runs["dynamic"][side]["tokens"] == runs["dense"][side]["tokens"] == runs["continuous"][side]["tokens"]
    assert runs["dynamic"]["decoder"]["tokens"] == 2 * 4 * 4  # two sentences, beam 4, three tokens and the end


@pytest.mark.slow
def test_a_checkpoint_of_ones_own(shared_goldens, tmp_path):
    golden = shared_goldens / "lm_top2"
    arguments = ("--checkpoint", golden / "checkpoint_last.pt", "--data", golden / "data-bin", "--output", tmp_path)
    flags = "--tokens-per-sample 128 --batch-size 8 --moe-eval-capacity-token-fraction 0.05"
    done = run(*arguments, "--repetitions", "1", "--flags", flags)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "benchmark_generate.json").read_text())["models"][0]["runs"]
    assert runs["static"][0]["decoder"]["tokens"] == runs["dynamic"][0]["decoder"]["tokens"] == 15035
    assert runs["static"][0]["dropped"] > 0.1 and runs["dynamic"][0]["dropped"] == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (("--model-dim", "100"), "--model-dim must be a multiple of 64, got 100"),
    (("--layers", "6"), "--layers must be a multiple of 4, so that there are MoE layers, got 6"),
    (("--checkpoint", "x.pt"), "must be given together"),
    (("--repetitions", "0"), "must be a whole number of at least 1, got '0'"),
])
def test_what_it_refuses(benchmark, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["benchmark_generate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        benchmark.parse_arguments()
    assert ended.value.code == 2 and words in capsys.readouterr().err
