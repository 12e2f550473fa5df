"""Flags that a dense model cannot obey, and dtypes that two flags name."""

from argparse import Namespace

import commands
import pytest
from data_makers import LM_TRAINING, MT_TRAINING, untrained_checkpoint, write_data

from fairseq_moe_ext.checkpoints.errors import CheckpointError
from fairseq_moe_ext.tasks.dense_flags import check_dtype_flags, check_flags_of_dense

LM = ("--task", "moe_language_modeling", "--gen-subset", "test", "--tokens-per-sample", "16", *commands.LM[-3:])
DENSE = ("--moe-freq", "0")
TWIN = ("--alternate-decoder-ffn-embed-dim", "64")  # dense layers in the experts' place
FLAGS = [
    ("--moe-capacity-factor", "1.5"),
    ("--expert-buffer-size", "2"),
    ("--moe-kernel", "loop"),
    ("--moe-gating", "static"),
    ("--moe-eval-capacity-token-fraction", "0.5", "--moe-gating", "static"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=[DENSE, TWIN], ids=["dense", "twin"])
def model(request, data, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "x.pt"
    untrained_checkpoint(file, data, *LM_TRAINING, *request.param)
    return data, "--path", file


@pytest.mark.parametrize("flag", FLAGS, ids=" ".join)
def test_a_flag_that_needs_experts_is_refused_with_a_dense_model(model, flag):
    with pytest.raises(ValueError, match=f"{flag[0]} needs a model with experts, got {flag[1]} with a dense one"):
        commands.eval_lm(*model, *LM, *flag)


def test_a_dense_model_is_served_without_them(model):
    assert commands.eval_lm(*model, *LM, "--moe-dtype", "float32").loss > 0


def test_a_placement_and_a_dtype_of_a_dense_model():
    with pytest.raises(ValueError, match="--expert-placement needs a model with experts, got p.json"):
        check_flags_of_dense(Namespace(expert_placement="p.json"), takes_dtype=False)
    with pytest.raises(ValueError, match="--moe-dtype needs a model with experts, got bfloat16"):
        check_flags_of_dense(Namespace(moe_dtype="bfloat16"), takes_dtype=False)
    check_flags_of_dense(Namespace(moe_dtype="bfloat16"), takes_dtype=True)
    check_flags_of_dense(Namespace(moe_dtype="float16", fp16=True), takes_dtype=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fp16": True, "moe_dtype": "float32"}, "--moe-dtype must be float16 with --fp16, got float32"),
        ({"fp16": True, "moe_dtype": "bfloat16"}, "--moe-dtype must be float16 with --fp16, got bfloat16"),
        ({"bf16": True, "moe_dtype": "float16"}, "--moe-dtype must be bfloat16 with --bf16, got float16"),
        ({"bf16": True}, "--bf16 is for training, serving in bfloat16 is --moe-dtype bfloat16"),
        ({"memory_efficient_bf16": True}, "--memory-efficient-bf16 is for training"),
    ],
)
def test_two_dtypes_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        check_dtype_flags(Namespace(**flags))


def test_one_dtype_by_two_flags_is_taken():
    check_dtype_flags(Namespace(fp16=True, memory_efficient_fp16=True, moe_dtype="float16"))
    check_dtype_flags(Namespace(bf16=True, moe_dtype="bfloat16"))
    check_dtype_flags(Namespace(moe_dtype="float32"))


@pytest.mark.parametrize("flags", [("--fp16", "--moe-dtype", "float32"), ("--bf16",)], ids=" ".join)
def test_the_commands_refuse_two_dtypes(model, tmp_path, flags):
    with pytest.raises(ValueError, match="--moe-dtype"):
        commands.eval_lm(*model, *LM, *flags)


def test_the_translation_tasks_refuse_them(tmp_path):
    data = write_data(tmp_path / "data", ("en", "de"))
    untrained_checkpoint(tmp_path / "x.pt", data, *MT_TRAINING)
    arguments = ("--path", tmp_path / "x.pt", "--gen-subset", "test", "-s", "en", "-t", "de", *commands.LM[-3:])
    with pytest.raises(ValueError, match="--moe-dtype must be float16 with --fp16, got float32"):
        commands.generate(data, "--task", "moe_translation", *arguments, "--fp16", "--moe-dtype", "float32")


def test_eval_lm_takes_one_checkpoint(model):
    data, _, file = model
    with pytest.raises(CheckpointError, match="--path must name one checkpoint to this command, got .*:"):
        commands.eval_lm(data, "--path", f"{file}:{file}", *LM)
