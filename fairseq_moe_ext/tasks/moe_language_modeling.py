"""`moe_language_modeling`: fairseq's language modeling over MoE checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.serving_task import ServingTask


@dataclass
class MoELanguageModelingConfig(MoEFlags, LanguageModelingConfig):
    """fairseq's fields and the plugin's."""


@register_task("moe_language_modeling", dataclass=MoELanguageModelingConfig)
class MoELanguageModelingTask(ServingTask, LanguageModelingTask):
    """Language modeling: training, `fairseq-eval-lm`, and generation from prompts."""

    served_model_class = MoETransformerLanguageModel

    @classmethod
    def setup_task(cls, args, **kwargs):
        if getattr(args, "continuous_batching", False):
            raise ValueError("--continuous-batching is for translation tasks, got moe_language_modeling")
        return super().setup_task(args, **kwargs)

    def load_dataset(self, split, *args, **kwargs):
        if self.static_serving:
            # upstream's evaluation forces it, and under a capacity the padding of the last block counts
            self.args.pad_to_fixed_length = True
        return super().load_dataset(split, *args, **kwargs)

    def eval_lm_dataloader(self, *args, context_window=0, **kwargs):
        self.shards_by_user = True
        self.batches_in_order = context_window > 0  # its data set hands the end of a batch on to the next
        return super().eval_lm_dataloader(*args, context_window=context_window, **kwargs)

    def get_batch_iterator(self, dataset, *args, seed=1, epoch=1, **kwargs):
        if self.observer is not None:
            # the release orders blocks by seed + epoch where upstream orders them by the seed alone, and under a
            # capacity the figures depend on which blocks share a batch
            seed -= epoch
        return super().get_batch_iterator(dataset, *args, seed=seed, epoch=epoch, **kwargs)
