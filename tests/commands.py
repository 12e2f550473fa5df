"""fairseq's own commands for the tests: in this process, or as a user starts them; and readers of their output."""

from __future__ import annotations

import copy
import functools
import io
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import processes
import quick_hydra
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf, omegaconf_no_object_check
from fairseq.sequence_scorer import SequenceScorer
from fairseq_cli import eval_lm as eval_lm_command
from fairseq_cli import generate as generate_command
from omegaconf import open_dict

# what fairseq imports for --user-dir; it refuses to where a test has imported the package before
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: F401
from fairseq_moe_ext.serving import fairseq_hooks
from fairseq_moe_ext.tasks import (  # noqa: F401
    moe_language_modeling,
    moe_translation,
    moe_translation_multi_simple_epoch,
)

quick_hydra.install()
REPOSITORY = Path(__file__).resolve().parents[1]
USER_DIR = REPOSITORY / "fairseq_moe_ext"
# a loader process takes seconds to end where this process has threads
_HERE = ("--cpu", "--num-workers", "0")
LM = ("--task", "moe_language_modeling", "--gen-subset", "test", "--tokens-per-sample", "128", *_HERE)
BEAM = ("--gen-subset", "test", "--beam", "4", "--remove-bpe", "sentencepiece", "--scoring", "sacrebleu", *_HERE)
MT = ("--task", "moe_translation", *BEAM)
_MULTI = ("--task", "moe_translation_multi_simple_epoch", "--langs", "en,de,fr", "--lang-pairs", "en-de,en-fr")
NLLB = (*_MULTI, "--encoder-langtok", "src", "--decoder-langtok", "-s", "en", *BEAM)
NLLB_OVERRIDES = {"use_moe_pad_mask": False}  # upstream generated so


@dataclass(frozen=True)
class ScoredBatch:
    """A batch as SequenceScorer scored it: ids, the network's input, and per row the log-probabilities (length,)."""

    ids: list[int]
    net_input: dict
    scores: list[np.ndarray]


@dataclass
class Evaluation:
    """What fairseq-eval-lm found: base-2 loss per token, and every batch."""

    loss: float
    batches: list[ScoredBatch]

    def by_id(self) -> dict[int, np.ndarray]:
        return {number: row for batch in self.batches for number, row in zip(batch.ids, batch.scores, strict=True)}


@dataclass
class Generation:
    """The lines of fairseq-generate: per kind (S, T, H, D, P) the sentence's number and the fields after it."""

    lines: list[str]
    batches: list[ScoredBatch] = field(default_factory=list)  # with --score-reference

    def of_kind(self, kind: str) -> list[tuple[int, list[str]]]:
        found = [line.split("\t") for line in self.lines if line.startswith(f"{kind}-")]
        return [(int(head.removeprefix(f"{kind}-")), rest) for head, *rest in found]

    def hypotheses(self) -> list[tuple[int, str]]:
        return [(number, fields[1]) for number, fields in self.of_kind("H")]

    def scores(self) -> np.ndarray:
        return np.array([float(fields[0]) for _, fields in self.of_kind("H")])


@contextmanager
def recorded_scores() -> Iterator[list[ScoredBatch]]:
    """All batches that SequenceScorer scores in this context."""
    batches: list[ScoredBatch] = []
    fairseq_hooks.install()  # else it would happen within, and the plugin's part would be gone afterwards
    original = SequenceScorer.generate

    def generate(self, models, sample, **kwargs):
        hypotheses = original(self, models, sample, **kwargs)
        scores = [sentence[0]["positional_scores"].clone().numpy() for sentence in hypotheses]
        batches.append(ScoredBatch(sample["id"].tolist(), sample["net_input"], scores))
        return hypotheses

    SequenceScorer.generate = generate
    try:
        yield batches
    finally:
        SequenceScorer.generate = original


def parse(command: str, *arguments: str | Path, overrides: dict | None = None):
    """The configuration that fairseq-eval-lm, -validate or -generate makes of its arguments; one for each caller."""
    rank = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")  # the parser asks for them
    parts = (*map(str, arguments), "--model-overrides", repr(overrides or {}))
    cfg = copy.deepcopy(_parsed(command, parts, rank))
    with omegaconf_no_object_check(), open_dict(cfg):
        for name, part in cfg.items():  # a task of the old kind has a Namespace, which omegaconf's copies would share
            if isinstance(part, Namespace):
                cfg[name] = copy.deepcopy(part)
    return cfg


@functools.lru_cache(16)  # a configuration has thousands of objects
def _parsed(command: str, arguments: tuple[str, ...], _rank: tuple):
    if command == "eval_lm":
        args = options.parse_args_and_arch(options.get_eval_lm_parser(), list(arguments))
    elif command == "validate":
        args = options.parse_args_and_arch(options.get_validation_parser(), list(arguments))
    else:
        parser = options.get_generation_parser()
        parser.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq_cli.generate has it
        args = options.parse_args_and_arch(parser, list(arguments))
    return convert_namespace_to_omegaconf(args)


def eval_lm(*arguments: str | Path, overrides: dict | None = None) -> Evaluation:
    """fairseq-eval-lm in this process."""
    with recorded_scores() as batches:
        results = eval_lm_command.main(parse("eval_lm", *arguments, overrides=overrides))
    return Evaluation(float(results["loss"]), batches)


def generate(*arguments: str | Path, overrides: dict | None = None) -> Generation:
    """fairseq-generate in this process."""
    output = io.StringIO()
    with recorded_scores() as batches:
        generate_command._main(parse("generate", *arguments, overrides=overrides), output)
    return Generation(output.getvalue().splitlines(), batches)


def read_generation(file: Path) -> Generation:
    return Generation(file.read_text(encoding="utf-8").splitlines())


def load(command: str, *arguments: str | Path, overrides: dict | None = None):
    """(model ready to serve, its task), as the commands make them."""
    cfg = parse(command, *arguments, overrides=overrides)
    task = tasks.setup_task(cfg.task)
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [cfg.common_eval.path], arg_overrides=overrides or {}, task=task
    )
    models[0].eval()
    models[0].prepare_for_inference_(cfg)
    return models[0], task


def command_line(
    command: str, *arguments: str | Path, user_dir: Path | None = USER_DIR, ranks: int | None = None, script=False
) -> list[str]:
    """`fairseq-<command>` as a user starts it: by torchrun where `ranks` is a number, or its script."""
    parts = [sys.executable, "-m", f"fairseq_cli.{command.replace('-', '_')}"]
    if ranks is not None:
        parts[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if script:
        parts = [str(Path(sys.executable).parent / f"fairseq-{command}")]
    parts += map(str, arguments)
    return parts if user_dir is None else [*parts, "--user-dir", str(user_dir)]


def environment(**more: str) -> dict[str, str]:
    """Of the commands' processes."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def reproduction_environment() -> dict[str, str]:
    """Of a process that imports scripts/reproduction, as scripts/reproduce.sh makes it."""
    path = [str(REPOSITORY / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment(PYTHONPATH=os.pathsep.join(path), PYTHONWARNINGS="ignore")


def run(command: str, *arguments: str | Path, check: bool = True, stdin: str = "", fresh: bool = False, **how):
    """Run `command_line` by tests/processes.py, a `fresh` interpreter where that is asked.

    `check` fails the test where the command fails.
    """
    parts = command_line(command, *arguments, **how)
    done = processes.run(parts, stdin=stdin, env=environment(), fresh=fresh)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(parts)} failed:\n{done.stderr[-4000:]}")
    return done


def read_state(file: Path) -> dict:
    """One checkpoint file, by PyTorch's safe loader."""
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(file, map_location="cpu", weights_only=True)
