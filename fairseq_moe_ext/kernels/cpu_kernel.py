"""The C kernel of cpu/kernel.c: the experts' linear layers on a CPU, each on its own few rows.

It is compiled at installation where there is a C compiler; without it PyTorch's products do everything, slower.
The environment variable FAIRSEQ_MOE_CPU_KERNEL says which of its instructions run, or that it does not.

Legend: X = experts, S = slots, N = rows, K = input features, M = output features.
"""

from __future__ import annotations

import ctypes
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from fairseq_moe_ext.kernels.activations import Activation

logger = logging.getLogger("fairseq_moe_ext")

VARIABLE = "FAIRSEQ_MOE_CPU_KERNEL"
INSTRUCTIONS = ("plain", "avx2", "avx512")  # by the C kernel's numbers, each more than the one before
CHOICES = ("auto", *INSTRUCTIONS[::-1], "off")  # the best that the CPU has; these; PyTorch's products alone
NAMES = {"plain": "plain", "avx2": "AVX2", "avx512": "AVX-512"}
NEEDS = {"avx2": "AVX2, FMA and F16C", "avx512": "AVX-512 (F, DQ, BW, VL)"}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # by the C kernel's numbers
# what the C kernel computes by itself, by its numbers
ACTIVATIONS: dict[Activation | None, int] = {None: 0, F.relu: 1, torch.relu: 1, F.gelu: 2}
VERSION = 10  # of what is passed to the C kernel
ANY_ROWS = 2**62
LONGEST = 256  # rows of an expert at a time: what the kernel keeps for each of its threads grows with them


class Groups:
    """The rows of X experts, as (4, X) int32: sources and targets (the first row of each expert, in what is read and in
    what is filled), counts (how many rows) and slots (where its weight lies).

    row_ids: (N,) int64, what is read are the rows of these numbers; None: the rows as they lie.
    """

    def __init__(
        self,
        sources: ArrayLike,
        targets: ArrayLike,
        counts: ArrayLike,
        slots: ArrayLike,
        row_ids: Tensor | None = None,
    ):
        self.row_ids = row_ids
        self.numbers = numbers = np.empty((4, len(counts)), np.int32)
        numbers[0], numbers[1], numbers[2], numbers[3] = sources, targets, counts, slots

    @classmethod
    def of_one(cls, count: int) -> Groups:
        """The first `count` rows, of the expert in slot 0."""
        groups = cls.__new__(cls)
        groups.row_ids, groups.numbers = None, np.zeros((4, 1), np.int32)
        groups.numbers[2, 0] = count
        return groups

    @property
    def counts(self) -> np.ndarray:
        """(X,) rows per expert."""
        return self.numbers[2]

    def up_to(self, most: int) -> Groups:
        """Without the rows of experts that have more than `most`."""
        sources, targets, counts, slots = self.numbers
        return Groups(sources, targets, np.where(counts <= most, counts, 0), slots, self.row_ids)

    def split(self, most: int) -> Groups:
        """Of the experts with at most `most` rows, none with more than LONGEST at a time: the others come in parts."""
        counts = self.counts
        if most <= LONGEST or not len(counts) or counts.max() <= LONGEST:
            return self
        parts = np.where(counts <= most, -(-counts // LONGEST), 1)
        experts = np.repeat(np.arange(len(counts)), parts)
        before = (np.arange(len(experts)) - np.repeat(parts.cumsum() - parts, parts)) * LONGEST
        sources, targets, counts, slots = self.numbers[:, experts]
        its = np.where(counts <= most, np.minimum(counts - before, LONGEST), 0)
        return Groups(sources + before, targets + before, its, slots, self.row_ids)


class Linear(NamedTuple):
    """weight (S, M, K) and bias (S, M) of S experts' layers, and what follows: a key of ACTIVATIONS."""

    weight: Tensor
    bias: Tensor
    activation: Activation | None = None


class Kernel:
    """The compiled kernel on some of its instructions."""

    def __init__(self, library: ctypes.CDLL, instructions: str):
        self.library, self.instructions, self.name = library, instructions, NAMES[instructions]
        self.number = INSTRUCTIONS.index(instructions)
        self._run, self._touch = self.function("run_experts"), self.function("touch_experts")

    def function(self, name: str) -> Callable[..., int]:
        """One of the library's that `call` takes."""
        found: Callable[..., int] = getattr(self.library, name)
        found.argtypes, found.restype = [ctypes.c_void_p], ctypes.c_int64
        return found

    def run(
        self, rows: Tensor, layers: Sequence[Linear], groups: Groups, outputs: Tensor, most: int = ANY_ROWS
    ) -> None:
        """rows (N, K) through one or two layers -> the groups' rows of outputs (N', M), where an expert has at most
        `most` rows; PyTorch's threads share every expert.

        All tensors lie on the CPU, are contiguous and of one of DTYPES. An expert's outputs depend on its rows and
        weights alone, bit by bit: not on where they lie, on other rows, or on the number of threads. ValueError where
        something does not fit.
        """
        dtype = rows.dtype
        if dtype not in DTYPES:
            raise ValueError(f"rows must be of one of {', '.join(map(str, DTYPES))}, got {dtype}")
        if len(layers) not in (1, 2):
            raise ValueError(f"layers must be one or two, got {len(layers)}")
        given = [address_of(rows, "rows", dtype), address_of(outputs, "outputs", dtype)]
        features, num_slots = rows.shape[1], ANY_ROWS
        for weight, bias, activation in layers:
            slots, its_features, inputs = shape = weight.shape
            if 0 in (inputs, its_features):
                raise ValueError(f"a weight must have inputs and outputs, got {tuple(shape)}")
            if inputs != features or bias.shape != (slots, its_features):
                raise ValueError(
                    f"rows and bias must fit the weight {tuple(shape)}, got rows of {features} features "
                    f"and a bias {tuple(bias.shape)}"
                )
            given += (
                *(address_of(weight, "weight", dtype), address_of(bias, "bias", dtype)),
                *(inputs, its_features, ACTIVATIONS[activation]),
            )
            features, num_slots = its_features, min(slots, num_slots)
        if outputs.shape[1] != features:
            raise ValueError(f"outputs must have the last weight's {features} features, got {outputs.shape[1]}")
        if len(layers) == 1:
            given += [0] * 5
        sizes = rows.shape[0], outputs.shape[0], num_slots  # no len(), which PyTorch has slower
        self.call(self._run, groups, most, sizes, DTYPES[dtype], len(layers), *given)

    def touch_pages(self, weight: Tensor) -> None:
        """PyTorch's threads touch the memory of a new weight (S, M, K), of one of DTYPES: each the pages of those rows
        that it will compute first (cpu/touching.h). Its values are lost; a bias has few pages, and is left alone."""
        slots, outputs, inputs = weight.shape
        layer = address_of(weight, "weight", weight.dtype), 0, inputs, outputs, ACTIVATIONS[None]
        its = DTYPES[weight.dtype], 1, 0, 0, *layer, *[0] * 5
        self.call(self._touch, Groups([], [], [], []), ANY_ROWS, (0, 0, slots), *its)

    def call(self, run: Callable[..., int], groups: Groups, most: int, sizes: tuple[int, int, int], *its: int) -> None:
        """A function of C's on `its` numbers, for the groups' rows, as sharing.h and kernel.c want it; sizes: how many
        rows, outputs and slots there are. ValueError where the groups do not lie within these."""
        if sizes[1] > LONGEST:
            groups = groups.split(most)
        numbers, row_ids = groups.numbers, groups.row_ids
        ids = (0, 0) if row_ids is None else (address_of(row_ids, "row ids", torch.int64), row_ids.shape[0])
        call = array("q", (numbers.shape[1], most, _data(numbers), *ids, *sizes, *team(), self.number, *its))
        error = run(call.buffer_info()[0])
        if error == -1:
            raise MemoryError("no memory for the experts' hidden features")
        if error:
            what = "groups" if row_ids is None else "groups and row ids"
            raise ValueError("{} must lie within the {} rows, {} outputs and {} slots".format(what, *sizes))


def can_be_read(*tensors: Tensor) -> bool:
    """Whether C may read and write in place of PyTorch: values on the CPU, of no class that only stands for some, while
    nothing is recorded."""
    on_cpu = all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors)
    return on_cpu and not torch.jit.is_tracing()


def address_of(tensor: Tensor, name: str, dtype: torch.dtype) -> int:
    """Of a tensor that C reads or fills; ValueError naming it where it does not lie as C wants it."""
    if tensor.dtype is not dtype or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, on the CPU and of {dtype}, got {tensor.dtype} on {tensor.device}, "
            f"strides {tensor.stride()}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must need no gradient: the C kernel gives none")
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"{name} must have values: the C kernel reads no {type(tensor).__name__} without")
    return address


def _data(numbers: np.ndarray) -> int:
    """The address of its values; a third of the time that NumPy's own ways to it take."""
    return ctypes.addressof(ctypes.c_char.from_buffer(numbers)) if numbers.size else 0


def load_kernel() -> Kernel | None:
    """The compiled kernel, as FAIRSEQ_MOE_CPU_KERNEL wants it; None where that is off, or by default not compiled.

    ValueError where the variable is none of CHOICES or asks for what this machine lacks.
    """
    return _kernel(os.environ.get(VARIABLE) or "auto")


def check_kernel() -> None:
    """`load_kernel`'s errors, without its warning: where all runs on a GPU the kernel is not needed."""
    if os.environ.get(VARIABLE):
        load_kernel()


@lru_cache
def _kernel(choice: str) -> Kernel | None:
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "off":
        return None
    library = _library()
    if library is None:
        if choice != "auto":
            raise ValueError(f"{VARIABLE} {choice} needs the C kernel, which `pip install -e .` compiles")
        logger.warning(
            "experts run slower, few rows and quantised ones above all: the C kernel is not compiled, or of another "
            "version than this code; `pip install -e .` compiles it"
        )
        return None
    best = library.best_instructions()
    if choice == "auto":
        choice = INSTRUCTIONS[best]
    if INSTRUCTIONS.index(choice) > best:
        raise ValueError(f"{VARIABLE} {choice} needs a CPU with {NEEDS[choice]}")
    return Kernel(library, choice)


def _library() -> ctypes.CDLL | None:
    """What the installation compiled; None where it did not, did so for another version of the C file, or for another
    kind of machine."""
    spec = find_spec("fairseq_moe_ext.kernels._cpu_kernel")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        library.best_instructions.restype = library.cpu_kernel_version.restype = ctypes.c_int64
        return library if library.cpu_kernel_version() == VERSION else None
    except (OSError, AttributeError):
        return None


def team() -> tuple[int, int, int]:
    """struct team of cpu/sharing.h: PyTorch's number of threads, and how to have them."""
    threads = torch.get_num_threads()
    return threads, *(_team() if threads > 1 else (0, 0))


def _team() -> tuple[int, int]:
    """The addresses of the functions by which PyTorch's OpenMP library runs something on its threads, and says which of
    them is the calling one: there is no second pool beside PyTorch's, and a thread has the same number in every call.

    0 where there is no such function. The first is 0 where one thread must do: also where that library's threads were
    left behind in the process that forked this one."""
    return _addresses_of_team() if os.getpid() == _process_of_team() else (0, 0)


@lru_cache
def _process_of_team() -> int:
    """The first process that asks; a forked child inherits the answer."""
    return os.getpid()


@lru_cache
def _addresses_of_team() -> tuple[int, int]:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return 0, 0
    functions = (getattr(library, name, None) for name in ("GOMP_parallel", "omp_get_thread_num"))
    start, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 if function else 0 for function in functions)
    return start, number
