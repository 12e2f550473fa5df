"""`--distributed-world-size` of the serving commands where no ranks can be started for it."""

import os
import sys

import pytest
from fairseq import options

from fairseq_moe_ext.tasks import serving_parser
from fairseq_moe_ext.tasks.serving_parser import prepare_parser

PARSERS = {
    "eval_lm": options.get_eval_lm_parser,
    "generate": options.get_generation_parser,
    "interactive": options.get_interactive_generation_parser,
}


def parse(command: str, *flags: str) -> int:
    parser = PARSERS[command]()
    prepare_parser(parser)
    return parser.parse_args(["--path", "x.pt", *flags]).distributed_world_size


@pytest.fixture(autouse=True)
def no_new_process(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"would become {arguments}")

    monkeypatch.setattr(os, "execv", refuse)


@pytest.mark.parametrize("command", PARSERS)
def test_one_rank_is_served_here(command):
    assert parse(command) == 1
    assert parse(command, "--distributed-world-size", "1") == 1


@pytest.mark.parametrize(
    ("command", "environment", "words"),
    [
        ("interactive", {}, "must be 1, since one process serves interactive, got 4"),
        ("generate", {}, "must be 1 where fairseq is called by a program of its own, got 4"),
        ("eval_lm", {}, "must be 1 where fairseq is called by a program of its own, got 4"),
        ("generate", {"SLURM_NTASKS": "2"}, "must be 1 under Slurm, where torchrun starts the ranks of each node, got"),
        ("generate", {"RANK": "0", "WORLD_SIZE": "2"}, "must be the number of ranks that torchrun started, 2, got 4"),
    ],
)
def test_ranks_that_cannot_be_started_are_refused(command, environment, words, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        parse(command, "--distributed-world-size", "4")
    assert caught.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "argument --distributed-world-size: " in message and words in message


def test_under_torchrun_fairseq_sees_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for flags in ((), ("--distributed-world-size", "1"), ("--distributed-world-size", "2")):
        assert parse("generate", *flags) == 1


@pytest.mark.parametrize("command", ["generate", "eval_lm"])
def test_more_ranks_of_fairseqs_own_commands_are_started(command, monkeypatch):
    """The arguments stay as they are; the ranks read them again."""
    monkeypatch.setattr(sys, "argv", ["x", "data", "--distributed-world-size", "4", "--x"])
    monkeypatch.setattr(serving_parser, "fairseqs_command", lambda: command)
    looked = []
    monkeypatch.setattr(serving_parser, "check_command", lambda args: looked.append("command"))
    monkeypatch.setattr(serving_parser, "check_ranks", lambda *given: looked.append(given))
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        parse(command, "--distributed-world-size", "4")
    assert looked == ["command", ("x.pt", 4, None)]
    ((program, line),) = started
    assert program == line[0] == sys.executable
    assert line[1:4] == ["-m", "fairseq_moe_ext.ranks.launch", "4"]
    assert line[4:] == [f"fairseq_cli.{command}", "data", "--distributed-world-size", "4", "--x"]


def test_a_command_line_with_unknown_options_starts_no_ranks(monkeypatch):
    monkeypatch.setattr(serving_parser, "fairseqs_command", lambda: "generate")
    with pytest.raises(SystemExit):
        parse("generate", "--distributed-world-size", "4", "--x")
