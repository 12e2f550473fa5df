"""Quantised checkpoints of the goldens, written tensor by tensor from the floats by the quantiser alone."""

from __future__ import annotations

from pathlib import Path

import hf_makers
import torch
from quantized_files import write_quantized
from torch import Tensor

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.plain_config import plain
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.experts.formats import QUANTIZED
from fairseq_moe_ext.experts.parts import EXPERT_KEYS
from fairseq_moe_ext.experts.quantize import quantize_expert, quantize_linear
from fairseq_moe_ext.kernels.block import Block, LinearBlock
from fairseq_moe_ext.nllb.convert import convert_nllb

SPM = "sentencepiece.bpe.model"
_DENSE = ("_proj.weight", "fc1.weight", "fc2.weight", "embed_tokens.weight", "output_projection.weight")


def write_golden(path: Path, source: Path, experts: str, dense: str, files: dict[str, bytes]) -> Path:
    """The checkpoint at `source` with experts and dense matrices in these formats, and `files` with it."""
    state = read_checkpoint(str(source))
    model: dict[str, Tensor] = state["model"]
    tensors, aliases, dims, seen = {}, {}, {}, {}
    for key, tensor in model.items():
        match = EXPERT_KEY.match(key)
        if match and not key.endswith(EXPERT_KEYS["fc1_weight"]):
            continue
        if match:
            prefix = f"{match.group(1)}{match.group(2)}."
            parts = [model[prefix + part].read() for part in EXPERT_KEYS.values()]
            layout = Block(QUANTIZED[experts], parts[0].size(1), parts[0].size(0))
            tensors[prefix + experts] = torch.empty(layout.nbytes, dtype=torch.uint8)
            quantize_expert(layout, parts, tensors[prefix + experts])
            dims[match.group(1)] = (layout.model_dim, layout.hidden_dim)
        elif key.endswith(_DENSE) and ".gate." not in key:
            name = key + ".int8" * (dense == "int8")
            if seen.setdefault(tensor.checksum, name) != name:
                aliases[name] = seen[tensor.checksum]
                continue
            weight = tensor.read()
            if dense == "int8":
                layout = LinearBlock(8, *weight.shape)
                tensors[name] = torch.zeros(layout.nbytes, dtype=torch.uint8)
                quantize_linear(layout.layers(tensors[name][None])[0], weight, None)
                dims[key] = tuple(weight.shape)
            else:
                tensors[name] = weight.to(getattr(torch, dense))
        else:
            tensors[key] = tensor.read()
    config = {name: _json(plain(state.get(name))) for name in ("args", "cfg")}
    told = {**config, "extra_state": {}, "optimizer_history": [], "task_state": {}}
    write_quantized(path, tensors, files, experts=experts, dense=dense, aliases=aliases, dims=dims, state=told)
    return path


def write_nllb(folder: Path) -> None:
    """A tiny NLLB in Hugging Face's layout, hf; its floats, model.pt; and X.safetensors with all that it needs."""
    hf_makers.write_model(folder / "hf")
    convert_nllb(str(folder / "hf"), str(folder / "model.pt"))
    files = {f"{kind}.txt": (folder / f"model.{kind}.txt").read_bytes() for kind in ("dict", "langs")}
    files[SPM] = (folder / "hf" / SPM).read_bytes()
    write_golden(folder / "X.safetensors", folder / "model.pt", "int4", "int8", files)


def _json(value):
    if hasattr(value, "__dict__") and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, dict):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
