"""What the three tasks share: hooks installed, flags checked, the plugin's generator and batches."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from fairseq import utils
from fairseq.tasks import FairseqTask

from fairseq_moe_ext.checkpoints.checkpoint_task import SERVED
from fairseq_moe_ext.checkpoints.dictionary_file import load_dictionary
from fairseq_moe_ext.checkpoints.errors import one_line
from fairseq_moe_ext.decoding.generator import (
    MoEContinuousGenerator,
    MoESequenceGenerator,
    MoESequenceGeneratorWithAlignment,
    ServedEpoch,
    by_owner,
    keep_every_sentence,
)
from fairseq_moe_ext.decoding.left_out import keep_fitting
from fairseq_moe_ext.decoding.option_rules import check_words
from fairseq_moe_ext.decoding.requests import Request, RequestMaker, Room, check_options
from fairseq_moe_ext.models.fairseq_version import check_fairseq
from fairseq_moe_ext.ranks.group import RANK_BATCH, Rank, Ranks
from fairseq_moe_ext.ranks.program import ProgramRanks
from fairseq_moe_ext.serving import fairseq_hooks
from fairseq_moe_ext.serving.unknown_words import warn_of_unknown_words
from fairseq_moe_ext.tasks.data_sets import check_not_empty, warn_of_other_parts
from fairseq_moe_ext.tasks.flags import check_flags
from fairseq_moe_ext.tasks.model_building import ModelBuilding
from fairseq_moe_ext.tasks.serving_parser import prepare_parser

logger = logging.getLogger("fairseq_moe_ext")


class ServingTask(ModelBuilding):
    """Mixin before one of fairseq's task classes.

    A task serves once fairseq has asked it for the model of a checkpoint; a task that trains never does.
    """

    serves_experts = True  # for serving/fairseq_hooks.py, which cannot know this class
    batches_in_order = False  # whether a batch depends on the one before it
    _epoch: ServedEpoch | None = None  # the batches that are served
    _data_sets = 0  # how many were begun
    _room = Room()  # and the limits by which they were made
    served_unit = "sentences"  # what an item of the data is
    shards_by_user = False  # whether a part of the data is what the user asked for (--num-shards)

    @classmethod
    def add_args(cls, parser):
        """fairseq's options of the task and the plugin's flags."""
        super().add_args(parser)
        prepare_parser(parser)

    @classmethod
    def load_dictionary(cls, filename):
        """The dictionary in `filename`; FileNotFoundError or CheckpointError names the file."""
        if "://" in str(filename):
            return super().load_dictionary(filename)
        if not Path(filename).exists():
            raise FileNotFoundError(
                f"{filename}: no such dictionary: the data's folder and the language flags must name one that is there"
            )
        return load_dictionary(Path(filename))

    @classmethod
    def setup_task(cls, args, ranks: Ranks | ProgramRanks | None = None, **kwargs):
        """ranks: those that serve, where they are known already."""
        check_fairseq()
        check_flags(args, None if ranks is None else Rank(ranks.rank, ranks.world_size))
        task = super().setup_task(args, **kwargs)
        task.ranks = ranks
        fairseq_hooks.remember(task)
        return task

    def build_generator(self, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **kwargs):
        """As fairseq's, the plugin's generators unless `seq_gen_cls` is given; ValueError for what it cannot obey."""
        extra_gen_cls_kwargs = dict(extra_gen_cls_kwargs or {})
        continuous = self._flags().continuous_batching and seq_gen_cls is None
        if continuous and getattr(args, "score_reference", False):
            logger.warning("--continuous-batching has no effect under --score-reference, which generates nothing")
            continuous = False
        if continuous:
            if self._epoch is None:
                raise ValueError("--continuous-batching is for fairseq-generate, got a generator without its batches")
            check_options(args, models)
            seq_gen_cls = MoEContinuousGenerator
        if seq_gen_cls is None:
            seq_gen_cls = MoESequenceGenerator
            alignment, replaces = (getattr(args, name, None) for name in ("print_alignment", "replace_unk"))
            if alignment or replaces is not None:
                seq_gen_cls = MoESequenceGeneratorWithAlignment
                extra_gen_cls_kwargs |= {"print_alignment": alignment or "hard", "by_word": replaces is not None}
        # past fairseq's multilingual task, which does not hand seq_gen_cls on
        generator = FairseqTask.build_generator(
            self, models, args, seq_gen_cls=seq_gen_cls, extra_gen_cls_kwargs=extra_gen_cls_kwargs, **kwargs
        )
        if hasattr(generator, "vocab_size"):  # of a search, not of references' scores
            check_words(args, generator.vocab_size)
        generator.observer = self.observer
        generator.nbest = getattr(args, "nbest", None)
        if continuous:
            generator.room = self._room
            generator.look_ahead = partial(self._next_request, models, getattr(args, "prefix_size", 0))
        return generator

    def _next_request(self, models, prefix_size: int) -> Request | None:
        """What fairseq-generate and this task will make of the next batch that was not looked at yet."""
        batch = self._epoch.batches.look_ahead()
        if batch is None:
            return None
        if next(models[0].parameters()).is_cuda:
            batch = utils.move_to_cuda(batch)
        prefix = batch["target"][:, :prefix_size] if prefix_size > 0 else None
        return self.inference_step(RequestMaker(), models, batch, prefix_tokens=prefix)

    def load_state_dict(self, state_dict):
        """fairseq's, before a model is built; what is served must be of this task's languages and dictionaries."""
        state_dict = dict(state_dict)
        served = state_dict.pop(SERVED, None)
        if served is not None:
            dictionaries = (self.source_dictionary, self.target_dictionary)
            served.check(self._flags(), dictionaries, getattr(self, "langs", None))
        super().load_state_dict(state_dict)

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        """As fairseq's; when serving, ValueError for what does not fit, unless the user wants it left out."""
        if self.observer is None:
            return super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)
        # fairseq-eval-lm would leave out whatever does not fit, without the user's asking
        skip = bool(getattr(self._flags(), "skip_invalid_size_inputs_valid_test", ignore_invalid_inputs))
        tell_of_nothing = self.observer.nothing_left if self.observer.goes_on else None
        return keep_fitting(indices, dataset, max_positions, skip, self.served_unit, tell_of_nothing)

    def load_dataset(self, split, *args, **kwargs):
        """As fairseq's; FileNotFoundError names the flags that name the split."""
        if self.observer is not None:
            check_not_empty(self._flags(), split)
            warn_of_other_parts(self._flags(), split)
        try:
            return super().load_dataset(split, *args, **kwargs)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"data {self._flags().data}: there is no data set {split} (--gen-subset, --train-subset or "
                f"--valid-subset) of these languages in it: {one_line(error)}"
            ) from error

    def get_interactive_tokens_and_lengths(self, lines, encode_fn):
        """As fairseq's; unknown words are warned of, and words beyond the model's embedding are unknown."""
        tokens, lengths = super().get_interactive_tokens_and_lengths(lines, encode_fn)
        if self._served_words is not None:
            tokens = [row.masked_fill(row >= self._served_words, self.source_dictionary.unk()) for row in tokens]
        warn_of_unknown_words(lines, tokens, self.source_dictionary)
        return tokens, lengths

    def build_dataset_for_inference(self, *args, **kwargs):
        """As fairseq's; the report is written when the program ends."""
        if self.observer is not None:
            self.observer.finish_at_exit()
        return super().build_dataset_for_inference(*args, **kwargs)

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """As fairseq's; when serving, this rank's batches, which tell the observer of themselves."""
        if self.observer is None:
            return super().get_batch_iterator(dataset, *args, **kwargs)
        if kwargs.get("num_shards", 1) > 1 and not self.shards_by_user:
            raise ValueError(
                "--distributed-world-size must be 1: one process serves, and fairseq would translate no more than "
                f"one part of the data in {kwargs['num_shards']}"
            )
        if not self.shards_by_user:  # fairseq-eval-lm has given them
            kwargs["num_shards"] = getattr(self._flags(), "num_shards", 1)
            kwargs["shard_id"] = getattr(self._flags(), "shard_id", 0)
        keep_every_sentence(dataset)
        of_all = self.ranks is None or self.ranks.shows_all or self.batches_in_order
        if not of_all:
            shards, shard = kwargs.get("num_shards", 1), kwargs.get("shard_id", 0)
            kwargs["num_shards"] = shards * self.ranks.world_size
            kwargs["shard_id"] = shard + shards * self.ranks.part
        epoch_iterator = super().get_batch_iterator(dataset, *args, **kwargs)
        self._room = Room(kwargs.get("max_sentences"), kwargs.get("max_tokens"))
        self._data_sets += 1
        last = self._data_sets == len(self._flags().valid_subset.split(","))  # another command than validate has one
        self._epoch = ServedEpoch(epoch_iterator, self.observer, self.ranks, of_all, last)
        return self._epoch

    def valid_step(self, sample, model, criterion):
        """fairseq's; under several ranks by the one whose batch it is, from which rank 0 gets what came of it."""
        compute = super().valid_step
        if self.ranks is None:
            return compute(sample, model, criterion)
        if not sample:  # fills up this rank's part
            return 0, 0, {}
        here = {key: value for key, value in sample.items() if key != RANK_BATCH}  # a search has no turn of its own
        ((result,),) = by_owner(sample, lambda: [[compute(here, model, criterion)]])
        return result

    def reduce_metrics(self, logging_outputs, criterion):
        """As fairseq's, on rank 0 only where ranks serve."""
        if self.ranks is None or self.ranks.rank == 0:  # which has those of all
            super().reduce_metrics(logging_outputs, criterion)

    @property
    def static_serving(self) -> bool:
        """Whether a checkpoint is served under static gating."""
        return self.observer is not None and str(self._flags().moe_gating) == "static"
