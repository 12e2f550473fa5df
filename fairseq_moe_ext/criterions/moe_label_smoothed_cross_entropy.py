"""`moe_label_smoothed_cross_entropy`: label-smoothed cross entropy plus the gate loss (upstream's of the same name)."""

from dataclasses import dataclass, field

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from fairseq_moe_ext.criterions.gate_loss import GateLoss, GateLossFields


@dataclass
class MoELabelSmoothedCrossEntropyConfig(GateLossFields, LabelSmoothedCrossEntropyCriterionConfig):
    """fairseq's fields and the gate loss's; the weight's default is 0 here, as upstream's."""

    moe_gate_loss_wt: float = field(default=0.0, metadata={"help": "weight of the gate loss"})


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedCrossEntropyConfig)
class MoELabelSmoothedCrossEntropyCriterion(GateLoss, LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross entropy plus the gate loss."""

    def __init__(
        self,
        task,
        sentence_avg,
        label_smoothing,
        moe_gate_loss_wt,
        moe_gate_loss_combine_method,
        moe_gate_loss_transform,
        ignore_prefix_size=0,
        report_accuracy=False,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.set_gate_loss(moe_gate_loss_wt, moe_gate_loss_combine_method, moe_gate_loss_transform)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log fairseq's metrics and the gates' figures of all workers."""
        GateLoss.reduce_gate_metrics(logging_outputs)
        super().reduce_metrics(logging_outputs)
