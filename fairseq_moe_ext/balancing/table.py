"""The figures of a fit as text.

Legend: E = experts, R = ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_moe_ext.balancing.fit import LayerFit
from fairseq_moe_ext.balancing.load import Balance, expert_sparsity, hot_experts, temporal_locality

HEAD = f"{'method':<18}{'fitted: max':>12}{'avg max':>9}{'held out: max':>16}{'avg max':>9}{'above bound':>13}"
HOT = 3  # so many of the hottest experts are named


def format_fit(layers: Sequence[LayerFit]) -> str:
    """Per layer and per phase in total, by every method: Max Load and Avg Max Load, fitted and held out.

    A total is the largest Max Load and the mean Avg Max Load of the phase's layers. `above bound`: how far the fitted
    Avg Max Load lies above what `exact` proved that none can fall below.
    """
    parts = [_format_layer(layer) for layer in layers]
    for phase in dict.fromkeys(layer.phase for layer in layers):
        of_phase = [layer for layer in layers if layer.phase == phase]
        if len(of_phase) > 1:
            parts.append(_format_total(phase, of_phase))
    return "\n\n".join(parts)


def _format_layer(layer: LayerFit) -> str:
    sparsity, locality = expert_sparsity(layer.fitted), temporal_locality(layer.fitted)
    hottest = ", ".join(str(expert) for expert in hot_experts(layer.fitted, HOT))
    title = (
        f"{layer.name} ({layer.phase}; {layer.fitted.shape[1]} experts, fitted on {len(layer.fitted)}, "
        f"held out {len(layer.held_out)})\n"
        f"{sparsity:.0%} of experts idle, hottest {hottest}; of those active {locality:.0%} were active just before"
    )
    rows = [
        _format_row(method, fit.fitted, fit.held_out, layer.bound) for method, fit in layer.methods.items()
    ]
    return "\n".join([title, HEAD, *rows, _format_bound(layer.bound)])


def _format_total(phase: str, layers: Sequence[LayerFit]) -> str:
    bound = sum(layer.bound for layer in layers) / len(layers)
    rows = []
    for method in layers[0].methods:
        fits = [layer.methods[method] for layer in layers]
        rows.append(_format_row(method, _total([f.fitted for f in fits]), _total([f.held_out for f in fits]), bound))
    return "\n".join([f"{phase}: {len(layers)} layers in total", HEAD, *rows, _format_bound(bound)])


def _total(balances: Sequence[Balance]) -> Balance:
    mean = sum(balance.avg_max_load for balance in balances) / len(balances)
    return Balance(mean, max(balance.max_load for balance in balances))


def _format_row(method: str, fitted: Balance, held_out: Balance, bound: float) -> str:
    above = f"{fitted.avg_max_load / bound - 1:.1%}" if bound else "-"
    return (
        f"{method:<18}{fitted.max_load:>12.4f}{fitted.avg_max_load:>9.4f}"
        f"{held_out.max_load:>16.4f}{held_out.avg_max_load:>9.4f}{above:>13}"
    )


def _format_bound(bound: float) -> str:
    return f"{'proved bound':<18}{bound:>21.4f}"
