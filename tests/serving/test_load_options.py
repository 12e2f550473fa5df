"""Options of `fairseq_moe_ext.load` and of a served model's calls: which there are, and which are refused by name."""

import dataclasses

import pytest

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.serving import device_flags
from fairseq_moe_ext.serving.keyword_options import (
    BATCHES,
    FLAGS,
    MODEL,
    SEARCH,
    TASKS,
    TEXT,
    KeywordOptions,
    OptionError,
)
from fairseq_moe_ext.tasks.flags import MoEFlags


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"beem": 4}, "beem must be an option of fairseq's commands or of this plugin, and is not; did you mean beam"),
        ({"input": "file"}, "input must not be given: it has an effect in fairseq's commands alone"),
        ({"moe_gating": "dense"}, "moe_gating invalid choice: 'dense'"),
        ({"beam": "four"}, "beam invalid int value: 'four'"),
        ({"beam": 0}, "beam must be at least 1, got 0"),
        ({"nbest": 7, "beam": 4}, "nbest must be at most beam, 4, got 7"),
        ({"langs": "en,de"}, "langs must go with a model of moe_translation_multi_simple_epoch"),
        ({"tokens_per_sample": 9}, "tokens_per_sample must go with a model of moe_language_modeling"),
        ({"cpu": 1}, "cpu must be True or False, got 1"),
        ({"sentencepiece_model": "x"}, "sentencepiece_model must go with the bpe or the tokenizer whose option it is"),
        ({"bpe": "letters"}, "bpe must be one of .*, got 'letters'"),
        ({"expert_bufer_size": 3}, "did you mean expert_buffer_size"),
        ({"model_overrides": "{"}, "model_overrides must be a mapping of the checkpoint's fields, got '{'"),
        ({"model_overrides": {"moe_gating": "static"}}, "model_overrides must leave moe_gating to moe_gating"),
        ({"print_alignment": "soft"}, "print_alignment must be 'hard', got 'soft'"),
        ({"constraints": "ordered", "sampling": True}, "sampling must not go with constraints, got True and ordered"),
        ({"sampling_topp": 0.3}, "sampling_topp needs sampling, got 0.3 without it"),
        ({"distributed_world_size": True}, "distributed_world_size must be a number of ranks, got True"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(shared_goldens, call, words):
    folder = shared_goldens / "mt_plain"
    with pytest.raises(OptionError, match=words):
        moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", **call)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"sampling_topk": 3}, "sampling_topk needs sampling, got 3 without it"),
        ({"sampling": True, "sampling_topk": 3, "sampling_topp": 0.3}, "sampling_topk must not go with sampling_topp"),
        ({"lenpen": 2, "unnormalized": True}, "lenpen must not go with unnormalized, got 2.0 and True"),
        ({"diverse_beam_groups": 2}, "diverse_beam_groups must divide beam, got 2 and 5"),
        ({"diverse_beam_strength": 3.0}, "diverse_beam_strength needs diverse_beam_groups, got 3.0 without it"),
        ({"sampling": True, "diversity_rate": 0.3}, "sampling must not go with diversity_rate, got True and 0.3"),
        ({"match_source_len": True, "max_len_b": 5}, "max_len_b must not go with match_source_len, got 5 and True"),
        ({"temperature": 0}, "temperature must be a number above 0 and up to 1000000, got 0.0"),
        ({"lenpen": float("nan")}, "lenpen must be a number from -50 to 50, got nan"),
        ({"max_len_a": -1}, "max_len_a must be a number from 0 to 1000000, got -1.0"),
        ({"min_len": 9, "max_len_b": 8}, "min_len must be at most max_len_b, 8, got 9"),
        ({"beam": 10**9}, "--beam must be below the .* words, got 1000000000"),
        ({"sampling": True, "sampling_topk": 10**6}, "--sampling-topk must be at most the .* words, got 1000000"),
        ({"min_len": 500, "max_len_a": 1.5}, "--min-len must be at most the longest output allowed, 127, got 500"),
    ],
)
def test_a_call_refuses_what_no_search_can_do(bilingual, lines, call, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        bilingual.translate(lines[:1], **call)
    assert bilingual.translate(lines[:1])


def test_a_call_may_say_what_is_the_default(bilingual, lines):
    defaults = {"sampling_topk": -1, "diverse_beam_groups": -1, "sampling": False, "lenpen": 1}
    assert bilingual.translate(lines[:1], **defaults) == bilingual.translate(lines[:1])


def test_a_capacity_of_static_gating_is_refused_under_dynamic_gating(shared_goldens):
    folder = shared_goldens / "mt_plain"
    with pytest.raises(ValueError, match="--moe-eval-capacity-token-fraction needs --moe-gating static, got 0.5 with"):
        moe.load(folder / "checkpoint_merged.pt", folder / "data-bin", moe_eval_capacity_token_fraction=0.5, cpu=True)


def test_flags_of_a_gpu_are_refused_on_a_cpu(shared_goldens, monkeypatch):
    monkeypatch.setattr(device_flags, "triton_is_interpreted", lambda: False)
    folder = shared_goldens / "mt_plain"
    disk = {"expert_buffer_size": 2, "expert_store": "disk"}
    for call in ({"moe_kernel": "triton"}, {"expert_host_memory": "2G", **disk}):
        name, value = next((f"--{name.replace('_', '-')}", value) for name, value in call.items())
        with pytest.raises(ValueError, match=f"{name} {value} needs a GPU, got --cpu"):
            moe.load(folder / "checkpoint_merged.pt", data=folder / "data-bin", cpu=True, **call)


@pytest.mark.parametrize(
    ("path", "call", "words"),
    [
        (
            "checkpoint_merged.pt",
            {"data": "nowhere"},
            "data must be a folder with the model's dictionaries, got no",
        ),
        (
            "checkpoint_merged.pt",
            {"data": None},
            "data must be a folder with .* dictionaries, got .*mt_plain: ",
        ),
        ("checkpoint_merged.pt", {"source_lang": "fr"}, "got .*data-bin: .*dict.fr.txt is not there"),
        (
            "checkpoint_merged.pt",
            {"bpe": "sentencepiece"},
            "sentencepiece_model must be given with bpe=",
        ),
        (
            "checkpoint_merged.pt",
            {"bpe": "sentencepiece", "sentencepiece_model": "none.model"},
            "bpe='sentencepiece' must have what they need: .*none.model",
        ),
        ([], {}, r"path must name a checkpoint, or be a list of such names, got \[\]"),
        ("none.pt", {}, "there is neither none.pt nor none-shared.pt with none-rank-0.pt"),
        (
            "../mt_nllb_ws2/checkpoint_last.pt",
            {"target_lang": "fr"},
            "source_lang must be given for a multi",
        ),
        ("../lm_top2/checkpoint_last.pt", {}, "got .*data-bin: .*dict.txt is not there"),
        (
            "checkpoint_merged.pt",
            {"moe_report": "/nowhere/x.json"},
            "--moe-report must name a file in an",
        ),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(shared_goldens, path, call, words):
    folder = shared_goldens / "mt_plain"
    with pytest.raises((OptionError, CheckpointError, ValueError), match=words) as caught:
        moe.load(folder / path if path else path, **{"data": folder / "data-bin", "cpu": True, **call})
    assert "\n" not in str(caught.value)


def test_options_of_loading_are_refused_in_a_call(bilingual):
    with pytest.raises(OptionError, match="moe_gating must be given to load"):
        bilingual.translate(["a"], moe_gating="static")
    with pytest.raises(OptionError, match="nbest must be 1 for translate"):
        bilingual.translate(["a"], nbest=2)
    with pytest.raises(TypeError, match="must be a list of strings, got the string 'a'"):
        bilingual.translate("a")
    for wrong, kind in ((None, "NoneType"), (5, "int"), (iter(["a"]), "list_iterator")):
        with pytest.raises(TypeError, match=f"^sentences must be a list of strings, got {kind}$"):
            bilingual.translate(wrong)
    with pytest.raises(TypeError, match="must be strings, got int as number 1"):
        bilingual.translate(["a", 1])


def test_every_flag_of_the_plugin_is_taken_or_left_out_on_purpose():
    flags = {field.name for field in dataclasses.fields(MoEFlags)} - {"_name"}
    # what another interface gives, what several ranks need, what does nothing, and what a command prints
    assert flags - set(FLAGS) <= {"continuous_batching", "expert_placement", "is_moe", "moe_debug"}
    assert set(FLAGS) <= flags


@pytest.mark.parametrize("task", TASKS)
def test_every_keyword_is_an_option_of_fairseqs_parser(task):
    moe.register()
    keywords = {name: None for name in (*SEARCH, *BATCHES, *MODEL, *TEXT, *FLAGS, *TASKS[task])}
    options = KeywordOptions(task)
    assert options._parser(None, None)[1] | {"remove_bpe"} == set(keywords)
    given = {"beam": 3, "lenpen": -0.5, "remove_bpe": True, "retain_dropout": False, "cpu": True, "max_tokens": None}
    args = options.parse("data", given)
    assert (args.beam, args.lenpen, args.post_process, args.cpu, args.max_tokens) == (
        3,
        -0.5,
        "subword_nmt",
        True,
        None,
    )
    actions = {action.dest for action in options._parser(None, None)[0]._actions}
    assert set(keywords) - {"remove_bpe"} <= actions
