"""The generation loop and the batches it is fed with."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import compress

import numpy as np
import torch
from fairseq.data import FairseqDataset
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.search import DiverseBeamSearch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment

from fairseq_moe_ext.decoding.continuous_batching import ContinuousGenerator
from fairseq_moe_ext.decoding.left_out import check_max_tokens
from fairseq_moe_ext.decoding.requests import longest_output
from fairseq_moe_ext.gating.layer import MOELayer
from fairseq_moe_ext.ranks.group import RANK_BATCH, Ranks
from fairseq_moe_ext.reporting.finite import FiniteSearch
from fairseq_moe_ext.reporting.observer import Observer

OBSERVER = "moe_observer"  # the key under which a served batch carries its observer


class _CountedGeneration:
    """Mixin before one of fairseq's generators: counts sentences and hypotheses' tokens, and takes its rank's turns.

    The encoder's and the decoder's time and tokens are taken where they run, in the model's stacks, so that scoring
    and generation are measured alike; `observer` has both.
    """

    observer: Observer | None = None
    nbest: int | None = None  # how many of a sentence's hypotheses are given out

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._finite = FiniteSearch(self)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = RepeatBlock(self.repeat_ngram_blocker)

    def generate(self, models, sample, **kwargs):
        hypotheses = by_owner(sample, lambda: self._generate_here(models, sample, **kwargs), self.nbest)
        count_results(sample, hypotheses, self.observer)
        return hypotheses

    @torch.no_grad()
    def _generate_here(self, models, sample, **kwargs):
        if isinstance(self.search, DiverseBeamSearch):
            # fairseq's diverse beam indexes a table of the batch by the sentences' numbers in the data set, which
            # ends beyond it; without numbers it counts within the batch
            sample = {key: value for key, value in sample.items() if key != "id"}
        if not self.match_source_len:
            source_length = sample["net_input"]["src_tokens"].size(1)
            longest_output(self.max_len_a, self.max_len_b, source_length, self.max_len, self.min_len)
        members = self.model.models
        with shared_encoder_output(members, self.beam_size), unpadded_batches(members), self._finite.around():
            hypotheses = super().generate(models, sample, **kwargs)
        broken_beams = self._finite.count()
        hypotheses = self._finite.without_broken(hypotheses)
        if self.observer is not None:
            self.observer.count_broken_beams(broken_beams)
            self.observer.report.count_hypotheses(hypotheses)
        return hypotheses

    def finalize_hypos(self, step, bbsz_idx, eos_scores, tokens, scores, finalized, finished, beam_size, *args):
        """fairseq's; the observer hears of the rows whose hypotheses are kept, of those that end at this step."""
        if self.observer is not None and self.observer.record is not None:  # else nothing waits for the device
            self._hypotheses_end(_kept_ends(bbsz_idx.tolist(), finalized, finished, beam_size))
        return super().finalize_hypos(
            step, bbsz_idx, eos_scores, tokens, scores, finalized, finished, beam_size, *args
        )

    def _hypotheses_end(self, rows: list[int]) -> None:
        if self.observer is not None:
            self.observer.hypotheses_end(rows)


def _kept_ends(rows: list[int], finalized: list[list], finished: list[bool], beam_size: int) -> list[int]:
    """Of the rows that end at a step, by sentences that go on, those that fairseq takes down: a sentence has room for
    `beam_size` hypotheses."""
    going_on = [number for number, done in enumerate(finished) if not done]
    room = {number: beam_size - len(finalized[number]) for number in going_on}
    kept = []
    for row in rows:
        number = going_on[row // beam_size]
        if room[number] > 0:
            room[number] -= 1
            kept.append(row)
    return kept


class RepeatBlock(torch.nn.Module):
    """fairseq's `--no-repeat-ngram-size`, of the tokens so far.

    fairseq looks for the last words at the end of a buffer that is still empty there, so that without its CUDA
    extension the option does nothing; of single words, nor does it with it. A word that a prefix or the end of the
    longest hypothesis forces may repeat what it wants: without it the beam could never end.
    """

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self._block = block

    def forward(self, tokens: torch.Tensor, lprobs: torch.Tensor, bsz: int, beam_size: int, step: int) -> torch.Tensor:
        """tokens: (bsz * beam_size, places), the first and `step` generated ones. lprobs: (bsz * beam_size, V)."""
        forced = (lprobs > -math.inf).sum(dim=1, keepdim=True) == 1  # (bsz * beam_size, 1)
        value, word = lprobs.max(dim=1, keepdim=True)
        if self._block.no_repeat_ngram_size == 1:
            lprobs.scatter_(1, tokens[:, 1 : step + 1], -math.inf)
        else:
            lprobs = self._block(tokens[:, : step + 1].contiguous(), lprobs, bsz, beam_size, step)
        return lprobs.scatter_(1, word, torch.where(forced, value, lprobs.gather(1, word)))


class MoESequenceGenerator(_CountedGeneration, SequenceGenerator):
    """fairseq's beam search over a served model."""


class MoESequenceGeneratorWithAlignment(_CountedGeneration, SequenceGeneratorWithAlignment):
    """The same with attention alignments (`--print-alignment`); by_word: as `--replace-unk` asks for them."""

    def __init__(self, *args, by_word: bool = False, **options):
        super().__init__(*args, **options)
        self._by_word = by_word

    def generate(self, models, sample, **kwargs):
        """As fairseq's; with by_word an alignment has a word per token that is printed."""
        hypotheses = super().generate(models, sample, **kwargs)
        if self._by_word:
            for hypothesis in (each for sentence in hypotheses for each in sentence):
                tokens = [token for token in hypothesis["tokens"].tolist() if token not in (self.pad, self.eos)]
                kept = [token not in self.symbols_to_strip_from_output for token in tokens]
                hypothesis["alignment"] = WordAlignment(compress(hypothesis["alignment"], kept))
        return hypotheses


class WordAlignment(list):
    """Pairs (source word, target word) as fairseq prints them; an index gives the source word of that target word.

    fairseq's replacement of unknown words still reads an alignment so, which its generator gives as pairs.
    """

    def __getitem__(self, word: int) -> int:
        return super().__getitem__(word)[0]


class MoEContinuousGenerator(_CountedGeneration, ContinuousGenerator):
    """The same over all batches at once (`--continuous-batching`)."""


@contextmanager
def shared_encoder_output(models: Iterable, beam_size: int) -> Iterator[None]:
    """In this context a sentence's beams attend to one copy of its encoder output, keys and values.

    fairseq's attention can do that, but of its models only BART asks for it: the others copy the encoder's output per
    beam, project it per beam, and copy all of it again at every step, where only the first reads it.
    """
    shared = [
        model
        for model in models
        if isinstance(getattr(model, "encoder", None), TransformerEncoderBase)
        and isinstance(model.decoder, TransformerDecoderBase)
        and all(getattr(layer, "encoder_attn", None) is not None for layer in model.decoder.layers)
    ]
    for model in shared:
        model.encoder.reorder_encoder_out = model.encoder._reorder_encoder_out  # leaves it as it is
        for layer in model.decoder.layers:
            layer.encoder_attn.set_beam_size(beam_size)
    try:
        yield
    finally:
        for model in shared:
            del model.encoder.reorder_encoder_out
            for layer in model.decoder.layers:
                layer.encoder_attn.set_beam_size(1)


@contextmanager
def unpadded_batches(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """In this context layers of a training take batches as they are: a validation that generates (`--eval-bleu`) has
    the rows of its beams, which static gating would pad to the batch size. A served layer does so anyway.
    """
    with ExitStack() as stack:
        for model in models:
            for layer in model.modules():
                if isinstance(layer, MOELayer):
                    stack.enter_context(layer.served())
        yield


def by_owner(sample: dict, compute: Callable[[], list[list[dict]]], nbest: int | None = None) -> list[list[dict]]:
    """A batch's hypotheses; under several ranks the batch knows whose turn it is to compute them.

    nbest: how many of each sentence are of use; None: all.
    """
    rank_batch = sample.get(RANK_BATCH)
    return compute() if rank_batch is None else rank_batch.result(compute, nbest)


def count_results(sample: dict, hypotheses: list[list[dict]], observer: Observer | None = None) -> None:
    """Let the batch's observer, or `observer`, look at what the batch came to."""
    observer = sample.get(OBSERVER, observer)
    if observer is not None:
        numbers = sample.get("id")
        observer.count_results(hypotheses, None if numbers is None else numbers.tolist())


def keep_every_sentence(dataset: FairseqDataset) -> None:
    """Make `dataset.batch_by_size` return the last batch, which fairseq drops when it is not a whole multiple.

    fairseq's `data_utils.batch_by_size` cuts off a last batch whose size is not a multiple of
    `--required-batch-size-multiple` (8 in fairseq-generate): 100 sentences give 96, a lone one none. All other batches
    stay as they are, which setting the multiple to 1 would not do.
    """
    if not isinstance(dataset.batch_by_size, _WholeBatches):
        dataset.batch_by_size = _WholeBatches(dataset)


class _WholeBatches:
    """A data set's `batch_by_size` without that loss; it goes with its data set to loader processes, also by pickle."""

    def __init__(self, dataset: FairseqDataset):
        self._dataset = dataset

    def __call__(self, indices, **kwargs):
        if len(indices) == 0:
            return []
        try:
            batches = list(type(self._dataset).batch_by_size(self._dataset, indices, **kwargs))
        except AssertionError as error:
            check_max_tokens(indices, self._dataset, kwargs.get("max_tokens"))
            raise error
        lost = np.asarray(indices)[sum(len(batch) for batch in batches) :]
        return batches + [lost] if len(lost) else batches


class ServedEpoch:
    """fairseq's epoch iterator whose batches are announced to the observer."""

    def __init__(self, epoch_iterator, observer: Observer, ranks: Ranks | None = None, of_all=True, last=True):
        self._epoch_iterator = epoch_iterator
        self._watched_by = observer, ranks, of_all, last
        self.batches: ServedBatches | None = None  # the last that were asked for

    def next_epoch_itr(self, *args, **kwargs) -> ServedBatches:
        """As fairseq's; the batches tell the observer when they begin and end."""
        of_rank = self._epoch_iterator.next_epoch_itr(*args, **kwargs)
        self.batches = ServedBatches(of_rank, *self._watched_by, len(self._epoch_iterator.frozen_batches))
        return self.batches

    def __getattr__(self, name):
        return getattr(self._epoch_iterator, name)


class ServedBatches:
    """Yields fairseq's batches in their order; the observer hears of each that is computed here, and of the end.

    Under several ranks of a command rank 0 yields all batches, another rank its own, and its process ends with them;
    every rank of a program yields its own.
    of_all: `batches` are those of all ranks, not this rank's alone. last: no data set comes after this one. total:
    how many all ranks have of this data set.
    """

    def __init__(self, batches, observer: Observer, ranks: Ranks | None = None, of_all=True, last=True, total=0):
        self._batches = batches
        self._observer = observer
        self._ranks = ranks
        self._of_all, self._last, self._total = of_all, last, total
        self.n = getattr(batches, "n", 0)  # fairseq's progress bars read it
        self._source: Iterator[dict] = iter(())
        self._ahead: deque[dict] = deque()  # seen by `look_ahead` and not yet yielded
        self._yielded = 0

    def __len__(self) -> int:
        return len(self._batches)

    def look_ahead(self) -> dict | None:
        """The first batch that was neither yielded nor told of here, which will be yielded in its turn; None: no more.

        One process only.
        """
        while (batch := next(self._source, None)) is not None:
            self._ahead.append(batch)
            if batch:
                return batch
        return None

    def __iter__(self) -> Iterator[dict]:
        if self._ranks is None:
            self._source = iter(self._batches)
            while (batch := self._ahead.popleft() if self._ahead else next(self._source, None)) is not None:
                self._observer.begin_batch()
                yield self._watched(batch)
            self._observer.finish()
            if not self._observer.goes_on:
                self._check()
            return
        self._observer.hear_interrupts()
        for position, batch in enumerate(self._batches):
            if not batch:  # fairseq fills the last round of its shards with empty batches, and knows them by that
                yield batch
                continue
            batch[RANK_BATCH] = rank_batch = self._ranks.rank_batch(position, self._of_all)
            if rank_batch.is_ours:
                self._observer.begin_batch(rank_batch.number)
            if rank_batch.is_ours or self._ranks.shows_all:
                yield self._watched(batch)
        self._ranks.drain(self._total, self._last)
        if not self._last:
            return
        self._observer.finish()
        self._ranks.leave()
        if not self._observer.goes_on:
            self._check()

    def _watched(self, batch: dict) -> dict:
        if batch:  # fairseq fills up its shards with empty ones, and knows them by that
            batch[OBSERVER] = self._observer
            self._observer.begin_targets(batch.get("target"))
            self._yielded += 1
        return batch

    def _check(self) -> None:
        if self._yielded == 0:
            raise ValueError("there must be a batch to serve, got none: are there more --num-shards than batches?")
        self._observer.check_results()
