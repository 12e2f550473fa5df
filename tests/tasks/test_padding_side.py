"""The side on which sentences are padded, which fairseq's multilingual task evaluates anew at every set-up."""

import commands
import pytest
from fairseq import tasks


def sides(task) -> tuple[bool, bool]:
    task.load_dataset("test")
    (dataset,) = task.datasets["test"].datasets  # one language pair
    return dataset.left_pad_source, dataset.left_pad_target


@pytest.fixture
def arguments(shared_goldens):
    return (shared_goldens / "mt_nllb_ws2/data-bin", *commands.NLLB, "-t", "de")


@pytest.mark.parametrize("given", [(True, False), (False, True)])
@pytest.mark.parametrize("form", [str, bool])  # as the command line gives it, as a training leaves it in a checkpoint
@pytest.mark.parametrize("command", ["generate", "validate"])
def test_every_set_up_pads_alike(arguments, given, form, command):
    of_search = commands.BEAM if command == "validate" else ()
    cfg = commands.parse(command, *(each for each in arguments if each not in of_search)).task
    cfg.left_pad_source, cfg.left_pad_target = map(form, given)
    assert [sides(tasks.setup_task(cfg)) for _ in range(3)] == [given] * 3


def test_arguments_that_lack_it_pad_as_fairseq_does(arguments):
    cfg = commands.parse("generate", *arguments).task
    del cfg.left_pad_source, cfg.left_pad_target
    assert sides(tasks.setup_task(cfg)) == (True, False)


@pytest.mark.parametrize("value", ["maybe", "__import__('os').getpid()", None, 2])
def test_anything_else_is_refused_and_never_evaluated(arguments, value):
    cfg = commands.parse("generate", *arguments).task
    cfg.left_pad_source = value
    with pytest.raises(ValueError, match="^--left-pad-source must be True or False, got "):
        tasks.setup_task(cfg)
