"""What serving takes: counted from shapes, the same for a checkpoint, a folder and an architecture."""

from __future__ import annotations

import runpy
from pathlib import Path

import hf_makers
import pytest

from fairseq_moe_ext.byte_sizes import parse_bytes
from fairseq_moe_ext.serving.checkpoint_summary import summarize
from fairseq_moe_ext.serving.convert_nllb import convert_nllb
from fairseq_moe_ext.serving.errors import CheckpointError
from fairseq_moe_ext.serving.memory_plan import ModelSizes, Setting, Workload, plan, read_sizes, table

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "plan_memory.py"))
GB = 10**9
NLLB = ModelSizes(
    dense=2_945_232_898,
    expert=33_564_672,
    moe_layers=12,
    experts=128,
    decoder_layers=24,
    model_dim=2048,
    vocabulary=256206,
)


def by_name(settings, name):
    return next(setting for setting in settings if name in setting.name)


def test_a_checkpoint_and_its_folder_have_the_same_sizes(tmp_path):
    hf_makers.write_model(tmp_path / "hf")
    convert_nllb(str(tmp_path / "hf"), str(tmp_path / "x.pt"))
    sizes = read_sizes(str(tmp_path / "x.pt"))
    found = summarize(str(tmp_path / "x.pt"))
    assert sizes.parameters == found.parameters
    assert sizes.expert * sizes.experts * sizes.moe_layers * 4 == found.expert_bytes
    folder = read_sizes(str(tmp_path / "hf"))
    assert folder.parameters == sizes.parameters - 2  # fairseq's two versions
    assert (folder.experts, folder.moe_layers, folder.decoder_layers) == (8, 4, 4)


def test_the_published_model():
    sizes = read_sizes("moe_transformer_nllb_54b")
    assert sizes.parameters == pytest.approx(54.5e9, rel=1e-3)
    assert (sizes.experts, sizes.moe_layers, sizes.vocabulary) == (128, 12, 256206)
    assert sizes.expert == 2 * 2048 * 8192 + 2048 + 8192
    assert sizes == NLLB


def test_a_dense_model_has_one_setting(tmp_path):
    hf_makers.write_model(tmp_path / "hf", hf_makers.DENSE)
    assert len(plan(read_sizes(str(tmp_path / "hf")), 24 * GB)) == 1


def test_what_fits_stays_within_the_device():
    for device in (8, 16, 24, 40, 80, 160):
        for setting in plan(NLLB, device * GB):
            assert not setting.fits or setting.device <= device * GB
    assert by_name(plan(NLLB, 160 * GB), "all experts").fits
    assert not by_name(plan(NLLB, 80 * GB), "all experts").fits
    assert not by_name(plan(NLLB, 8 * GB), "experts in RAM").fits


def test_the_buffer_is_as_large_as_fits():
    """One more place of every layer would be too much."""
    setting = by_name(plan(NLLB, 24 * GB), "experts in RAM")
    assert setting.device <= 0.95 * 24 * GB < setting.device + 2 * NLLB.expert * NLLB.moe_layers
    assert "--expert-buffer-size 12" in setting.flags


def test_main_memory_limits():
    settings = plan(NLLB, 24 * GB, host=64 * GB)
    assert not by_name(settings, "experts in RAM").fits
    assert by_name(settings, "disk and some RAM").fits
    assert by_name(settings, "CPU").host <= 64 * GB
    assert not by_name(plan(NLLB, 24 * GB, host=8 * GB), "CPU").fits


def test_a_larger_batch_needs_more():
    small, large = (by_name(plan(NLLB, 24 * GB, work=Workload(batch=batch)), "GPUs").device for batch in (1, 16))
    assert small < large


def test_the_script_prints_a_table(tmp_path, capsys):
    hf_makers.write_model(tmp_path / "hf")
    assert SCRIPT["main"]([str(tmp_path / "hf"), "--device-memory", "24GiB"]) == 0
    printed = capsys.readouterr().out
    assert "4 MoE layers of 8 experts" in printed and printed.count("\n|") == 7
    assert SCRIPT["main"]([str(tmp_path / "nothing.pt"), "--device-memory", "24G"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert SCRIPT["memory"]("1.5GB") == 3 << 29
    with pytest.raises(SystemExit):
        SCRIPT["main"](["x", "--device-memory", "much"])


def test_the_table_speaks_in_the_unit_of_the_flags():
    (row,) = [line for line in table([Setting("all", 24 * 2**30, 0, 3 << 29, True, "")]).splitlines() if "all" in line]
    assert [cell.strip() for cell in row.split("|")[3:6]] == ["24.0 GiB", "", "1.5 GiB"]
    assert parse_bytes("24.0 GiB") == 24 * 2**30


def test_no_model():
    with pytest.raises(CheckpointError):
        ModelSizes.of_shapes({})
