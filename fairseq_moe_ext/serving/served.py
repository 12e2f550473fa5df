"""A model that a Python program serves: translation and generation, its report, its end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from fairseq.data import FairseqDataset
from fairseq.token_generation_constraints import pack_constraints
from omegaconf import DictConfig

from fairseq_moe_ext.checkpoints.errors import ClosedError
from fairseq_moe_ext.ranks.calls import Call, OneCall
from fairseq_moe_ext.reporting.program_observer import ProgramObserver
from fairseq_moe_ext.serving.engine import Engine
from fairseq_moe_ext.serving.keyword_options import BATCHES, SEARCH, OptionError
from fairseq_moe_ext.serving.recorded_languages import languages_of
from fairseq_moe_ext.serving.scored_data import blocks, pairs
from fairseq_moe_ext.serving.served_parts import ServedParts
from fairseq_moe_ext.serving.text import Hypothesis

Found = dict[int, list[Hypothesis]]  # a sentence's number -> what came of it


class Served:
    """A model in service, made by `fairseq_moe_ext.load`; also a context manager that closes it.

    Threads may share it: their calls wait for each other.
    """

    def __init__(self, parts: ServedParts):
        self._name = ":".join(parts.paths)
        self._lock = threading.RLock()
        self._parts: ServedParts | None = parts
        self._end = weakref.finalize(self, parts.end)

    def translate(
        self, sentences: Sequence[str], source_lang: str | None = None, target_lang: str | None = None, **options: Any
    ) -> list[str | None]:
        """The best translation of every sentence, of a language model its most likely continuation.

        source_lang, target_lang: of a translation model; of a multilingual one any that it has. None: as `load` was
        told. options: of the search and its batches (keyword_options.py, SEARCH and BATCHES) above those given to
        `load`. None stands for a sentence that `skip_invalid_size_inputs_valid_test` left out. OptionError,
        ClosedError, NotFiniteError where a result is no number.
        """
        options |= _named(source_lang, target_lang)
        return [found[0].text if found else None for found in self._generate(sentences, options, best_alone=True)]

    def generate(
        self, sentences: Sequence[str], source_lang: str | None = None, target_lang: str | None = None, **options: Any
    ) -> list[list[Hypothesis]]:
        """The `nbest` hypotheses of every sentence, best first; otherwise as `translate`."""
        return self._generate(sentences, options | _named(source_lang, target_lang))

    def score(
        self, sentences: Sequence[str], targets: Sequence[str] | None = None, **options: Any
    ) -> list[Hypothesis | None]:
        """The model's log-probabilities of texts, of a translation model those of `targets` given `sentences`.

        options: of the batches (keyword_options.py, BATCHES), and the languages. Of a translation's scores the language
        token's is one; otherwise as `translate`.
        """
        with self._call("score", {"sentences": sentences, "targets": targets, **options}) as (parts, call):
            with call.preparing():
                _check_call(sentences, options, (*BATCHES, *parts.languages))
                parts, options = parts.of_call(options)
                _check_targets(parts.task, sentences, targets)
                _, cfg = parts.generator(options)
                scorer = parts.scorer(cfg)
                batches = parts.batches(_scored(parts, sentences, targets), cfg) if sentences else ()
            found: Found = {}
            with parts.observer.call(False, None, parts.device, languages_of(parts.task)):
                for batch in batches:
                    for number, (hypothesis, *_) in zip(
                        batch["id"].tolist(), scorer.generate(parts.models, batch), strict=True
                    ):
                        found[number] = [parts.codec.hypothesis(hypothesis, scorer)]
                found = _shared(found, call, parts.observer)
            return [found[number][0] if number in found else None for number in range(len(sentences))]

    def report(self) -> dict:
        """What was served so far: the content of `--moe-report`."""
        with self._call("report", {}) as (parts, call):
            with call.preparing():
                pass
            return parts.observer.as_dict()

    def engine(self, *, max_waiting: int = 1024, max_beam: int | None = None, **options: Any) -> Engine:
        """Continuous batching: requests come one by one and are decoded side by side (engine.py).

        options: as of a call; `batch_size` and `max_tokens` are the room, of what is under way at a time, the others
        what holds where a request does not say otherwise. max_waiting: requests beyond. max_beam: the most that a
        request may ask for. ValueError where the model or an option has no such search.
        """
        _check_call((), options, (*(name for name in SEARCH if name != "seed"), "batch_size", "max_tokens"))
        with self._open() as parts:
            parts.ranks.check_alone("engine()")
            if parts.observer.record is not None:
                raise ValueError(
                    "engine() must be asked for without moe_record: requests of several languages share its passes, "
                    f"got {parts.observer.record.path}"
                )
            _, cfg = parts.generator(options)
            engine = Engine(parts, cfg, self._lock, max_waiting, max_beam, keep=self)
            parts.engines.add(engine)
            return engine

    def close(self) -> None:
        """Give back memory, threads and files, and write what was asked for; once more does nothing."""
        with self._lock:
            self._parts = None
            found = self._end.detach()
            if found is not None:
                _, end, *_ = found
                end(in_step=True)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{'closed' if self._parts is None else 'served'} model {self._name}>"

    @contextmanager
    def _open(self) -> Iterator[ServedParts]:
        """The parts, for one thread at a time."""
        with self._lock:
            if self._parts is None:
                raise ClosedError(f"a served model must be open, got a call of {self._name} after its close()")
            yield self._parts

    @contextmanager
    def _call(self, name: str, arguments: Mapping[str, Any]) -> Iterator[tuple[ServedParts, OneCall | Call]]:
        """The parts and the call, which all ranks make."""
        with self._open() as parts, parts.ranks.call(name, arguments) as call:
            yield parts, call

    def _generate(
        self, sentences: Sequence[str], options: Mapping[str, Any], best_alone: bool = False
    ) -> list[list[Hypothesis]]:
        name = "translate" if best_alone else "generate"
        with self._call(name, {"sentences": sentences, **options}) as (parts, call):
            with call.preparing():
                _check_call(sentences, options, (*SEARCH, "constraints", *BATCHES, *parts.languages))
                parts, options = parts.of_call(options)
                if best_alone and options.get("nbest", 1) != 1:
                    raise OptionError(
                        f"nbest must be 1 for translate(), got {options['nbest']}: generate() gives several"
                    )
                generator, cfg = parts.generator(options)
                generation = cfg.generation
                nbest = 1 if best_alone else generation.nbest
                if generation.sampling and not best_alone and nbest != generation.beam:
                    raise OptionError(f"nbest must be equal to beam, {generation.beam}, with sampling, got {nbest}")
                batches = _batches(parts, [text.strip() for text in sentences], cfg) if sentences else ()
            draws = generation.sampling or generation.retain_dropout
            seed = None if generation.no_seed_provided else cfg.common.seed
            found: Found = {}
            with parts.observer.call(draws, seed, parts.device, languages_of(parts.task)):
                for numbers, batch in batches:
                    constraints = batch.pop("constraints", None)
                    hypotheses = parts.task.inference_step(generator, parts.models, batch, constraints=constraints)
                    for number, of_sentence in zip(numbers, hypotheses, strict=True):
                        found[number] = [parts.codec.hypothesis(each, generator) for each in of_sentence[:nbest]]
                found = _shared(found, call, parts.observer)
            return [found.get(number, []) for number in range(len(sentences))]


def _named(source_lang: Any, target_lang: Any) -> dict[str, Any]:
    """Those that a call names, as its options."""
    given = {"source_lang": source_lang, "target_lang": target_lang}
    return {name: language for name, language in given.items() if language is not None}


def _shared(found: Found, call: Call | OneCall, observer: ProgramObserver) -> Found:
    """What came of all ranks' batches, of which the observer hears."""
    mine = [[number, list(map(astuple, hypotheses))] for number, hypotheses in found.items()]
    everything = call.share([mine, observer.told()])
    observer.hear([told for _, told in everything])
    return {
        number: [Hypothesis.of_plain(each) for each in hypotheses]
        for part, _ in everything
        for number, hypotheses in part
    }


def _check_call(sentences: Any, options: Iterable[str], known: Sequence[str]) -> None:
    _check_texts("sentences", sentences)
    for name in options:
        if name not in known:
            raise OptionError(f"{name} must be given to load(), for this call takes {', '.join(known)}")


def _check_texts(name: str, texts: Any) -> None:
    if isinstance(texts, str):
        raise TypeError(f"{name} must be a list of strings, got the string {texts[:40]!r}")
    if not isinstance(texts, Collection):
        raise TypeError(f"{name} must be a list of strings, got {type(texts).__name__}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be strings, got {type(text).__name__} as number {number}")


def _check_targets(task: Any, sentences: Sequence[str], targets: Sequence[str] | None) -> None:
    if hasattr(task, "eval_lm_dataloader"):
        if targets is not None:
            raise ValueError(f"targets must be None for a language model, got {len(targets)} texts")
        return
    _check_texts("targets", targets or ())
    if targets is None or len(targets) != len(sentences):
        got = "none" if targets is None else len(targets)
        raise ValueError(f"targets must be one translation for each of the {len(sentences)} sentences, got {got}")


def _scored(parts: ServedParts, sentences: Sequence[str], targets: Sequence[str] | None) -> FairseqDataset:
    sources, _ = parts.task.get_interactive_tokens_and_lengths(list(sentences), parts.codec.encode)
    if targets is None:
        return blocks(parts.task, sources)
    words = map(parts.codec.encode, targets)
    dictionary = parts.task.target_dictionary
    return pairs(parts.task, sources, [dictionary.encode_line(each, add_if_not_exist=False).long() for each in words])


def _batches(parts: ServedParts, lines: list[str], cfg: DictConfig) -> Iterator[tuple[list[int], dict]]:
    """(the sentences' numbers, a batch of them) as fairseq-interactive makes them of its input."""
    constraints = None
    if cfg.generation.constraints:
        split = [line.split("\t") for line in lines]
        lines = [words for words, *_ in split]
        constraints = pack_constraints([[_constraint(parts, text) for text in texts] for _, *texts in split])
    tokens, lengths = parts.task.get_interactive_tokens_and_lengths(lines, parts.codec.encode)
    dataset = parts.task.build_dataset_for_inference(tokens, lengths, constraints=constraints)
    return map(_to_search, parts.batches(dataset, cfg))


def _to_search(batch: dict) -> tuple[list[int], dict]:
    """(the sentences' numbers, what fairseq's search takes of them)."""
    sample = {name: batch[name] for name in ("id", "constraints") if batch.get(name) is not None}
    sample["net_input"] = {name: batch["net_input"][name] for name in ("src_tokens", "src_lengths")}
    return batch["id"].tolist(), sample


def _constraint(parts: ServedParts, text: str) -> torch.Tensor:
    words = parts.codec.encode(text)
    return parts.task.target_dictionary.encode_line(words, append_eos=False, add_if_not_exist=False)
