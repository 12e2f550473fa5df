"""What fairseq's commands refuse before they load anything, and how they say it: in one sentence, the last, once."""

import argparse
import re
import sys
from argparse import Namespace

import commands
import data_makers
import processes
import pytest
import torch
from fairseq import options
from option_runs import PARSERS

from fairseq_moe_ext.kernels import choice
from fairseq_moe_ext.serving import device_flags
from fairseq_moe_ext.tasks import command_check
from fairseq_moe_ext.tasks.refused_options import GENERATE, INTERACTIVE, MT, MULTI, VALIDATE, written_options


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(data, checkpoint) of a translation model with 8 experts."""
    folder = tmp_path_factory.mktemp("model")
    data = data_makers.write_data(folder / "data", ("en", "de"))
    data_makers.untrained_checkpoint(folder / "x.pt", data, *data_makers.MT_TRAINING)
    return data, folder / "x.pt"


def refused(model, *flags, command="generate", **how) -> str:
    """All that a command says which must end with one sentence of the plugin's before anything is loaded."""
    data, checkpoint = model
    done = commands.run(command, data, "--path", checkpoint, *commands.MT, *flags, check=False, **how)
    assert done.returncode == 1 and done.stdout == ""
    assert "loading model" not in done.stderr
    return done.stderr


def sentence(said: str) -> str:
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--path", "no.pt"), "--path no.pt: there is neither no.pt nor no-shared.pt with no-rank-0.pt"),
        (("--lm-path", "no"), "--lm-path no: no such file"),
        (("--expert-placement", "no.json"), "--expert-placement no.json: no such file"),
        (("--expert-buffer-size", "2", "--expert-profile", "no.npz"), "--expert-profile no.npz: no such file"),
        (
            ("-s", "en", "-t", "xx"),
            "/data/dict.xx.txt: no such dictionary: the data's folder and the language flags must name one",
        ),
        (
            ("--bpe", "sentencepiece", "--sentencepiece-model", "no.model"),
            "--sentencepiece-model no.model: no such file",
        ),
        (("--moe-kernel", "triton"), "--moe-kernel triton needs a GPU, got --cpu: auto or loop serve on a CPU"),
        (
            ("--expert-buffer-size", "2", "--expert-store", "disk", "--expert-host-memory", "1G"),
            "--expert-host-memory 1G needs a GPU, got --cpu: it lies between the disk store and one",
        ),
        (
            ("--distributed-world-size", "9"),
            "--distributed-world-size: the ranks must not outnumber the experts without an --expert-placement that "
            "holds replicas: 9 ranks, 8 experts",
        ),
        (("--distributed-world-size", "2", "--path", "no.pt"), "--path no.pt: there is neither no.pt nor"),
        (("--moe-capacity-factor", "1", "--moe-gating", "static"), "--moe-capacity-factor must go with"),
        (("--model-overrides", "{"), "--model-overrides must be a mapping of the checkpoint's fields, got '{'"),
        (
            ("--model-overrides", "{'moe_gating': 'static'}"),
            "--model-overrides must leave moe_gating to --moe-gating, got 'static'",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_one_sentence_says_what_is_wrong(model, flags, words, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # tests/conftest.py
    said = refused(model, *flags)
    assert sentence(said).startswith("fairseq-generate: error: ") and words in sentence(said)
    assert said.count(words) == 1


FILES = [
    (MULTI, "--lang-dict"),
    (MULTI, "--fixed-dictionary"),
    (MULTI, "--source-dict"),
    (MULTI, "--target-dict"),
    (MT, "--bpe", "sentencepiece", "--sentencepiece-model"),
    (MT, "--bpe", "subword_nmt", "--bpe-codes"),
    (MT, "--bpe", "fastbpe", "--bpe-codes"),
    (MT, "--bpe", "byte_bpe", "--sentencepiece-model-path"),
    (MT, "--bpe", "hf_byte_bpe", "--bpe-vocab", __file__, "--bpe-merges"),
    (MT, "--bpe", "hf_byte_bpe", "--bpe-merges", __file__, "--bpe-vocab"),
    (MT, "--bpe", "bert", "--bpe-vocab-file"),
    (MT, "--bpe", "gpt2", "--gpt2-vocab-bpe", __file__, "--gpt2-encoder-json"),
    (MT, "--bpe", "gpt2", "--gpt2-encoder-json", __file__, "--gpt2-vocab-bpe"),
    (MT, "--expert-placement"),
    (MT, "--expert-buffer-size", "2", "--expert-profile"),
]


@pytest.mark.parametrize("command", [GENERATE, INTERACTIVE])
@pytest.mark.parametrize("flags", FILES, ids=" ".join)
def test_every_file_that_an_option_names_must_be_there(model, flags, command):
    task, *flags = flags
    arguments = [str(model[0]), "--task", task, "--path", "no.pt", *flags, "no/such file"]
    if task == MULTI:
        arguments += ["--lang-pairs", "en-de", "-s", "en", "-t", "de"]
    args = options.parse_args_and_arch(PARSERS[command](), arguments)
    with pytest.raises(ValueError, match=f"^{flags[-1]} no/such file: no such file$"):
        command_check.check_command(args)  # which looks at the checkpoint later


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (GENERATE, ("--sampling",), "--sampling needs --nbest equal to --beam, got 1 and 5"),
        (INTERACTIVE, ("--sampling", "--beam", "2"), "--sampling needs --nbest equal to --beam, got 1 and 2"),
        (GENERATE, ("--replace-unk",), "--replace-unk needs --dataset-impl raw in fairseq-generate, got None"),
        (INTERACTIVE, ("--batch-size", "2"), "--batch-size must be at most --buffer-size in fairseq-interactive"),
        (VALIDATE, (), "--max-tokens or --batch-size must be given in fairseq-validate, got neither"),
    ],
)
def test_what_fairseq_asserts_of_options_is_a_sentence(model, command, flags, words):
    data, checkpoint = model
    given = ("--path", checkpoint, "--task", MT, "-s", "en", "-t", "de", "--cpu", "--num-workers", "0")
    done = commands.run(command, data, *given, *flags, check=False)
    assert done.returncode == 1 and words in sentence(done.stderr)


@pytest.mark.parametrize("command", ["eval-lm", "validate"])
def test_a_command_of_one_model_refuses_an_ensemble(model, command):
    data, checkpoint = model
    task = commands.LM if command == "eval-lm" else ("--task", MT, "-s", "en", "-t", "de", "--batch-size", "2", "--cpu")
    done = commands.run(command, data, "--path", f"{checkpoint}:{checkpoint}", *task, check=False)
    words = f"error: --path must name one checkpoint to this command, got {checkpoint}:{checkpoint}"
    assert done.returncode == 1 and sentence(done.stderr) == f"fairseq-{command}: {words}"
    assert "loading model" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--beam", "500"), "--beam must be below the "),
        (("--sampling", "--nbest", "4", "--sampling-topk", "500"), "--sampling-topk must be at most the "),
        (("--min-len", "500", "--max-len-a", "2"), "--min-len must be at most the longest output allowed, "),
    ],
)
def test_what_the_model_sets_a_bound_to_is_a_sentence(model, flags, words):
    data, checkpoint = model
    done = commands.run("generate", data, "--path", checkpoint, *commands.MT, *flags, check=False)
    assert done.returncode == 1 and sentence(done.stderr).startswith(f"fairseq-generate: error: {words}")


def test_a_missing_data_folder_and_input_file(model):
    assert sentence(refused(("no-data", model[1]))).endswith("error: data no-data: no such folder")
    said = refused(model, "--input", "no.txt", command="interactive")
    assert sentence(said) == "fairseq-interactive: error: --input no.txt: no such file"


def test_a_missing_data_set_is_named(model):
    data, checkpoint = model
    done = commands.run("generate", data, "--path", checkpoint, *commands.MT, "--gen-subset", "no", check=False)
    assert "fairseq-generate: error: " in sentence(done.stderr) and "no data set no (--gen-subset" in done.stderr


def test_training_names_what_is_missing_too(model):
    arguments = (*data_makers.MT_TRAINING, "--cpu", "--batch-size", "4", "--optimizer", "adam")
    done = commands.run("train", "no-data", *arguments, check=False)
    assert sentence(done.stderr) == "fairseq-train: error: data no-data: no such folder" and done.returncode == 1


def test_a_broken_checkpoint_is_told_before_ranks_are_started(model, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(model[1].read_bytes()[:1000])
    said = refused(model, "--path", broken, "--distributed-world-size", "2")
    assert f"error: {broken}: " in sentence(said)


def test_moe_debug_brings_the_traceback(model):
    said = refused(model, "--path", "no.pt", "--moe-debug")
    assert said.count("Traceback (most recent call last)") == 1
    assert "CheckpointError: --path no.pt: " in said.splitlines()[-1]


def test_what_another_library_raises_keeps_its_traceback(model):
    said = refused(model, "--results-path", model[1] / "no-folder")
    assert "Traceback" in said and "NotADirectoryError" in said.splitlines()[-1]


def test_under_torchrun_the_sentence_is_said_once_in_its_last_words(model):
    said = refused(model, "--path", "no.pt", ranks=2)
    lines = [number for number, line in enumerate(said.splitlines()) if "--path no.pt: " in line]
    assert len(lines) == 1 and lines[0] >= len(said.splitlines()) - 4
    assert said.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow
def test_ranks_that_were_started_for_the_world_size_say_it_once_and_last(model):
    flags = ("--distributed-world-size", "2", "--moe-capacity-factor", "1", "--moe-gating", "static")
    said = refused(model, *flags)
    assert "error: --moe-capacity-factor must go with" in sentence(said)
    assert said.count("--moe-capacity-factor must go with") == 1


NAMES = ("my-fairseq-generate", "run_generate.py", "generate.py", "fairseq-generate.py")


@pytest.mark.parametrize("name", NAMES)
def test_a_program_of_the_users_own_is_never_started_again(model, tmp_path, name):
    script = tmp_path / name
    script.write_text("print('mine')\nfrom fairseq_cli.generate import cli_main\ncli_main()\n", encoding="utf-8")
    data, checkpoint = model
    arguments = (data, "--path", checkpoint, *commands.MT, "--user-dir", commands.USER_DIR)
    command = [sys.executable, script, *arguments, "--distributed-world-size", "2"]
    done = processes.run(command, env=commands.environment())
    assert (done.returncode, done.stdout) == (2, "mine\n")
    assert "must be 1 where fairseq is called by a program of its own, got 2" in done.stderr.splitlines()[-1]


def test_triton_is_refused_where_no_gpu_can_run_it(monkeypatch):
    monkeypatch.setattr(device_flags, "triton_is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, got a machine where PyTorch finds none"):
        device_flags.check_kernel_flag("triton", on_cpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(ValueError, match=r"of compute capability 8.0 or newer, got 7.0"):
        device_flags.check_kernel_flag("triton", on_cpu=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: choice.AMPERE)
    device_flags.check_kernel_flag("triton", on_cpu=False)
    with pytest.raises(ValueError, match="got --cpu"):
        device_flags.check_kernel_flag("triton", on_cpu=True)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command_check.check_command(Namespace(cpu=False, device_id=1, distributed_world_size=1))
    with pytest.raises(ValueError, match="--device-id must be below the number of GPUs, 2, got 2"):
        command_check.check_command(Namespace(cpu=False, device_id=2, distributed_world_size=1))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--expert-store", "host"), "--expert-store needs --expert-buffer-size, got host without it"),
        (("--expert-buffer-scope=all",), "--expert-buffer-scope needs --expert-buffer-size, got all without it"),
        (("--moe-overflow", "drop"), "--moe-overflow needs --moe-capacity-factor, got drop without it"),
        (("--checkpoint-suffix=-x", "--path", "x.pt:y.safetensors"),
         "--checkpoint-suffix needs a checkpoint X.pt, got -x with --path y.safetensors"),
    ],
)
def test_a_default_that_is_written_in_vain_is_refused(flags, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        commands.parse("generate", "data", "--path", "x.pt", *commands.MT, *flags)


def test_written_options_are_those_of_the_line_whatever_they_say():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--left", default="True", type=eval)
    parser.add_argument("--beam", default=5, type=int)
    parser.add_argument("--quiet", action="store_true")
    parse = parser.parse_known_args
    assert written_options(parser, parse, ["x", "--left", "True", "--other"]) == {"data", "left"}
    assert written_options(parser, parse, ["x", "--beam=5", "--quiet"]) == {"data", "beam", "quiet"}
