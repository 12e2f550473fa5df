"""The four serving commands over tiny models, in this process, as the table of their options asks for them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import commands
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm, generate, interactive, validate
from sentencepiece import SentencePieceTrainer

from fairseq_moe_ext.tasks.refused_options import EVAL_LM, GENERATE, INTERACTIVE, LM, MT, MULTI, VALIDATE
from fairseq_moe_ext.tasks.serving_task import ServingTask

SPLITS = {"train": 8, "valid": 6, "test": 6}
LANGUAGES = ("--langs", "en,de", "--lang-pairs", "en-de")
TRAINING = {
    LM: LM_TRAINING,
    MT: MT_TRAINING,
    MULTI: ("--task", MULTI, "--arch", "moe_transformer_tiny", *LANGUAGES, "--encoder-langtok", "src")
    + ("--decoder-langtok",),
}
PARSERS = {
    GENERATE: options.get_generation_parser,
    INTERACTIVE: options.get_interactive_generation_parser,
    EVAL_LM: options.get_eval_lm_parser,
    VALIDATE: options.get_validation_parser,
}
# what every run of a command, or a task, is given; a run's own flags come after and stand above
_OF_COMMAND = {
    GENERATE: ("--gen-subset", "test", "--beam", "2", "--max-len-b", "8"),
    INTERACTIVE: ("--beam", "2", "--max-len-b", "8", "--buffer-size", "4", "--batch-size", "4"),
    EVAL_LM: ("--gen-subset", "test"),
    VALIDATE: ("--batch-size", "4"),
}
OF_TASK = {
    LM: ("--tokens-per-sample", "16"),
    MT: ("-s", "en", "-t", "de"),
    MULTI: ("-s", "en", "-t", "de", *LANGUAGES, "--encoder-langtok", "src", "--decoder-langtok"),
}
_TIMES = re.compile(r"^W-.*$|\([\d.,]+ \w+/s.*?\)|wps.[\d.]+", re.MULTILINE)
_RESULT = re.compile(r"Loss \(base 2\)|^\d+ \S+ \[-|^\S+\t\d+\t|^valid on|^example \w+: ")
_MEASURED = re.compile("second|peak|loading|threads")  # parts of a report that no two runs have alike


def make_models(folder: Path) -> dict[str, Path]:
    """Task -> a folder with `data` and an untrained `X.pt`; also `lines`, the input of fairseq-interactive."""
    found = {}
    for task in (LM, MT, MULTI):
        found[task] = folder / task
        data = write_data(folder / task / "data", () if task == LM else ("en", "de"), splits=SPLITS)
        untrained_checkpoint(folder / task / "X.pt", data, *TRAINING[task])
        (folder / task / "lines").write_text("w3 w4 w5\nw9 w8 w7 w6\nw30\nw21 w22\n")
        _sentencepiece(folder / task)
        kept = {"": [0, 1, 2, 9, 10, 11]} if task == LM else {"en": [0, 1, 2], "de": [9, 10, 11]}  # of layers of 8
        (folder / task / "experts.json").write_text(json.dumps(kept))
        (folder / task / "constrained").write_text("w3 w4 w5\tw9\nw9 w8 w7 w6\n")
        for suffix in ("",) if task == LM else (".en-de.en", ".en-de.de"):
            (data / f"raw{suffix}").write_text("w3 w4 w5\nw9 w8 w7 w6\n")
        if task == LM:
            words = (data / "dict.txt").read_text()
            odd = re.sub(r"(w\d*[13579]) ", r"\1@@ ", words)  # beginnings of the next words
            (data / "dict.txt").write_text(odd)
        else:
            if task == MT:
                for language in ("en", "de"):  # words that BLEU's tokenizer takes apart
                    file = data / f"dict.{language}.txt"
                    file.write_text(re.sub(r"^(w3[1-9]) ", r"\1@@ ", file.read_text(), flags=re.MULTILINE))
            other = re.sub(r"^w", "v", (data / "dict.de.txt").read_text(), flags=re.MULTILINE)
            (data / "other.txt").write_text(other)
            shutil.copy(data / "dict.de.txt", data / "dict.txt")
            untrained_checkpoint(folder / task / "LM.pt", data, *LM_TRAINING)
            (data / "langs.txt").write_text("en\nde\nfr\n")
            for file in data.glob("test.en-de.en.*"):
                shutil.copy(file, data / file.name.replace("test.", "alone."))  # without references
        if task == MULTI:
            state = torch.load(folder / task / "X.pt", weights_only=False)
            del state["cfg"]["task"].decoder_langtok, state["cfg"]["task"].langtoks
            torch.save(state, folder / task / "untold.pt")
    return found


def command_parser(command: str, task: str, *arguments: object) -> argparse.ArgumentParser:
    """fairseq's own parser with the task's options, as `options.parse_args_and_arch` leaves it for `arguments`."""
    parser = PARSERS[command]()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        options.parse_args_and_arch(parser, ["data", "--task", task, "--path", "x.pt", *map(str, arguments)])
    return parser


def _sentencepiece(folder: Path) -> None:
    """A tiny model beside the data, for --bpe sentencepiece."""
    text = folder / "text"
    text.write_text("\n".join(f"w{number} w{number + 1} w{number + 2}" for number in range(30)))
    SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "pieces"), vocab_size=24, minloglevel=2)


def arguments_of(folder: Path, command: str, task: str, *flags: object) -> list[str]:
    parts = [folder / "data", "--task", task, "--path", folder / "X.pt", "--cpu", "--num-workers", 0]
    if command == INTERACTIVE:
        parts += ["--input", folder / "lines"]
    if task == LM and command == GENERATE:
        parts += ["--sample-break-mode", "eos"]  # prompts
    of_task = () if task == LM and command == INTERACTIVE else OF_TASK[task]
    of_command = (*_OF_COMMAND[command], *(("--max-len-b", 16) if task == LM and command == GENERATE else ()))
    return [*map(str, (*parts, *of_command, *of_task, *flags))]


def run(folder: Path, command: str, task: str, *flags: object) -> str:
    """What the command prints, logs and reports of its results, without times; its error where it fails."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    output, logs = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), _listening(logs), commands.recorded_scores() as batches, _steps() as steps:
        torch.manual_seed(0)
        try:
            _main(command, arguments_of(folder, command, task, "--moe-report", report, *flags))
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}"
    lines = [line for line in logs.getvalue().splitlines() if _RESULT.search(line)]
    scored = [f"{batch.ids} {[row.tolist() for row in batch.scores]}" for batch in batches]
    counted = json.dumps(_counted(json.loads(report.read_text()))) if report.exists() else ""
    printed = "" if command == VALIDATE else output.getvalue()  # whose log goes there, with the time and the options
    return _TIMES.sub("", "\n".join([printed, *lines, *scored, *steps, counted]))


@contextlib.contextmanager
def _steps() -> Iterator[list[str]]:
    """What comes of each batch that fairseq-validate computes a loss of, without times."""
    steps, original = [], ServingTask.valid_step

    def valid_step(self, sample, model, criterion):
        loss, size, figures = original(self, sample, model, criterion)
        steps.append(f"{float(loss)} {size} {[(k, float(v)) for k, v in figures.items() if not k.endswith('_ms')]}")
        return loss, size, figures

    with patch.object(ServingTask, "valid_step", valid_step):
        yield steps


def _main(command: str, arguments: list[str]) -> None:
    parser = PARSERS[command]()
    if command == GENERATE:
        parser.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq_cli.generate has it
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
    if command == VALIDATE:
        overrides = options.parse_args_and_arch(PARSERS[command](), arguments, suppress_defaults=True)
        validate.main(cfg, override_args=overrides)
    else:
        at_exit: list = []
        with patch("atexit.register", at_exit.append):  # fairseq-interactive reports when its process ends
            {GENERATE: generate, INTERACTIVE: interactive, EVAL_LM: eval_lm}[command].main(cfg)
        for finish in at_exit:
            finish()


def _counted(node):
    if isinstance(node, dict):
        return {key: _counted(item) for key, item in node.items() if not _MEASURED.search(key)}
    return [_counted(item) for item in node] if isinstance(node, list) else node


@contextlib.contextmanager
def _listening(stream: io.StringIO) -> Iterator[None]:
    """All log lines come into `stream`, whatever a test before has switched off."""
    root, handler = logging.getLogger(), logging.StreamHandler(stream)
    level, disabled = root.level, logging.root.manager.disable
    logging.disable(logging.NOTSET)
    root.setLevel(logging.INFO)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("fairseq") and isinstance(logger, logging.Logger):  # whoever ran before may have muted it
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
    root.addHandler(handler)
    try:
        with patch.object(validate, "reset_logging"):  # fairseq-validate takes every second handler away with it
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.disable(disabled)
