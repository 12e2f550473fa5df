"""ggml's shared libraries, as llama-cpp-python installs them, by ctypes: what a chain of products needs.

A tensor's dims are named as ggml has them, the innermost first: a weight (M, K) is of dims (K, M).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 8, "I32": 26}
BYTES = {"F32": (4, 1), "Q4_0": (18, 32), "Q8_0": (34, 32), "I32": (4, 1)}  # of so many values
META = 1 << 20  # bytes of tensors' heads and of a graph, ample


class _Params(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_FUNCTIONS = {  # name -> result, arguments; a tensor, a context, a buffer are pointers
    "ggml_init": (c_void_p, _Params),
    "ggml_new_tensor": (c_void_p, c_void_p, c_int, c_int, POINTER(c_int64)),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_relu": (c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_get_default_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_get_device": (c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_cpu_has_avx2": (c_int,),
    "ggml_cpu_has_avx512_vnni": (c_int,),
    "ggml_cpu_has_llamafile": (c_int,),
}


class Ggml:
    """The CPU's backend with so many threads. Nothing is given back before the process ends."""

    def __init__(self, threads: int):
        folder = Path(find_spec("llama_cpp").origin).parent / "lib"
        libraries = [
            ctypes.CDLL(str(folder / f"libggml-{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("base", "cpu")
        ]
        self._functions = {}
        for name, (result, *types) in _FUNCTIONS.items():
            function = next(found for library in libraries if (found := getattr(library, name, None)) is not None)
            function.restype, function.argtypes = result, types
            self._functions[name.removeprefix("ggml_")] = function
        self._backend = self("backend_cpu_init")
        self("backend_cpu_set_n_threads", self._backend, threads)

    def __call__(self, name: str, *arguments):
        """ggml_`name`."""
        return self._functions[name](*arguments)

    def instructions(self) -> str:
        """What its products were compiled for."""
        names = {"avx2": "AVX2", "avx512_vnni": "AVX-512 VNNI", "llamafile": "tinyBLAS"}
        return ", ".join(name for flag, name in names.items() if self(f"cpu_has_{flag}"))

    def repacking(self) -> int:
        """The buffer type that lays weights out anew as they are written into it, as llama.cpp takes it by default."""
        address = self("backend_reg_get_proc_address", self("backend_cpu_reg"), b"ggml_backend_dev_get_extra_bufts")
        found = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self("backend_get_device", self._backend))
        if not found[0]:
            raise RuntimeError("this build of ggml repacks nothing")
        return found[0]

    def weights(self, kind: str, parts: Sequence[Tensor], repacked: bool = False) -> list[int]:
        """parts, each (..., M, K) float32 -> a tensor each of this kind."""
        context = self._context()
        tensors = [self._tensor(context, kind, reversed(part.shape)) for part in parts]
        buffer = self.repacking() if repacked else self("backend_get_default_buffer_type", self._backend)
        self._allocate(context, buffer)
        for tensor, part in zip(tensors, parts, strict=True):
            nbytes, values = BYTES[kind]
            quantized = torch.empty(part.numel() * nbytes // values, dtype=torch.uint8)
            rows, inputs = part.numel() // part.size(-1), part.size(-1)
            self("quantize_chunk", TYPES[kind], part.data_ptr(), quantized.data_ptr(), 0, rows, inputs, None)
            self("backend_tensor_set", tensor, quantized.data_ptr(), 0, quantized.numel())
        return tensors

    def graph(self) -> Graph:
        """An empty one."""
        return Graph(self)

    def _context(self) -> int:
        return self("init", _Params(META, None, True))

    def _tensor(self, context: int, kind: str, dims) -> int:
        dims = list(dims)
        return self("new_tensor", context, TYPES[kind], len(dims), (c_int64 * len(dims))(*dims))

    def _allocate(self, context: int, buffer_type: int) -> None:
        if not self("backend_alloc_ctx_tensors_from_buft", context, buffer_type):
            raise MemoryError("ggml cannot allocate its tensors")


class Graph:
    """Products that are computed again and again. Build it, `ready` it, then `run` it."""

    def __init__(self, ggml: Ggml):
        self._ggml, self._context, self._inputs = ggml, ggml._context(), []
        self._graph = ggml("new_graph", self._context)

    def input(self, values: Tensor) -> int:
        """values (...) float32 or int32 -> a tensor that holds them."""
        kind = "I32" if values.dtype == torch.int32 else "F32"
        tensor = self._ggml._tensor(self._context, kind, reversed(values.shape))
        self._inputs.append((tensor, values.contiguous()))
        return tensor

    def multiply(self, weight: int, rows: int, ids: int | None = None) -> int:
        """By one weight, or by that of each row's expert."""
        if ids is None:
            return self._ggml("mul_mat", self._context, weight, rows)
        return self._ggml("mul_mat_id", self._context, weight, rows, ids)

    def relu(self, rows: int) -> int:
        return self._ggml("relu", self._context, rows)

    def output(self, tensor: int) -> int:
        self._ggml("build_forward_expand", self._graph, tensor)
        return tensor

    def ready(self) -> None:
        """Give every tensor its memory, and the inputs their values."""
        ggml = self._ggml
        ggml._allocate(self._context, ggml("backend_get_default_buffer_type", ggml._backend))
        for tensor, values in self._inputs:
            ggml("backend_tensor_set", tensor, values.data_ptr(), 0, values.numel() * values.element_size())

    def run(self) -> None:
        """RuntimeError where ggml cannot compute it."""
        status = self._ggml("backend_graph_compute", self._ggml._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml's graph ends with status {status}")

    def read(self, tensor: int, *shape: int) -> Tensor:
        """float32."""
        values = torch.empty(shape)
        self._ggml("backend_tensor_get", tensor, values.data_ptr(), 0, 4 * values.numel())
        return values
