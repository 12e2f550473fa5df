"""The languages that one served model can be asked for: a multilingual one for others than it was loaded for, too."""

from __future__ import annotations

import copy
import filecmp
import threading
from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.tasks import FairseqTask
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from fairseq_moe_ext.serving.keyword_options import OptionError
from fairseq_moe_ext.serving.text import TextCodec


@dataclass(frozen=True)
class LanguagePair:
    """task: as the commands set it up for these languages. eos, symbols_to_strip_from_output: as its generator's."""

    task: FairseqTask
    codec: TextCodec
    eos: int
    symbols_to_strip_from_output: frozenset[int]


class LanguagePairs:
    """Per pair of languages what a request needs, with the dictionaries of the task that is served.

    codec: what makes words of a text and back, for a pair's task and its two languages. unnamed: `source_lang` and
    `target_lang`, where `load` was not told them.
    """

    def __init__(
        self,
        task: FairseqTask,
        generation: Any,
        codec: Callable[[FairseqTask, str, str], TextCodec],
        unnamed: Collection[str] = (),
    ):
        self._unnamed = unnamed
        self._task, self._generation, self._codec = task, generation, codec
        flags = task.args if hasattr(task, "args") else task.cfg
        self._served = flags.source_lang, flags.target_lang
        self._pairs: dict[tuple[str, str], LanguagePair] = {}
        self._lock = threading.Lock()

    def pair(self, source: str | None = None, target: str | None = None) -> LanguagePair:
        """None: the language that the model was loaded for. OptionError for one that it cannot be asked for."""
        check_named(self._unnamed, source_lang=source, target_lang=target)
        languages = source or self._served[0], target or self._served[1]
        with self._lock:
            if languages not in self._pairs:
                self._pairs[languages] = self._made(languages)
            return self._pairs[languages]

    def _made(self, languages: tuple[str, str]) -> LanguagePair:
        task = self._task if languages == self._served else self._task_of(languages)
        strip = task.build_generator([], self._generation, seq_gen_cls=_Symbols).strip
        return LanguagePair(task, self._codec(task, *languages), task.target_dictionary.eos(), strip)

    def _task_of(self, languages: tuple[str, str]) -> FairseqTask:
        task = self._task
        kept = getattr(task, "kept_experts", None)
        if kept is not None:
            raise OptionError(
                f"source_lang and target_lang must be {' and '.join(kept.languages)}, for which the model's experts "
                f"are kept, got {' and '.join(languages)}"
            )
        several = isinstance(task, TranslationMultiSimpleEpochTask)
        for side, language, served in zip(("source", "target"), languages, self._served, strict=True):
            known = list(task.langs) if several else [served]
            if language not in known:
                raise OptionError(f"{side}_lang must be of the model's languages, {_listed(known)}, got {language!r}")
        dictionaries = dict(task.dicts)
        for side, language, served in zip(("source", "target"), languages, self._served, strict=True):
            if served in dictionaries and language not in dictionaries:
                self._check_dictionary(f"{side}_lang", language, served)
                dictionaries[language] = dictionaries[served]
        found, found.data_manager, args = copy.copy(task), copy.copy(task.data_manager), copy.copy(task.args)
        args.source_lang, args.target_lang = languages
        found.args = found.data_manager.args = args
        found.dicts = found.data_manager.dicts = dictionaries
        found.source_langs, found.target_langs = ([language] for language in languages)
        found.lang_pairs = found.eval_lang_pairs = found.model_lang_pairs = ["-".join(languages)]
        return found

    def _check_dictionary(self, name: str, language: str, served: str) -> None:
        """A command for this language reads its dictionary, which must be the one that the model is served with."""
        if self._task.args.fixed_dictionary is not None:
            return
        folder = Path(utils.split_paths(self._task.args.data)[0])
        theirs, ours = (folder / f"dict.{each}.txt" for each in (language, served))
        if not theirs.is_file():
            raise OptionError(f"{name} {language} must have a dictionary, and {theirs} is missing")
        if not filecmp.cmp(theirs, ours, shallow=False):
            raise OptionError(f"{name} {language} must have the dictionary of {served}, and {theirs} is another")


def check_named(unnamed: Collection[str], **languages: str | None) -> None:
    """OptionError where a call of a multilingual model leaves out a language that `load` was not told either."""
    for name, language in languages.items():
        if language is None and name in unnamed:
            raise OptionError(f"{name} must be given to load() or to this call for a multilingual model, got none")


class _Symbols(Namespace):
    """Stands for a generator where a task is asked which words are no part of its results."""

    def __init__(self, models, tgt_dict, symbols_to_strip_from_output=(), **_options):
        super().__init__(strip=frozenset(symbols_to_strip_from_output or ()) | {tgt_dict.eos()})


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
