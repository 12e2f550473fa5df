"""docs/flags.md against the parser: every flag of the plugin is there, with its default's name and its choices."""

import re
from dataclasses import fields

import pytest
from doc_pages import REPOSITORY
from option_runs import command_parser

from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.refused_options import GENERATE, MT

PAGE = REPOSITORY / "docs" / "flags.md"
FLAGS = {f"--{item.name.replace('_', '-')}" for item in fields(MoEFlags) if item.name != "_name"}


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[str, str]]:
    """Flag -> (what stands after it, its default)."""
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| `(--[\w-]+)([^`]*)` \| (.*?) \| ", line):
            assert match.group(1) not in found, f"{match.group(1)} is there twice"
            found[match.group(1)] = match.group(2).strip(), match.group(3)
    return found


@pytest.fixture(scope="module")
def actions() -> dict:
    parser = command_parser(GENERATE, MT)
    return {name: action for action in parser._actions for name in action.option_strings if name in FLAGS}


def test_the_page_has_the_parsers_flags_and_no_others(rows, actions):
    assert set(rows) == set(actions) == FLAGS


def test_choices_are_the_parsers(rows, actions):
    for flag, action in actions.items():
        said, _ = rows[flag]
        if action.choices is None:
            assert not said.startswith("{") and bool(said) == (action.nargs != 0), flag
        else:
            assert sorted(said.strip("{}").split(",")) == sorted(map(str, action.choices)), flag


def test_defaults_are_the_parsers(rows):
    for item in fields(MoEFlags):
        flag = f"--{item.name.replace('_', '-')}"
        if item.name != "_name" and isinstance(item.default, str):
            assert rows[flag][1] == f"`{item.default}`", flag
        elif item.default is False:
            assert rows[flag][1] == "off", flag
