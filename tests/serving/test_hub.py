"""fairseq's own doors from Python: loading functions, `from_pretrained` and hub interfaces, on the first call."""

import argparse
import collections
import sys

import commands
import numpy as np
import processes
import pytest
import torch
from checkpoint_makers import proving_state, split, whole
from fairseq import checkpoint_utils
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from python_served import dense_checkpoint

import fairseq_moe_ext as moe
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.safe_loader import load_safely
from fairseq_moe_ext.serving import fairseq_hooks
from fairseq_moe_ext.serving.ours import is_ours

FIRST_AND_SECOND = """
import argparse, sys
import {first}
from fairseq import checkpoint_utils, utils
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerModel
utils.import_user_module(argparse.Namespace(user_dir={user_dir!r}))
found = []
for _ in range(2):
    hub = TransformerModel.from_pretrained({folder!r}, "checkpoint_merged.pt", {folder!r} + "/data-bin")
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task(
        [{folder!r} + "/checkpoint_merged.pt"], arg_overrides={{"data": {folder!r} + "/data-bin"}}
    )
    found.append((hub.translate(["A man ."], beam=2), type(task).__name__, type(models[0]).__name__))
print(found[0] == found[1], found[0][1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fairseq", "fairseq_moe_ext"])
def test_the_first_load_in_a_process_succeeds_as_the_second(shared_goldens, first):
    code = FIRST_AND_SECOND.format(
        first=first, user_dir=str(commands.USER_DIR), folder=str(shared_goldens / "mt_plain")
    )
    done = processes.run([sys.executable, "-c", code], cwd=commands.REPOSITORY, env=commands.environment(), fresh=True)
    assert done.stdout.splitlines()[-1:] == ["True ('MoETranslationTask', 'MoETransformerModel')"], done.stderr[-3000:]


def hub_of(folder, kind=TransformerModel, **options):
    return kind.from_pretrained(str(folder), "checkpoint_last.pt", str(folder / "data-bin"), **options)


def test_a_hub_interface_translates_as_the_command(shared_goldens):
    folder = shared_goldens / "mt_plain"
    hub = hub_of(folder)
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True) as served:
        lines = ["▁A ▁man ▁in ▁an ▁orange ▁hat ▁star ring ▁at ▁something .", "▁A ▁girl"]
        assert hub.translate(lines, beam=4) == served.translate(lines, beam=4)


def test_a_hub_interface_of_a_multilingual_model(shared_goldens):
    hub = hub_of(shared_goldens / "mt_nllb_ws2", source_lang="en", target_lang="fr")
    assert type(hub.task).__name__ == "MoETranslationMultiSimpleEpochTask"
    assert len(hub.translate(["▁A ▁man", "▁A ▁girl ▁."], beam=2)) == 2


def test_a_hub_interface_scores_as_the_command(shared_goldens):
    folder = shared_goldens / "lm_top2"
    hub = hub_of(folder, TransformerLanguageModel)
    with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True) as served:
        text = "▁What ▁say ▁you ▁?"
        wanted = served.score([text])[0].positional_scores
    found = hub.score(text)["positional_scores"] / np.log(2)
    torch.testing.assert_close(found[: len(wanted) - 1], torch.tensor(wanted[:-1]), rtol=0, atol=1e-5)


def test_flags_go_through_from_pretrained_and_stay_out_of_the_checkpoint(shared_goldens, tmp_path):
    folder = shared_goldens / "mt_plain"
    content = commands.read_state(folder / "checkpoint_merged.pt")
    task = {**dict(content["cfg"]["task"]), "expert_buffer_size": "2", "moe_report": "report.json"}
    content["cfg"] = {**content["cfg"], "task": task}
    torch.save(content, tmp_path / "checkpoint_last.pt")
    (tmp_path / "data-bin").symlink_to(folder / "data-bin")
    for flags, buffered in (({}, False), ({"expert_buffer_size": 2}, True)):
        hub = hub_of(tmp_path, **flags)
        assert (hub.models[0].expert_buffer is not None) == buffered
        assert hub.task.cfg.moe_report is None


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "perplexity"), [("none", "149.41"), ("eos", "147.2")])
def test_fairseq_validate_evaluates_as_the_checkpoint_was_trained(shared_goldens, mode, perplexity):
    folder = shared_goldens / "lm_top2"
    arguments = (folder / "data-bin", "--path", folder / "checkpoint_last.pt", "--valid-subset", "test", "--cpu")
    options = ("--task", "moe_language_modeling", "--tokens-per-sample", "128", "--sample-break-mode", mode)
    done = commands.run("validate", *arguments, *options, "--batch-size", "8")
    assert f" ppl {perplexity}" in done.stdout and "moe_gate_loss" in done.stdout


def test_other_models_are_fairseqs_before_and_after(shared_goldens, tmp_path):
    dense_checkpoint(tmp_path / "bart-shared.pt")
    original = checkpoint_utils.load_model_ensemble_and_task.moe_ext_original
    wanted, wanted_cfg, wanted_task = original([str(tmp_path / "bart-shared.pt")])
    for _ in range(2):
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "bart-shared.pt")])
        assert type(task) is type(wanted_task) and type(models[0]) is TransformerModel and cfg == wanted_cfg
        for name, tensor in wanted[0].state_dict().items():
            assert torch.equal(models[0].state_dict()[name], tensor)
        folder = shared_goldens / "mt_plain"
        with moe.load(folder / "checkpoint_last.pt", data=folder / "data-bin", cpu=True) as served:
            served.translate(["a"])


@pytest.mark.parametrize(
    "asked",
    [
        ("s3://bucket/model.pt", "", 0, 1),
        ("s3://bucket/model.pt", "-rank-0", 0, 1),
        ("model.pt", "", 1, 2),  # model-parallel shards
        ("bart-shared.pt", "", 0, 1),
        ("none.pt", "", 0, 1),
    ],
)
def test_files_that_are_not_ours_are_found_as_fairseq_finds_them(tmp_path, asked, monkeypatch):
    dense_checkpoint(tmp_path / "bart-shared.pt")
    monkeypatch.chdir(tmp_path)
    find = checkpoint_utils.get_maybe_sharded_checkpoint_filename
    assert type(find(*asked)) is str and find(*asked) == find.moe_ext_original(*asked)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_checkpoint_is_ours_by_its_experts_or_its_names(tmp_path, new_format):
    contents = {
        "experts": whole(proving_state(2)),
        "task": whole({}, cfg={"model": {"_name": "transformer_lm"}, "task": {"_name": "moe_language_modeling"}}),
        "dense": whole({"decoder.moe": torch.ones(1)}, cfg={"model": {"_name": "transformer_lm"}}),
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=new_format)
    assert [is_ours(str(tmp_path / f"{name}.pt")) for name in contents] == [True, True, False]
    split(proving_state(4), 2, tmp_path)
    assert is_ours(str(tmp_path / "X.pt")) and is_ours(str(tmp_path / "X-rank-1.pt"))
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "experts.pt").read_bytes()[:200])
    assert not is_ours(str(tmp_path / "damaged.pt")) and not is_ours(str(tmp_path / "none.pt"))


class Users(dict):
    """A program's own stand-in for a name that is on the plugin's list, too."""

    def __init__(self, _factory):
        super().__init__()


def test_what_the_program_has_allowed_stands_where_fairseq_reads(shared_goldens, tmp_path):
    """Also while a task of the plugin lives, under which files in training are read by the plugin's list."""
    content = commands.read_state(shared_goldens / "mt_plain" / "checkpoint_merged.pt")
    extra = collections.defaultdict(int)
    torch.save({**content, "extra_state": {"counts": extra}}, tmp_path / "X.pt")
    hub = hub_of(shared_goldens / "mt_plain")
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([(Users, "collections.defaultdict")])
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "X.pt"))
        assert type(state["extra_state"]["counts"]) is Users
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert type(checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "X.pt"))["extra_state"]["counts"]) is dict
    assert hub.task in fairseq_hooks._tasks


def test_the_programs_own_safe_globals_are_left_alone(tmp_path):
    torch.save({"a": argparse.Namespace(b=1), "c": np.float64(2)}, tmp_path / "X.pt")
    users = [argparse.Namespace, (dict, "collections.defaultdict"), np.dtype, collections.Counter]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(users)
    try:
        now = set(torch.serialization.get_safe_globals())
        assert load_safely(tmp_path / "X.pt", "cpu")["a"].b == 1
        assert set(torch.serialization.get_safe_globals()) == now
        with pytest.raises(CheckpointError):
            load_safely(tmp_path / "none.pt", "cpu")
        assert set(torch.serialization.get_safe_globals()) == now
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
