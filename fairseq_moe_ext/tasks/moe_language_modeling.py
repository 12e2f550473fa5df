"""`moe_language_modeling`: fairseq's language modeling over MoE checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fairseq import utils
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_moe_ext.checkpoints.dictionary_file import load_dictionary
from fairseq_moe_ext.models.moe_transformer_lm import MoETransformerLanguageModel
from fairseq_moe_ext.tasks.flags import FairseqsFlags, MoEFlags
from fairseq_moe_ext.tasks.serving_task import ServingTask


@dataclass
class MoELanguageModelingConfig(MoEFlags, FairseqsFlags, LanguageModelingConfig):
    """fairseq's fields and the plugin's."""


@register_task("moe_language_modeling", dataclass=MoELanguageModelingConfig)
class MoELanguageModelingTask(ServingTask, LanguageModelingTask):
    """Language modeling: training, `fairseq-eval-lm`, and generation from prompts."""

    served_model_class = MoETransformerLanguageModel
    served_unit = "blocks"

    @classmethod
    def setup_task(cls, args, **kwargs):
        """As fairseq's; ValueError for options that cannot take effect."""
        if getattr(args, "continuous_batching", False):
            raise ValueError("--continuous-batching is for translation tasks, got moe_language_modeling")
        if args.tokens_per_sample < 1:  # fairseq-eval-lm has taken the context off
            raise ValueError(
                f"--tokens-per-sample must be above --context-window, got {args.tokens_per_sample} tokens beside it"
            )
        return super().setup_task(args, **kwargs)

    @classmethod
    def setup_dictionary(cls, args, **kwargs):
        """As fairseq's; CheckpointError says what is wrong in a dictionary."""
        # fairseq's reads it past `load_dictionary`
        file = Path(utils.split_paths(args.data)[0], "dict.txt") if args.data else None
        if file is not None and file.exists():
            load_dictionary(file)
        return super().setup_dictionary(args, **kwargs)

    def load_dataset(self, split, *args, **kwargs):
        """As fairseq's; under static gating blocks are padded to a fixed length, as upstream evaluates them."""
        if self.static_serving:
            # upstream's evaluation forces it, and under a capacity the padding of the last block counts
            self.args.pad_to_fixed_length = True
        return super().load_dataset(split, *args, **kwargs)

    def eval_lm_dataloader(self, *args, context_window=0, max_positions=None, num_workers=1, **kwargs):
        """As fairseq's; ValueError where rows with their context are longer than the model's positions."""
        self.shards_by_user = True
        if context_window > 0:
            # its data set hands the end of a batch on to the next
            self.batches_in_order, num_workers = True, min(num_workers, 1)
            longest = self.args.tokens_per_sample + context_window
            if max_positions is not None and longest > max_positions:
                raise ValueError(
                    f"--tokens-per-sample, the --context-window of {context_window} in it, must be at most the "
                    f"model's {max_positions} positions, got {longest}"
                )
        kwargs |= {"max_positions": max_positions, "num_workers": num_workers}
        return super().eval_lm_dataloader(*args, context_window=context_window, **kwargs)

    def get_batch_iterator(self, dataset, *args, seed=1, epoch=1, **kwargs):
        """As fairseq's; when serving, batches come in upstream's order."""
        if self.observer is not None:
            # the release orders blocks by seed + epoch where upstream orders them by the seed alone, and under a
            # capacity the figures depend on which blocks share a batch
            seed -= epoch
        return super().get_batch_iterator(dataset, *args, seed=seed, epoch=epoch, **kwargs)
