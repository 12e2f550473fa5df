"""What a served model consists of, for the languages that a call asks for; and its end."""

from __future__ import annotations

import gc
import os
import weakref
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.sequence_scorer import SequenceScorer
from omegaconf import DictConfig

from fairseq_moe_ext.buffering.cache import BufferedExperts
from fairseq_moe_ext.ranks.program import OneProcess, ProgramRanks
from fairseq_moe_ext.reporting.program_observer import ProgramObserver
from fairseq_moe_ext.serving.engine import Engine
from fairseq_moe_ext.serving.file_data import FileData
from fairseq_moe_ext.serving.keyword_options import KeywordOptions, OptionError, configuration
from fairseq_moe_ext.serving.language_pairs import LanguagePairs, check_named
from fairseq_moe_ext.serving.text import TextCodec

LANGUAGES = ("source_lang", "target_lang")  # of a call of a translation model
BATCH_SIZE = 32  # sentences, where neither `batch_size` nor `max_tokens` is given


@dataclass
class ServedParts:
    """What a served model consists of; emptied by its end.

    options: as `load` was given them, together with the checkpoint's. file_data: its file's own dictionaries, where
    these are what is served with. unnamed: the options of languages that each call must name.
    """

    paths: list[str]
    models: list[torch.nn.Module]
    task: Any
    observer: ProgramObserver
    codec: TextCodec
    keywords: KeywordOptions
    data: str
    options: Mapping[str, Any]
    ranks: ProgramRanks | OneProcess
    file_data: FileData | None = None
    unnamed: frozenset[str] = frozenset()
    generators: dict[tuple, tuple[Any, DictConfig]] = field(default_factory=dict)
    engines: weakref.WeakSet[Engine] = field(default_factory=weakref.WeakSet)  # that are open, or were
    pairs: LanguagePairs | None = None
    others: dict[tuple[str | None, str | None], ServedParts] = field(default_factory=dict)  # of other languages
    process: int = field(default_factory=os.getpid)  # that has loaded the model

    @property
    def languages(self) -> tuple[str, ...]:
        """The options of a call that name languages; a language model has none."""
        return () if hasattr(self.task, "eval_lm_dataloader") else LANGUAGES

    @property
    def device(self) -> torch.device:
        """Where the first model's parameters lie."""
        return next(self.models[0].parameters()).device

    def generator(self, call: Mapping[str, Any]) -> tuple[Any, DictConfig]:
        """fairseq's generator under a call's options, and the configuration that they give; kept for the next call."""
        key = tuple(sorted((name, repr(value)) for name, value in call.items()))
        if key not in self.generators:
            cfg = configuration(self.keywords.parse(self.data, {**self.options, **call}))
            if cfg.dataset.batch_size is None and cfg.dataset.max_tokens is None:
                cfg.dataset.batch_size = BATCH_SIZE
            self.generators.clear()  # one: others cost little to make again
            self.generators[key] = self._generator(cfg.generation), cfg
        return self.generators[key]

    def of_call(self, options: Mapping[str, Any]) -> tuple[ServedParts, dict[str, Any]]:
        """These parts for the languages that a call asks for, and its other options.

        OptionError where the model does not have such a language.
        """
        rest = {name: value for name, value in options.items() if name not in LANGUAGES}
        if len(rest) == len(options):
            check_named(self.unnamed, source_lang=None, target_lang=None)
            return self, rest
        asked = options.get("source_lang"), options.get("target_lang")
        for name, value in zip(LANGUAGES, asked, strict=True):
            if value is not None and not isinstance(value, str):
                raise OptionError(f"{name} must be a language's name, got {value!r}")
        if asked not in self.others:
            if self.pairs is None:
                self.pairs = LanguagePairs(self.task, self.generator({})[1].generation, self.codec_of, self.unnamed)
            self.others[asked] = self._for_languages(*asked)
        return self.others[asked], rest

    def _for_languages(self, source: str | None, target: str | None) -> ServedParts:
        pair = self.pairs.pair(source, target)
        if pair.task is self.task:
            return self
        named = {name: value for name, value in zip(LANGUAGES, (source, target), strict=True) if value is not None}
        options = {**self.options, **named}
        return replace(self, task=pair.task, codec=pair.codec, options=options, generators={}, pairs=None, others={})

    def scorer(self, cfg: DictConfig) -> Any:
        """What scores instead of searching."""
        if hasattr(self.task, "eval_lm_dataloader"):
            return SequenceScorer(self.task.target_dictionary, cfg.eval_lm.softmax_batch)
        return self._generator({**cfg.generation, "score_reference": True})

    def _generator(self, generation: Mapping[str, Any]) -> Any:
        # no DictConfig: the errors of fields that it lacks keep each other and every frame above, until they are found
        return self.task.build_generator(self.models, Namespace(**generation))

    def batches(self, dataset: FairseqDataset, cfg: DictConfig) -> Iterator[dict]:
        """fairseq's, where the model is; of several ranks this one's. ValueError where a sentence is too long."""
        epoch = self.task.get_batch_iterator(
            dataset=dataset,
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            max_positions=utils.resolve_max_positions(
                self.task.max_positions(), *(model.max_positions() for model in self.models)
            ),
            ignore_invalid_inputs=cfg.dataset.skip_invalid_size_inputs_valid_test,
            disable_iterator_cache=True,
        )
        return self._batches_of(epoch)

    def _batches_of(self, epoch: Any) -> Iterator[dict]:
        """The iterator is made with the first of them: it draws a random number, which is the call's."""
        for batch in epoch.next_epoch_itr(shuffle=False):
            if batch:  # those of one rank are filled up with empty ones
                yield utils.move_to_cuda(batch, self.device) if self.device.type == "cuda" else batch

    def codec_of(self, task: Any, source: str, target: str) -> TextCodec:
        """For `task`, which is this one for other languages."""
        if task is self.task or self.options.get("tokenizer") is None:
            return self.codec.of(task)
        languages = {"source_lang": source, "target_lang": target}
        return TextCodec(task, self.keywords.parse(self.data, {**self.options, **languages}))

    def end(self, in_step: bool = False) -> None:
        """Write the report and the trace that were asked for, stop the copies, close the files, forget the weights.

        in_step: all ranks do it now. What a forked child only drops is its parent's to end.
        """
        if not in_step and self.process != os.getpid():
            return
        for engine in tuple(self.engines):
            engine.close()
        self.ranks.end(self.observer.write if self.observer.writes else None, in_step)
        self._stop_copies()
        on_gpu = bool(self.models) and self.device.type == "cuda"
        self.models.clear()
        self.generators.clear()
        self.others.clear()
        self.task = self.codec = self.pairs = None
        if self.file_data is not None:
            self.file_data.close()
        gc.collect()  # a model's parts refer to each other
        if on_gpu:
            torch.cuda.empty_cache()

    def _stop_copies(self) -> None:
        for model in self.models:
            for layer in model.moe_layers().values() if hasattr(model, "moe_layers") else ():
                if isinstance(layer.experts, BufferedExperts):
                    layer.experts.stop()
