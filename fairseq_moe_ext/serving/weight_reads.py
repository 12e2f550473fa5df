"""Which weights a decoder's step and an encoder's pass read, from a state's shapes, and how many bytes that is.

Each weight counts once, however many rows use it. Of experts, as many as n choices touch where routing is uniform,
E (1 - (1 - 1/E)^n): a trained gate touches fewer.

Legend: E = experts of a layer, M = outputs, K = inputs.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY, is_dense_matrix
from fairseq_moe_ext.kernels.block import LinearBlock

# a few rows are looked up; keys and values of the encoder's output are computed once per sentence
_NOT_IN_A_PASS = re.compile(r"embed_tokens|embed_positions|output_projection|\.encoder_attn\.[kv]_proj\.|\.version$")


@dataclass(frozen=True)
class DenseWeights:
    """elements: of all. quantizable: of them, what `--moe-weights-scope all` puts in int8 (and its biases); int8: bytes
    that those then take."""

    elements: int = 0
    quantizable: int = 0
    int8: int = 0

    @classmethod
    def of_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> DenseWeights:
        """shapes: without experts."""
        linear = {name: shape for name, shape in shapes.items() if is_dense_matrix(name, shape)}
        biases = (shapes.get(f"{name.removesuffix('weight')}bias", (0,)) for name in linear)
        return cls(
            elements=sum(map(math.prod, shapes.values())),
            quantizable=sum(map(math.prod, (*linear.values(), *biases))),
            int8=sum(LinearBlock(8, *shape).nbytes for shape in linear.values()),
        )

    def bytes(self, element: int, int8: bool = False) -> int:
        """As floats of `element` bytes; int8: but for what is quantizable."""
        elements, quantized = (self.quantizable, self.int8) if int8 else (0, 0)
        return (self.elements - elements) * element + quantized


@dataclass(frozen=True)
class Reads:
    """Of one pass: the dense weights, and MoE layers of `experts` experts each."""

    dense: DenseWeights
    moe_layers: int
    experts: int

    def experts_touched(self, rows: int, choices: int) -> float:
        """In all layers together, by `rows` tokens of so many choices each."""
        if not self.moe_layers:
            return 0.0
        return self.moe_layers * self.experts * (1 - (1 - 1 / self.experts) ** (rows * choices))

    def bytes(self, rows: int, choices: int, expert_bytes: int, element: int, int8: bool = False) -> float:
        """Dense weights as in `DenseWeights.bytes`, and the experts touched."""
        return self.dense.bytes(element, int8) + self.experts_touched(rows, choices) * expert_bytes


def reads_of(side: str, shapes: Mapping[str, tuple[int, ...]], vocabulary: tuple[int, int]) -> Reads:
    """side: "encoder", or "decoder", whose step ends with the output projection (V, D), also where it is tied."""
    own = {name: shape for name, shape in shapes.items() if name.startswith(f"{side}.")}
    experts = {match.group(1, 2) for match in map(EXPERT_KEY.match, own) if match}
    layers = Counter(layer for layer, _ in experts)
    dense = {name: shape for name, shape in own.items() if not EXPERT_KEY.match(name)}
    dense = {name: shape for name, shape in dense.items() if not _NOT_IN_A_PASS.search(name)}
    if side == "decoder":
        dense["output_projection.weight"] = vocabulary
    return Reads(DenseWeights.of_shapes(dense), len(layers), max(layers.values(), default=0))
