"""Random numbers belong to a batch, not to the rank or the order that it was served in."""

import commands
import pytest
import torch
from data_makers import MT_TRAINING, untrained_checkpoint, write_data

from fairseq_moe_ext.models.batch_seeds import BatchSeeds

_HERE = commands.LM[-3:]
MT = ("--task", "moe_translation", "--gen-subset", "test", "-s", "en", "-t", "de", "--max-len-b", "8", *_HERE)
RANDOM = {"moe_second_expert_policy": "sampling"}
SAMPLED = ("--sampling", "--beam", "2", "--nbest", "2", "--batch-size", "4", "--retain-dropout")


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    data = write_data(folder / "data", ("en", "de"))
    untrained_checkpoint(folder / "x.pt", data, *MT_TRAINING, "--dropout", "0.1")
    return data, "--path", folder / "x.pt"


@pytest.mark.parametrize("seed", [(), ("--seed", "5")], ids=["no seed", "seed"])
def test_two_ranks_draw_what_one_draws(mt, seed):
    overrides = ("--model-overrides", repr(RANDOM))
    one = commands.run("generate", *mt, *MT, *SAMPLED, *seed, *overrides)
    two = commands.run("generate", *mt, *MT, *SAMPLED, *seed, *overrides, ranks=2)
    wanted = commands.Generation(one.stdout.splitlines())
    assert commands.Generation(two.stdout.splitlines()).hypotheses() == wanted.hypotheses()
    texts = [text for _, text in wanted.hypotheses()]
    assert len(texts) == 40 and len(set(texts)) > 20


class _Source:
    def __init__(self, seeds: list):
        self.seed = seeds.append


def test_a_batch_draws_the_same_whatever_came_before_it():
    seeds, drawn = BatchSeeds(), []
    source = _Source(drawn)
    torch.manual_seed(3)
    first = torch.rand(4)
    torch.manual_seed(3)
    seeds.register(source, 70)
    numbers = {}
    for batch in (0, 2, 1, 2, 0):
        seeds.begin(batch)
        numbers.setdefault(batch, []).append(torch.rand(4).tolist())
    assert numbers[0][0] == numbers[0][1] == first.tolist()  # the first batch draws by the seed itself
    assert numbers[2][0] == numbers[2][1] != numbers[1][0] != numbers[0][0]
    assert drawn[0] == drawn[4] == 70 and drawn[1] == drawn[3] and len(set(drawn)) == 3
