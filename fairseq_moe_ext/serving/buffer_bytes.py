"""`--expert-buffer-size` in bytes: how many experts each layer of a served model keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.buffering.expert_profile import LayerImportance
from fairseq_moe_ext.buffering.share_out import LayerCosts, Sizes, share_out

logger = logging.getLogger("fairseq_moe_ext")


def shared_out(
    layers: Mapping[str, BufferedExperts],
    budget: int,
    taken: Callable[[Sizes], int],
    importance: Mapping[str, LayerImportance],
    order: str,
    policy: str,
) -> dict[str, int]:
    """The experts that each of `layers` keeps, such that `taken`, the bytes of all slots, is at most `budget`.

    importance: of all layers, or empty: then evenly. order, policy: by which experts are evicted. ValueError where one
    expert of each does not fit.
    """
    costs = {}
    for name, layer in layers.items():
        misses = importance[name].misses(layer.local, order, policy) if importance else None
        costs[name] = LayerCosts(len(layer.local), layer.expert_bytes, misses)
    try:
        sizes = share_out(costs, budget, taken)
    except ValueError as error:
        raise ValueError(f"--expert-buffer-size {error}") from error
    logger.info(
        "--expert-buffer-size: of %d bytes %d are shared out %s: %s",
        budget, taken(sizes), "by --expert-profile" if importance else "evenly",
        ", ".join(f"{count} experts of {name}" for name, count in sizes.items()),
    )
    return sizes
