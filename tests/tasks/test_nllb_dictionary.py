"""NLLB's dictionary: what the options of upstream's `nllb` branch add, in its order, and what a mismatch says."""

import re

import commands
import hf_makers
import pytest
import torch
from fairseq import tasks

from fairseq_moe_ext.serving.convert_nllb import convert_nllb
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.nllb_tokens import mending, option_sets

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


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A converted model with three tags: fairseq-generate's arguments but for the dictionary's options."""
    work = tmp_path_factory.mktemp("served")
    hf_makers.write_model(work / "hf")
    done = convert_nllb(str(work / "hf"), str(work / "x.pt"), dtype=torch.float32)
    texts = {"eng_Latn": ["the fox", "ten days"], "deu_Latn": ["der hund", "vier"]}
    data = hf_makers.write_sentences(work / "data", work / "hf" / "sentencepiece.bpe.model", done.files[1], texts)
    flags = ("--task", "moe_translation_multi_simple_epoch", "-s", "eng_Latn", "-t", "deu_Latn", "--cpu")
    flags += ("--lang-pairs", "eng_Latn-deu_Latn", "--fixed-dictionary", done.files[1], "--lang-dict", done.files[2])
    return data, *flags, "--encoder-langtok", "src", "--decoder-langtok", "--path", done.files[0], "--num-workers", "0"


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


def test_the_right_options_serve(served):
    assert len(commands.generate(*served, "--add-data-source-prefix-tags", "--beam", "2").hypotheses()) == 2
