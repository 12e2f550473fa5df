"""What all experts' modules have in common. Legend: H = local experts, N = rows in expert order, D = model dim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from fairseq_moe_ext.experts.buffer_call import BufferCall
from fairseq_moe_ext.experts.parts import ExpertKeys, packed_shapes
from fairseq_moe_ext.kernels.activations import Activation
from fairseq_moe_ext.kernels.offsets import Offsets


class CalledByCounts(nn.Module, ABC):
    """Experts that `run` by offsets on the device, and are called by counts on the host.

    local: the numbers of the experts that lie here, rising; None: all. kernel: what computes them where nothing is
    trained, one of KERNELS (kernels/choice.py).
    """

    def __init__(
        self,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        activation: Activation,
        local: Sequence[int] | None,
        kernel: str,
    ):
        super().__init__()
        self.num_experts, self.model_dim, self.hidden_dim = num_experts, model_dim, hidden_dim
        self.local = tuple(range(num_experts) if local is None else local)
        if list(self.local) != sorted(set(self.local) & set(range(num_experts))):
            raise ValueError(f"local must be rising numbers of experts below {num_experts}, got {self.local}")
        self.activation = activation
        self.kernel = kernel
        self.totals = BufferCall()  # of all calls
        self._keys = ExpertKeys(num_experts, self.local, packed_shapes(len(self.local), model_dim, hidden_dim))

    def use_kernel(self, kernel: str) -> None:
        """From here on compute by `kernel`."""
        self.kernel = kernel

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """rows (N, D) in expert order, H counts that sum to N -> outputs (N, D)."""
        if sum(rows_per_expert) != rows.size(0):
            raise ValueError(f"rows_per_expert must sum to the {rows.size(0)} rows, got {sum(rows_per_expert)}")
        return self.run(rows, Offsets.of_counts(rows_per_expert, rows.device))

    @abstractmethod
    def run(self, rows: Tensor, offsets: Offsets) -> Tensor:
        """rows (N, D) in the order of the H experts -> outputs (N, D).

        Rows behind the last expert's belong to nobody, and their outputs have no meaning.
        """
