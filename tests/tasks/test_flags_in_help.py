"""`--help` of fairseq's commands, as a user reads it, names the plugin's flags."""

import re
import sys
from dataclasses import fields

import commands
import processes
import pytest

from fairseq_moe_ext.checkpoints.moe_config import MoEModelFields
from fairseq_moe_ext.tasks.flags import MoEFlags

FLAGS = {f"--{item.name.replace('_', '-')}" for item in fields(MoEFlags) if item.name != "_name"}


def groups(*arguments: str) -> dict[str, set[str]]:
    """Title -> the options of that group; each option stands in one group."""
    done = processes.run(arguments, env=commands.environment())
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, set[str]] = {}
    for part in re.split(r"\n\n(?=\S)", done.stdout)[1:]:
        title, _, rest = part.partition("\n")
        found[title] = set(re.findall(r"^  (--[\w-]+)", rest, flags=re.MULTILINE))
    assert sum(map(len, found.values())) == len(set().union(*found.values()))
    return found


def ours(found: dict[str, set[str]]) -> set[str]:
    (title,) = [title for title in found if title.startswith("fairseq_moe_ext (with --task moe_translation,")]
    return found[title]


@pytest.mark.parametrize("command", ["generate", "interactive", "eval-lm", "validate", "train"])
def test_every_command_shows_the_plugins_flags_in_their_own_group(command):
    found = groups(*commands.command_line(command, "--help"))
    assert ours(found) == FLAGS
    models = [title for title in found if title.startswith("fairseq_moe_ext's models")]
    assert len(models) == (command == "train")
    if models:
        known = {f"--{item.name.replace('_', '-')}" for item in fields(MoEModelFields)}
        assert found[models[0]] >= {"--moe-freq", "--moe-expert-count"} and found[models[0]] <= known


@pytest.mark.parametrize(
    ("arguments", "title", "option"),
    [
        (("--task=moe_translation", "-h"), "--task moe_translation:", "--source-lang"),
        (
            ("--help", "--task", "moe_translation_multi_simple_epoch"),
            "--task moe_translation_multi_simple_epoch:",
            "--encoder-langtok",
        ),
    ],
)
def test_the_flags_of_the_task_that_is_named_follow(arguments, title, option):
    found = groups(*commands.command_line("generate", *arguments))
    assert ours(found) == FLAGS and option in found[title]


def test_training_shows_the_criterions_flags():
    found = groups(*commands.command_line("train", "--criterion", "moe_cross_entropy", "--help"))
    assert "--moe-gate-loss-wt" in found["--criterion moe_cross_entropy:"]


def test_a_program_of_the_users_own_keeps_fairseqs_help(tmp_path):
    script = tmp_path / "my-fairseq-generate"
    script.write_text("from fairseq_cli.generate import cli_main\ncli_main()\n", encoding="utf-8")
    found = groups(sys.executable, str(script), "--user-dir", str(commands.USER_DIR), "--help")
    assert found and not any(title.startswith("fairseq_moe_ext") for title in found)
