"""What a command's arguments say is looked at before anything is loaded: files that are missing, kernels that this
machine cannot run, more ranks than experts."""

from __future__ import annotations

import os
from argparse import Namespace

import torch
from fairseq import utils

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.find_files import check_one_checkpoint, find_checkpoint_files
from fairseq_moe_ext.checkpoints.state_keys import expert_counts
from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.reporting.own_command import fairseqs_command
from fairseq_moe_ext.serving.device_flags import check_device_flags
from fairseq_moe_ext.serving.model_overrides import read_overrides
from fairseq_moe_ext.tasks.flags import check_flags
from fairseq_moe_ext.tasks.refused_options import EVAL_LM, GENERATE, INTERACTIVE, VALIDATE

# options that name a file which fairseq or the plugin reads, by their names in a parsed command line
_FILES = (
    *("fixed_dictionary", "source_dict", "target_dict", "lang_dict", "expert_placement", "expert_profile"),
    *("sentencepiece_model", "sentencepiece_model_path", "bpe_codes", "bpe_merges", "bpe_vocab", "bpe_vocab_file"),
    *("gpt2_encoder_json", "gpt2_vocab_bpe"),
)


def check_command(args: Namespace) -> None:
    """ValueError, which names the option, at the first file that is not there or the first flag that cannot work here.

    args: a whole command line, parsed by one of fairseq's parsers.
    """
    _check_files(args)
    read_overrides(getattr(args, "model_overrides", None), "--model-overrides")
    if args.distributed_world_size <= 1:  # else the ranks that are started look at their flags
        check_flags(args)
    _check_data(args)
    check_asserted(fairseqs_command(), args)
    check_device_flags(args)
    device = getattr(args, "device_id", 0) or 0
    if torch.cuda.is_available() and not args.cpu and device >= torch.cuda.device_count():
        raise ValueError(f"--device-id must be below the number of GPUs, {torch.cuda.device_count()}, got {device}")


def _check_files(args: Namespace) -> None:
    for name in _FILES:
        path = getattr(args, name, None)
        if isinstance(path, str) and path and "://" not in path and not os.path.exists(path):
            raise ValueError(f"{as_option(name)} {path}: no such file")
    lines = getattr(args, "input", None)
    if isinstance(lines, str) and lines != "-" and not os.path.exists(lines):
        raise ValueError(f"--input {lines}: no such file")


def _check_data(args: Namespace) -> None:
    for folder in filter(None, utils.split_paths(getattr(args, "data", None) or "")):
        if "://" not in folder and not os.path.isdir(folder):
            raise ValueError(f"data {folder}: no such folder")
    for flag in ("path", "lm_path"):
        for path in filter(None, utils.split_paths(getattr(args, flag, None) or "")):
            if "://" not in path:
                find_checkpoint_files(with_suffix(path, args), as_option(flag))


def with_suffix(path: str, args: Namespace) -> str:
    """The path as fairseq reads it under `--checkpoint-suffix`."""
    return path.replace(".pt", (getattr(args, "checkpoint_suffix", None) or "") + ".pt")


def check_asserted(command: str | None, args: Namespace) -> None:
    """ValueError at what fairseq's command asserts of its options; command: None is for none of fairseq's.

    CheckpointError where `--path` names several checkpoints to a command that serves one.
    """
    if command in (EVAL_LM, VALIDATE):
        check_one_checkpoint(args.path or "")
    if command in (GENERATE, INTERACTIVE) and args.sampling and args.nbest != args.beam:
        raise ValueError(f"--sampling needs --nbest equal to --beam, got {args.nbest} and {args.beam}")
    if command == GENERATE and args.replace_unk is not None and str(args.dataset_impl) != "raw":
        raise ValueError(f"--replace-unk needs --dataset-impl raw in fairseq-generate, got {args.dataset_impl}")
    if command == INTERACTIVE and (args.batch_size or 1) > max(args.buffer_size, 1):
        values = f"{args.batch_size} and {args.buffer_size}"
        raise ValueError(f"--batch-size must be at most --buffer-size in fairseq-interactive, got {values}")
    if command == VALIDATE and args.max_tokens is None and args.batch_size is None:
        raise ValueError("--max-tokens or --batch-size must be given in fairseq-validate, got neither")


def check_ranks(path: str, ranks: int, placement: str | None) -> None:
    """Read what the checkpoint at `path` says of itself; ValueError where `ranks` are more than it has experts.

    CheckpointError where it is missing or broken. placement: with one more ranks may hold replicas.
    """
    experts = min(expert_counts(read_checkpoint(path)["model"]).values(), default=0)
    if placement is None:
        check_rank_count(ranks, experts)


def check_rank_count(ranks: int, experts: int) -> None:
    """ValueError where ranks outnumber a model's experts; 0 experts: a dense model."""
    if 0 < experts < ranks:
        raise ValueError(
            "--distributed-world-size: the ranks must not outnumber the experts without an --expert-placement that "
            f"holds replicas: {ranks} ranks, {experts} experts"
        )
