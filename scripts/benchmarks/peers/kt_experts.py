"""Experts of kt-kernel (KTransformers): its kernels for ggml's Q8_0 and Q4_0, and that for int4 of groups of 64 with
AVX2. Served by serve.py.

Its expert is a gated SwiGLU of three matrices without biases; two thirds of the hidden dim, to the nearest multiple of
256 that it asks for, have about the weights and the arithmetic of ours. Rows are bfloat16.
"""

import os
from collections.abc import Callable

import kt_kernel
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, quants
from quantized_problem import Problem, relative_error
from serve import Prepared, serve
from torch import Tensor

STEP = 256  # of the hidden dim
GROUP = 64
MOST = {"Q8_0": 0.03, "Q4_0": 0.3, "int4": 0.3}  # the largest relative error of outputs by those of float32


def prepare(case: dict) -> Prepared:
    problem = Problem.of(case)
    hidden = max(STEP, round(2 * problem.hidden_dim / 3 / STEP) * STEP)
    generator = torch.Generator().manual_seed(problem.seed)
    shapes = (hidden, problem.model_dim), (hidden, problem.model_dim), (problem.model_dim, hidden)
    weights = [torch.randn(problem.experts, *each, generator=generator) * each[1] ** -0.5 for each in shapes]
    experts = Experts(weights, int(os.environ["OMP_NUM_THREADS"]))
    calls = {}
    for name, module in (("Q8_0", experts.ggml("Q8_0")), ("Q4_0", experts.ggml("Q4_0")), ("int4", experts.int4())):
        for count in case["rows"]:
            rows = problem.rows(count)
            call, outputs = experts.caller(module, rows.flatten(0, 1).bfloat16(), count)
            call()
            gate, up, down = (each.transpose(1, 2) for each in weights)
            error = relative_error(outputs.float().view_as(rows), (F.silu(rows @ gate) * (rows @ up)) @ down)
            assert error <= MOST[name], f"kt-kernel's {name} is off by {error:.3g}, at most {MOST[name]} is right"
            calls[f"kt-kernel {name}|{count}"] = call
    return Prepared(calls, facts={"hidden_dim": hidden, "instructions": kt_kernel.__cpu_variant__})


class Experts:
    """weights: gate (E, F, D), up (E, F, D), down (E, D, F)."""

    def __init__(self, weights: list[Tensor], threads: int):
        self._kernels, self._weights = kt_kernel.kt_kernel_ext, weights
        self._experts, self._hidden, self._dim = weights[0].shape
        workers = self._kernels.WorkerPoolConfig()
        workers.subpool_count, workers.subpool_numa_map, workers.subpool_thread_count = 1, [0], [threads]
        self._infer = self._kernels.CPUInfer(workers)
        self._kept: list[Tensor] = [torch.zeros(self._experts, dtype=torch.bool), torch.arange(self._experts)]

    def ggml(self, kind: str):
        """By what it took over from llamafile."""
        config = self._config()
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, config.max_len
        form = GGMLQuantizationType[kind]
        blocks = [torch.from_numpy(quants.quantize(each.flatten(0, 1).numpy(), form)) for each in self._weights]
        self._kept += blocks
        config.gate_proj, config.up_proj, config.down_proj = (each.data_ptr() for each in blocks)
        config.gate_type = config.up_type = config.down_type = getattr(self._kernels.kvcache.ggml_type, kind)
        config.hidden_type = self._kernels.kvcache.ggml_type.BF16
        return self._loaded(self._kernels.moe.MOE(config))

    def int4(self):
        """By its own."""
        config = self._config()
        for name, each in zip(("gate", "up", "down"), self._weights, strict=True):
            groups = each.unflatten(2, (-1, GROUP))
            scales = (groups.abs().amax(-1) / 7).bfloat16()
            codes = (groups / scales.float()[..., None]).round_().clamp_(-8, 7).to(torch.int32).add_(8).flatten(2)
            words = sum(codes[..., place::8] << 4 * place for place in range(8)).to(torch.int32)
            self._kept += [words, scales]
            setattr(config, f"{name}_projs", [[its.data_ptr() for its in words]])
            setattr(config, f"{name}_scales", [[its.data_ptr() for its in scales]])
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, GROUP, False
        return self._loaded(self._kernels.moe.AVX2RawInt4_MOE(config))

    def caller(self, module, rows: Tensor, count: int) -> tuple[Callable[[], None], Tensor]:
        """rows (E * n, D) bfloat16 -> what computes them, and the outputs that it fills."""
        outputs = torch.empty_like(rows)
        ids = torch.arange(self._experts).repeat_interleave(count)
        given = [torch.tensor([len(rows)], dtype=torch.int32), ids, torch.ones(len(rows)), rows, outputs]
        length, *others = (each.data_ptr() for each in given)
        self._kept += given

        def call() -> None:
            self._infer.submit(module.forward_task(length, 1, *others, False))
            self._infer.sync()

        return call, outputs

    def _config(self):
        config = self._kernels.moe.MOEConfig(self._experts, 1, self._dim, self._hidden, self._kept[0].data_ptr())
        config.pool, config.max_len = self._infer.backend_, 1024
        return config

    def _loaded(self, module):
        self._infer.submit(module.load_weights_task(self._kept[1].data_ptr()))
        self._infer.sync()
        return module


if __name__ == "__main__":
    serve(prepare)
