"""`moe_translation`: fairseq's bilingual translation over MoE checkpoints."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from fairseq.data import encoders
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.tasks.eval_bleu_options import check_eval_bleu
from fairseq_moe_ext.tasks.flags import FairseqsFlags, MoEFlags
from fairseq_moe_ext.tasks.serving_task import ServingTask


@dataclass
class MoETranslationConfig(MoEFlags, FairseqsFlags, TranslationConfig):
    """fairseq's fields and the plugin's."""


@register_task("moe_translation", dataclass=MoETranslationConfig)
class MoETranslationTask(ServingTask, TranslationTask):
    """Translation: training, `fairseq-generate`, `fairseq-interactive`."""

    served_model_class = MoETransformerModel

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        """As fairseq's; ValueError for options of --eval-bleu that fairseq would not understand."""
        check_eval_bleu(cfg)
        return super().setup_task(cfg, **kwargs)

    def _build_for_serving(self, args: Any, state: Any):
        model = super()._build_for_serving(args, state)
        if self.cfg.eval_bleu:  # fairseq's own `build_model`, which is passed by, makes these two
            detokenizer = Namespace(tokenizer=self.cfg.eval_bleu_detok, **json.loads(self.cfg.eval_bleu_detok_args))
            self.tokenizer = encoders.build_tokenizer(detokenizer)
            search = Namespace(**json.loads(self.cfg.eval_bleu_args))
            self.sequence_generator = self.build_generator([model], search)
        return model
