"""What `fairseq-moe quantize` writes is served bit by bit as its source that is quantised while it is loaded."""

import re

import commands
import hf_makers
import pytest
import torch
from quantized_sources import quantize
from served_models import Loader

import fairseq_moe_ext as moe

INT4 = ("--moe-weights", "int4", "--moe-weights-scope", "all")


@pytest.mark.parametrize("name", ["lm_top2", "mt_nllb_ws2"])
def test_of_a_real_checkpoint(shared_goldens, tmp_path, name):
    assert quantize(shared_goldens / name / "checkpoint_last.pt", tmp_path / "X.safetensors") == 0
    loader = Loader(shared_goldens)
    found = loader.logits(name, {}, path=tmp_path / "X.safetensors")
    assert torch.equal(found, loader.logits(name, {}, *INT4))


def test_of_hugging_faces_folder_with_raw_text_and_no_other_file(tmp_path):
    hf_makers.write_model(tmp_path / "hf")
    assert quantize(tmp_path / "hf", tmp_path / "X.safetensors") == 0
    with moe.load(str(tmp_path / "X.safetensors")) as served:
        (found,) = served.translate([hf_makers.TEXT[0]], "eng_Latn", "deu_Latn", beam=2, max_len_b=8)
        again = served.translate(hf_makers.TEXT[:2], "eng_Latn", "deu_Latn", beam=2, max_len_b=8)
    assert isinstance(found, str) and again[0] == found


def test_fairseq_eval_lm_from_it_alone(shared_goldens, tmp_path):
    golden = shared_goldens / "lm_top2"
    assert quantize(golden / "checkpoint_last.pt", tmp_path / "X.safetensors") == 0
    found = commands.eval_lm(golden / "data-bin", "--path", tmp_path / "X.safetensors", *commands.LM)
    wanted = commands.eval_lm(golden / "data-bin", "--path", golden / "checkpoint_last.pt", *commands.LM, *INT4)
    assert found.loss == wanted.loss


def test_fairseq_validate_from_it(shared_goldens, tmp_path):
    golden = shared_goldens / "mt_plain"
    assert quantize(golden / "checkpoint_last.pt", tmp_path / "X.safetensors") == 0
    assert losses(golden, tmp_path / "X.safetensors") == losses(golden, golden / "checkpoint_last.pt", *INT4)


def losses(golden, path, *flags) -> str:
    arguments = (golden / "data-bin", "--path", path, "--valid-subset", "test", "--cpu", "--task", "moe_translation")
    done = commands.run("validate", *arguments, "--batch-size", "8", "--num-workers", "0", *flags)
    (line,) = re.findall(r"\| valid on 'test' subset \| (.*)$", done.stdout + done.stderr, flags=re.MULTILINE)
    return line
