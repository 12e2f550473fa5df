"""A picture of what a placement does: load per rank before and after, and the experts' load over batches.

Legend: B = batches, E = experts, R = ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from fairseq_moe_ext.atomic_file import new_file
from fairseq_moe_ext.balancing.fit import LayerFit
from fairseq_moe_ext.balancing.load import rank_shares, shares

BEFORE, AFTER = "#b8b8b8", "#2a6fb0"


def plot_fit(path: str | os.PathLike, layers: Sequence[LayerFit], method: str, world_size: int) -> None:
    """Write a PNG to `path`, one row per layer.

    Left: each rank's mean share of the held-out load, its largest share in any batch as a tick, before (`contiguous`,
    where there is one) and after (`method`), beside the even share. Right: the experts' shares over all batches, with
    the line between the fitted and the held-out half; experts are ordered by their mean share.
    """
    from matplotlib.figure import Figure  # heavy, and an extra: only where a picture is asked for

    figure = Figure(figsize=(12, 3.4 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 2, squeeze=False, width_ratios=(1, 1))
    for layer, (bars, heat) in zip(layers, axes, strict=True):
        _plot_ranks(bars, layer, method, world_size)
        image = _plot_experts(heat, layer)
        figure.colorbar(image, ax=heat, label="% of the load")
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _plot_ranks(axes, layer: LayerFit, method: str, world_size: int) -> None:
    shown = [(name, color) for name, color in (("contiguous", BEFORE), (method, AFTER)) if name in layer.methods]
    width, ranks = 0.8 / len(shown), np.arange(world_size)
    peaks: str | None = "largest share in a batch"  # one entry of the legend for both
    for number, (name, color) in enumerate(dict(shown).items()):
        percent = 100 * rank_shares(layer.held_out, layer.methods[name].layer, world_size)
        at = ranks + (number - (len(shown) - 1) / 2) * width
        average = layer.methods[name].held_out.avg_max_load
        axes.bar(at, percent.mean(axis=0), width, color=color, label=f"{name}: Avg Max Load {average:.1%}")
        axes.hlines(percent.max(axis=0), at - width / 3, at + width / 3, color="black", label=peaks)
        peaks = None
    axes.axhline(100 / world_size, color="black", linestyle=":", linewidth=1, label="even share")
    axes.set(title=layer.name, xlabel="rank", ylabel=f"% of the held-out load ({layer.phase})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper center", ncols=2, fontsize="x-small")


def _plot_experts(axes, layer: LayerFit):
    fitted, held_out = shares(layer.fitted), shares(layer.held_out)
    order = np.argsort(-fitted.sum(axis=0), kind="stable")
    percent = 100 * np.concatenate([fitted, held_out])[:, order].T
    image = axes.imshow(percent, aspect="auto", interpolation="nearest", cmap="magma_r")
    axes.axvline(len(fitted) - 0.5, color="black", linewidth=1)
    axes.set(title="fitted | held out", xlabel="batch", ylabel="experts, hottest first")
    return image
