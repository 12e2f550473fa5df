"""The gate loss added to one of fairseq's criterions, combined and logged as upstream does it.

Source: upstream's `criterions/fairseq_criterion.py` (MoECriterion).
"""

import math
from dataclasses import dataclass, field

import torch
from fairseq.dataclass import ChoiceEnum
from fairseq.logging import metrics

from fairseq_moe_ext.gating import MOELayer

METADATA_KEYS = (
    "overflow_expert1",
    "overflow_expert2",
    "entropy_gating",
    "expert1_balance_top",
    "expert1_balance_bottom",
    "unused_expert1_count",
    "expert2_balance_top",
    "expert2_balance_bottom",
    "unused_expert2_count",
    "all_to_all_cpu_time_ms",
    "all_to_all_cuda_time_ms",
)


@dataclass
class GateLossFields:
    """Fields of the gate loss, by upstream's names."""

    moe_gate_loss_wt: float = field(default=1.0, metadata={"help": "weight of the gate loss"})
    moe_gate_loss_combine_method: ChoiceEnum(["average", "sum"]) = field(
        default="average", metadata={"help": "how the layers' gate losses are combined"}
    )
    moe_gate_loss_transform: ChoiceEnum(["none", "neg_log"]) = field(
        default="none", metadata={"help": "what is done to the combined gate loss"}
    )


class GateLoss:
    """Mixin before one of fairseq's criterions, whose own loss is the inner loss."""

    def set_gate_loss(self, weight: float, combine_method: str, transform: str) -> None:
        """Keep what the criterion's fields say: the weight, `average` or `sum` over layers, `none` or `neg_log`."""
        self.gate_loss_weight = weight
        self.gate_loss_combine_method = str(combine_method)
        self.gate_loss_transform = str(transform)

    def forward(self, model, sample, reduce=True):
        """As fairseq's: (loss, sample_size, logging_output); the loss is a sum over the sample."""
        layers = [module for module in model.modules() if isinstance(module, MOELayer)]
        for layer in layers:
            layer.recall(None)
        inner_loss, sample_size, logging_output = super().forward(model, sample, reduce=reduce)
        loss = inner_loss
        if layers:
            # layer drop leaves out some; a serving layer is to complain
            called = [layer for layer in layers if layer.serving or layer.statistics is not None]
            gate_loss = sample_size * self.combined_gate_loss(called) if called else torch.zeros_like(inner_loss)
            loss = inner_loss + self.gate_loss_weight * gate_loss
            logging_output["moe_loss"] = gate_loss.data
            logging_output.update(_mean_metadata(called))
        logging_output["inner_loss"] = inner_loss.data
        logging_output["loss"] = loss.data
        return loss, sample_size, logging_output

    def combined_gate_loss(self, layers: list[MOELayer]) -> torch.Tensor:
        """Scalar: the layers' gate losses, combined and transformed."""
        total = sum(layer.gate_loss().float() for layer in layers)
        if self.gate_loss_combine_method == "average":
            total = total / len(layers)
        return -total.log() if self.gate_loss_transform == "neg_log" else total

    @staticmethod
    def reduce_gate_metrics(logging_outputs) -> None:
        """Log the gate loss and upstream's metadata of a step."""
        batch_count = sum(log.get("batch_count", 0) for log in logging_outputs)
        if batch_count == 0:
            return  # a dense model
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        gate_loss = sum(log.get("moe_loss", 0) for log in logging_outputs)
        metrics.log_scalar("moe_gate_loss", gate_loss / sample_size, sample_size, round=8)
        for key in METADATA_KEYS:
            total = sum(log.get(key, 0) for log in logging_outputs)
            metrics.log_scalar(key, total / batch_count, batch_count, round=3)


def _mean_metadata(layers: list[MOELayer]) -> dict:
    """Mean over the layers of upstream's metadata; what one rank or one choice does not have is 0."""
    found = [layer.metadata() for layer in layers]
    means = {key: sum(metadata.get(key, 0) for metadata in found) / max(len(found), 1) for key in METADATA_KEYS}
    return {**means, "batch_count": int(bool(found))}


def log_in_bits(name: str, total, count: int) -> None:
    """Log a sum of natural-log losses per `count`, in bits."""
    metrics.log_scalar(name, total / count / math.log(2), count, round=3)
