"""`moe_translation_multi_simple_epoch`: fairseq's multilingual translation over MoE checkpoints (NLLB's task)."""

from __future__ import annotations

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.serving_parser import prepare_parser
from fairseq_moe_ext.tasks.serving_task import ServingTask


@register_task("moe_translation_multi_simple_epoch")
class MoETranslationMultiSimpleEpochTask(ServingTask, TranslationMultiSimpleEpochTask):
    """Multilingual translation: training, `fairseq-generate`, `fairseq-interactive`."""

    served_model_class = MoETransformerModel

    @staticmethod
    def add_args(parser):
        TranslationMultiSimpleEpochTask.add_args(parser)
        gen_parser_from_dataclass(parser, MoEFlags())
        prepare_parser(parser)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        # as fairseq's own: the forced language token is no part of the translation
        extra_gen_cls_kwargs = dict(extra_gen_cls_kwargs or {})
        _, target_langtok = self.args.langtoks["main"]
        if target_langtok and not getattr(args, "keep_inference_langtok", False):
            token = self.data_manager.get_decoder_langtok(self.args.target_lang, target_langtok)
            extra_gen_cls_kwargs["symbols_to_strip_from_output"] = {token}
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)
