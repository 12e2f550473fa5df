"""Which of a checkpoint's layers a model keeps (fairseq's `--encoder-layers-to-keep` and `--decoder-layers-to-keep`).

fairseq's own `prune_state_dict` drops all layers of a side of which nothing is said, and prunes a checkpoint a second
time that was saved after it was pruned. Kept layers stand in the order that they had and are numbered anew from 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fairseq_moe_ext.checkpoints.plain_config import ConfigError, shown
from fairseq_moe_ext.checkpoints.state_keys import layer_numbers, moe_layer_numbers

logger = logging.getLogger("fairseq_moe_ext")

SIDES = ("encoder", "decoder")
_LAYER = re.compile(r"^(encoder|decoder)\.layers\.(\d+)\.")


def kept_numbers(given: str | None) -> list[int]:
    """The layers that `--*-layers-to-keep` names, in the model's order; [] where it is unset.

    >>> kept_numbers("5,1"), kept_numbers(None)
    ([1, 5], [])
    """
    return sorted(map(int, given.split(","))) if given else []


def settle_kept_layers(model: dict[str, Any], overridden: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make a checkpoint's model fields agree with what its state has: with the layers to be kept, or without them.

    model: its fields under `overridden`, those of `--model-overrides`; changed in place. A checkpoint's own field that
    names as many layers as the state has says how the model was built, so that nothing is left to be done.
    ConfigError where a layer is named that the state does not have, or one twice.
    """
    for side in SIDES:
        field, present = f"{side}_layers_to_keep", layer_numbers(tensors, side)
        kept = kept_numbers(model.get(field))
        if not kept:
            continue
        if field not in overridden and len(kept) == len(present):
            model[field] = None
        elif len(set(kept)) < len(kept) or not set(kept) <= set(present):
            raise ConfigError(
                f"{field} must name layers of the state, each once, of which the {side} has {_range(present)}, "
                f"got {shown(model[field])}"
            )
        model[f"{side}_layers"] = len(kept)


def prune(state: dict[str, Tensor], kept: Mapping[str, list[int]]) -> None:
    """Leave in `state`, in place, only the layers of `kept`, side -> numbers; a side that it does not name stays."""
    places = {side: {number: place for place, number in enumerate(numbers)} for side, numbers in kept.items()}
    items = list(state.items())
    state.clear()
    for key, tensor in items:
        match = _LAYER.match(key)
        if match and match.group(1) in places:
            place = places[match.group(1)].get(int(match.group(2)))
            if place is None:
                continue
            key = f"{key[: match.start(2)]}{place}{key[match.end(2) :]}"
        state[key] = tensor


def prune_as_configured(model_cfg: Any, state: dict[str, Tensor]) -> None:
    """Prune `state`, in place, as the model's arguments say, which then name no layers any more, as fairseq has it.

    A state that has as many layers as are kept was saved after it was pruned (training goes on) and stays as it is.
    """
    kept = {side: kept_numbers(getattr(model_cfg, f"{side}_layers_to_keep", None)) for side in SIDES}
    kept = {side: numbers for side, numbers in kept.items() if numbers}
    for side in list(kept):
        setattr(model_cfg, f"{side}_layers_to_keep", None)
        present = layer_numbers(state, side)
        if len(present) == len(kept[side]):
            if present != kept[side]:
                logger.info("the checkpoint's %s has only the %d layers to be kept already", side, len(present))
            del kept[side]
    prune(state, kept)


def check_places(state: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    """ConfigError where a training goes on from `state` whose MoE layers do not stand where those of `model` do.

    fairseq builds a training's model by its flags before it reads a checkpoint, so that they must say which layers of
    which model were kept.
    """
    for side in SIDES:
        found, wanted = moe_layer_numbers(state, side), moe_layer_numbers(model, side)
        if found and wanted and found != wanted:
            raise ConfigError(
                f"the {side}'s MoE layers must stand where the training's flags put them, at {wanted}, and are at "
                f"{found} in the checkpoint: of a model with kept layers --{side}-layers and --{side}-layers-to-keep "
                "must be as when it was pruned"
            )


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
