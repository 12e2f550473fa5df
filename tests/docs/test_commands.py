"""The commands of the pages as they are written, in a copy of the tree with small models in the quickstart's places."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_makers import untrained_checkpoint, write_data
from doc_pages import PAGES, REPOSITORY, Block, blocks, commands_of, page_name, prose
from forked_programs import BIN, write_programs
from option_runs import command_parser

from fairseq_moe_ext.tasks.refused_options import EVAL_LM, GENERATE, INTERACTIVE, LM, MT, MULTI, VALIDATE

LANGUAGES = ("bash", "python", "json", "sh", "")  # "": output
OTHER_TESTS = ("docs/python.md",)  # whose Python and sh test_python_docs.py runs
REASONS = (  # what a block's `no-run: ` may begin with
    "needs a GPU",
    "needs several machines",
    "needs the recordings of upstream's models",
    "needs the results of",
    "needs a file of",
    "installs",
    "downloads",
    "takes",
    "trains",
    "runs until",
    "tests of the suite",
)
SERVES = {f"fairseq-{name}": name for name in ("generate", "interactive", "eval-lm", "validate")}
PARSED = {"generate": GENERATE, "interactive": INTERACTIVE, "eval-lm": EVAL_LM, "validate": VALIDATE}
# a line of output or log that says that something was computed
COMPUTED = {
    "generate": re.compile(r"^T-\d+\t\S+ .*\nH-.*\nD-", re.MULTILINE),  # of words, unless all became one
    "interactive": re.compile(r"^D-\d+\t-?[\d.]+\t", re.MULTILINE),
    "eval-lm": re.compile(r"Evaluated [1-9][\d,]* tokens"),
}


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def test_every_block_says_its_language_and_why_it_does_not_run():
    for block in all_blocks():
        assert block.language in LANGUAGES, f"{block}: {block.info!r}"
        assert block.language != "sh" or page_name(block.page) in OTHER_TESTS, f"{block}: {block.info!r}"
        reason = block.why_not_run
        if block.language in ("bash", "python") and reason is not None:
            assert block.info.startswith(f"{block.language} no-run: "), f"{block}: {block.info!r}"
            assert reason.startswith(REASONS), f"{block}: {reason!r} must begin with one of {REASONS}"
    assert sum(block.why_not_run is None for block in all_blocks("bash")) > 15


def test_no_command_stands_outside_a_block():
    """An indented one would be run by no test."""
    command = re.compile(r"\s{4,}(bash|python|fairseq-|pip|torchrun|\.venv|[A-Z_]+=\S* .*\bbash)\b")
    for page in PAGES:
        for number, line in enumerate(prose(page), 1):
            assert not command.match(line), f"{page_name(page)}:{number}: {line.strip()}"


@functools.cache
def known_options(command: str, task: str) -> set[str]:
    parser = command_parser(PARSED[command], task)
    return {name for action in parser._actions for name in action.option_strings}


def served(words: list[str]) -> tuple[str, list[str]] | None:
    """(fairseq's command, its arguments) of a command line's words, however it is started."""
    for place, word in enumerate(words):
        if word in SERVES:
            return SERVES[word], words[place + 1 :]
        if word.startswith("fairseq_cli."):
            return word.removeprefix("fairseq_cli.").replace("_", "-"), words[place + 1 :]
    return None


def test_options_of_all_commands_are_known():
    """Of those as well that are not run."""
    checked = 0
    for block in all_blocks("bash"):
        for line in commands_of(block):
            words = shlex.split(line)
            for word in words:
                assert not word.startswith("tests/") or (REPOSITORY / word).exists(), f"{block}: {word}"
            if found := served(words):
                command, given = found
                given = given[: next((place for place, word in enumerate(given) if word in "|<>"), len(given))]
                task = next((given[place + 1] for place, word in enumerate(given) if word == "--task"), MT)
                unknown = {word for word in given if re.match(r"--?[a-z]", word)} - known_options(command, task)
                assert not unknown, f"{block}: {command} has no {unknown}"
                checked += 1
            elif words[0] == "fairseq-moe":
                text = "".join(
                    (REPOSITORY / "fairseq_moe_ext" / "command_line" / f"{name}.py").read_text(encoding="utf-8")
                    for name in (words[1], "parsing")
                )
                handed_on: set[str] = set()
                if words[1] == "compare":  # to the commands, also in its quoted settings
                    handed_on = known_options("generate", MT) | known_options("eval-lm", LM)
                    words = [part for word in words for part in word.split()]
                for word in words:
                    known = word in handed_on or f'"{word}"' in text
                    assert not word.startswith("--") or known, f"{block}: fairseq-moe {words[1]} {word}"
                checked += 1
            elif scripts := [word for word in words if word.startswith(("scripts/", "examples/")) and "." in word]:
                assert (REPOSITORY / scripts[0]).is_file(), f"{block}: {scripts[0]}"
                if scripts[0].endswith(".py"):
                    folder = (REPOSITORY / scripts[0]).parent  # scripts of a folder share options
                    text = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
                    for word in words:
                        if word.startswith("--"):
                            assert f'"{word}"' in text or f'"{word[2:]}"' in text, f"{block}: {scripts[0]} {word}"
                checked += 1
    assert checked > 30


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository with small untrained models and data in the places of the pages' own."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("examples", "scripts"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("output", "__pycache__"))
    (tree / "fairseq_moe_ext").symlink_to(REPOSITORY / "fairseq_moe_ext")
    (tree / ".venv").symlink_to(BIN.parent)
    write_programs(tree / "bin")
    output = tree / "examples" / "output"
    experts = ("--moe-expert-count", "32")

    translation = output / "translation"
    sizes = ("--train", "400", "--valid", "20", "--test", "24")
    run(tree, "python", "examples/translation/make_data.py", "--output", translation / "text", *sizes)
    splits = [f"--{split}pref={translation / 'text' / split}" for split in ("train", "valid", "test")]
    parts = ("--source-lang", "en", "--target-lang", "xx", "--joined-dictionary", "--workers", "1", *splits)
    run(tree, "fairseq-preprocess", *parts, "--destdir", translation / "data-bin")
    arguments = ("--task", MT, "--arch", "moe_transformer_tiny", "-s", "en", "-t", "xx", *experts)
    untrained_checkpoint(translation / "model.pt", translation / "data-bin", *arguments)

    model = output / "language_modeling"
    sizes = ("--train", "60000", "--valid", "4000", "--test", "4000")
    run(tree, "python", "examples/language_modeling/make_data.py", "--output", model / "text", *sizes)
    splits = [f"--{split}pref={model / 'text' / split}.txt" for split in ("train", "valid", "test")]
    run(tree, "fairseq-preprocess", "--only-source", "--workers", "1", *splits, "--destdir", model / "data-bin")
    arguments = ("--task", LM, "--arch", "moe_transformer_lm_tiny", "--tokens-per-sample", "128", *experts)
    untrained_checkpoint(model / "model.pt", model / "data-bin", *arguments)

    multilingual = tree / "multilingual"
    data = write_data(multilingual / "data-bin", ("en", "de"), splits={"train": 8, "valid": 6, "test": 6})
    shutil.copy(data / "dict.de.txt", data / "dict.fr.txt")
    languages = ("--langs", "en,de,fr", "--lang-pairs", "en-de,en-fr", "--encoder-langtok", "src", "--decoder-langtok")
    arguments = ("--task", MULTI, "--arch", "moe_transformer_tiny", *languages)
    untrained_checkpoint(multilingual / "whole.pt", data, *arguments)
    convert = ("split", multilingual / "whole.pt", multilingual / "model.pt", "--ranks", "2", "--drop-optimizer")
    run(tree, "fairseq-moe", "convert", *convert)

    run(tree, "python", "examples/nllb/make_tiny.py", tree / "tiny")
    (tree / "nllb-moe-54b").symlink_to(tree / "tiny" / "hf")
    for language in ("eng_Latn", "deu_Latn"):
        (tree / f"devtest.{language}").symlink_to(tree / "tiny" / "flores" / f"devtest.{language}")
    return tree


def environment(tree: Path) -> dict[str, str]:
    programs = str(tree / "bin")
    more = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHON_BIN": programs, "PYTHONPATH": str(tree)}
    return {**os.environ, **more, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(tree: Path, *words: object) -> subprocess.CompletedProcess:
    """The command in the tree, as a user starts it; the test fails where it fails."""
    done = subprocess.run(
        [*map(str, words)], cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done


def to_run(page: Path) -> Iterator[tuple[Block, str]]:
    """(block, what is to run): command by command, a block of Python as a whole."""
    for block in blocks(page, "bash", "python"):
        if block.why_not_run is not None:
            continue
        if block.language == "python":
            if page_name(page) not in OTHER_TESTS:
                yield block, block.text
        else:
            yield from ((block, line) for line in commands_of(block))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(to_run(page))], ids=page_name)
def test_the_commands_of_a_page_run_as_they_are_written(tree, page):
    """One after the other, since later ones read what earlier ones wrote; each computes something."""
    for block, text in to_run(page):
        if block.language == "python":
            run(tree, "python", "-c", text)
            continue
        done = run(tree, "bash", "-euo", "pipefail", "-c", text)
        found = served(shlex.split(text))
        if found and found[0] in COMPUTED:
            said = done.stdout + done.stderr
            assert COMPUTED[found[0]].search(said), f"{block}: {text}\n{said[-2000:]}"
