"""`moe_translation_multi_simple_epoch`: fairseq's multilingual translation over MoE checkpoints (NLLB's task)."""

from __future__ import annotations

import ast
from argparse import ArgumentTypeError

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask
from fairseq.utils import FileContentsAction

from fairseq_moe_ext.models.moe_transformer import MoETransformerModel
from fairseq_moe_ext.nllb.tokens import SPECS_OPTION, TAGS_OPTION, TASKS_OPTION, extra_tokens_of
from fairseq_moe_ext.option_names import as_option
from fairseq_moe_ext.tasks.file_as_data import CheckpointOrContents
from fairseq_moe_ext.tasks.flags import MoEFlags
from fairseq_moe_ext.tasks.nllb_options import accept_nllb_options
from fairseq_moe_ext.tasks.serving_parser import prepare_parser
from fairseq_moe_ext.tasks.serving_task import ServingTask


def _dictionary_specs(text: str) -> dict[str, str]:
    try:
        specs = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        specs = None
    if not isinstance(specs, dict):
        raise ArgumentTypeError(f"must be a dictionary as \"{{'mono_dae': ''}}\", got {text!r}")
    return specs


def _truth(value: bool | str, name: str) -> bool:
    """What an argument that fairseq evaluates says."""
    truths = {"true": True, "1": True, "false": False, "0": False}
    found = truths.get(str(value).lower())
    if found is None:
        raise ValueError(f"{as_option(name)} must be True or False, got {value!r}")
    return found


@register_task("moe_translation_multi_simple_epoch")
class MoETranslationMultiSimpleEpochTask(ServingTask, TranslationMultiSimpleEpochTask):
    """Multilingual translation: training, `fairseq-generate`, `fairseq-interactive`.

    extra_tokens: what NLLB's options added to the dictionary beyond dict.txt and the language tokens.
    """

    served_model_class = MoETransformerModel

    def __init__(self, args, langs, dicts, training):
        self.extra_tokens = extra_tokens_of(args)
        for dictionary in dicts.values():
            for token in self.extra_tokens:
                if token not in dictionary:
                    dictionary.add_symbol(token)
        super().__init__(args, langs, dicts, training)

    @classmethod
    def setup_task(cls, args, **kwargs):
        """As fairseq's; padding sides may be texts or truth values."""
        # fairseq evaluates them as text, and takes a value that is one already for false: a training writes such into
        # its checkpoint, and so does another set-up of the same arguments
        for name in ("left_pad_source", "left_pad_target"):
            setattr(args, name, str(_truth(getattr(args, name, name == "left_pad_source"), name)))
        return super().setup_task(args, **kwargs)

    @staticmethod
    def add_args(parser):
        """fairseq's options, NLLB's and the plugin's flags."""
        parser.register("action", FileContentsAction, CheckpointOrContents)
        TranslationMultiSimpleEpochTask.add_args(parser)
        parser.add_argument(
            TAGS_OPTION, action="store_true", help="add NLLB's tags of mined and back-translated data to the dictionary"
        )
        parser.add_argument(
            TASKS_OPTION, action="store_true", help="add NLLB's tokens of self-supervised tasks to the dictionary"
        )
        parser.add_argument(
            SPECS_OPTION,
            type=_dictionary_specs,
            help="the self-supervised tasks whose tokens the dictionary has, as \"{'mono_dae': '', 'mono_lm': ''}\"",
        )
        gen_parser_from_dataclass(parser, MoEFlags())
        if "--path" in parser._option_string_actions:  # a training would need what they do
            accept_nllb_options(parser)
        prepare_parser(parser)

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        """As `ServingTask.build_generator`; the forced language token is left out of the hypotheses."""
        # as fairseq's own: the forced language token is no part of the translation
        extra_gen_cls_kwargs = dict(extra_gen_cls_kwargs or {})
        _, target_langtok = self.args.langtoks["main"]
        if target_langtok and not getattr(self.args, "keep_inference_langtok", False):
            token = self.data_manager.get_decoder_langtok(self.args.target_lang, target_langtok)
            extra_gen_cls_kwargs["symbols_to_strip_from_output"] = {token}
        return super().build_generator(models, args, seq_gen_cls, extra_gen_cls_kwargs, **kwargs)
