"""Sets of experts for the tiny goldens, checkpoints cut to them by hand, and a naive twin of a pruned layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import commands
import reference
import torch
from torch import Tensor, nn

EXPERTS = 4  # of each layer of the tiny goldens
LM = ("eval_lm", *commands.LM, "--tokens-per-sample", "24")
MT = ("generate", *commands.MT)
NLLB = ("generate", *commands.NLLB, "-t", "de")
COMMANDS = {"tiny_lm_top2": LM, "tiny_mt": MT, "tiny_nllb": NLLB}


def write_sets(path: Path, sets: Mapping[str, Sequence[int]]) -> str:
    """In the published form."""
    path.write_text(json.dumps({language: list(numbers) for language, numbers in sets.items()}))
    return str(path)


def load(folder: Path, name: str, *flags: str, path: Path | None = None):
    """The golden in `folder`, or the checkpoint at `path` with its data, as the command serves it."""
    command, *arguments = COMMANDS[name]
    model, _ = commands.load(
        command, folder / "data-bin", "--path", path or folder / "checkpoint_last.pt", *arguments, *flags
    )
    return model


@torch.no_grad()
def logits(model) -> Tensor:
    """(3, 9, words) over rows of random tokens, some of them padded."""
    tokens = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    tokens[0, 6:] = tokens[1, 8:] = 1
    if hasattr(model, "encoder"):
        return model(tokens, tokens.ne(1).sum(dim=1), tokens)[0].float()
    return model(tokens)[0].float()


def cut(state: Mapping[str, Tensor], layers: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A state with these experts alone, by layer (`decoder.layers.1`), numbered anew, and the gates' rows of these."""
    found = {}
    for key, tensor in state.items():
        before, is_expert, after = key.partition(".moe_layer.experts.")
        if is_expert:
            number, _, part = after.partition(".")
            if int(number) not in layers[before]:
                continue
            key = f"{before}.moe_layer.experts.{list(layers[before]).index(int(number))}.{part}"
        elif ".moe_layer.gate.wg.weight" in key:
            tensor = tensor[list(layers[key.partition(".moe_layer.")[0]])]
        found[key] = tensor.clone()
    return found


class NaiveLayer(nn.Module):
    """Stands in a whole model for a MoE layer that is pruned to these experts."""

    def __init__(self, layer, numbers: Sequence[int]):
        super().__init__()
        state = layer.experts.state_dict()
        self.wg = layer.gate.wg.weight[list(numbers)]
        parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        self.experts = [reference.Expert(*(state[f"{number}.{part}"] for part in parts)) for number in numbers]
        self.settings = {
            "num_choices": layer.gate.num_choices,
            "use_fp32": layer.gate.use_fp32,
            "output_masking": layer.output_masking,
            "activation": layer.experts.activation,
        }
        self.dispatcher = layer.dispatcher  # the transformer layer asks it whether padding counts

    def forward(self, x, padding_mask=None, decoding=False):
        return reference.moe_layer(x, self.wg, self.experts, padding_mask=padding_mask, **self.settings).output.to(x)
