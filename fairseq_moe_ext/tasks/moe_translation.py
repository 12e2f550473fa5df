"""`moe_translation`: fairseq's bilingual translation over MoE checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.tasks.flags import FairseqsFlags, MoEFlags
from fairseq_moe_ext.tasks.serving_task import ServingTask


@dataclass
class MoETranslationConfig(MoEFlags, FairseqsFlags, TranslationConfig):
    """fairseq's fields and the plugin's."""


@register_task("moe_translation", dataclass=MoETranslationConfig)
class MoETranslationTask(ServingTask, TranslationTask):
    """Translation: training, `fairseq-generate`, `fairseq-interactive`."""

    served_model_class = MoETransformerModel
