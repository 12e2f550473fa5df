"""Triton's compiler needs no GPU: the kernels as machine code for the generations that people own, and its limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# compute capability, kilobytes of shared memory that a block may have there
A100, RTX3090, RTX4090, H100 = (80, 163), (86, 99), (89, 99), (90, 227)
# where, dtype, rows per expert, whether steps are whole, activation, slots, how the products are written there
CASES = [
    (A100, "fp16", 4, True, "relu", True, "mma.sync"),
    (A100, "bf16", 200, True, None, False, "mma.sync"),
    (RTX3090, "fp16", 200, True, "gelu", True, "mma.sync"),
    (RTX3090, "fp32", 40, True, "relu", True, "fma.rn.f32"),
    (RTX4090, "bf16", 40, True, "relu", True, "mma.sync"),
    (H100, "fp16", 4, True, "relu", True, "mma.sync"),
    (H100, "fp16", 40, False, None, False, "wgmma"),
    (H100, "bf16", 200, True, "relu", True, "wgmma"),
]
ROOT = Path(__file__).resolve().parents[2]


def compile_all():
    """Prints, per case, the machine code's bytes, its shared memory, its products and copies."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fairseq_moe_ext.kernels import triton_mlp

    itemsize = {"fp16": torch.float16.itemsize, "bf16": torch.bfloat16.itemsize, "fp32": torch.float32.itemsize}
    for (capability, kilobytes), dtype, rows, whole, activation, slots, products in CASES:
        tiles = triton_mlp.tiles_for(rows, itemsize[dtype], kilobytes * 1024)
        values = dict.fromkeys(("inputs", "weights", "biases", "outputs"), f"*{dtype}")
        numbers = dict.fromkeys(("num_experts", "in_dim", "out_dim", "row_tiles"), "i32")
        constants = {
            "HAS_SLOTS": slots, "ACTIVATION": activation, "EXPERTS": 128, "WHOLE_STEPS": whole,
            "ROWS": tiles.rows, "COLUMNS": tiles.columns, "INNER": tiles.inner, "NEIGHBOURS": 8,
        }
        signature = {
            **values, "offsets": "*i32", "slots": "*i32", "tile_ends": "*i32", **numbers,
            **dict.fromkeys(constants, "constexpr"),
        }
        aligned = {(place,): [["tt.divisibility", 16]] for place in (*range(7), *((8, 9) if whole else ()))}
        kernel = triton.compile(
            ASTSource(triton_mlp._linear_kernel, signature, constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
        text = kernel.asm["ptx"]
        found = {"bytes": len(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "products": products in text}
        print(json.dumps({**found, "asynchronous": "cp.async" in text}))


def test_the_kernels_compile_for_every_generation(tmp_path):
    """In a process of its own: in this one they are for the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-c", "import test_triton_compiles; test_triton_compiles.compile_all()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(found) == len(CASES)
    for case, kernel in zip(CASES, found, strict=True):
        (_, kilobytes), _, _, whole, *_ = case
        assert kernel["bytes"] > 0 and kernel["products"], case
        assert kernel["shared"] <= kilobytes * 1024, case
        assert kernel["asynchronous"] or not whole, case
