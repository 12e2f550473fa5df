"""Which layers are called next, and which of their experts are likely: by order and by recent calls, no prediction.

Source: ProMoE's and InfMoE's prefetch of the next layers in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LIKELY = 0.5  # share of a layer's calls, recent ones counting more, in which an expert must have had rows
_AGEING = 0.8  # what a call counts falls by this factor with every later one


def in_order(names: Sequence[str]) -> dict[str, list[str]]:
    """Of each layer, which ones are called next: the next one of its stack, a decoder's last one before its first; in a
    decoder then the encoder's first, for the next batch.

    names: of all layers in a model's order.

    >>> in_order(["encoder.1", "encoder.3", "decoder.1"])
    {'encoder.1': ['encoder.3'], 'encoder.3': ['decoder.1'], 'decoder.1': ['encoder.1']}
    """
    decoder = [name for name in names if name.startswith("decoder")]
    found = {name: [after] for name, after in zip(names, [*names[1:], (decoder or names)[0]], strict=True)}
    for name in decoder:
        found[name] = [after for after in (*found[name], names[0]) if after != name]
    return {name: list(dict.fromkeys(after)) for name, after in found.items()}


class Habits:
    """How often, and with how many rows, a layer's H experts were active; recent calls count more."""

    def __init__(self, num_experts: int):
        self._active, self._rows = [0.0] * num_experts, [0.0] * num_experts

    def add(self, rows_per_expert: Iterable[int]) -> None:
        """One call."""
        for expert, rows in enumerate(rows_per_expert):
            self._active[expert] += (1 - _AGEING) * ((rows > 0) - self._active[expert])
            self._rows[expert] += (1 - _AGEING) * (rows - self._rows[expert])

    def likely(self) -> list[int]:
        """Experts that the next call will want, those with the most rows first."""
        found = [expert for expert, share in enumerate(self._active) if share >= LIKELY]
        return sorted(found, key=lambda expert: -self._rows[expert])
