"""fairseq's commands as a user starts them: processes of their own, what they print and how they end."""

import json
import re
import shutil
from argparse import Namespace

import commands
import pytest
from data_makers import LM_TRAINING, MT_TRAINING, write_data
from fairseq import utils
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from ties import assert_same_generation, assert_same_hypotheses, of_lines

RESULT_LINE = re.compile(r"(?:[STP]-\d+\t|[HD]-\d+\t-\d+\.\d+\t|Generate test with beam=4: BLEU = )")


def eval_lm(goldens, model: str, *flags, **kwargs):
    folder = goldens / model
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", 8)
    return commands.run("eval-lm", folder / "data-bin", *path, *commands.LM, *flags, **kwargs)


def generate(goldens, model: str, *flags, **kwargs):
    folder = goldens / model
    path = ("--path", folder / "checkpoint_last.pt", "--batch-size", 36)
    return commands.run("generate", folder / "data-bin", *path, *flags, **kwargs)


def assert_prints(output: str, recording) -> None:
    """The recorded sentences and hypotheses in their order, their BLEU, and nothing but fairseq's result lines."""
    found, recorded = commands.Generation(output.splitlines()), commands.read_generation(recording)
    for line in found.lines:
        assert RESULT_LINE.match(line), line
    assert_same_generation(found, recorded)


@pytest.mark.parametrize(
    ("model", "flags", "result"),
    [
        ("lm_top2", (), "Loss (base 2): 7.2231, Perplexity: 149.41"),
        pytest.param(
            "lm_top2_ws2",
            ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.05"),
            "Loss (base 2): 7.6267, Perplexity: 197.64",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_eval_lm_prints_upstreams_perplexity(shared_goldens, tmp_path, model, flags, result):
    done = eval_lm(shared_goldens, model, *flags, "--moe-report", tmp_path / "report.json", "--is-moe")
    assert result in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("served: ") == 1
    assert json.loads((tmp_path / "report.json").read_text())["decoder"]["tokens"] == 15035


def test_generate_prints_upstreams_translations_and_nothing_else(shared_goldens):
    done = generate(shared_goldens, "mt_plain", *commands.MT, script=True, fresh=True)
    assert_prints(done.stdout, shared_goldens / "mt_plain" / "golden" / "gen_en-de_cap1.0_b36.txt")
    assert "BLEU = 20.62 " in done.stdout.splitlines()[-1]
    assert done.stderr.count("served: ") == 1


def test_generate_with_a_multilingual_model_into_a_file(shared_goldens, tmp_path):
    overrides = ("--model-overrides", repr(commands.NLLB_OVERRIDES), "--results-path", tmp_path)
    done = generate(shared_goldens, "mt_nllb_ws2", *commands.NLLB, "-t", "fr", *overrides)
    assert done.stdout == ""
    output = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    recording = shared_goldens / "mt_nllb_ws2" / "golden" / "gen_en-fr_cap1.0_b36.rank0.txt"
    assert_prints(output, recording)
    assert "BLEU = 33.05 " in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--moe-gating", "sparse"), ("--moe-gating", "'sparse'", "dynamic")),
        (("--moe-report", "missing/report.json"), ("--moe-report", "missing/report.json", "existing folder")),
        (("--moe-eval-capacity-token-fraction", "most"), ("--moe-eval-capacity-token-fraction", "'most'")),
    ],
)
def test_flags_that_are_wrong_end_the_command_before_anything_is_loaded(tmp_path, flags, words):
    nothing = (tmp_path / "no data", "--path", tmp_path / "no checkpoint.pt")
    done = commands.run("generate", *nothing, *commands.MT, *flags, check=False)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert "loading model" not in done.stderr
    assert done.stdout == ""


def test_a_missing_checkpoint_ends_the_command(shared_goldens, tmp_path):
    data = shared_goldens / "lm_top2" / "data-bin"
    done = commands.run("eval-lm", data, "--path", tmp_path / "X.pt", *commands.LM, check=False)
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("fairseq-eval-lm: error: --path ") and str(tmp_path / "X.pt") in message


def test_a_copy_of_the_plugin_elsewhere(shared_goldens, tmp_path):
    compiled = shutil.ignore_patterns("__pycache__")
    copy = shutil.copytree(commands.USER_DIR, tmp_path / "fairseq_moe_ext", ignore=compiled)
    with open(copy / "__init__.py", "a") as file:
        file.write('\nimport sys\n\nprint("this is the copy", file=sys.stderr)\n')
    done = eval_lm(shared_goldens, "lm_top1", user_dir=copy)
    assert done.stderr.count("this is the copy") == 1
    assert "Loss (base 2): 7.3646, Perplexity: 164.80" in done.stderr


def test_importing_the_plugin_again_does_no_harm():
    before = dict(TASK_REGISTRY), dict(MODEL_REGISTRY)
    for path in (commands.USER_DIR, f"{commands.USER_DIR}/", commands.USER_DIR):
        utils.import_user_module(Namespace(user_dir=str(path)))
    assert (dict(TASK_REGISTRY), dict(MODEL_REGISTRY)) == before


@pytest.mark.slow
def test_interactive_translates_as_generate_does(shared_goldens):
    folder = shared_goldens / "mt_plain"
    flags = [flag for flag in commands.MT if flag not in ("--gen-subset", "test")]
    pieces = [flag for flag in commands.MT if flag not in ("--remove-bpe", "sentencepiece")]
    path = ("--path", folder / "checkpoint_last.pt")
    sources = commands.generate(folder / "data-bin", *path, *pieces, "--score-reference").of_kind("S")[:5]
    text = "".join(fields[0] + "\n" for _, fields in sources)
    recorded = commands.read_generation(folder / "golden" / "gen_en-de_cap1.0_b36.txt")
    wanted = [of_lines(recorded)[number] for number, _ in sources]
    for buffer in ((), ("--buffer-size", 3, "--batch-size", 3)):
        done = commands.run("interactive", folder / "data-bin", *path, *flags, *buffer, stdin=text)
        found = of_lines(commands.Generation(done.stdout.splitlines()))
        assert len(found) == 5
        assert_same_hypotheses([found[number] for number in sorted(found)], wanted, positions=2e-4)
        assert done.stderr.count("served: ") == 1


TRAINING = ("--optimizer", "adam", "--lr", "0.01", "--max-tokens", "400", "--no-epoch-checkpoints", "--cpu")
TRAINING += ("--log-format", "simple", "--log-interval", "10", "--num-workers", "0", "--disable-validation")


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["lm", "mt"])
def test_a_small_model_is_trained_resumed_and_served(tmp_path, kind, gating):
    data = write_data(tmp_path / "data", ("en", "de") if kind == "mt" else ())
    common = (*(MT_TRAINING if kind == "mt" else LM_TRAINING), *TRAINING)
    common += ("--save-dir", tmp_path, "--moe-gating", gating)
    criterion = ("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01")
    if kind == "mt" and gating == "static":
        criterion = ("--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", "0.1", *criterion[2:])
    first = commands.run("train", data, *common, *criterion, "--max-update", 20)
    second = commands.run("train", data, *common, *criterion, "--max-update", 40)
    assert "Loaded checkpoint" in second.stdout and "updates" in second.stdout
    losses = [float(loss) for run in (first, second) for loss in re.findall(r" inner_loss=([\d.]+)", run.stdout)]
    losses += [float(loss) for run in (first, second) for loss in re.findall(r" nll_loss=([\d.]+)", run.stdout)]
    assert losses[-1] < losses[0]
    assert "moe_gate_loss=" in first.stdout and "overflow_expert1=" in first.stdout

    state = commands.read_state(tmp_path / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 40
    prefix = "decoder.layers.1.moe_layer"
    assert tuple(state["model"][f"{prefix}.experts.7.fc1.weight"].shape) == ((128, 64) if kind == "lm" else (192, 96))
    assert f"{prefix}.gate.wg.weight" in state["model"]
    assert not [key for key in state["model"] if "fc1_weight" in key]

    served = ("--path", tmp_path / "checkpoint_last.pt", "--gen-subset", "valid", "--cpu", "--moe-gating", gating)
    if kind == "lm":
        done = commands.run("eval-lm", data, *served, "--task", "moe_language_modeling", "--tokens-per-sample", 16)
        perplexity = float(re.search(r"Perplexity: ([\d.]+)", done.stderr).group(1))
        assert perplexity < 20  # of 36 words
    else:
        done = commands.run("generate", data, *served, "--task", "moe_translation", "--beam", 2, "--max-len-b", 20)
        assert len(commands.Generation(done.stdout.splitlines()).hypotheses()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["dynamic", "static"])
def test_a_training_validates_by_bleu(tmp_path, gating):
    """Beams are more rows than the batch size to which static gating pads what a training validates."""
    data = write_data(tmp_path / "data", ("en", "de"))
    options = (*MT_TRAINING, *(each for each in TRAINING if each != "--disable-validation"), "--save-dir", tmp_path)
    options += ("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01", "--moe-gating", gating)
    bleu = ("--eval-bleu", "--eval-bleu-args", '{"beam": 3, "max_len_b": 10}', "--best-checkpoint-metric", "bleu")
    done = commands.run("train", data, *options, *bleu, "--max-update", 4, "--batch-size", 8)
    assert re.search(r"valid on 'valid' subset .* bleu [\d.]+", done.stdout)
