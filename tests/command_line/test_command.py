"""`fairseq-moe`: its subcommands' help, how they fail, and that scripts/ and `python -m` are the same."""

from __future__ import annotations

import subprocess
import sys

import commands
import processes
import pytest

from fairseq_moe_ext import __version__
from fairseq_moe_ext.command_line import COMMANDS, main

CALLERS = {
    "convert": "scripts/convert_checkpoint.py",
    "nllb": "scripts/convert_nllb_moe.py",
    "quantize": "scripts/quantize_checkpoint.py",
    "plan": "scripts/plan_memory.py",
    "balance": "scripts/balance_experts.py",
    "profile": "scripts/merge_profiles.py",
    "simulate": "scripts/simulate_buffer.py",
    "prune": "scripts/prune_experts.py",
    "compare": "scripts/compare_settings.py",
}


def ended(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_help_lists_every_subcommand_without_the_heavy_libraries():
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('fairseq_moe_ext', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('heavy', *({'torch', 'fairseq', 'numpy'} & {*sys.modules}))\n"
    )
    done = processes.run([sys.executable, "-c", code], cwd=commands.REPOSITORY, fresh=True)
    assert "usage: fairseq-moe " in done.stdout and done.stdout.endswith("code 0\nheavy\n"), done.stderr
    for name, about in COMMANDS.items():
        assert f"    {name} " in done.stdout and about.split(",")[0] in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommands_help_names_itself_and_every_option(name, capsys):
    code, out, err = ended(capsys, name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: fairseq-moe {name} ")
    assert f"\n    fairseq-moe {name} " in out  # an example
    assert "scripts/" not in out and "serving/" not in out  # what an installation does not have


def test_the_version(capsys):
    assert ended(capsys, "--version") == (0, f"fairseq_moe_ext {__version__}\n", "")


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "error: the following arguments are required: COMMAND"),
    (("serve",), "invalid choice: 'serve' (choose from "),
    (("--", "plan"), "COMMAND"),
    (("plan",), "error: the following arguments are required: SOURCE"),
    (("plan", "x", "--device-memory", "1G", "--beam", "0"), "--beam: must be a whole number of at least 1, got '0'"),
    (("compare", "x", "y"), "error: the following arguments are required: DATA"),
    (("nllb", "x", "--output", "y", "--tokenizer", "z"), "--tokenizer goes with --to-hf, --force without it"),
])
def test_a_wrong_call_ends_with_2_and_one_sentence(arguments, words, capsys):
    code, out, err = ended(capsys, *arguments)
    assert (code, out) == (2, "") and words in err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [
    ("convert", "summary", "{}/no.pt"),
    ("nllb", "{}/no", "--output", "{}/x.pt"),
    ("plan", "{}/no.pt", "--device-memory", "1G"),
])
def test_a_failure_ends_with_1_and_one_sentence(arguments, tmp_path, capsys):
    code, out, err = ended(capsys, *(part.format(tmp_path) for part in arguments))
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path) in err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_script_is_the_subcommand(name):
    """From a checkout that is not installed, in a folder that is not the checkout."""
    script = commands.REPOSITORY / CALLERS[name]
    assert len(script.read_text().splitlines()) <= 15
    environment = {**commands.environment(), "PYTHONPATH": ""}
    done = [
        subprocess.run([sys.executable, *start, "--help"], cwd=cwd, env=environment, capture_output=True, text=True)
        for start, cwd in (([script], "/"), (["-m", "fairseq_moe_ext", name], commands.REPOSITORY))
    ]
    assert [each.returncode for each in done] == [0, 0] and done[0].stdout == done[1].stdout != ""
