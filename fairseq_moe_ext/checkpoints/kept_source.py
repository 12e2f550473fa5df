"""What is quantised of a source where only a pair's experts are kept: fewer tensors, under other numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts, cut_key, read_kept, rows_of_gate
from fairseq_moe_ext.checkpoints.quantization_source import SourceModel, SourceTensor
from fairseq_moe_ext.checkpoints.state_keys import GATE_KEY


@dataclass(frozen=True)
class Keep:
    """What the user wants kept: path, a file of experts by language; languages, of which pair (`--keep`, `--pair`)."""

    path: str
    languages: tuple[str, str]

    def of_model(self, num_experts: dict[str, int]) -> KeptExperts:
        """num_experts: E by layer. CheckpointError where the file does not fit."""
        try:
            return read_kept("--keep", self.path, self.languages, num_experts)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def num_experts_of(model: SourceModel) -> dict[str, int]:
    """E by layer, an encoder's first, both in their order; of a model that is cut already, of the whole one."""
    found = {match.group(1): model.shapes[match.string][0] for match in map(GATE_KEY.match, model.shapes) if match}
    if model.kept is not None:
        found = dict.fromkeys(found, model.kept.num_experts)
    layers = sorted((name for name in found if ".cmr_layer." not in name), key=_place)
    return {name: found[name] for name in layers}


def cut_model(model: SourceModel, kept: KeptExperts) -> SourceModel:
    """Without the experts that are not kept, and with the gates' rows of the others."""
    shapes = {}
    for key, shape in model.shapes.items():
        rows = rows_of_gate(key, kept.layers)
        new = cut_key(key, kept.layers)
        if new is not None:
            shapes[new] = shape if rows is None else (len(rows), *shape[1:])
    aliases = {cut_key(alias, kept.layers): cut_key(key, kept.layers) for alias, key in model.aliases.items()}
    return replace(model, shapes=shapes, aliases={a: key for a, key in aliases.items() if a and key}, kept=kept)


def cut_tensors(tensors: Iterable[SourceTensor], kept: KeptExperts) -> Iterator[SourceTensor]:
    """Of a part's tensors those that are kept, under their keys in the cut model; gates are read for it."""
    for each in tensors:
        rows = rows_of_gate(each.key, kept.layers)
        new = cut_key(each.key, kept.layers)
        if new is not None:
            yield replace(each, key=new, tensor=each.tensor if rows is None else each.read()[0][rows])


def _place(name: str) -> tuple[bool, int]:
    return not name.startswith("encoder."), int(name.split(".")[2])
