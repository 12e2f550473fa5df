"""docs/options.md against fairseq's own parsers: every option of the four commands is in it and does what it says."""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path

import option_runs
import pytest
import torch
from data_makers import training_configuration, write_data
from fairseq.tasks import TASK_REGISTRY
from option_examples import ELSEWHERE, EXAMPLES, FOLDER, OF_EVAL_LM, OF_INTERACTIVE, OF_VALIDATE, Example
from option_runs import command_parser

from fairseq_moe_ext.tasks.refused_options import (
    EVAL_LM,
    GENERATE,
    INTERACTIVE,
    LM,
    MT,
    MULTI,
    SERVING,
    VALIDATE,
    why_refused,
)

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = {"LM": LM, "MT": MT, "multi": MULTI}
KINDS = ("works", "refused", "harmless")
# fairseq-eval-lm serves language models alone
TASKS = {command: (LM,) if command == EVAL_LM else (MT, MULTI, LM) for command in SERVING}


def table() -> dict[str, tuple[dict[str, dict[str, str]], str]]:
    """Option -> (command -> task -> works, refused or harmless, as far as it is there; what the table says why)."""
    rows = {}
    for line in (REPOSITORY / "docs" / "options.md").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\| `([^`]+)` \| (.*) \|", line):
            *cells, why = (cell.strip() for cell in match.group(2).split(" | "))
            assert match.group(1) not in rows, f"{match.group(1)} is there twice"
            rows[match.group(1)] = {c: _cell(c, cell) for c, cell in zip(SERVING, cells, strict=True)}, why
    return rows


def _cell(command: str, text: str) -> dict[str, str]:
    if text == "–":
        return {}
    main, *others = text.split(", ")
    found = dict.fromkeys(TASKS[command], main)
    for other in others:
        kind, name = other.split(" with ")
        found[NAMES[name]] = kind
    assert set(found.values()) <= set(KINDS), text
    return found


@functools.cache
def parser(command: str, task: str) -> argparse.ArgumentParser:
    return command_parser(command, task)


def actions(command: str, task: str) -> dict[str, argparse.Action]:
    """As the table calls them -> fairseq's options."""
    found = {}
    for action in parser(command, task)._actions:
        name = next((name for name in action.option_strings if name.startswith("--")), action.dest)
        found[name] = action
    return found


def kinds(kind: str) -> list[tuple[str, str, str]]:
    """(option, command, task) of all that are of the kind, as far as the task's parser has them."""
    return [
        (option, command, task)
        for option, (cells, _) in table().items()
        for command, tasks in cells.items()
        for task, found in tasks.items()
        if found == kind and option in actions(command, task)
    ]


def test_the_table_has_fairseqs_options_and_no_others():
    wanted = {(name, command) for command in SERVING for task in TASKS[command] for name in actions(command, task)}
    found = {(name, command) for name, (cells, _) in table().items() for command, tasks in cells.items() if tasks}
    assert found == wanted


def test_what_is_refused_or_harmless_says_why():
    for option, (cells, why) in table().items():
        if any(kind != "works" for tasks in cells.values() for kind in tasks.values()):
            assert len(why) > 10, option


UNTOLD = re.compile(r"^(IndexError|KeyError|TypeError|AttributeError|NameError|AssertionError: (?!Index file)|Runtime)")
VALUES = {
    "distributed_world_size": "2",
    "extra_lang_pairs": '{"mined": "en-de"}',
    "sampling_weights": '{"main:en-de": 1.0}',
}


def values(action: argparse.Action) -> list[str]:
    """Some value of the option that is not its default."""
    if action.dest in VALUES:
        return [VALUES[action.dest]]
    if action.nargs == 0:
        return []
    if action.choices is not None:
        return [str(next(choice for choice in action.choices if str(choice) != str(action.default)))]
    for text in ("7", "0.5", "x", "{'x': 'y'}", "True"):
        try:
            read = action.type(text) if action.type else text
        except (ValueError, TypeError, SyntaxError, argparse.ArgumentTypeError):
            continue
        if read is not None:
            return [text]
    return ["x"]


def refusal(option: str, command: str, task: str, capsys) -> str:
    """What the command says to the option, before it does anything."""
    arguments = ["data", "--task", task, "--path", "x.pt", option, *values(actions(command, task)[option])]
    if "--langs" in actions(command, task):
        arguments += ["-s", "en", "-t", "de", *option_runs.LANGUAGES]
    try:
        args = parser(command, task).parse_args(arguments)
        TASK_REGISTRY[task].setup_task(args)
    except ValueError as error:
        return str(error)
    except SystemExit:
        return capsys.readouterr().err.strip().splitlines()[-1]
    return "nothing"


def test_what_is_refused_is_refused_by_name_in_a_sentence_before_anything_is_loaded(capsys):
    refused = kinds("refused")
    assert len({option for option, _, _ in refused}) > 150
    for option, command, task in refused:
        said = refusal(option, command, task, capsys)
        assert option in said and "got" in said and "\n" not in said, f"{option} in {command} with {task}: {said}"


def test_what_is_not_refused_is_not_refused_by_name():
    for kind in ("works", "harmless"):
        for option, command, task in kinds(kind):
            assert why(option, command, task) is None, f"{option} in {command} with {task}"


def why(option: str, command: str, task: str) -> str | None:
    return why_refused(command, task, actions(command, task)[option].dest)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return option_runs.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def outcome(models):
    """A run's outcome, by command, task and flags; each is run once."""

    @functools.cache
    def run(command: str, task: str, *flags: str) -> str:
        folder = models[task]
        return option_runs.run(folder, command, task, *(flag.replace(FOLDER, str(folder)) for flag in flags))

    return run


def runs() -> list[tuple[str, str]]:
    """(option, command) of all that work."""
    return sorted({(option, command) for option, command, _ in kinds("works")})


def example(option: str, command: str) -> Example | None:
    own = {EVAL_LM: OF_EVAL_LM, INTERACTIVE: OF_INTERACTIVE, VALIDATE: OF_VALIDATE}.get(command, {})
    return own.get(option, EXAMPLES.get(option))


def test_every_option_that_works_has_a_run():
    for option, command in runs():
        if example(option, command) is None:
            text = (REPOSITORY / ELSEWHERE[option]).read_text(encoding="utf-8")
            assert option in text or option.removeprefix("--").replace("-", "_") in text, option


@pytest.mark.slow
@pytest.mark.parametrize(("option", "command"), [run for run in runs() if example(*run) is not None])
def test_an_option_that_works_changes_what_comes_out(outcome, option, command):
    run = example(option, command)
    working = [task for task, kind in table()[option][0][command].items() if kind == "works"]
    task = run.task if run.task in working else next(t for t in working if option in actions(command, t))
    without = outcome(command, task, *run.beside)
    assert ("Error: " in without) == run.fails, without
    found = outcome(command, task, *run.beside, *run.flags)
    assert found != without
    assert not UNTOLD.search(found), found


@pytest.mark.slow
@pytest.mark.parametrize("command", [GENERATE, INTERACTIVE, VALIDATE])
def test_the_decoders_language_token_is_the_first_word_or_not(models, monkeypatch, command):
    """Of a checkpoint that does not say what it was trained with; validate has the task of one that does."""
    path = ("--path", models[MULTI] / "untold.pt")
    found = option_runs.run(models[MULTI], command, MULTI, *path)
    bare = tuple(flag for flag in option_runs.OF_TASK[MULTI] if flag != "--decoder-langtok")
    monkeypatch.setitem(option_runs.OF_TASK, MULTI, bare)
    without = option_runs.run(models[MULTI], command, MULTI, *path)
    assert "Error: " not in found + without and found != without
    told = option_runs.run(models[MULTI], command, MULTI)
    assert told == found if command == VALIDATE else "--decoder-langtok must be as in" in told


@pytest.mark.slow
@pytest.mark.parametrize("command", SERVING)
def test_what_is_harmless_changes_nothing(outcome, command):
    """All of a task's harmless options in one run."""
    for task in TASKS[command]:
        given = []
        for option, of_command, of_task in kinds("harmless"):
            if (of_command, of_task) == (command, task) and option not in ("--help", "--num-workers"):
                given += [option, *values(actions(command, task)[option])]
        plain = outcome(command, task)
        assert "Error: " not in plain, plain
        assert outcome(command, task, *given) == plain


def test_the_device_is_fairseqs_to_choose(models, monkeypatch):
    """Where there is a GPU, --cpu serves without it, and fairseq-eval-lm takes the one that --device-id names."""

    chosen, of = [], option_runs.arguments_of
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(option_runs, "arguments_of", lambda *given: [each for each in of(*given) if each != "--cpu"])
        option_runs.run(models[LM], EVAL_LM, LM, "--device-id", "1")  # fails later, without a GPU
    assert chosen == [1]
    option_runs.run(models[LM], EVAL_LM, LM, "--device-id", "1")
    assert chosen == [1]


@pytest.mark.parametrize("flag", ["--expert-buffer-size", "--moe-capacity-factor", "--moe-report"])
def test_training_refuses_what_is_for_serving(flag):
    with pytest.raises(ValueError, match=f"{flag} is for serving, got 2.* in fairseq-train"):
        training_configuration(Path("data"), *option_runs.TRAINING[MT], flag, "2")


@pytest.mark.parametrize(
    ("command", "task", "flags", "rule"),
    [
        (GENERATE, MT, "--sampling-topk 3", "--sampling-topk needs --sampling, got 3"),
        (GENERATE, MT, "--sampling --diverse-beam-groups 5", "--sampling must not go with --diverse-beam-groups"),
        (GENERATE, MT, "--diverse-beam-groups 2", "--diverse-beam-groups must divide --beam, got 2 and 5"),
        (INTERACTIVE, MT, "--constraints --sampling", "--sampling must not go with --constraints"),
        (INTERACTIVE, MT, "--print-alignment soft", "--print-alignment must be hard"),
        (GENERATE, MT, "--score-reference --lenpen 2", "--lenpen must not go with --score-reference, got 2.0 and True"),
        (GENERATE, MT, "--lm-weight 0.5", "--lm-weight needs --lm-path"),
        (GENERATE, MT, "--num-shards 2 --shard-id 2", "--shard-id must be at least 0 and below --num-shards"),
        (GENERATE, MT, "--unnormalized --lenpen 2", "--lenpen must not go with --unnormalized"),
        (INTERACTIVE, MT, "--constraints --replace-unk", "--replace-unk must not go with --constraints"),
        (INTERACTIVE, MT, "--constraints --print-alignment", "--print-alignment must not go with --constraints"),
        (GENERATE, MULTI, "--dataset-impl raw", "--dataset-impl must not be raw"),
        (EVAL_LM, LM, "--context-window 1024", "--context-window must be below --tokens-per-sample, got 1024 and 1024"),
        (EVAL_LM, LM, "--post-process sentencepiece", "--post-process must be subword_nmt"),
        (GENERATE, MT, "--nbest 7", "--nbest must be at most --beam, 5, got 7"),
        (INTERACTIVE, LM, "--min-len 9 --max-len-b 8", "--min-len must be at most --max-len-b, 8, got 9"),
    ],
)
def test_options_that_contradict_each_other(command, task, flags, rule):
    with pytest.raises(ValueError, match=rule):
        parser(command, task).parse_args(["data", "--task", task, "--path", "x.pt", *flags.split()])


@pytest.mark.parametrize(
    ("command", "flag", "rule"),
    [
        *((GENERATE, f"--nbest {number}", f"--nbest must be at least 1, got {number}") for number in (0, -2)),
        (INTERACTIVE, "--beam 0", "--beam must be at least 1, got 0"),
        (GENERATE, "--temperature 0", "--temperature must be a number above 0 and up to 1000000, got 0"),
        (GENERATE, "--temperature nan", "--temperature must be a number above 0 and up to 1000000, got nan"),
        (INTERACTIVE, "--lenpen inf", "--lenpen must be a number from -50 to 50, got inf"),
        (GENERATE, "--lenpen 1e308", r"--lenpen must be a number from -50 to 50, got 1e\+308"),
        (GENERATE, "--unkpen nan", "--unkpen must be a number from -1000000 to 1000000, got nan"),
        (GENERATE, "--sampling --sampling-topk 0", "--sampling-topk must be at least 1, got 0"),
        (GENERATE, "--sampling --sampling-topp 2", "--sampling-topp must be a number above 0 and up to 1, got 2"),
        (GENERATE, "--max-len-a -1", "--max-len-a must be a number from 0 to 1000000, got -1"),
        (GENERATE, "--max-len-b -3", "--max-len-b must be at least 0, got -3"),
        (GENERATE, "--diversity-rate nan", "--diversity-rate must be a number above 0"),
        (INTERACTIVE, "--diverse-beam-groups 0", "--diverse-beam-groups must be at least 1, got 0"),
        (GENERATE, "--no-repeat-ngram-size -3", "--no-repeat-ngram-size must be at least 0, got -3"),
        (GENERATE, "--seed -1", "--seed must be a whole number from 0 to 4294967295, got -1"),
        (VALIDATE, "--required-batch-size-multiple 0", "--required-batch-size-multiple must be at least 1, got 0"),
        (GENERATE, "--required-seq-len-multiple 0", "--required-seq-len-multiple must be at least 1, got 0"),
        (GENERATE, "--num-workers -1", "--num-workers must be at least 0, got -1"),
        (INTERACTIVE, "--buffer-size -1", "--buffer-size must be at least 0, got -1"),
        *((command, "--batch-size 0", "--batch-size must be at least 1, got 0") for command in (GENERATE, VALIDATE)),
        (EVAL_LM, "--max-tokens 0", "--max-tokens must be at least 1, got 0"),
        (EVAL_LM, "--softmax-batch 0", "--softmax-batch must be at least 1, got 0"),
        (EVAL_LM, "--context-window -3", "--context-window must be at least 0, got -3"),
        (EVAL_LM, "--tokens-per-sample 0", "--tokens-per-sample must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_be(command, flag, rule):
    task = LM if command == EVAL_LM else MT
    with pytest.raises(ValueError, match=rule):
        parser(command, task).parse_args(["data", "--task", task, "--path", "x.pt", *flag.split()])


@pytest.mark.parametrize("flag", ["--score-reference", "--prefix-size"])
def test_references_must_be_there(tmp_path, flag):
    data = write_data(tmp_path, ("en", "de"), splits={"test": 2})
    for file in data.glob("test.en-de.de.*"):
        file.unlink()
    value = ["2"] if flag == "--prefix-size" else []
    with pytest.raises(ValueError, match=f"{flag} needs references, got"):
        parser(GENERATE, MT).parse_args([str(data), "--task", MT, "--path", "x.pt", flag, *value])
