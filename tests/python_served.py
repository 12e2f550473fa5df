"""Models that the tests serve from Python, their recorded texts, and the command beside them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import commands
import torch
from fairseq.data import data_utils
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerModel
from model_makers import SMALL, dictionary

PIECES = {"post_process": "sentencepiece", "cpu": True}


def lines_of(served, name: str = "test.en-de.en") -> list[str]:
    """A file of the recorded test set, in the words of the dictionary."""
    dictionary = served._parts.task.source_dictionary
    return list(map(dictionary.string, data_utils.load_indexed_dataset(f"{served._parts.data}/{name}", dictionary)))


def interactive(folder: Path, lines: list[str], *options: str) -> commands.Generation:
    """fairseq-interactive of these lines, with more of its options."""
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--cpu", "--buffer-size", "100")
    done = commands.run("interactive", *arguments, *options, stdin="\n".join(lines) + "\n")
    return commands.Generation(done.stdout.splitlines())


def dense_checkpoint(file: Path) -> None:
    """A model of fairseq's own, as its training writes it in plain data."""
    words = dictionary()
    task = {"_name": "translation", "data": str(file.parent), "source_lang": "en", "target_lang": "de"}
    fields = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in SMALL.items()}
    model_cfg = {"_name": "transformer", "arch": "transformer", **fields}
    args = Namespace(**model_cfg)
    for language in ("en", "de"):
        words.save(str(file.parent / f"dict.{language}.txt"))
    ARCH_CONFIG_REGISTRY["transformer"](args)
    task_like = Namespace(source_dictionary=words, target_dictionary=words)
    torch.manual_seed(1)
    model = TransformerModel.build_model(args, task_like)
    cfg = {"model": vars(args), "task": task, "dataset": {"gen_subset": "test"}}
    history = [{"num_updates": 7, "optimizer_name": "adam", "lr_scheduler_state": {}}]
    content = {"args": None, "cfg": cfg, "model": model.state_dict(), "optimizer_history": history, "extra_state": {}}
    torch.save({**content, "task_state": {}}, file)
