"""What all experts' modules have in common. Legend: H = local experts, N = rows in expert order, D = model dim."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fairseq_moe_ext.kernels.offsets import Offsets


class CalledByCounts(nn.Module):
    """Experts that `run` by offsets on the device, and are called by counts on the host.

    kernel: what computes them where nothing is trained, one of KERNELS (kernels/choice.py).
    """

    def __init__(self, kernel: str):
        super().__init__()
        self.kernel = kernel

    def use_kernel(self, kernel: str) -> None:
        """From here on compute by `kernel`."""
        self.kernel = kernel

    def forward(self, rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """rows (N, D) in expert order, H counts that sum to N -> outputs (N, D)."""
        if sum(rows_per_expert) != rows.size(0):
            raise ValueError(f"rows_per_expert must sum to the {rows.size(0)} rows, got {sum(rows_per_expert)}")
        return self.run(rows, Offsets.of_counts(rows_per_expert, rows.device))

    def run(self, rows: Tensor, offsets: Offsets) -> Tensor:
        """rows (N, D) in the order of the H experts -> outputs (N, D).

        Rows behind the last expert's belong to nobody, and their outputs have no meaning.
        """
        raise NotImplementedError
