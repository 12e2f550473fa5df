"""What tests quantise: a model's state in fairseq's names, and what its quantised file must hold by the quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fairseq_moe_ext.checkpoints.quantized_file import QuantizedFile
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.command_line.quantize import main
from fairseq_moe_ext.experts.quantize import quantize_expert, quantize_linear
from fairseq_moe_ext.kernels.block import Block, LinearBlock

PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
BITS = {"int8": 8, "int4": 4}


def random_state(experts: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A language model's state of two MoE layers: model dim 70, hidden dim 96."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    model = {"decoder.embed_tokens.weight": normal(9, 70)}
    for layer in (0, 1):
        prefix = f"decoder.layers.{layer}"
        for name in ("q_proj", "out_proj"):
            model[f"{prefix}.self_attn.{name}.weight"] = normal(70, 70)
            model[f"{prefix}.self_attn.{name}.bias"] = normal(70)
        model[f"{prefix}.final_layer_norm.weight"] = normal(70)
        model[f"{prefix}.moe_layer.gate.wg.weight"] = normal(experts, 70)
        for expert in range(experts):
            for part, shape in zip(PARTS, ((96, 70), (96,), (70, 96), (70,)), strict=True):
                model[f"{prefix}.moe_layer.experts.{expert}.{part}"] = normal(*shape)
    model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"]
    return model


def quantize(source: Path, target: Path, *more: str, experts: str = "int4", dense: str = "int8") -> int:
    """The command's exit code."""
    return main([str(source), "--output", str(target), "--experts", experts, "--dense", dense, *more])


def wanted_tensors(model: Mapping[str, torch.Tensor], experts: str, dense: str) -> dict[str, torch.Tensor]:
    """The file's tensors, aliases too, by the quantiser alone."""
    found, done = {}, set()
    for key, tensor in model.items():
        match = EXPERT_KEY.match(key)
        if match:
            name = f"{match.group(1)}{match.group(2)}"
            if name not in done:
                done.add(name)
                parts = [model[f"{name}.{part}"] for part in PARTS]
                block = Block(BITS[experts], parts[0].size(1), parts[0].size(0))
                found[f"{name}.{experts}"] = torch.zeros(block.nbytes, dtype=torch.uint8)
                quantize_expert(block, parts, found[f"{name}.{experts}"])
        elif tensor.dim() == 2 and "gate" not in key and dense == "int8":
            block = LinearBlock(8, *tensor.shape)
            found[f"{key}.int8"] = torch.zeros(block.nbytes, dtype=torch.uint8)
            quantize_linear(block.layers(found[f"{key}.int8"][None])[0], tensor, None)
        else:
            is_matrix = tensor.dim() == 2 and "gate" not in key
            found[key] = tensor.to(getattr(torch, dense)) if is_matrix else tensor.float()
    return found


def assert_holds(file: Path, wanted: Mapping[str, torch.Tensor]) -> QuantizedFile:
    """The file's tensors are these, bit by bit."""
    opened = QuantizedFile(file)
    tensors = opened.tensors()
    assert set(tensors) == set(wanted)
    for name, values in wanted.items():
        assert tensors[name].dtype == values.dtype and torch.equal(tensors[name].read(), values), name
    return opened
