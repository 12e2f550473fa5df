"""What a record must hold, summed up naively from what the gates of a plain run were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.gating.routing import Gate, Routing
from fairseq_moe_ext.recording import MOST_CALLS, MOST_HIDDEN

GATE = ".gate.wg.weight"


class Heard:
    """Per MoE layer what its gate was given and what it chose, call by call: tokens (T, D), real (T,) bool, routing."""

    def __init__(self, checkpoint: Path):
        state = read_checkpoint(str(checkpoint))["model"]
        self.state = {key: tensor.float() for key, tensor in state.items() if ".moe_layer." in key}
        names = [key.removesuffix(GATE) for key in self.state if key.endswith(GATE)]
        self.calls: dict[str, list[tuple[Tensor, Tensor, Routing]]] = {name: [] for name in names}

    def take(self, module, inputs, output) -> None:
        if isinstance(module, Gate):
            tokens, mask = inputs
            real = torch.ones(len(tokens), dtype=torch.bool) if mask is None else ~mask
            weight = module.wg.weight
            (name,) = (name for name in self.calls if torch.equal(self.state[name + GATE], weight))
            self.calls[name].append((tokens.clone(), real.clone(), output))

    def weights(self, name: str, expert: int) -> list[Tensor]:
        """fc1's weight and bias."""
        return [self.state[f"{name}.experts.{expert}.fc1.{part}"] for part in ("weight", "bias")]

    def rows(self, name: str, expert: int) -> list[Tensor]:
        """Per call that has any the expert's rows, in the order of tokens."""
        found = []
        for tokens, real, routing in self.calls[name]:
            its = (routing.expert_ids == expert).any(1) & real
            if its.any():
                found.append(tokens[its])
        return found

    def hidden(self, name: str, expert: int, activation) -> Tensor:
        """fc2's inputs, of the rows that a record has."""
        rows = torch.cat(self.rows(name, expert)[:MOST_CALLS])[:MOST_HIDDEN]
        return activation(F.linear(rows, *self.weights(name, expert)))

    def first_choices(self, name: str) -> tuple[Tensor, Tensor]:
        """First choices (T,) of all real tokens, and the gate's probability there."""
        chosen, gained = [], []
        for tokens, real, routing in self.calls[name]:
            first = routing.expert_ids[:, 0]
            probabilities = (tokens @ self.state[name + GATE].t()).softmax(1)
            chosen.append(first[real])
            gained.append(probabilities.gather(1, first[:, None])[:, 0][real])
        return torch.cat(chosen), torch.cat(gained)

    def firsts_at(self, name: str, places: list[Tensor]) -> Tensor:
        """First choices at places (T,) bool of every call, counted by expert."""
        found = [
            routing.expert_ids[:, 0][its] for (*_, routing), its in zip(self.calls[name], places, strict=True)
        ]
        return torch.bincount(torch.cat(found), minlength=self.calls[name][0][2].num_experts)


@contextmanager
def heard_gates(checkpoint: Path) -> Iterator[Heard]:
    """All gates' calls in this context."""
    heard = Heard(checkpoint)
    hook = torch.nn.modules.module.register_module_forward_hook(heard.take)
    try:
        yield heard
    finally:
        hook.remove()
