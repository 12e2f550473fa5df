"""A golden's model in service, its engine, and fairseq's search of each sentence alone."""

from argparse import Namespace

import torch
from fairseq.data import data_utils
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks import FairseqTask
from python_served import PIECES
from ties import assert_same_hypotheses, of_tokens

import fairseq_moe_ext as moe

COUNT = 8  # sentences
BEAM = {"beam": 4, "max_len_b": 14}


class Loaded:
    """A golden's model in service, and the first sentences of its test data; searches like BEAM."""

    def __init__(self, folder, **options):
        data = folder / "data-bin"
        self.served = moe.load(folder / "checkpoint_last.pt", data=data, **PIECES, **options)
        parts = self.served._parts
        self.task, (self.model,) = parts.task, parts.models
        self._generation = parts.generator(BEAM)[1].generation
        read = data_utils.load_indexed_dataset(str(data / "test.en-de.en"), self.task.source_dictionary)
        self.sentences = [read[number].long() for number in range(COUNT)]
        self.texts = [self.task.source_dictionary.string(tokens) for tokens in self.sentences]

    def engine(self, **options):
        return self.served.engine(**BEAM, **options)

    @property
    def steps(self) -> int:
        """Decoder passes so far."""
        return self.served.report()["decoder"]["steps"]

    def alone(self, tokens: torch.Tensor, **options) -> list[dict]:
        """What fairseq's own generator finds for one sentence."""
        generation = Namespace(**{**self._generation, **options})
        generator = FairseqTask.build_generator(self.task, [self.model], generation, seq_gen_cls=SequenceGenerator)
        dataset = self.task.build_dataset_for_inference([tokens], [tokens.numel()])
        sample = dataset.collater([dataset[0]])
        sample = {"net_input": {name: sample["net_input"][name] for name in ("src_tokens", "src_lengths")}}
        (found,) = self.task.inference_step(generator, [self.model], sample)
        return found[: generation.nbest]


def assert_same(requests, expected) -> None:
    found = of_tokens([request.result(timeout=0) for request in requests])
    assert_same_hypotheses(found, of_tokens(expected), rtol=1e-5)


def texts_of(found) -> list[list[tuple[str, str]]]:
    return [[(each.words, each.text) for each in sentence] for sentence in found]
