"""Calls of the C kernel and of what stands beside it, for the tests of this folder."""

import ctypes
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fairseq_moe_ext.kernels import cpu_kernel
from fairseq_moe_ext.kernels.cpu_kernel import ANY_ROWS, DTYPES, INSTRUCTIONS, VARIABLE, Groups, Kernel, Linear
from fairseq_moe_ext.kernels.crossing import TABLE
from fairseq_moe_ext.kernels.loop import run_loop
from fairseq_moe_ext.kernels.offsets import Offsets

FEW_ROWS = max(rows[torch.float32] for rows in TABLE.values())  # more go to PyTorch's products on every CPU
REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "fairseq_moe_ext" / "kernels" / "cpu" / "kernel.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")


def runs_here(choice: str) -> bool:
    """Whether the kernel was compiled and the CPU has these instructions."""
    library = cpu_kernel._library()
    return library is not None and INSTRUCTIONS.index(choice) <= library.best_instructions()


KERNELS = [pytest.param(choice, marks=pytest.mark.skipif(not runs_here(choice), reason=f"no kernel {choice} here"))
           for choice in INSTRUCTIONS]
WAYS = [*KERNELS, "off"]
KERNEL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(counts, inputs, outputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return normal(sum(counts), inputs), normal(len(counts), outputs, inputs), normal(len(counts), outputs)


def one_by_one(rows, counts, weight, bias, activation=None):
    """In double precision."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    results = [weight[owner].double() @ row.double() + bias[owner].double()
               for row, owner in zip(rows, owners, strict=True)]
    result = torch.stack(results) if results else rows.new_zeros(0, weight.size(1)).double()
    return result if activation is None else activation(result)


def groups_of(counts):
    starts = Offsets.of_counts(counts).on_host[:-1]
    return Groups(starts, starts, counts, range(len(counts)))


@contextmanager
def asking_for(choice: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, choice)
        yield


def by_kernel(choice, rows, counts, weight, bias, activation=None, most=ANY_ROWS, library=None):
    """One layer by the C kernel; rows that it leaves as they are stay NaN."""
    output = rows.new_full((rows.size(0), weight.size(1)), float("nan"))
    kernel = Kernel(library or cpu_kernel._library(), choice)
    kernel.run(rows, [Linear(weight, bias, activation)], groups_of(counts), output, most)
    return output


def mlp(rows, counts, pool, activation=F.relu, slots=None):
    """Two layers by `run_loop`, into a new tensor."""
    output = rows.new_full((rows.size(0), pool[2].size(1)), float("nan"))
    run_loop(rows, Offsets.of_counts(counts), slots, pool, activation, output)
    return output


def make_pool(experts, dim, hidden, dtype=torch.float32, seed=1):
    _, fc1_weight, fc1_bias = make([0] * experts, dim, hidden, dtype, seed)
    _, fc2_weight, fc2_bias = make([0] * experts, hidden, dim, dtype, seed + 1)
    return fc1_weight, fc1_bias, fc2_weight, fc2_bias


def compiled(folder, source=SOURCE, *flags):
    """A C file, by default the kernel's, compiled with other flags."""
    library = folder / "kernel.so"
    parts = ["-std=gnu11", "-O2", "-ffp-contract=off", "-Wno-psabi", "-shared", "-fPIC"]
    subprocess.run([COMPILER, *parts, *flags, source, "-o", library], check=True)
    found = ctypes.CDLL(library)
    found.best_instructions.restype = found.cpu_kernel_version.restype = ctypes.c_int64
    return found


needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


def assert_is_linear(choice, rows, counts, weight, bias, activation, most, library=None):
    dtype = rows.dtype
    expected = one_by_one(rows, counts, weight, bias)
    if activation is F.gelu:  # of the rounded sums, as a layer of its own would see them
        expected = activation(expected.to(dtype).double())
    elif activation is not None:
        expected = activation(expected)
    for chunk, count in zip(expected.split(counts), counts, strict=True):
        if count > most:
            chunk.fill_(float("nan"))
    result = by_kernel(choice, rows, counts, weight, bias, activation, most, library)
    rounding = torch.finfo(dtype).eps / 2  # once, to the nearest: what float32 sums lose beside it is absolute
    absolute = 3e-5
    if activation is F.gelu and dtype != torch.float32:
        rounding, absolute = 3 * rounding, 1e-3  # a sum at a tie may round either way before
    torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=absolute, equal_nan=True)
