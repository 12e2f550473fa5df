"""NLLB's dictionary: what the options of upstream's `nllb` branch add, in its order, and what a mismatch says."""

import re

import commands
import hf_makers
import pytest
import torch
from fairseq import tasks

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.nllb.convert import convert_nllb
from fairseq_moe_ext.nllb.tokens import mending, option_sets

TAGS = ["<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>"]
LANGUAGES = ["__en__", "__de__"]
SPECS = "{'mono_dae': '', 'mono_lm': ''}"


@pytest.mark.parametrize(
    "flags, added",
    [
        ((), LANGUAGES),
        (("--add-data-source-prefix-tags",), [*LANGUAGES, *TAGS]),
        (("--add-ssl-task-tokens",), LANGUAGES),
        (("--finetune-dict-specs", "{'mono_dae': ''}"), [*LANGUAGES, "<mask>"]),
        (("--finetune-dict-specs", "{'mono_lm': ''}"), LANGUAGES),
        (("--finetune-dict-specs", SPECS, "--add-ssl-task-tokens"), [*LANGUAGES, "<mask>", "__dae__", "__lm__"]),
        (
            ("--add-data-source-prefix-tags", "--add-ssl-task-tokens", "--finetune-dict-specs", SPECS),
            [*LANGUAGES, "<mask>", "__dae__", *TAGS, "__lm__"],
        ),
        (
            ("--lang-tok-style", "mbart", "--add-data-source-prefix-tags"),
            ["[en]", "[de]", "<mask>", *TAGS],
        ),
    ],
)
def test_tokens_in_upstreams_order(tmp_path, flags, added):
    file = hf_makers.write_dictionary(tmp_path / "dict.txt", ["a", "b"])
    flags = ("--task", "moe_translation_multi_simple_epoch", "--langs", "en,de", "--lang-pairs", "en-de", *flags)
    cfg = commands.parse("generate", tmp_path, "-s", "en", "-t", "de", "--fixed-dictionary", file, *flags)
    task = tasks.setup_task(cfg.task)
    wanted = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", *added]
    assert task.source_dictionary.symbols == task.target_dictionary.symbols == wanted


def test_upstreams_own_vocabulary(shared_goldens):
    folder = shared_goldens / "mt_nllb_ws2"
    task = tasks.setup_task(commands.parse("generate", folder / "data-bin", *commands.NLLB, "-t", "de").task)
    lines = (folder / "full_vocab_with_langtoks.txt").read_text(encoding="utf-8").splitlines()
    words = [re.split(r"\s", line)[0] for line in lines]
    assert task.source_dictionary.symbols[-len(words) :] == words


def test_specs_must_be_a_dictionary(tmp_path, capsys):
    flags = ("--task", "moe_translation_multi_simple_epoch", "--finetune-dict-specs", "mono_dae")
    with pytest.raises(SystemExit):
        commands.parse("generate", tmp_path, *flags)
    assert "--finetune-dict-specs: must be a dictionary" in capsys.readouterr().err


def test_the_advice_names_the_options_that_fit():
    for options, tokens in option_sets():
        if len(tokens) > 0:
            found = mending(100 + len(tokens), 100, [])
            fitting = [chosen for chosen, extra in option_sets() if len(extra) == len(tokens)]
            assert found.removeprefix("give ") in fitting and options is not None
    assert mending(100, 103, TAGS).startswith("leave out --add-data-source-prefix-tags")
    assert mending(200, 100, []) == ""


@pytest.mark.parametrize(
    "told, given, advice",
    [
        (["<mask>"], [], "give --finetune-dict-specs '{'mono_dae': ''}'"),
        (["__lm__"], [], "give --add-ssl-task-tokens --finetune-dict-specs '{'mono_lm': ''}'"),
        ([], TAGS, "leave out --add-data-source-prefix-tags"),
        (TAGS, ["<mask>"], "give --add-data-source-prefix-tags"),
        (TAGS, TAGS, ""),  # the right options: it is something else
        (["<mask>"], TAGS, "give --finetune-dict-specs '{'mono_dae': ''}'"),
    ],
)
def test_the_checkpoints_own_options_are_the_advice(told, given, advice):
    wanted = 100 + len(told) + (told == given)
    assert mending(wanted, 100 + len(given), given, told).startswith(advice)
    assert bool(advice) or mending(wanted, 100 + len(given), given, told) == ""


def test_no_advice_by_options_that_the_checkpoint_did_not_have():
    """Four rows too many, which NLLB's tags with a token would explain, are no tags where the checkpoint had none."""
    assert mending(104, 100, [], told=[]) == "" and mending(104, 100, [], told=None).startswith("give ")


def convert(work, **changes) -> tuple:
    """A converted model: fairseq-generate's arguments but for the dictionary's options, and those."""
    hf_makers.write_model(work / "hf", **changes)
    done = convert_nllb(str(work / "hf"), str(work / "x.pt"), dtype=torch.float32)
    texts = {"eng_Latn": ["the fox", "ten days"], "deu_Latn": ["der hund", "vier"]}
    data = hf_makers.write_sentences(work / "data", work / "hf" / "sentencepiece.bpe.model", done.files[1], texts)
    flags = ("--task", "moe_translation_multi_simple_epoch", "-s", "eng_Latn", "-t", "deu_Latn", "--cpu")
    flags += ("--lang-pairs", "eng_Latn-deu_Latn", "--fixed-dictionary", done.files[1], "--lang-dict", done.files[2])
    flags += ("--encoder-langtok", "src", "--decoder-langtok", "--path", done.files[0], "--num-workers", "0")
    return (data, *flags), done.task_flags.removeprefix("--encoder-langtok src --decoder-langtok").split()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Of a model with three tags: the arguments without the options that add them."""
    arguments, options = convert(tmp_path_factory.mktemp("served"))
    assert options == ["--add-data-source-prefix-tags"]
    return arguments


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "rows, 67, got 64, 3 too few: give --add-data-source-prefix-tags; otherwise"),
        (
            ("--add-data-source-prefix-tags", "--finetune-dict-specs", "{'mono_dae': ''}"),
            "rows, 67, got 68, 1 too many: give --add-data-source-prefix-tags; otherwise",
        ),
        (("--lang-dict", None, "--langs", ",".join(f"l{i}" for i in range(30))), None),
    ],
)
def test_a_mismatch_says_by_how_much_and_what_mends_it(served, flags, message):
    if message is None:
        number = served.index("--lang-dict")
        languages = "eng_Latn,deu_Latn,fra_Latn," + flags[-1]
        arguments = (*served[:number], "--langs", languages, *served[number + 2 :])
        message = "got 94, 27 too many: the data's"
    else:
        arguments = (*served, *flags)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        commands.load("generate", *arguments)


def test_advice_by_the_numbers_alone_says_so(served, tmp_path):
    path = served[served.index("--path") + 1]
    state = torch.load(path, weights_only=False)
    del state["args"].add_data_source_prefix_tags, state["extra_state"]["dictionary_checksum"]
    torch.save(state, tmp_path / "x.pt")
    arguments = [tmp_path / "x.pt" if argument == path else argument for argument in served]
    with pytest.raises(CheckpointError, match="by the numbers alone, for .*: give --add-data-source-prefix-tags;"):
        commands.load("generate", *arguments)


def test_the_right_options_serve(served):
    assert len(commands.generate(*served, "--add-data-source-prefix-tags", "--beam", "2").hypotheses()) == 2


def test_a_model_with_rows_padded_to_a_multiple_is_served(tmp_path):
    arguments, options = convert(tmp_path, vocab_size=72)
    assert options == []
    assert len(commands.generate(*arguments, "--beam", "2").hypotheses()) == 2
