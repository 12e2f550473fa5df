"""--expert-keep serves the experts that are kept and the gates' rows of these, and nothing of the others."""

import json
from pathlib import Path

import commands
import kept_makers
import numpy as np
import pytest
import torch
from buffer_makers import buffered
from data_makers import untrained_checkpoint, write_data
from kept_makers import load, logits, write_sets

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.recording import load_record
from fairseq_moe_ext.reporting.routing_recorder import RoutingRecorder
from fairseq_moe_ext.trace import PhaseTrace, load_trace, pack_trace

# numbers in the published form: an encoder layer's 4 experts, then a decoder layer's
SETS = {
    "tiny_lm_top2": {"": (0, 1, 3)},
    "tiny_mt": {"en": (0, 2, 3, 4), "de": (1, 5, 7)},
    "tiny_nllb": {"en": (0, 1, 2, 5), "de": (3, 4, 6), "fr": (2, 3, 6, 7)},
}
LAYERS = {
    "tiny_lm_top2": {"decoder.layers.1": (0, 1, 3)},
    "tiny_mt": {"encoder.layers.1": (0, 2, 3), "decoder.layers.1": (1, 3)},
    "tiny_nllb": {"encoder.layers.1": (0, 1, 2), "decoder.layers.1": (0, 2)},
}
EVERY = list(SETS)
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "nllb_pruning" / "experts.json"


@pytest.fixture
def kept(golden_folder, tmp_path):
    """(model, flags) -> the model served with SETS."""

    def serve(name, *flags, sets=None):
        file = write_sets(tmp_path / "experts.json", sets or SETS[name])
        return load(golden_folder(name), name, "--expert-keep", file, *flags)

    return serve


@pytest.mark.parametrize("name", EVERY)
def test_is_a_layer_of_these_experts_alone(golden_folder, kept, name):
    twin = load(golden_folder(name), name)
    for layer, numbers in LAYERS[name].items():
        module = twin.get_submodule(layer)
        module.moe_layer = kept_makers.NaiveLayer(module.moe_layer, numbers)
    whole, found, wanted = logits(load(golden_folder(name), name)), logits(kept(name)), logits(twin)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("name, sets, layers", [
    ("tiny_lm_top2", {"": (0, 1, 3)}, {"decoder.layers.1": (0, 1, 3)}),
    ("tiny_mt", {"en": (0, 3), "de": (4, 6)}, {"encoder.layers.1": (0, 3), "decoder.layers.1": (0, 2)}),
])
def test_is_bit_by_bit_a_checkpoint_that_was_cut_by_hand(golden_folder, kept, tmp_path, name, sets, layers):
    state = commands.read_state(golden_folder(name) / "checkpoint_last-shared.pt")
    whole = read_checkpoint(str(golden_folder(name) / "checkpoint_last.pt"))["model"]
    state["model"] = kept_makers.cut({key: tensor + 0 for key, tensor in whole.items()}, layers)
    count = len(next(iter(layers.values())))
    config = state["args"] or state["cfg"]["model"]
    (config if isinstance(config, dict) else vars(config))["moe_expert_count"] = count
    torch.save(state, tmp_path / "cut.pt")
    wanted = logits(load(golden_folder(name), name, path=tmp_path / "cut.pt"))
    assert torch.equal(logits(kept(name, sets=sets)), wanted)


@pytest.mark.parametrize("name", EVERY)
def test_all_of_them_change_no_bit(golden_folder, kept, name):
    numbers = tuple(range(8 if name != "tiny_lm_top2" else 4))
    sets = dict.fromkeys(SETS[name], numbers)
    assert torch.equal(logits(kept(name, sets=sets)), logits(load(golden_folder(name), name)))


@pytest.mark.parametrize("name", EVERY)
def test_where_the_experts_lie_changes_no_bit(kept, tmp_path, name):
    wanted = logits(kept(name))
    for flags in (buffered(1), buffered(2, "--expert-store", "disk")):
        assert torch.equal(logits(kept(name, *flags)), wanted)
    store = buffered(1, "--expert-store", "disk", "--expert-store-dir", str(tmp_path / "store"))
    int4 = ("--moe-weights", "int4")
    assert torch.equal(logits(kept(name, *store, *int4)), logits(kept(name, *int4)))


def test_only_the_bytes_of_kept_experts_are_read(golden_folder, kept):
    whole, pruned = load(golden_folder("tiny_mt"), "tiny_mt"), kept("tiny_mt")
    sizes = {name: layer.experts.expert_bytes for name, layer in whole.moe_layers().items()}
    gone = sum(size * (4 - len(LAYERS["tiny_mt"][name.removesuffix(".moe_layer")])) for name, size in sizes.items())
    assert whole.loading.bytes - pruned.loading.bytes == gone  # a gate is read whole
    assert sum(layer.experts.total_bytes for layer in pruned.moe_layers().values()) == 4 * sum(sizes.values()) - gone


def test_report_trace_and_record_name_experts_as_the_whole_model_does(golden_folder, kept, tmp_path):
    folder = golden_folder("tiny_mt")
    file = write_sets(tmp_path / "experts.json", SETS["tiny_mt"])
    ends = (("report", "json"), ("trace", "npz"), ("record", "npz"))
    outputs = {name: tmp_path / f"{name}.{end}" for name, end in ends}
    flags = [part for name, path in outputs.items() for part in (f"--moe-{name}", str(path))]
    command = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.MT)
    commands.run("generate", *command, "--expert-keep", file, *flags)
    report = json.loads(outputs["report"].read_text())
    for layer in report["layers"]:
        numbers = LAYERS["tiny_mt"][layer["name"].removesuffix(".moe_layer")]
        assert len(layer["load"]) == 4 and set(np.flatnonzero(layer["load"])) <= set(numbers) and any(layer["load"])
        assert layer["kept_experts"] == list(numbers)
    for phase in load_trace(outputs["trace"]).values():
        assert phase.load.shape[2] == 4
        for place, name in enumerate(phase.names):
            numbers = LAYERS["tiny_mt"][name.removesuffix(".moe_layer")]
            assert set(np.flatnonzero(phase.load[:, place].sum(axis=0))) <= set(numbers)
    for name, layer in load_record(outputs["record"]).layers.items():
        numbers = set(LAYERS["tiny_mt"][name.removesuffix(".moe_layer")])
        assert layer.num_experts == 4 and set(np.flatnonzero(layer.fc1.rows)) <= numbers
        assert set(np.flatnonzero(layer.choices.first.sum(axis=0))) <= numbers
        assert set(layer.sample.experts.flatten().tolist()) <= numbers


@pytest.mark.parametrize("flags, sentence", [
    (("--expert-keep", "1.5"), "--expert-keep must be a file of experts by language (.json), or a share above 0"),
    (("--expert-keep", "0.5"), "--expert-keep 0.5 needs --expert-profile"),
    (("--expert-keep", "FILE", "--moe-gating", "static"), "--expert-keep needs --moe-gating dynamic"),
    (("--expert-keep", "missing.json"), "--expert-keep missing.json: not sets of experts by language (.json): No such"),
])
def test_refuses_what_cannot_be(golden_folder, tmp_path, flags, sentence):
    file = write_sets(tmp_path / "experts.json", SETS["tiny_mt"])
    with pytest.raises(ValueError) as error:
        load(golden_folder("tiny_mt"), "tiny_mt", *(file if flag == "FILE" else flag for flag in flags))
    assert str(error.value).startswith(sentence)


def test_refuses_a_language_that_the_file_lacks(golden_folder, tmp_path):
    file = write_sets(tmp_path / "experts.json", {"en": (0, 1, 4, 5), "fr": (0, 1, 4, 5)})
    with pytest.raises(ValueError, match=r"--expert-keep .* must have the language 'de', it has 'en', 'fr'"):
        load(golden_folder("tiny_mt"), "tiny_mt", "--expert-keep", file)


def test_refuses_a_set_without_two_experts_of_a_layer(kept):
    with pytest.raises(ValueError, match="at least 2 experts"):
        kept("tiny_mt", sets={"en": (0, 1, 4), "de": (5,)})
    with pytest.raises(ValueError, match=r"--expert-keep .*encoder.layers.1.moe_layer must keep at least one"):
        kept("tiny_mt", sets={"en": (4,), "de": (5, 6)})


@pytest.mark.parametrize("placed", [False, True])
def test_ranks_share_the_kept_experts(golden_folder, tmp_path, placed):
    folder, sets = golden_folder("tiny_nllb"), write_sets(tmp_path / "experts.json", SETS["tiny_nllb"])
    command = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *commands.NLLB, "-t", "de")
    keep = ("--expert-keep", sets, "--moe-report", str(tmp_path / "report.json"))
    wanted = commands.run("generate", *command, *keep).stdout
    alone = json.loads((tmp_path / "report.json").read_text())
    flags = ()
    if placed:  # of the whole model
        layers = {f"{side}.layers.1.moe_layer": [[1], [0], [1], [0]] for side in ("encoder", "decoder")}
        (tmp_path / "placement.json").write_text(json.dumps({"world_size": 2, "layers": layers}))
        flags = ("--expert-placement", str(tmp_path / "placement.json"))
    assert commands.run("generate", *command, *keep, *flags, ranks=2).stdout == wanted
    report = json.loads((tmp_path / "report.json").read_text())
    for layer, before in zip(report["layers"], alone["layers"], strict=True):
        assert layer["load"] == before["load"] and len(layer["load_per_rank"]) == 2
        if placed:
            assert layer["load_per_rank"] == [sum(layer["load"][1::2]), sum(layer["load"][::2])]


def test_a_trace_of_the_whole_model_says_what_is_resident_at_the_start(golden_folder, kept, tmp_path):
    load = np.zeros((1, 1, 4), np.uint8)
    load[0, 0, 3] = 9  # of the kept (0, 2, 3) and (1, 3) the last one
    phases = {
        phase: PhaseTrace((f"{side}.layers.1.moe_layer",), load, np.zeros(1, np.int64))
        for phase, side in (("encoder", "encoder"), ("decode", "decoder"))
    }
    (tmp_path / "trace.npz").write_bytes(pack_trace(phases))
    model = kept("tiny_mt", *buffered(1, "--expert-profile", str(tmp_path / "trace.npz")))
    for name, layer in model.moe_layers().items():
        numbers = LAYERS["tiny_mt"][name.removesuffix(".moe_layer")]
        assert [numbers[place] for place in layer.experts.resident_experts] == [3]
    assert torch.equal(logits(model), logits(kept("tiny_mt")))


def test_the_routing_that_settings_are_compared_by_has_the_whole_models_numbers(golden_folder, tmp_path):
    sets = write_sets(tmp_path / "experts.json", {"": (1, 3)})
    folder = golden_folder("tiny_lm_top2")
    recorder = RoutingRecorder()
    with recorder.watching():
        _, *arguments = kept_makers.LM
        command = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", *arguments)
        commands.eval_lm(*command, "--tokens-per-sample", "16", "--expert-keep", sets)
    (experts,) = recorder.routed_tokens().experts.values()
    assert set(np.unique(experts)) == {1, 3}


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published sets do not lie beside the repository")
def test_the_published_sets_in_a_model_of_nllb_54bs_layers(tmp_path):
    """24 + 24 layers with 128 experts in every fourth, of small dims: 288 of 1,536 experts are read."""
    languages = ("eng_Latn", "fra_Latn")
    data = write_data(tmp_path / "data", languages, splits={"train": 4, "valid": 2, "test": 4})
    pair = ("--langs", ",".join(languages), "--lang-pairs", "eng_Latn-fra_Latn", "--encoder-langtok", "src")
    task = ("--task", "moe_translation_multi_simple_epoch", *pair, "--decoder-langtok")
    dims = [
        part
        for side in ("encoder", "decoder")
        for part in (f"--{side}-embed-dim", "16", f"--{side}-ffn-embed-dim", "8", f"--{side}-attention-heads", "2")
    ]
    untrained_checkpoint(tmp_path / "X.pt", data, *task, "--arch", "moe_transformer_nllb_54b", *dims)
    command = (data, "--path", tmp_path / "X.pt", *task, "-s", languages[0], "-t", languages[1], "--cpu", "--beam", "2")
    command += ("--gen-subset", "test", "--max-len-b", "9", "--num-workers", "0", "--moe-report")
    keep, reports = ("--expert-keep", str(PUBLISHED)), []
    for flags in ((), keep, (*keep, *buffered(4, "--expert-store", "disk"))):
        commands.run("generate", *command, tmp_path / "report.json", *flags)
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    whole, kept, on_disk = reports
    an_expert = whole["memory"]["expert_bytes_total"] // 1536
    assert kept["memory"]["expert_bytes_total"] == kept["memory"]["expert_bytes_resident"] == 288 * an_expert
    assert whole["loading"]["bytes"] - kept["loading"]["bytes"] == (1536 - 288) * an_expert
    assert on_disk["loading"]["bytes"] < kept["loading"]["bytes"]
    assert [layer["load"] for layer in on_disk["layers"]] == [layer["load"] for layer in kept["layers"]]
    sets = json.loads(PUBLISHED.read_text())
    for number, layer in enumerate(kept["layers"]):
        of_language = sets[languages[number >= 6]]
        assert layer["kept_experts"] == [each - 128 * number for each in of_language if each // 128 == number]
        assert set(np.flatnonzero(layer["load"])) <= set(layer["kept_experts"])
