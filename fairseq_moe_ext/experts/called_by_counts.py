"""What all experts' modules have in common. Legend: H = local experts, N = rows in expert order, D = model dim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.experts.formats import Format
from fairseq_moe_ext.experts.parts import ExpertKeys, packed_shapes
from fairseq_moe_ext.experts.schedule import Step, run_steps
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.grouped_mlp import Pool
from fairseq_moe_ext.kernels.offsets import Offsets

# what `run` was given, and its outputs
ExpertsObserver = Callable[[Tensor, Offsets, "Tensor | None", Tensor], None]


class Watcher(Protocol):
    """Sees what experts compute (watched_inputs.py), and changes nothing."""

    def steps(
        self, steps: Iterable[Step], rows: Tensor, offsets: Offsets, pool: Pool, row_ids: Tensor | None
    ) -> Iterator[Step]:
        """The same steps, of a call of run_steps with these arguments."""


class CalledByCounts(nn.Module, ABC):
    """Experts that `run` by offsets on the device, and are called by counts on the host.

    form: how their weights lie. local: the numbers of the experts that lie here, rising; None: all. kernel: what
    computes them where nothing is trained, one of KERNELS (kernels/choice.py).
    """

    def __init__(
        self,
        num_experts: int,
        form: Format,
        activation: Activation,
        local: Sequence[int] | None,
        kernel: str,
    ):
        super().__init__()
        self.num_experts, self.format = num_experts, form
        self.model_dim, self.hidden_dim = form.model_dim, form.hidden_dim
        self.local = tuple(range(num_experts) if local is None else local)
        if list(self.local) != sorted(set(self.local) & set(range(num_experts))):
            raise ValueError(f"local must be rising numbers of experts below {num_experts}, got {self.local}")
        self.activation = activation
        self.kernel = kernel
        self.totals = BufferCall()  # of all calls
        self._watcher: Watcher | None = None
        shapes = packed_shapes(len(self.local), form.model_dim, form.hidden_dim)
        self._keys = ExpertKeys(num_experts, self.local, shapes)
        self._observer: ExpertsObserver | None = None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The model's, in which rows come."""

    @property
    def expert_bytes(self) -> int:
        """Of one expert in fast memory."""
        return self.format.expert_bytes(self.dtype)

    @property
    def total_bytes(self) -> int:
        """Of the weights of all local experts."""
        return len(self.local) * self.expert_bytes

    @property
    def resident_bytes(self) -> int:
        """Of the weights in fast memory."""
        return self.total_bytes

    @property
    def resident_experts(self) -> list[int]:
        """The numbers of the experts in fast memory."""
        return list(self.local)

    def prefetch(self, rows_per_expert: Sequence[int]) -> None:
        """The H counts of the next call, as soon as they are known; nothing to do where all experts are resident."""

    def kernel_for(self, device: torch.device, dtype: torch.dtype) -> str:
        """Which kernel computes rows of `dtype` on `device` where no gradients are wanted."""
        return self.format.kernel(self.kernel, device, dtype)

    def use_kernel(self, kernel: str) -> None:
        """From here on compute by `kernel`."""
        self.kernel = kernel

    def observe(self, observer: ExpertsObserver) -> None:
        """Tell `observer` of every call from here on."""
        self._observer = observer

    def watch(self, watcher: Watcher | None) -> None:
        """Show `watcher` every call from here on; None: nobody."""
        self._watcher = watcher

    def _watched(
        self, steps: Iterable[Step], rows: Tensor, offsets: Offsets, pool: Pool, row_ids: Tensor | None
    ) -> Iterable[Step]:
        return steps if self._watcher is None else self._watcher.steps(steps, rows, offsets, pool, row_ids)

    def _run_steps(
        self, steps: Iterable[Step], rows: Tensor, offsets: Offsets, pool: Pool, row_ids: Tensor | None
    ) -> Tensor:
        """As `run_steps`, by this module's kernel and activation."""
        kernel = self.kernel_for(rows.device, rows.dtype)
        watched = self._watched(steps, rows, offsets, pool, row_ids)
        return run_steps(watched, kernel, rows, offsets, pool, self.activation, row_ids)

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """rows (N, D) in expert order, H counts that sum to N -> outputs (N, D)."""
        if sum(rows_per_expert) != rows.size(0):
            raise ValueError(f"rows_per_expert must sum to the {rows.size(0)} rows, got {sum(rows_per_expert)}")
        return self.run(rows, Offsets.of_counts(rows_per_expert, rows.device))

    def run(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None = None) -> Tensor:
        """rows (N, D) in the order of the H experts, or those of rows (T, D) with the numbers row_ids (N,) int64 ->
        outputs (N, D). RuntimeError where gradients are asked for that these experts do not have.

        Rows behind the last expert's belong to nobody, and their outputs have no meaning.
        """
        outputs = self.compute(rows, offsets, row_ids)
        if self._observer is not None:
            self._observer(rows, offsets, row_ids, outputs)
        return outputs

    @abstractmethod
    def compute(self, rows: Tensor, offsets: Offsets, row_ids: Tensor | None) -> Tensor:
        """As `run`, which tells the observer of it."""
