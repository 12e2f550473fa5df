"""`--distributed-world-size` of the serving commands where no ranks can be started for it."""

import os
import sys

import pytest
from fairseq import options

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


@pytest.mark.parametrize("script", ["fairseq-generate", "generate.py", "some/folder/fairseq-generate"])
def test_more_ranks_are_started_by_torchrun(script, monkeypatch):
    """The arguments stay as they are; torchrun's ranks read them again."""
    monkeypatch.setattr(sys, "argv", [script, "data", "--distributed-world-size", "4", "--x"])
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        parse("generate", "--distributed-world-size", "4")
    ((program, command),) = started
    assert program == command[0] == sys.executable
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[-6:] == ["-m", "fairseq_cli.generate", "data", "--distributed-world-size", "4", "--x"]
