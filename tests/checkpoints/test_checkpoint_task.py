"""The checkpoint's own task and dictionary judge the options that say what its tokens are."""

import re
from argparse import Namespace

import commands
import pytest
import torch
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data
from model_makers import dictionary
from omegaconf import OmegaConf

from fairseq_moe_ext.checkpoints.checkpoint_task import CheckpointTask
from fairseq_moe_ext.checkpoints.dictionary_checksum import DICTIONARY_CHECKSUM, dictionary_checksum
from fairseq_moe_ext.checkpoints.errors import CheckpointError

MULTILINGUAL = {
    "langs": ["en", "de", "fr"],
    "lang_pairs": ["en-de", "en-fr"],
    "source_lang": None,
    "encoder_langtok": "src",
    "decoder_langtok": True,
    "langtoks": {"main": ("src", "tgt")},
    "lang_tok_style": "multilingual",
    "lang_tok_replacing_bos_eos": False,
    "add_data_source_prefix_tags": False,
    "add_ssl_task_tokens": False,
    "finetune_dict_specs": None,
}


def check(checkpoint: dict, **given) -> None:
    CheckpointTask("x.pt", checkpoint).check(Namespace(**given), ())


@pytest.mark.parametrize(
    ("field", "given", "both"),
    [
        ("langs", ["de", "en", "fr"], "en,de,fr, got de,en,fr"),
        ("langs", ["en", "de"], "en,de,fr, got en,de"),
        ("encoder_langtok", None, "src, got none"),
        ("encoder_langtok", "tgt", "src, got tgt"),
        ("decoder_langtok", False, "True, got False"),
        ("langtoks", {"main": ("src", None)}, "{'main': ['src', 'tgt']}, got {'main': ['src', None]}"),
        ("lang_tok_style", "mbart", "multilingual, got mbart"),
        ("lang_tok_replacing_bos_eos", True, "False, got True"),
        ("add_data_source_prefix_tags", True, "False, got True"),
        ("add_ssl_task_tokens", True, "False, got True"),
    ],
)
def test_another_value_is_refused_with_both(field, given, both):
    message = re.escape(f"--{field.replace('_', '-')} must be as in x.pt, {both}")
    with pytest.raises(CheckpointError, match=message):
        check(MULTILINGUAL, **{**MULTILINGUAL, field: given})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"langs": "en,de,fr", "decoder_langtok": "True"},
        {"lang_pairs": ["en-de"], "source_lang": "en", "target_lang": "fr"},  # one pair of many
        {"langtoks": {"main": ["src", "tgt"]}},
    ],
)
def test_what_changes_nothing_is_taken(change):
    check(MULTILINGUAL, **{**MULTILINGUAL, **change})


def test_what_a_checkpoint_does_not_say_is_not_compared():
    check({}, **MULTILINGUAL)
    check({"langs": None, "lang_dict": "langs.txt", "lang_pairs": ["en-de"]}, **MULTILINGUAL)


def test_languages_that_were_the_pairs():
    pairs = {"langs": None, "lang_dict": None, "lang_pairs": "en-fr,en-de"}
    check(pairs, langs=["de", "en", "fr"])
    with pytest.raises(CheckpointError, match="--langs must be as in x.pt, de,en,fr, got en,de,fr"):
        check(pairs, langs=["en", "de", "fr"])


def test_the_goldens_languages_in_another_order(shared_goldens):
    folder = shared_goldens / "mt_nllb_ws2"
    arguments = [folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.NLLB, "-t", "de"]
    arguments[arguments.index("en,de,fr")] = "de,en,fr"
    with pytest.raises(CheckpointError, match="--langs must be as in .*, en,de,fr, got de,en,fr"):
        commands.generate(*arguments)


@pytest.fixture(scope="module")
def mt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mt")
    data = write_data(folder / "data", ("en", "de"))
    untrained_checkpoint(folder / "x.pt", data, *MT_TRAINING)
    return data, folder / "x.pt"


def generate(data, path, *flags, **how):
    arguments = ("--task", "moe_translation", "--gen-subset", "test", "--max-len-b", "3", *commands.LM[-3:])
    return commands.generate(data, "--path", path, *arguments, *flags, **how)


def test_a_bilingual_model_the_other_way_round(mt):
    with pytest.raises(CheckpointError, match="--source-lang must be as in .*, en, got de"):
        generate(*mt, "-s", "de", "-t", "en")
    override = {"source_lang": "de", "target_lang": "en"}  # the user knows that only the names differ
    assert generate(*mt, "-s", "de", "-t", "en", overrides=override).of_kind("H")


def test_a_language_models_first_token_and_output(tmp_path):
    data = write_data(tmp_path / "data")
    untrained_checkpoint(tmp_path / "x.pt", data, *LM_TRAINING)
    flags = ("--task", "moe_language_modeling", "--gen-subset", "test", "--tokens-per-sample", "16", "--cpu")
    with pytest.raises(CheckpointError, match="--add-bos-token must be as in .*, False, got True"):
        commands.eval_lm(data, "--path", tmp_path / "x.pt", *flags, "--add-bos-token")


def test_a_first_token_that_training_had_may_be_left_off(tmp_path, caplog):
    """fairseq-eval-lm knows nothing of it without the flag, and its results are fairseq's."""
    data = write_data(tmp_path / "data")
    untrained_checkpoint(tmp_path / "x.pt", data, *LM_TRAINING, "--add-bos-token")
    flags = ("--task", "moe_language_modeling", "--gen-subset", "test", "--tokens-per-sample", "8", "--cpu")
    told = "--add-bos-token was on in the training of"
    with caplog.at_level("WARNING"):
        without = commands.eval_lm(data, "--path", tmp_path / "x.pt", *flags)
        assert caplog.text.count(told) == 1
        with_it = commands.eval_lm(data, "--path", tmp_path / "x.pt", *flags, "--add-bos-token")
    assert caplog.text.count(told) == 1 and without.loss != with_it.loss


def test_a_dictionary_of_another_size_is_left_to_loading():
    found = CheckpointTask("x.pt", MULTILINGUAL, "another checksum", frozenset({9}))
    found.check(Namespace(**{**MULTILINGUAL, "langs": ["en"]}), [dictionary(40)])


def test_languages_from_a_file_count():
    given = Namespace(**{**MULTILINGUAL, "langs": None, "lang_dict": "langs.txt"})
    CheckpointTask("x.pt", MULTILINGUAL).check(given, (), ["en", "de", "fr"])
    with pytest.raises(CheckpointError, match="--langs must be as in x.pt, en,de,fr, got fr,de,en"):
        CheckpointTask("x.pt", MULTILINGUAL).check(given, (), ["fr", "de", "en"])


@pytest.mark.parametrize("change", ["none", "order", "size"])
def test_the_checksum_of_a_dictionary(mt, tmp_path, change):
    data, file = mt
    state = commands.read_state(file)
    words = dictionary(40).symbols
    state["extra_state"][DICTIONARY_CHECKSUM] = dictionary_checksum(
        {"none": words, "order": [*words[:-2], words[-1], words[-2]], "size": words[:-1]}[change]
    )
    torch.save(state, path := tmp_path / "x.pt")
    if change == "none":
        assert generate(data, path, "-s", "en", "-t", "de").of_kind("H")
        return
    with pytest.raises(CheckpointError, match="the dictionary must hold the words of the checkpoint's"):
        generate(data, path, "-s", "en", "-t", "de")


def test_fields_of_a_configuration_with_interpolations():
    task = OmegaConf.create({"add_bos_token": True, "source_lang": "${common.seed}"})
    CheckpointTask("x.pt", {"add_bos_token": "True", "source_lang": "en"}).check(task, ())
