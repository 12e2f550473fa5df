"""scripts/convert_checkpoint.py: the way there and back is bit-identical, and nothing is half-written."""

from __future__ import annotations

import errno
import os
import sys
from argparse import Namespace
from pathlib import Path

import commands
import processes
import pytest
import torch
from checkpoint_makers import assert_same_state, proving_state, whole
from checkpoint_makers import split as cut
from full_disk import full_at
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairseq_moe_ext.checkpoints.checkpoint import read_checkpoint
from fairseq_moe_ext.checkpoints.checkpoint_summary import summarize
from fairseq_moe_ext.checkpoints.convert import merge, split
from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.checkpoints.rank_files import rank_told

SCRIPT = commands.REPOSITORY / "scripts" / "convert_checkpoint.py"
GOLDENS = ["lm_top1", "lm_top2", "lm_top2_ws2", "mt_plain", "mt_nllb_ws2"]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_file(found: Path, wanted: Path, rest: tuple[str, ...] = ()) -> None:
    """The same bits under the same keys, and the same rest but for the optimizer; `rest`: those parts of it alone."""
    found, wanted = commands.read_state(found), commands.read_state(wanted)
    assert sorted(found["model"]) == sorted(wanted["model"])
    for key, tensor in wanted["model"].items():
        assert found["model"][key].dtype == tensor.dtype and bits(found["model"][key]) == bits(tensor), key
    assert set(found) == set(wanted) - {"last_optimizer_state"}
    for key in rest or set(found) - {"model"}:
        assert found[key] == wanted[key], key


@pytest.mark.parametrize("name", GOLDENS)
def test_upstreams_files_come_back_from_one_file(shared_goldens, tmp_path, name):
    source = shared_goldens / name / "checkpoint_last.pt"
    ranks = len(list(source.parent.glob("*-rank-*.pt")))
    assert merge(str(source), str(tmp_path / "one.pt"), drop_optimizer=True) == [tmp_path / "one.pt"]
    parts = split(str(tmp_path / "one.pt"), str(tmp_path / "X.pt"), ranks)
    assert [part.name for part in parts] == ["X-shared.pt", *(f"X-rank-{rank}.pt" for rank in range(ranks))]
    for part in parts:
        original = source.with_name(part.name.replace("X", "checkpoint_last"))
        # every rank measured its training for itself; one file keeps what rank 0 has to say
        assert_same_file(part, original, () if part.stem == "X-rank-0" else ("args", "optimizer_history"))
        assert rank_told(commands.read_state(part)) == rank_told(commands.read_state(original))
        assert part.stat().st_size < 1.1 * original.stat().st_size


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_one_file_comes_back_from_any_number_of_ranks(shared_goldens, tmp_path, ranks):
    source = shared_goldens / "mt_plain" / "checkpoint_merged.pt"
    split(str(source), str(tmp_path / "X.pt"), ranks)
    merge(str(tmp_path / "X-rank-0.pt"), str(tmp_path / "back.pt"))
    assert_same_file(tmp_path / "back.pt", source)
    assert rank_told(commands.read_state(tmp_path / f"X-rank-{ranks - 1}.pt")) == ranks - 1


def test_many_ranks_keep_their_order(tmp_path):
    torch.save(whole(proving_state(24)), tmp_path / "one.pt")
    split(str(tmp_path / "one.pt"), str(tmp_path / "X.pt"), 12, drop_optimizer=True)
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], proving_state(24))


def test_bits_that_are_no_numbers_and_half_precision_survive(tmp_path):
    model = proving_state(4)
    odd = torch.tensor([0x7FC00001, 0x7F800001, -1, -(2**31)], dtype=torch.int32).view(torch.float32)
    model["decoder.layers.0.odd"] = odd
    model["decoder.layers.1.moe_layer.gate.wg.weight"] = model["decoder.layers.1.moe_layer.gate.wg.weight"].half()
    torch.save(whole(model), tmp_path / "one.pt")
    split(str(tmp_path / "one.pt"), str(tmp_path / "X.pt"), 2, drop_optimizer=True)
    merge(str(tmp_path / "X.pt"), str(tmp_path / "back.pt"))
    assert_same_file(tmp_path / "back.pt", tmp_path / "one.pt")


def test_tied_tensors_are_stored_once_and_packed_ones_apart(tmp_path):
    model = proving_state(4)
    model["decoder.output_projection.weight"] = model["decoder.embed_tokens.weight"] = torch.randn(500, 100)
    packed = torch.randn(4, 5, 3)  # as a model of this plugin lies in memory
    for expert in range(4):
        model[f"decoder.layers.1.moe_layer.experts.{expert}.fc1.weight"] = packed[expert]
    torch.save(whole(model), tmp_path / "one.pt")
    merge(str(tmp_path / "one.pt"), str(tmp_path / "merged.pt"), drop_optimizer=True)
    split(str(tmp_path / "merged.pt"), str(tmp_path / "X.pt"), 2)
    found = commands.read_state(tmp_path / "X-shared.pt")["model"]
    assert found["decoder.output_projection.weight"].data_ptr() == found["decoder.embed_tokens.weight"].data_ptr()
    for tensor in commands.read_state(tmp_path / "X-rank-0.pt")["model"].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert_same_state(read_checkpoint(str(tmp_path / "X.pt"))["model"], model)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), PLAIN, max_size=6)
FALSY = {"moe_eval_capacity_token_fraction": 0.0, "moe_freq": 0, "moe_eom": None, "langs": [], "lang_dict": ""}


@given(args=st.none() | FIELDS, cfg=st.dictionaries(st.sampled_from(["model", "task", "common"]), FIELDS, max_size=3),
       extra=FIELDS, ranks=st.sampled_from([1, 2, 4]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@example(args=FALSY, cfg={"model": FALSY, "task": {"langs": ["b", "a"]}}, extra=FALSY, ranks=2, dtype=torch.float16)
@settings(max_examples=15, deadline=None)
def test_everything_but_the_weights_survives(tmp_path_factory, args, cfg, extra, ranks, dtype):  # fmt: skip
    folder = tmp_path_factory.mktemp("fields")
    model = {key: tensor.to(dtype) for key, tensor in proving_state(4).items()}
    told = {
        "args": None if args is None else Namespace(**args),
        "cfg": {name: Namespace(**group) if name == "task" else group for name, group in cfg.items()},
        "extra_state": extra,
        "task_state": extra,
        "criterion": {"a": torch.ones(1)},
    }
    torch.save(whole(model, last_optimizer_state=None, **told), folder / "one.pt")
    split(str(folder / "one.pt"), str(folder / "X.pt"), ranks)
    merge(str(folder / "X.pt"), str(folder / "back.pt"))
    found = commands.read_state(folder / "back.pt")
    assert {name: found[name] for name in told} == told
    assert found["model"].keys() == model.keys()
    assert all(torch.equal(found["model"][key], model[key]) for key in model)


def test_what_only_the_shared_file_says_counts(tmp_path):
    """As tools that cut a checkpoint by themselves leave it: rank files with experts and no more."""
    cut(proving_state(4), 2, tmp_path, template=lambda model: {"model": model, "cfg": None})
    content = torch.load(tmp_path / "X-shared.pt", weights_only=False)
    told = {"cfg": {"model": {"_name": "transformer_lm", "moe_freq": 2}}, "extra_state": {"dictionary_checksum": "1f"}}
    torch.save({**content, **told}, tmp_path / "X-shared.pt")
    found = read_checkpoint(str(tmp_path / "X.pt"))
    assert {name: found[name] for name in told} == told
    assert_same_state(found["model"], proving_state(4))


def test_names_of_upstreams_branches_are_kept(tmp_path):
    torch.save(whole(proving_state(2) | {"decoder.layers.0.alpha2": torch.ones(3)}), tmp_path / "one.pt")
    merge(str(tmp_path / "one.pt"), str(tmp_path / "two.pt"), drop_optimizer=True)
    assert "decoder.layers.0.alpha2" in commands.read_state(tmp_path / "two.pt")["model"]


@pytest.mark.parametrize(
    ("job", "error"),
    [
        (lambda folder: merge(f"{folder}/one.pt", f"{folder}/two.pt"), "it holds an optimizer state"),
        (lambda folder: merge(f"{folder}/bare.pt", f"{folder}/there.pt"), "there.pt: it exists already: give --force"),
        (lambda folder: merge(f"{folder}/bare.pt", f"{folder}/no/X.pt"), "must lie in an existing folder"),
        (lambda folder: merge(f"{folder}/bare.pt", f"{folder}/X-shared.pt"), "must be named X.pt"),
        (lambda folder: merge(f"{folder}/none.pt", f"{folder}/two.pt"), "there is neither none.pt nor"),
        (lambda folder: split(f"{folder}/bare.pt", f"{folder}/X.pt", 3), "--ranks must divide .* 4 experts, got 3"),
        (lambda folder: split(f"{folder}/bare.pt", f"{folder}/X.pt", 0), "--ranks must divide .* 4 experts, got 0"),
        (lambda folder: split(f"{folder}/bare.pt", f"{folder}/Y.pt", 2), "Y-rank-7.pt: it would be taken for a part"),
        (lambda folder: split(f"{folder}/bare.pt", f"{folder}/Z.pt", 2), "Z-rank-1.pt: it exists already"),
        (lambda folder: split(f"{folder}/dense.pt", f"{folder}/X.pt", 2), "must have MoE layers to be split"),
    ],
)
def test_refusals_that_leave_everything_as_it_is(tmp_path, job, error):
    torch.save(whole(proving_state(4)), tmp_path / "one.pt")
    torch.save(whole(proving_state(4), last_optimizer_state=None), tmp_path / "bare.pt")
    torch.save(whole({"a": torch.ones(1)}, last_optimizer_state=None), tmp_path / "dense.pt")
    for name in ("there", "Y-rank-7", "Z-rank-1"):
        (tmp_path / f"{name}.pt").touch()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match=error):
        job(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "there.pt").stat().st_size == 0


def test_nothing_is_left_where_writing_fails(tmp_path):
    """The last of three files is too large."""
    big = {"decoder.layers.1.moe_layer.experts.3.fc1.weight": torch.ones(1 << 18)}
    torch.save(whole(proving_state(4) | big), tmp_path / "one.pt")
    (tmp_path / "X-rank-0.pt").write_bytes(b"before")
    reason = os.strerror(errno.EFBIG)
    with full_at(1 << 18), pytest.raises(CheckpointError, match=f"X-rank-1.pt: it cannot be written: {reason}"):
        split(str(tmp_path / "one.pt"), str(tmp_path / "X.pt"), 2, drop_optimizer=True, force=True)
    assert sorted(os.listdir(tmp_path)) == ["X-rank-0.pt", "one.pt"]
    assert (tmp_path / "X-rank-0.pt").read_bytes() == b"before"


def test_force_overwrites_even_the_source(tmp_path):
    torch.save(whole(proving_state(4)), tmp_path / "one.pt")
    merge(str(tmp_path / "one.pt"), str(tmp_path / "one.pt"), drop_optimizer=True, force=True)
    assert "last_optimizer_state" not in commands.read_state(tmp_path / "one.pt")
    assert_same_state(read_checkpoint(str(tmp_path / "one.pt"))["model"], proving_state(4))


def test_a_damaged_weight_is_not_copied(tmp_path):
    torch.save(whole(proving_state(4)), tmp_path / "one.pt")
    content = bytearray((tmp_path / "one.pt").read_bytes())
    value = torch.full((5, 3), 102.0).numpy().tobytes()
    content[content.index(value) + 7] ^= 1
    (tmp_path / "one.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="one.pt: record .* is damaged"):
        merge(str(tmp_path / "one.pt"), str(tmp_path / "two.pt"), drop_optimizer=True)
    assert os.listdir(tmp_path) == ["one.pt"]


def test_summary(shared_goldens):
    found = summarize(str(shared_goldens / "mt_nllb_ws2" / "checkpoint_last.pt"))
    assert (found.layers, found.moe_layers) == ({"encoder": 2, "decoder": 2}, {"encoder": [1], "decoder": [1]})
    assert (found.experts, found.model_dim, found.hidden_dim, found.vocabulary) == (8, 128, 160, 4004)
    assert found.expert_bytes == 2 * 8 * (2 * 128 * 160 + 128 + 160) * 4
    assert found.dtypes.keys() == {"float32"} and found.bytes == 4 * found.parameters
    assert not found.has_optimizer and len(found.files.ranks) == 2
    text = str(summarize(str(shared_goldens / "lm_top2_ws2" / "checkpoint_last.pt")))
    files = "checkpoint_last-shared.pt and 2 rank files"
    for words in (files, "transformer_lm_gpt", "MoE layers 1, 3", "its state is in the files"):
        assert words in text


def test_a_summary_reads_no_weights(tmp_path):
    torch.save(whole(proving_state(4)), tmp_path / "one.pt")
    content = bytearray((tmp_path / "one.pt").read_bytes())
    value = torch.full((5, 3), 102.0).numpy().tobytes()
    content[content.index(value)] ^= 1
    (tmp_path / "one.pt").write_bytes(content)
    assert summarize(str(tmp_path / "one.pt")).experts == 4


def run(*arguments, file_size: int | None = None):
    """The script from a checkout that is not on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPT, *arguments]
    return processes.run(command, env=environment, cwd="/", file_size=file_size)


def test_a_full_disk_ends_in_one_line(tmp_path):
    torch.save(whole(proving_state(4) | {"big": torch.ones(1 << 18)}), tmp_path / "one.pt")
    done = run(
        *("merge", tmp_path / "one.pt", tmp_path / "two.pt", "--drop-optimizer"),
        file_size=1 << 18,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    reason = os.strerror(errno.EFBIG)
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'two.pt'}: it cannot be written: {reason}"
    assert os.listdir(tmp_path) == ["one.pt"]


@pytest.mark.slow
def test_the_script(tmp_path):
    cut(proving_state(4), 2, tmp_path)
    done = run("merge", tmp_path / "X.pt", tmp_path / "one.pt", "--drop-optimizer")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'one.pt'}\n"), done.stderr
    assert_same_state(read_checkpoint(str(tmp_path / "one.pt"))["model"], proving_state(4))
    done = run("split", tmp_path / "one.pt", tmp_path / "Y.pt", "--ranks", 4)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 5), done.stderr
    done = run("summary", tmp_path / "Y.pt")
    assert done.returncode == 0 and "4 in each MoE layer, model dim 3, hidden dim 5" in done.stdout
    done = run("split", tmp_path / "one.pt", tmp_path / "Y.pt", "--ranks", 3)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: --ranks must divide the model's 4 experts, got 3"
