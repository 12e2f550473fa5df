"""This plugin's quantised experts and dense layers, its float32 experts, and PyTorch's products of packed weights (each
without a peer's environment). Served by serve.py."""

import sys
from pathlib import Path

from quantized_problem import Problem
from serve import Prepared, serve

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parents[1])]

from made_experts import dense_layers, float_experts, pytorch_experts, quantized_experts  # noqa: E402

from fairseq_moe_ext.kernels.cpu_kernel import load_kernel  # noqa: E402
from fairseq_moe_ext.kernels.quantized_kernel import instructions_of  # noqa: E402


def prepare(case: dict) -> Prepared:
    """case: as Problem.of has it, and rows, numbers of rows per expert."""
    problem = Problem.of(case)
    dims = problem.experts, problem.model_dim, problem.hidden_dim
    kernel = load_kernel()
    if kernel is None:
        raise RuntimeError("the C kernel is not compiled, or turned off")
    makers = {
        "ours, float32": float_experts(*dims),
        "ours, int8": quantized_experts(*dims, 8),
        "ours, int4": quantized_experts(*dims, 4),
        "ours, int8 dense": dense_layers(*dims),
        "PyTorch int8": pytorch_experts(*dims, 8),
        "PyTorch int4": pytorch_experts(*dims, 4),
    }
    left_out = {name: "this PyTorch has no such product" for name, maker in makers.items() if maker is None}
    calls = {
        f"{name}|{count}": maker(count) for name, maker in makers.items() if maker is not None for count in case["rows"]
    }
    for call in calls.values():
        call()
    return Prepared(calls, left_out, {"instructions": instructions_of(kernel)})


if __name__ == "__main__":
    serve(prepare)
