"""fairseq's commands as a user starts them, under their less common options; and what they say without the plugin."""

import json
import re
import shutil
from argparse import Namespace

import commands
import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import make_builder
from ties import assert_same_hypotheses, of_lines

from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel, moe_transformer_lm_tiny

CPU = ("--cpu", "--num-workers", "0")
TRANSLATE = ("--task", "moe_translation", "--gen-subset", "test", "--beam", "4", "--max-len-b", "30", *CPU)


def read(folder, name: str, dictionary) -> list[str]:
    """The sentences of a binary data set as space-separated tokens of its dictionary."""
    data = data_utils.load_indexed_dataset(str(folder / name), dictionary)
    return [dictionary.string(data[number]) for number in range(len(data))]


def write(folder, name: str, lines: list[str], dictionary) -> None:
    builder = make_builder(str(folder / f"{name}.bin"), "mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).long())
    builder.finalize(str(folder / f"{name}.idx"))


@pytest.fixture(scope="module")
def prompts(shared_goldens, tmp_path_factory):
    """(data folder, its lines): the beginnings of a few lines of the golden's text, of different lengths."""
    source, folder = shared_goldens / "lm_top2" / "data-bin", tmp_path_factory.mktemp("prompts")
    shutil.copy(source / "dict.txt", folder)
    dictionary = Dictionary.load(str(source / "dict.txt"))
    long = [line.split() for line in read(source, "test", dictionary) if len(line.split()) > 9][:6]
    lines = [" ".join(words[: 2 + number]) for number, words in enumerate(long)]
    write(folder, "test", lines, dictionary)
    return folder, lines


@pytest.fixture(scope="module")
def sentences(shared_goldens, tmp_path_factory):
    """(data folder, its source lines): the golden's first twelve sentence pairs, with a dictionary for an LM too."""
    source, folder = shared_goldens / "mt_plain" / "data-bin", tmp_path_factory.mktemp("sentences")
    for lang in ("en", "de"):
        shutil.copy(source / f"dict.{lang}.txt", folder)
        dictionary = Dictionary.load(str(source / f"dict.{lang}.txt"))
        lines = read(source, f"test.en-de.{lang}", dictionary)[:12]
        write(folder, f"test.en-de.{lang}", lines, dictionary)
        if lang == "en":
            english = lines
    shutil.copy(source / "dict.de.txt", folder / "dict.txt")
    return folder, english


def lines_of(kind: str, output: str) -> dict[int, list[list[str]]]:
    """Per sentence the fields of all its lines of one kind."""
    found: dict[int, list[list[str]]] = {}
    for number, rest in re.findall(rf"^{kind}-(\d+)\t(.*)$", output, flags=re.MULTILINE):
        found.setdefault(int(number), []).append(rest.split("\t"))
    return found


def assert_continued(output: str, lines: list[str], nbest: int) -> None:
    hypotheses = lines_of("H", output)
    assert sorted(hypotheses) == list(range(len(lines)))
    longer = 0
    for number, line in enumerate(lines):
        assert len(hypotheses[number]) == nbest
        for score, text in hypotheses[number]:
            assert np.isfinite(float(score))
            assert text.split()[: len(line.split())] == line.split()
            longer += len(text.split()) > len(line.split())
    assert longer > len(lines)


def assert_same_translations(some: str, others: str, count: int = 12) -> None:
    found, wanted = (of_lines(commands.Generation(output.splitlines())) for output in (some, others))
    assert found.keys() == wanted.keys() == set(range(count))
    numbers = range(count)
    assert_same_hypotheses([found[each] for each in numbers], [wanted[each] for each in numbers], positions=2e-4)


def translate(goldens, data, *flags, path=None, command="generate", stdin="") -> str:
    path = path or goldens / "mt_plain" / "checkpoint_last.pt"
    return commands.run(command, data, "--path", path, *TRANSLATE, "--batch-size", 12, *flags, stdin=stdin).stdout


# --- prompts


def test_generate_continues_prompts_with_a_language_model(shared_goldens, prompts):
    data, lines = prompts
    path = ("--path", shared_goldens / "lm_top2" / "checkpoint_last.pt", "--task", "moe_language_modeling")
    modes = ("--gen-subset", "test", "--sample-break-mode", "eos", "--tokens-per-sample", 128)
    decoding = ("--beam", 3, "--nbest", 2, "--max-len-b", 20, "--batch-size", 6)
    done = commands.run("generate", data, *path, *modes, *decoding, *CPU)
    assert_continued(done.stdout, lines, nbest=2)


@pytest.mark.slow
def test_interactive_continues_prompts_as_generate_does(shared_goldens, prompts):
    data, lines = prompts
    path = ("--path", shared_goldens / "lm_top2" / "checkpoint_last.pt", "--task", "moe_language_modeling")
    decoding = ("--beam", 3, "--nbest", 2, "--max-len-b", 20, "--batch-size", 6)
    text = "".join(f"{line}\n" for line in lines)
    done = commands.run("interactive", data, *path, *decoding, "--buffer-size", 6, *CPU, stdin=text)
    assert_continued(done.stdout, lines, nbest=2)
    modes = ("--gen-subset", "test", "--sample-break-mode", "eos", "--tokens-per-sample", 128)
    wanted = commands.run("generate", data, *path, *modes, *decoding, *CPU)
    assert_same_translations(done.stdout, wanted.stdout, count=6)


# --- translation


def test_interactive_translates_as_generate_does(shared_goldens, sentences):
    data, lines = sentences
    text = "".join(f"{line}\n" for line in lines)
    languages = ("-s", "en", "-t", "de", "--buffer-size", 12)
    found = translate(shared_goldens, data, *languages, command="interactive", stdin=text)
    assert [rows[0][0] for _, rows in sorted(lines_of("S", found).items())] == lines
    path = ("--path", shared_goldens / "mt_plain" / "checkpoint_last.pt", "--batch-size", 12)
    assert_same_translations(found, "\n".join(commands.generate(data, *path, *TRANSLATE).lines))


@pytest.mark.slow
def test_sampling_follows_the_seed(shared_goldens, sentences):
    data, _ = sentences
    flags = ("--sampling", "--sampling-topk", 20, "--nbest", 4)
    first, again, other = (translate(shared_goldens, data, *flags, "--seed", seed) for seed in (5, 5, 6))
    assert first == again
    assert lines_of("H", first) != lines_of("H", other)
    assert len(lines_of("H", first)) == 12


@pytest.mark.slow
def test_an_ensemble_of_one_model_under_two_names_is_that_model(shared_goldens, sentences):
    data, _ = sentences
    folder = shared_goldens / "mt_plain"
    both = f"{folder / 'checkpoint_last.pt'}:{folder / 'checkpoint_merged.pt'}"
    assert_same_translations(translate(shared_goldens, data, path=both), translate(shared_goldens, data))


@pytest.mark.slow
@pytest.mark.parametrize("saved_task", ["moe_language_modeling", "language_modeling"])
def test_fusion_with_a_moe_language_model(shared_goldens, sentences, tmp_path, saved_task):
    """fairseq sets the language model up by the task it was saved under; upstream's know only its own."""
    data, _ = sentences
    words = Dictionary.load(str(data / "dict.txt"))
    args = Namespace(decoder_layers=2, decoder_embed_dim=32, decoder_ffn_embed_dim=48, max_target_positions=256)
    moe_transformer_lm_tiny(args)
    torch.manual_seed(0)
    model = MoETransformerLanguageModel.build_model(args, Namespace(source_dictionary=words, target_dictionary=words))
    state = commands.read_state(shared_goldens / "lm_top2" / "checkpoint_last-rank-0.pt")
    state["cfg"]["model"] = {"_name": "moe_transformer_lm", **vars(args)}
    state["cfg"]["task"]["_name"] = saved_task
    for name, tensor in model.state_dict().items():
        tensor.mul_(1 if "norm" in name else 3)  # far from uniform
    torch.save({**state, "model": model.state_dict()}, tmp_path / "lm.pt")
    plain = translate(shared_goldens, data)
    found = translate(shared_goldens, data, "--lm-path", tmp_path / "lm.pt", "--lm-weight", 0.2)
    nothing = translate(shared_goldens, data, "--lm-path", tmp_path / "lm.pt", "--lm-weight", 0)
    assert lines_of("H", found).keys() == lines_of("H", plain).keys()
    assert lines_of("H", found) != lines_of("H", plain)
    assert_same_translations(nothing, plain)


# --- scoring


def loss_of(done) -> float:
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", done.stderr + done.stdout).group(1))


@pytest.mark.slow
def test_bfloat16_end_to_end(shared_goldens, tmp_path):
    """lm_top2 scores 7.2231 in float32; bfloat16 may cost 0.01 bits."""
    folder = shared_goldens / "lm_top2"
    flags = ("--batch-size", 8, "--moe-dtype", "bfloat16", "--moe-report", tmp_path / "report.json")
    path = ("--path", folder / "checkpoint_last.pt")
    done = commands.run("eval-lm", folder / "data-bin", *path, *commands.LM, *flags)
    assert loss_of(done) == pytest.approx(7.2231, abs=0.01)
    assert json.loads((tmp_path / "report.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_a_random_second_expert_follows_the_seed_and_the_log_warns(shared_goldens, policy):
    folder = shared_goldens / "lm_top2"
    overrides = ("--model-overrides", f"{{'moe_second_expert_policy': '{policy}'}}", "--batch-size", 8)
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.LM, *overrides)
    losses = []
    for seed in (3, 3, 4):
        done = commands.run("eval-lm", *arguments, "--seed", seed, "--softmax-batch", 64)
        (line,) = [line for line in done.stderr.splitlines() if "moe_second_expert_policy): results" in line]
        assert "WARNING" in line
        assert "results follow --seed and depend on which sentences share a batch" in line
        losses.append(loss_of(done))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_context_window_and_break_mode_end_to_end(shared_goldens):
    """tests/serving/test_eval_lm_options.py holds the scores; here the commands."""
    folder = shared_goldens / "lm_top2"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.LM, "--batch-size", 8)
    for flags in (("--context-window", 16), ("--sample-break-mode", "complete"), ("--output-word-probs",)):
        found = commands.run("eval-lm", *arguments, *flags)
        assert loss_of(found) == pytest.approx(commands.eval_lm(*arguments, *flags).loss, abs=1e-4)


# --- without the plugin: the README's troubleshooting


@pytest.fixture(scope="module")
def merged_language_model(shared_goldens, tmp_path_factory):
    """lm_top2 in one file, which today's PyTorch reads without an allow-list."""
    folder = shared_goldens / "lm_top2"
    shared, state = (commands.read_state(folder / f"checkpoint_last-{part}.pt") for part in ("shared", "rank-0"))
    path = tmp_path_factory.mktemp("merged") / "merged.pt"
    torch.save({**state, "model": {**shared["model"], **state["model"]}}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("user_dir", [None, commands.USER_DIR])
def test_without_our_task_fairseq_misses_the_file_of_a_sharded_checkpoint(shared_goldens, user_dir):
    for command, name in (("generate", "mt_plain"), ("eval-lm", "lm_top2")):
        path = shared_goldens / name / "checkpoint_last.pt"
        arguments = (shared_goldens / name / "data-bin", "--path", path, "--gen-subset", "test", "--cpu")
        done = commands.run(command, *arguments, user_dir=user_dir, check=False)
        assert done.returncode != 0
        assert done.stderr.strip().splitlines()[-1] == f"OSError: Model file not found: {path}"


@pytest.mark.slow
def test_without_our_task_pytorch_refuses_a_translation_models_file(shared_goldens):
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_merged.pt", "--gen-subset", "test", "--cpu")
    done = commands.run("generate", *arguments, user_dir=None, check=False)
    assert done.returncode != 0
    assert "_pickle.UnpicklingError: Weights only load failed." in done.stderr
    assert "WeightsUnpickler error: Unsupported global: GLOBAL argparse.Namespace was not" in done.stderr


@pytest.mark.slow
def test_without_our_task_fairseq_does_not_expect_a_language_models_experts(shared_goldens, merged_language_model):
    flags = ("--path", merged_language_model, "--gen-subset", "test", "--tokens-per-sample", 128, "--cpu")
    done = commands.run("eval-lm", shared_goldens / "lm_top2" / "data-bin", *flags, user_dir=None, check=False)
    assert done.returncode != 0
    *_, error, missing, unexpected = done.stderr.strip().splitlines()
    assert error == "RuntimeError: Error(s) in loading state_dict for TransformerLanguageModel:"
    assert missing.startswith(
        '\tMissing key(s) in state_dict: "decoder.layers.1.fc1.weight", "decoder.layers.1.fc1.bias"'
    )
    assert unexpected.startswith('\tUnexpected key(s) in state_dict: "decoder.layers.1.moe_layer.gate.wg.weight", ')
    assert '"decoder.layers.1.moe_layer.experts.0.fc1.weight"' in unexpected


@pytest.mark.slow
def test_without_the_user_dir_fairseq_does_not_know_our_task(shared_goldens):
    folder = shared_goldens / "mt_plain"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--task", "moe_translation", "--cpu")
    done = commands.run("generate", *arguments, user_dir=None, check=False)
    assert done.returncode == 2
    assert "error: argument --task: invalid choice: 'moe_translation' (choose from" in done.stderr
