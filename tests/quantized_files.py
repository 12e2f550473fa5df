"""Small quantised checkpoint files for the tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fairseq_moe_ext.checkpoints.quantized_about import QuantizedAbout, QuantizedSource
from fairseq_moe_ext.checkpoints.quantized_writer import QuantizedWriter

STATE = {"args": {"arch": "moe_transformer"}, "cfg": None, "extra_state": {}, "optimizer_history": [], "task_state": {}}


def about(**fields: Any) -> QuantizedAbout:
    """With these fields in place of the usual ones."""
    usual = QuantizedAbout(
        experts="int4",
        dense="int8",
        group=64,
        quantizer=1,
        source=QuantizedSource("5" * 64, (("model.pt", 1000),), "cc-by-nc-4.0"),
        calibrated=None,
        aliases={},
        dims={},
        state=STATE,
    )
    return replace(usual, **fields)


def write_quantized(
    path: Path, tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes] | None = None, **fields: Any
) -> QuantizedAbout:
    """Write the file at `path`; returns what it says of itself. fields: as of `about`."""
    said = about(**fields)
    shapes: Iterable = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = QuantizedWriter(path, shapes, files or {}, said, "0")
    for name, tensor in tensors.items():
        writer.write(name, [tensor])
    writer.set_source(said.source)
    writer.complete()
    return said
