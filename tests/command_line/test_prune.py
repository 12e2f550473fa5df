"""fairseq-moe prune: what it writes is what --expert-keep serves."""

import json
from dataclasses import replace
from pathlib import Path

import commands
import numpy as np
import pytest
import torch
from kept_makers import load, logits
from small_lm import small_lm

from fairseq_moe_ext.buffering.profile import LayerProfile, Profile, profile_of, save_profile
from fairseq_moe_ext.checkpoints.kept_experts import read_kept
from fairseq_moe_ext.command_line import prune
from fairseq_moe_ext.recording import load_record

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "nllb_pruning" / "experts.json"
ENCODER, DECODER = "encoder.layers.3.moe_layer", "decoder.layers.3.moe_layer"


def layer(languages, experts, seed):
    generator = np.random.default_rng(seed)
    first = np.zeros((3, experts), np.int64)
    first[languages] = generator.integers(0, 50, (len(languages), experts))
    tokens = first.sum(axis=1)
    share = first / np.maximum(tokens, 1)[:, None]
    importance = share * np.exp(generator.random(share.shape))
    return LayerProfile(tokens, importance, first // 10, first, first.sum(axis=0) * 2)


@pytest.fixture
def profile(tmp_path):
    """Of two layers of 16 experts; sources en and de, targets de and fr."""
    found = Profile(("en", "de", "fr"), {ENCODER: layer([0, 1], 16, 0), DECODER: layer([1, 2], 16, 1)})
    save_profile(tmp_path / "profile.json", found)
    return found


def pruned(tmp_path, *options):
    """What the command writes."""
    target = tmp_path / "experts.json"
    assert prune.main([str(tmp_path / "profile.json"), "--output", str(target), *options]) == 0
    return json.loads(target.read_text())


def best(values, count):
    return sorted(sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:count])


def test_each_language_has_its_own_side(profile, tmp_path, capsys):
    found = pruned(tmp_path, "--share", "0.5")  # 12 of the encoder, 4 of the decoder
    importance = {name: each.importance for name, each in profile.layers.items()}
    encoder = {language: best(importance[ENCODER][place], 12) for place, language in ((0, "en"), (1, "de"))}
    decoder = {
        language: [16 + each for each in best(importance[DECODER][place], 4)]
        for place, language in ((1, "de"), (2, "fr"))
    }
    assert found == {"en": encoder["en"], "de": encoder["de"] + decoder["de"], "fr": decoder["fr"]}
    said = capsys.readouterr().out
    assert said.endswith("experts.json\n") and "12 of 16" in said and "4 of 16" in said
    kept = read_kept("--keep", tmp_path / "experts.json", ("en", "fr"), {ENCODER: 16, DECODER: 16})
    assert kept.layers == {ENCODER: tuple(encoder["en"]), DECODER: tuple(each - 16 for each in decoder["fr"])}


@pytest.mark.parametrize("options, counts", [
    (("--ratio", "1"), (8, 8)), (("--metric", "activity"), (12, 4)), (("--metric", "load"), (12, 4)),
    (("--metric", "random", "--seed", "5"), (12, 4)),
])
def test_a_pair(profile, tmp_path, options, counts):
    found = pruned(tmp_path, "--share", "0.5", "--pair", "en-fr", *options)
    assert list(found) == ["en", "fr"] and tuple(map(len, found.values())) == counts
    metric = options[1] if options[0] == "--metric" else "importance"
    if metric == "random":
        assert found == pruned(tmp_path, "--share", "0.5", "--pair", "en-fr", *options)
        assert found != pruned(tmp_path, "--share", "0.5", "--pair", "en-fr", *options[:3], "6")
    else:
        values = profile.layers[ENCODER]
        values = values.load if metric == "load" else getattr(values, metric)[0]
        assert found["en"] == best(values, counts[0])


def test_one_threshold_over_both_sides_of_a_pair(profile, tmp_path):
    found = pruned(tmp_path, "--share", "0.5", "--pair", "en-fr", "--by", "threshold")
    assert len(found["en"]) + len(found["fr"]) in (15, 16)  # one step of the threshold adds an expert
    shares = []
    for name, language, first in ((ENCODER, "en", 0), (DECODER, "fr", 16)):
        values = profile.layers[name].importance[profile.languages.index(language)]
        shares.append(sum(values[number - first] for number in found[language]) / values.sum())
    assert abs(shares[0] - shares[1]) < 0.15


def test_the_guard_keeps_the_experts_of_ends(profile, tmp_path):
    ends = np.zeros((3, 16), np.int64)
    worst = int(np.argmin(profile.layers[DECODER].importance[2]))
    ends[2, worst] = 7
    guarded = Profile(
        profile.languages, {**profile.layers, DECODER: replace(profile.layers[DECODER], ends=ends)}
    )
    save_profile(tmp_path / "profile.json", guarded)
    without = pruned(tmp_path, "--share", "0.5", "--pair", "en-fr")
    found = pruned(tmp_path, "--share", "0.5", "--pair", "en-fr", "--guard-ends")
    assert worst + 16 not in without["fr"] and worst + 16 in found["fr"]
    assert set(found["fr"]) == {*without["fr"], worst + 16} and found["en"] == without["en"]


@pytest.mark.parametrize("options, sentence", [
    (("--pair", "en-en"), "it has no tokens of 'en' in decoder.layers.3.moe_layer, only of de, fr"),
    (("--pair", "en"), "--pair must be two languages such as eng_Latn-fra_Latn, got 'en'"),
    (("--pair", "fr-de"), "it has no tokens of 'fr' in encoder.layers.3.moe_layer, only of en, de"),
])
def test_says_what_is_wrong(profile, tmp_path, capsys, options, sentence):
    arguments = [str(tmp_path / "profile.json"), "--output", str(tmp_path / "experts.json"), *options]
    assert prune.main(arguments) == 1
    assert capsys.readouterr().err.rstrip().endswith(sentence)
    assert not (tmp_path / "experts.json").exists()


@pytest.mark.parametrize("options", [
    ("--share", "0"), ("--share", "2"), ("--ratio", "2", "--by", "threshold"), ("--seed", "1"), ("--ratio", "0"),
])
def test_refuses_options_that_cannot_take_effect(profile, tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        prune.main([str(tmp_path / "profile.json"), "--output", str(tmp_path / "experts.json"), *options])
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err


def test_a_profile_without_ends_has_no_guard(profile, tmp_path, capsys):
    layers = {name: replace(each, ends=np.zeros((3, 16), np.int64)) for name, each in profile.layers.items()}
    save_profile(tmp_path / "profile.json", Profile(profile.languages, layers))
    arguments = [str(tmp_path / "profile.json"), "--output", str(tmp_path / "experts.json"), "--guard-ends"]
    assert prune.main(arguments) == 1
    assert "--guard-ends needs a profile with ends of sentences of 'de' in decoder" in capsys.readouterr().err


def test_is_served_as_expert_keep_chooses_by_the_profile(tmp_path):
    data, _ = small_lm(tmp_path)
    command = (data, "--path", tmp_path / "X.pt", *commands.LM, "--tokens-per-sample", "16")
    commands.run("eval-lm", *command, "--moe-record", str(tmp_path / "record.npz"))
    save_profile(tmp_path / "profile.json", profile_of(load_record(tmp_path / "record.npz")))
    assert [len(numbers) for numbers in pruned(tmp_path, "--share", "0.7").values()] == [2 * 5]  # of 2 layers of 8
    whole, by_file, by_share = (
        logits(commands.load("eval_lm", *command, *flags)[0])
        for flags in (
            (),
            ("--expert-keep", str(tmp_path / "experts.json")),
            ("--expert-keep", "0.7", "--expert-profile", str(tmp_path / "profile.json")),
        )
    )
    assert torch.equal(by_share, by_file) and not torch.equal(by_file, whole)


def test_the_profile_must_know_the_run(golden_folder, profile, tmp_path):
    share = ("--expert-keep", "0.9", "--expert-profile", str(tmp_path / "profile.json"))
    with pytest.raises(ValueError, match="--expert-profile .*: it must be of the checkpoint's 2 MoE layers of 4"):
        load(golden_folder("tiny_nllb"), "tiny_nllb", *share)
    with pytest.raises(ValueError, match="it has no tokens of 'fr' in encoder.layers.3.moe_layer, only of en, de"):
        load(golden_folder("tiny_nllb"), "tiny_nllb", *share, "-s", "fr")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published sets do not lie beside the repository")
def test_the_published_sets_are_36_and_12_of_128():
    layers = {f"{side}.layers.{number}.moe_layer": 128 for side in ("encoder", "decoder") for number in range(3, 24, 4)}
    kept = read_kept("--keep", PUBLISHED, ("eng_Latn", "fra_Latn"), layers)
    assert kept.counts == {name: 36 if name.startswith("encoder") else 12 for name in layers}
    content = json.loads(PUBLISHED.read_text())
    numbers = [
        place * 128 + number for place, name in enumerate(layers) for number in kept.layers[name]
    ]
    assert numbers == [n for n in content["eng_Latn"] if n < 768] + [n for n in content["fra_Latn"] if n >= 768]
    with pytest.raises(ValueError, match="must have the language 'tlh_Latn', it has 'ace_Arab'.* and 194 more"):
        read_kept("--keep", PUBLISHED, ("eng_Latn", "tlh_Latn"), layers)
