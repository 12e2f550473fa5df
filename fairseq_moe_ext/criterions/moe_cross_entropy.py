"""`moe_cross_entropy`: cross entropy plus the gate loss (upstream's criterion of the same name)."""

from dataclasses import dataclass

from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.logging import metrics

from fairseq_moe_ext.criterions.gate_loss import GateLoss, GateLossFields, log_in_bits


@dataclass
class MoECrossEntropyConfig(GateLossFields, CrossEntropyCriterionConfig):
    """fairseq's fields and the gate loss's."""


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(GateLoss, CrossEntropyCriterion):
    """Cross entropy plus the gate loss."""

    def __init__(
        self, task, sentence_avg, moe_gate_loss_wt, moe_gate_loss_combine_method, moe_gate_loss_transform
    ):
        super().__init__(task, sentence_avg)
        self.set_gate_loss(moe_gate_loss_wt, moe_gate_loss_combine_method, moe_gate_loss_transform)

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """Log loss, inner loss (both base 2) and the gates' figures of all workers."""
        GateLoss.reduce_gate_metrics(logging_outputs)
        sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
        ntokens = sum(log.get("ntokens", 0) for log in logging_outputs)
        inner_loss = sum(log.get("inner_loss", 0) for log in logging_outputs)
        log_in_bits("loss", sum(log.get("loss", 0) for log in logging_outputs), sample_size)
        log_in_bits("inner_loss", inner_loss, sample_size)
        # perplexity is the inner loss's: the gate loss says nothing of the language
        of_tokens = "inner_loss" if sample_size == ntokens else "nll_loss"
        if of_tokens == "nll_loss":
            log_in_bits("nll_loss", inner_loss, ntokens)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[of_tokens].avg))
