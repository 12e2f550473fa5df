"""Layers and batches for the tests, drawn by hypothesis or written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from reference import Expert
from torch import Tensor

from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer, Top1Gate, Top2Gate
from fairseq_moe_ext.gating.slots import StaticOptions, dispatcher_for

PADDINGS = ("none", "left", "right", "scattered", "one row", "all")
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def examples(number: int) -> settings:
    """The same examples on every run and every machine, however slow it is."""
    return settings(max_examples=number, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Case:
    """A layer and a batch for it. skew: 0 spreads tokens over the experts, 40 puts them all on the same ones."""

    rows: int = 3
    positions: int = 7
    model_dim: int = 6
    hidden_dim: int = 5
    num_experts: int = 5
    num_choices: int = 2
    skew: float = 0.0
    padding: str = "none"
    dtype: torch.dtype = torch.float32
    use_fp32: bool = False
    normalize_before_dropping: bool = False
    seed: int = 0

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """x (B, L, D) and its padding mask (B, L); the first feature is 1, a bias for the gate."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.rows, self.positions, self.model_dim, generator=generator)
        x[..., 0] = 1.0
        mask = torch.zeros(self.rows, self.positions, dtype=torch.bool)
        if self.padding == "none":
            return x.to(self.dtype), None
        if self.padding == "scattered":
            mask = torch.rand(mask.shape, generator=generator) < 0.4
        elif self.padding == "one row":
            mask[:1] = True
        elif self.padding == "all":
            mask[:] = True
        else:
            for row in range(self.rows):
                pads = row % (self.positions + 1)
                if self.padding == "left":
                    mask[row, :pads] = True
                else:
                    mask[row, self.positions - pads :] = True
        return x.to(self.dtype), mask

    def gate(self, policy: str = "all") -> Top1Gate | Top2Gate:
        if self.num_choices == 1:
            return Top1Gate(self.model_dim, self.num_experts, self.use_fp32)
        return Top2Gate(self.model_dim, self.num_experts, self.use_fp32, policy, self.normalize_before_dropping)

    def layer(
        self, gating: str = "dynamic", policy: str = "all", output_masking: float = 0.0, activation=torch.relu, **static
    ) -> MOELayer:
        """In evaluation; the same weights for the same seed, whatever the gating."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        experts = ResidentExperts(self.num_experts, self.model_dim, self.hidden_dim, activation)
        layer = MOELayer(self.gate(policy), experts, dispatcher_for(gating, StaticOptions(**static)), output_masking)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
            bias = torch.randperm(self.num_experts, generator=generator) * self.skew / max(self.num_experts - 1, 1)
            layer.gate.wg.weight[:, 0] = bias
        return layer.to(self.dtype).eval()

    def with_(self, **changes) -> Case:
        return replace(self, **changes)


def expert_list(layer: MOELayer) -> list[Expert]:
    """The layer's experts for the twin, read by their names in the state dict."""
    state = layer.experts.state_dict()
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    return [Expert(*(state[f"{expert}.{name}"] for name in names)) for expert in range(layer.experts.num_experts)]


@st.composite
def layer_cases(draw, min_tokens: int = 0, dtypes=(torch.float32,)) -> Case:
    """From no token to a few dozen, 2 to 9 experts, evenly routed or all on one."""
    return Case(
        rows=draw(st.integers(min(min_tokens, 1), 4)),
        positions=draw(st.integers(1, 8)),
        model_dim=draw(st.sampled_from((2, 6, 9))),
        hidden_dim=draw(st.sampled_from((1, 5))),
        num_experts=draw(st.integers(2, 9)),
        num_choices=draw(st.sampled_from((1, 2))),
        skew=draw(st.sampled_from((0.0, 1.0, 4.0, 40.0))),
        padding=draw(st.sampled_from(PADDINGS)),
        dtype=draw(st.sampled_from(dtypes)),
        use_fp32=draw(st.booleans()),
        normalize_before_dropping=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )
