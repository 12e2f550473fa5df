"""`--retain-dropout`: which dropouts stay on in serving, those inside the experts among them.

fairseq's own way: every FairseqDropout is asked whether its module's name is among `--retain-dropout-modules`. The
names are upstream's, those of the classes without the plugin's `MoE` or fairseq's `Base`; the experts go by the name of
their layer, too. Masking of outputs (`moe_eom`, `moe_fom`) is no dropout of fairseq's: as upstream has it, serving
scales by its mean.
"""

from __future__ import annotations

import ast
import logging
from typing import Any

from fairseq.modules.fairseq_dropout import FairseqDropout
from torch import nn

from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.experts.resident import ResidentExperts
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.gating.cmr import CMRGate

logger = logging.getLogger("fairseq_moe_ext")

FLAG = "--retain-dropout-modules"


def choose_dropouts(model: nn.Module, generation: Any) -> None:
    """Make `generation` options fit `model`, before fairseq asks its dropouts; ValueError where they cannot."""
    names = getattr(generation, "retain_dropout_modules", None)
    if names is None:
        return
    if not getattr(generation, "retain_dropout", False):
        raise ValueError(f"{FLAG} must go with --retain-dropout, got {names} alone")
    names = _parse(names)
    dropouts = [module for module in model.modules() if isinstance(module, FairseqDropout)]
    with_dropout = {_public(dropout.module_name) for dropout in dropouts if dropout.module_name}
    with_dropout |= {CMRGate.__name__ for module in model.modules() if isinstance(module, CMRGate)}
    known = with_dropout | {_public(type(module).__name__) for module in model.modules()}
    wanted = {_public(name): name for name in names}
    if set(wanted) - known:
        unknown = ", ".join(wanted[name] for name in wanted if name not in known)
        raise ValueError(f"{FLAG} must name modules of the model, as {', '.join(sorted(with_dropout))}, got {unknown}")
    if not set(wanted) & with_dropout:
        raise ValueError(
            f"{FLAG} must name a module with dropout, one of {', '.join(sorted(with_dropout))}, got {', '.join(names)}"
        )
    for dropout in dropouts:
        dropout.module_name = wanted.get(_public(dropout.module_name or ""), dropout.module_name)
    for module in model.modules():
        if hasattr(module, "experts_dropout") and _public(type(module).__name__) in wanted:
            module.experts_dropout.module_name = wanted[_public(type(module).__name__)]
    generation.retain_dropout_modules = names  # a list: in a text fairseq would find parts of names


def retain_in_experts(model: nn.Module, generation: Any) -> None:
    """What fairseq has decided for each layer with experts, by its `experts_dropout`, and for the gates of CMR.

    ValueError where experts with dropout are computed by what has none.
    """
    if not getattr(generation, "retain_dropout", False):
        return
    names = getattr(generation, "retain_dropout_modules", None)
    for module in model.modules():
        if isinstance(module, CMRGate):
            module.retain_dropout = names is None or CMRGate.__name__ in names
        dropout = getattr(module, "experts_dropout", None)
        if dropout is None or not dropout.apply_during_inference or dropout.p == 0:
            continue
        _check(module.moe_layer, dropout.p)
        module.moe_layer.experts.retain_dropout()


def _check(layer: MOELayer, probability: float) -> None:
    rule = f"--retain-dropout concerns the dropout inside the experts ({probability})"
    if not isinstance(layer.experts, ResidentExperts):
        flag = "--expert-buffer-size" if layer.experts.format.name == FLOAT else "--moe-weights"
        raise ValueError(f"{rule}, which those in a buffer and quantised ones do not have: it must go without {flag}")
    if layer.experts.kernel not in ("auto", "loop"):
        raise ValueError(f"{rule}, which --moe-kernel {layer.experts.kernel} does not have: it must be loop")
    if layer.dispatcher.spans_ranks:
        logger.warning("--retain-dropout under several ranks: other numbers are drawn than on one rank")


def _parse(names: Any) -> list[str]:
    """Names, separated by commas or as a list that Python or JSON would read."""
    given = names
    if isinstance(names, str):
        try:
            names = ast.literal_eval(names) if names.strip().startswith("[") else names.split(",")
        except (SyntaxError, ValueError):
            names = None
    names = [name.strip() for name in names or () if isinstance(name, str)]
    if not names or not all(names):
        raise ValueError(f"{FLAG} must be names or a list of names, got {given!r}")
    return names


def _public(name: str) -> str:
    """
    >>> _public("MoETransformerDecoderLayer"), _public("TransformerEncoderLayerBase")
    ('TransformerDecoderLayer', 'TransformerEncoderLayer')
    """
    return name.removeprefix("MoE").removesuffix("Base")
