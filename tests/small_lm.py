"""A small language model's checkpoint, its data, and the state that is served of it."""

from __future__ import annotations

from pathlib import Path

import commands
import torch
from data_makers import LM_TRAINING, untrained_checkpoint, write_data


def small_lm(folder: Path) -> tuple[Path, dict]:
    """(data, the content of the one checkpoint file, each tensor with a storage of its own)."""
    data = write_data(folder / "data")
    untrained_checkpoint(folder / "X.pt", data, *LM_TRAINING)
    content = commands.read_state(folder / "X.pt")
    content["model"] = {key: tensor.clone() for key, tensor in content["model"].items()}
    return data, content


def served_state(data: Path, path: Path) -> dict[str, torch.Tensor]:
    """The state of the model that fairseq-eval-lm would serve."""
    model, _ = commands.load("eval_lm", data, "--path", path, *commands.LM)
    return model.state_dict()
