"""Which models the figures are made of: the quickstart's two, or a checkpoint of one's own; and their commands."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.errors import CheckpointError

# what fairseq imports for --user-dir
from fairseq_moe_ext.models import moe_transformer, moe_transformer_lm  # noqa: F401
from fairseq_moe_ext.tasks import (  # noqa: F401
    moe_language_modeling,
    moe_translation,
    moe_translation_multi_simple_epoch,
)

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "output"
QUICKSTART_NAMES = ("language_modeling", "translation")
LM_FLAGS = "--task moe_language_modeling --tokens-per-sample 128"
MT_FLAGS = "--task moe_translation --beam 4 --max-len-a 1.5 --max-len-b 5"
LM_ROWS, MT_ROWS = 8, 64
# small enough for dozens of batches of the quickstart's test sets: what is fitted on one half and tested on the other
LM_FEW_ROWS, MT_FEW_ROWS = 2, 8


@dataclass(frozen=True)
class Model:
    """A checkpoint, its data, the flags of the command that serves it; `rows`: its batch, in sentences or blocks."""

    name: str
    checkpoint: Path
    data: Path
    flags: tuple[str, ...]
    translates: bool
    rows: int

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    @property
    def few_rows(self) -> int:
        """A batch small enough for a test set to have many."""
        return MT_FEW_ROWS if self.translates else LM_FEW_ROWS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `find_models` reads, and --subset."""
    parser.add_argument("--checkpoint", type=Path, help="instead of the quickstart's models")
    parser.add_argument("--data", type=Path, help="its binarised data")
    parser.add_argument("--flags", default="", help="more flags of the command that serves it, as one string")
    parser.add_argument("--subset", default="test", help="--gen-subset (test)")


def find_models(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Model]:
    """The models that the options name; ends the command where there are none."""
    if (args.checkpoint is None) != (args.data is None):
        parser.error("--checkpoint (CHECKPOINT) and --data (DATA) must be given together")
    if args.checkpoint is not None:
        folders = {args.checkpoint.stem: (args.checkpoint, args.data)}
    else:
        folders = {name: (QUICKSTART / name / "model.pt", QUICKSTART / name / "data-bin") for name in QUICKSTART_NAMES}
        if missing := [path for path, _ in folders.values() if not path.is_file()]:
            parser.error(f"there is no {missing[0]}: run `bash examples/quickstart.sh` first, or name a model of yours")
    models = []
    for name, (checkpoint, data) in folders.items():
        try:
            translates = bool(summarize(str(checkpoint)).layers.get("encoder"))
        except CheckpointError as error:
            parser.error(str(error))
        flags, rows = (MT_FLAGS, MT_ROWS) if translates else (LM_FLAGS, LM_ROWS)
        flags = (*shlex.split(flags), *shlex.split(args.flags))
        models.append(Model(name, checkpoint, data, flags, translates, getattr(args, "batch_size", None) or rows))
    return models


def arguments_of(model: Model, subset: str, rows: int | None = None) -> list[str]:
    """Of the command that serves it; `rows`: another batch than the model's."""
    common = ("--path", model.checkpoint, "--gen-subset", subset, "--batch-size", rows or model.rows)
    return [str(part) for part in (model.data, *common, "--cpu", "--num-workers", 0, *model.flags)]


def configuration(arguments: list[str], translates: bool):
    """What fairseq-generate or fairseq-eval-lm makes of its arguments."""
    parser = options.get_generation_parser() if translates else options.get_eval_lm_parser()
    if translates:
        parser.add_argument("--arch", "-a", default="wav2vec2")  # as fairseq_cli.generate has it
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
