"""What the two served models share: their MoE layers by name, and the switch from training to serving."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig

from fairseq_moe_ext.checkpoints.kept_experts import KeptExperts
from fairseq_moe_ext.checkpoints.kept_layers import check_places, prune_as_configured
from fairseq_moe_ext.checkpoints.loading import Loading, ModelState, loading_into
from fairseq_moe_ext.checkpoints.state_keys import EXPERT_KEY
from fairseq_moe_ext.gating import MOELayer
from fairseq_moe_ext.models.batch_seeds import BatchSeeds
from fairseq_moe_ext.models.retained_dropout import choose_dropouts, retain_in_experts

logger = logging.getLogger("fairseq_moe_ext")


class ExpertBuffer(Protocol):
    """Gives a model's layers their buffered experts (serving/expert_buffer.py).

    checkpoint: set before the weights come.
    """

    checkpoint: Path | None

    def start(self, model: ServedModel) -> None:
        """Fill the buffers of `model`, which has its weights where it will compute."""


class ServedModel:
    """Mixin before one of fairseq's model classes.

    `observer`, set by the task, is told of every pass and every call of a MoE layer (reporting/observer.py).
    """

    observer = None
    seeds: BatchSeeds | None = None  # set by the task, too
    loading: Loading | None = None  # what loading a served checkpoint took
    expert_buffer: ExpertBuffer | None = None  # None: all experts are resident
    kept_experts: KeptExperts | None = None  # those that a pruned model has of all; None: it is whole
    serving_dtype: torch.dtype | None = None  # None: the dtype that fairseq has put the model in
    # by which it is made ready at its first pass, where nobody does so before: fairseq-validate computes losses with it
    served_by: DictConfig | None = None

    def moe_layers(self) -> dict[str, MOELayer]:
        """The MoE layers by their module's name in the checkpoint, in the order of the state dict."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MOELayer)}

    def load_state_dict(self, state_dict, strict=True, model_cfg=None, args=None):
        """fairseq's, with a served checkpoint's state checked, timed and its errors named."""
        if not isinstance(state_dict, ModelState) and model_cfg is not None:  # training goes on
            state_dict = dict(state_dict)
            prune_as_configured(model_cfg, state_dict)
            check_places(state_dict, self.state_dict())
        if isinstance(state_dict, ModelState):
            if self.expert_buffer is not None:
                self.expert_buffer.checkpoint = Path(state_dict.loading.path)
            for key in self._experts_of_other_ranks(state_dict):
                del state_dict[key]
            if self.observer is not None:
                self.observer.weights_come(self, state_dict)
        with loading_into(self, state_dict) as self.loading:
            return super().load_state_dict(state_dict, strict, model_cfg, args)

    def _experts_of_other_ranks(self, state: ModelState) -> list[str]:
        layers = self.moe_layers()
        held = {f"{name}.experts.": set(layer.experts.local) for name, layer in layers.items()}
        matches = [match for match in map(EXPERT_KEY.match, state) if match and match.group(1) in held]
        # a number that no layer has is for loading to complain of
        return [
            match.string
            for match in matches
            if int(match.group(2)) not in held[match.group(1)]
            and int(match.group(2)) < layers[match.group(1).removesuffix(".experts.")].experts.num_experts
        ]

    def prepare_for_inference_(self, cfg):
        """fairseq's entry point once the weights are loaded and moved."""
        choose_dropouts(self, cfg.generation)
        super().prepare_for_inference_(cfg)
        self._serve(cfg)

    def forward(self, *args, **kwargs):
        """fairseq's."""
        if self.served_by is not None and not self.training:
            self._serve(self.served_by, validates=True)
        return super().forward(*args, **kwargs)

    def _serve(self, cfg: DictConfig, validates: bool = False) -> None:
        self.served_by = None
        retain_in_experts(self, cfg.generation)
        if self.serving_dtype is not None:
            self.to(self.serving_dtype)
        if self.expert_buffer is not None:
            with nullcontext() if self.loading is None else self.loading.timed():
                self.expert_buffer.start(self)
        observer = self.observer
        if any(layer.gate.is_random for layer in self.moe_layers().values()):
            logger.warning(
                "the second expert is drawn at random (moe_second_expert_policy): results follow --seed and depend on "
                "which sentences share a batch"
            )
        for number, (name, layer) in enumerate(self.moe_layers().items()):
            # every layer draws from a stream of its own; fairseq-eval-lm seeds nothing by itself
            seed = int(cfg.common.seed) * 1_000_003 + number
            layer.prepare_for_serving(seed, None if observer is None else observer.layer_hook(name), validates)
            if self.seeds is not None:
                self.seeds.register(layer, seed)
        for side in ("encoder", "decoder"):
            if hasattr(self, side):
                getattr(self, side).observer = observer
        if observer is not None:
            observer.model_ready(self)
