"""Goldens as fairseq's own loader serves them under overrides and flags, and what they say of a fixed input."""

from __future__ import annotations

import commands
import torch
from fairseq import checkpoint_utils, tasks

FLAGS = {
    "lm_top2": ("eval_lm", *commands.LM),
    "mt_plain": ("generate", *commands.MT),
    "mt_nllb_ws2": ("generate", *commands.NLLB, "-t", "de"),
}
EVERY_MODEL = list(FLAGS)
PADDING = torch.zeros(3, 24, dtype=torch.bool)
PADDING[0, 15:] = PADDING[1, 20:] = True


class Loader:
    """Serves goldens under overrides by fairseq's own loader; a task is set up once per model and flags."""

    def __init__(self, goldens):
        self.goldens = goldens
        self._tasks: dict = {}
        self._logits: dict = {}

    def load(self, name: str, overrides: dict, *flags, path=None):
        """The served model of a golden, or of the checkpoint at `path` with its data."""
        if (name, flags) not in self._tasks:
            command, *arguments = FLAGS[name]
            golden = ("--path", self.goldens / name / "checkpoint_last.pt")
            cfg = commands.parse(command, self.goldens / name / "data-bin", *golden, *arguments, *flags)
            self._tasks[name, flags] = cfg, tasks.setup_task(cfg.task)
        cfg, task = self._tasks[name, flags]
        models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(path or cfg.common_eval.path)], arg_overrides=dict(overrides), task=task
        )
        models[0].eval()
        models[0].prepare_for_inference_(cfg)
        return models[0]

    def logits(self, name: str, overrides: dict, *flags, path=None) -> torch.Tensor:
        """What the served model says of three rows, some of them padded."""
        key = (name, repr(overrides), flags)
        if path is not None or key not in self._logits:
            found = logits(self.load(name, overrides, *flags, path=path))
            if path is not None:
                return found
            self._logits[key] = found
        return self._logits[key]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """(3, 24, words) of a served model over rows of random tokens, some of them padded."""
    tokens = torch.randint(4, 1800, (3, 24), generator=torch.Generator().manual_seed(0))
    tokens[PADDING] = 1
    tokens = tokens.to(next(model.parameters()).device)
    if hasattr(model, "encoder"):
        return model(tokens, tokens.ne(1).sum(dim=1), tokens)[0].float().cpu()
    return model(tokens)[0].float().cpu()
