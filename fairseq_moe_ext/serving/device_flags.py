"""Flags that work on a GPU alone, looked at before anything is loaded: by the commands and from Python."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

import torch

from fairseq_moe_ext.kernels.choice import AMPERE
from fairseq_moe_ext.torch_versions import triton_is_interpreted


def check_device_flags(args: Namespace) -> None:
    """ValueError, which names the flag, where one of `args` cannot work on the device that they ask for."""
    on_cpu = bool(getattr(args, "cpu", False))
    check_kernel_flag(str(getattr(args, "moe_kernel", "auto")), on_cpu)
    check_host_memory_flag(str(getattr(args, "expert_host_memory", "auto")), on_cpu)


def check_kernel_flag(kernel: str, on_cpu: bool) -> None:
    """ValueError where `--moe-kernel` is Triton's and cannot run; on_cpu: whether the user asked for the CPU."""
    if kernel != "triton" or find_spec("triton") is not None and triton_is_interpreted():
        return
    if (got := _no_gpu(on_cpu)) is not None:
        raise ValueError(f"--moe-kernel triton needs a GPU, got {got}: auto or loop serve on a CPU")
    if (capability := torch.cuda.get_device_capability()) < AMPERE:
        raise ValueError(
            f"--moe-kernel triton needs a GPU of compute capability {AMPERE[0]}.{AMPERE[1]} or newer, got "
            f"{capability[0]}.{capability[1]}"
        )


def check_host_memory_flag(size: str, on_cpu: bool) -> None:
    """ValueError where `--expert-host-memory` is given on a CPU, whose buffer is in main memory itself."""
    if size != "auto" and (got := _no_gpu(on_cpu)) is not None:
        raise ValueError(f"--expert-host-memory {size} needs a GPU, got {got}: it lies between the disk store and one")


def _no_gpu(on_cpu: bool) -> str | None:
    """What keeps a command from serving on a GPU; on_cpu: whether the user asked for the CPU."""
    if on_cpu:
        return "--cpu"
    return None if torch.cuda.is_available() else "a machine where PyTorch finds none"
