"""The model of a checkpoint as a task builds it: under the task's flags, with its experts where they are to lie."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from fairseq.models import FairseqLanguageModel
from omegaconf import DictConfig, open_dict

from fairseq_moe_ext.balancing.placement import load_placement
from fairseq_moe_ext.byte_sizes import bytes_in_words
from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts, cut_experts
from fairseq_moe_ext.checkpoints.loading import ModelState
from fairseq_moe_ext.checkpoints.model_fits import (
    check_fits,
    dense_model,
    load_in_one_sentence,
    naming_the_checkpoint,
)
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig, has_moe_layers
from fairseq_moe_ext.checkpoints.state_keys import experts_by_layer
from fairseq_moe_ext.checkpoints.supported_fields import check_fields
from fairseq_moe_ext.experts.formats import FLOAT
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.models.int8_dense import Model, built_in_int8, bytes_in_int8
from fairseq_moe_ext.ranks.group import Ranks, served_ranks, world_size
from fairseq_moe_ext.ranks.program import ProgramRanks
from fairseq_moe_ext.reporting.observer import Observer
from fairseq_moe_ext.serving.expert_share import distribute_experts, drop_second_choices
from fairseq_moe_ext.serving.recorded_languages import languages_of_run, recorder_of
from fairseq_moe_ext.tasks.buffer_flags import buffer_settings
from fairseq_moe_ext.tasks.capacity_flags import capacity_settings
from fairseq_moe_ext.tasks.choice_flags import second_choice_threshold
from fairseq_moe_ext.tasks.command_check import check_rank_count
from fairseq_moe_ext.tasks.dense_flags import check_dtype_flags, check_flags_of_dense
from fairseq_moe_ext.tasks.flags import check_static_capacity
from fairseq_moe_ext.tasks.keep_flags import kept_experts
from fairseq_moe_ext.tasks.weight_flags import ServedWeights, served_weights, weight_error_rows

logger = logging.getLogger("fairseq_moe_ext")

# whether a checkpoint has an encoder -> what it is, and the tasks that serve it
_KINDS = {
    False: ("a language model", "moe_language_modeling"),
    True: ("a translation model", "moe_translation or moe_translation_multi_simple_epoch"),
}


class ModelBuilding:
    """Mixin of the tasks; a task that was asked for the model of a checkpoint has an observer from then on."""

    observer: Observer | None = None
    ranks: Ranks | ProgramRanks | None = None
    kept_experts: KeptExperts | None = None  # of the model that is served; None: all
    # how many the model has embeddings of: with --remove-bpe fairseq adds the words that it prints to the dictionary
    _served_words: int | None = None

    def build_model(self, args, from_checkpoint=False):
        """As fairseq's; the model of a checkpoint is built for serving, and reported on."""
        if not from_checkpoint:
            return super().build_model(args, from_checkpoint)
        flags = self._flags()
        check_dtype_flags(flags)
        check_static_capacity(flags)
        if self.observer is None:
            if world_size() > 1 and flags.expert_placement is None:  # before the ranks wait for each other
                check_rank_count(world_size(), int(getattr(args, "moe_expert_count", None) or 0))
            self.ranks = served_ranks()
            outputs = flags.moe_report, flags.moe_trace, self.ranks
            more = {"weight_error_rows": weight_error_rows(flags), "record": recorder_of(flags, self)}
            self.observer = Observer(str(flags.moe_gating), *outputs, **more)
        self.observer.models += 1
        self._served_words = len(self.source_dictionary)
        state = vars(args).pop("served_state", None) if isinstance(args, Namespace) else None
        with naming_the_checkpoint(state):
            return self._build_for_serving(args, state)

    def _build_for_serving(self, args: Any, state: ModelState | None):
        has_encoder, flags = getattr(args, "encoder_layers", None) is not None, self._flags()
        if not has_moe_layers(args):
            # without a model of fairseq's: an architecture of upstream's branches that the release has no name for
            known = dense_model(getattr(args, "_name", None) or getattr(args, "arch", None))
            if known is not None:
                has_encoder = not issubclass(known, FairseqLanguageModel)
            self._check_kind(has_encoder)
            check_fields(args, has_encoder, has_experts=False)
            check_flags_of_dense(flags, takes_dtype=False)
            logger.info("the checkpoint has no MoE layers: served as the dense model that it is")
            weights = served_weights(flags, state)
            if known is None:
                check_fields(args, has_encoder)  # built as a model with experts is
                args = self._with_flags(args, weights)
            build = self._build_served if known is None else super().build_model
            check_fits(lambda: build(copy.deepcopy(args), True), state)
            model = self._built(lambda: build(args, True), weights)
            if not isinstance(model, self.served_model_class):  # fairseq's own
                load_in_one_sentence(model)
            if not self.observer.has_model:
                self.observer.watch_dense(model)
            return model
        self._check_kind(has_encoder)
        check_fields(args, has_encoder)
        weights = served_weights(flags, state)
        args = self._with_flags(args, weights)
        self._keep(args, state)
        check_fits(lambda: self._build_served(Namespace(**{**vars(args), "allocate_experts": True})), state)
        model = self._built(lambda: self._build_served(args), weights)
        if not model.moe_layers():  # dense layers stand in their place
            check_flags_of_dense(flags, takes_dtype=True)
        model.kept_experts = self.kept_experts
        placement = None if flags.expert_placement is None else load_placement(flags.expert_placement)
        kernel = str(flags.moe_kernel)
        settings = buffer_settings(flags, languages_of_run(self)), capacity_settings(flags)
        distribute_experts(model, self.ranks, *settings, placement, kernel, weights.experts)
        if (threshold := second_choice_threshold(flags)) is not None:
            drop_second_choices(model, threshold)
        dtype = flags.moe_dtype
        if dtype is not None:
            model.serving_dtype = getattr(torch, str(dtype))
            model.to(model.serving_dtype)  # before the weights come, so that they never lie in two dtypes
        model.seeds = self.observer.seeds
        if not self.observer.has_model:  # the report of an ensemble speaks of its first MoE model
            self.observer.has_model = True
            model.observer = self.observer
        return model

    def _keep(self, args: Namespace, state: ModelState | None) -> None:
        """Leave in `state` the experts that are served, and let `args` say how many each layer has."""
        self.kept_experts = kept_experts(self, self._flags(), state)
        if self.kept_experts is None:
            return
        if state.kept is None:
            cut_experts(state, self.kept_experts)
        args.experts_of_layers = experts_by_layer(state)
        choices = 1 if MoEConfig.from_args(args).moe_top1_expert else 2
        for name, count in args.experts_of_layers.items():
            if count < choices:
                what = "--expert-keep" if state.kept is None else state.loading.path
                raise ValueError(
                    f"{what} must keep at least {choices} experts of {name}, as many as it chooses, got {count}"
                )

    def _built(self, build: Callable[[], Model], weights: ServedWeights) -> Model:
        """`build`'s model, its dense layers in int8 where they are to be."""
        if not weights.int8_dense:
            return build()
        model = built_in_int8(build, widens=str(self._flags().moe_kernel) == "loop")
        if not any(isinstance(module, MOELayer) for module in model.modules()):  # else a line on experts says it, too
            logger.info("all dense layers lie in int8 (%s)", bytes_in_words(bytes_in_int8(model)))
        return model

    def _check_kind(self, has_encoder: bool) -> None:
        if has_encoder == issubclass(self.served_model_class, FairseqLanguageModel):
            found, fitting = _KINDS[has_encoder]
            raise ValueError(f"--task does not fit the checkpoint, which is {found}: it must be {fitting}")

    def _build_served(self, args: Namespace, from_checkpoint: bool = True):
        return self.served_model_class.build_model(args, self)

    def _with_flags(self, args: Any, weights: ServedWeights) -> Any:
        """The checkpoint's model arguments under this task's flags; a flag stands above the checkpoint."""
        flags = self._flags()
        values = {"moe_gating": str(flags.moe_gating), "initialize_experts": False}
        given_later = buffer_settings(flags) is not None or weights.experts != FLOAT
        values["allocate_experts"] = not given_later and self.ranks is None
        values["checkpoint_activations"] = values["offload_activations"] = False  # of training alone
        fraction = getattr(flags, "moe_eval_capacity_token_fraction", None)
        if fraction is not None:
            values["moe_eval_capacity_token_fraction"] = float(fraction)
        if isinstance(args, DictConfig):
            with open_dict(args):
                args.update(values)
        else:
            args = Namespace(**{**vars(args), **values})
        return args

    def _flags(self) -> Any:
        return self.args if hasattr(self, "args") else self.cfg
