"""Beam search on ranks of one group: uneven numbers of sentences and steps, some ranks without any, as one rank's."""

import commands
import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from rank_commands import arguments_of
from rank_group import ranks
from rank_layers import contiguous, replicated, shuffled, split_layer
from ties import Hypothesis, assert_same_hypotheses, of_tokens

from fairseq_moe_ext.ranks.exchange import Exchange
from fairseq_moe_ext.ranks.process_group import start_group

RANKS = 3
PLACEMENTS = {"contiguous": contiguous, "shuffled": shuffled, "replicated": replicated}
STATIC = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "1.0")


@pytest.fixture(scope="module")
def group():
    with ranks(RANKS) as group:
        yield group


def batches_of(rank: int, sentences: tuple[int, ...]) -> list[dict]:
    """One batch for each number of sentences: random words, left-padded, of up to 9 + 4 * rank of them."""
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for number in sentences:
        lengths = torch.randint(2, 10 + 4 * rank, (number,), generator=generator)
        tokens = torch.full((number, int(lengths.max())), 1)
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            row[-length:] = torch.randint(4, 4000, (length,), generator=generator)
            row[-1] = 2
        batches.append({"net_input": {"src_tokens": tokens, "src_lengths": lengths}})
    return batches


def load(goldens, flags):
    model, task = commands.load("generate", *arguments_of(goldens, "mt_plain", *flags))
    return model, task.target_dictionary


def search(model, dictionary, batches, beam: int) -> list[list[Hypothesis]]:
    """Per sentence its best hypothesis."""
    generator = SequenceGenerator([model], dictionary, beam_size=beam, max_len_b=25)
    found = [hypothesis for batch in batches for hypothesis in generator.generate([model], batch)]
    return of_tokens([hypotheses[:1] for hypotheses in found])


def translate(rank, world_size, goldens, flags, where, beam, sentences_of_ranks):
    """This rank's translations, and the idle rounds until all were done."""
    model, dictionary = load(goldens, flags)
    exchange = Exchange(start_group())
    for layer in model.moe_layers().values():
        split_layer(layer, PLACEMENTS[where](8, world_size), rank, world_size, exchange)
    found = search(model, dictionary, batches_of(rank, sentences_of_ranks[rank]), beam)
    while exchange.idle_round(alive=False):
        pass
    return found, exchange.idle_rounds


@pytest.mark.parametrize("sentences", [((4, 2), (7,), (1, 1, 1)), ((), (1,), ()), ((1,), (), (1,))], ids=str)
@pytest.mark.parametrize(
    ("flags", "where", "beam"),
    [
        ((), "contiguous", 1),
        ((), "shuffled", 5),
        ((), "replicated", 5),
        (STATIC, "contiguous", 5),
        (STATIC, "shuffled", 1),
    ],
    ids=str,
)
def test_translations_are_one_ranks(shared_goldens, group, flags, where, beam, sentences):
    served = group(translate, shared_goldens, flags, where, beam, sentences)
    model, dictionary = load(shared_goldens, flags)
    for rank, (found, idle_rounds) in enumerate(served):
        wanted = search(model, dictionary, batches_of(rank, sentences[rank]), beam)
        assert_same_hypotheses(found, wanted)
        assert len(found) == sum(sentences[rank])
        assert idle_rounds >= 1 and (found or idle_rounds > 10)
