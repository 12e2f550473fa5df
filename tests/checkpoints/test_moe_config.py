"""The MoE fields of a model's arguments, however a command line or an override has them."""

from argparse import Namespace

import pytest
from data_makers import MT_TRAINING, training_configuration, write_data
from fairseq import tasks

from fairseq_moe_ext.checkpoints.moe_config import MoEConfig


@pytest.mark.parametrize("flags", [(), ("--batch-size-valid", "4")], ids=["redundant", "given"])
def test_a_translation_trains_with_the_batch_size_of_its_validation(tmp_path, flags):
    data = write_data(tmp_path, ("en", "de"))
    cfg = training_configuration(data, *MT_TRAINING, "--moe-gating", "static", "--batch-size", "4", *flags)
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    assert {layer.dispatcher.options.batch_size_valid for layer in model.moe_layers().values()} == {4}


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("batch_size_valid", "4", 4),
        ("moe_expert_count", "8", 8),
        ("moe_eom", "0.2", 0.2),
        ("moe_eval_capacity_token_fraction", 1, 1.0),
        ("use_moe_pad_mask", "False", False),
        ("moe_top1_expert", 1, True),
        ("batch_size", "${dataset.batch_size}", None),
    ],
)
def test_a_value_comes_in_its_fields_type(field, text, value):
    found = getattr(MoEConfig.from_args(Namespace(**{field: text})), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text"),
    [("batch_size_valid", "four"), ("moe_freq", "1.5"), ("moe_cmr", "maybe"), ("moe_eom", "much"), ("moe_freq", [2])],
)
def test_a_value_of_another_type_is_refused_by_name(field, text):
    with pytest.raises(ValueError, match=f"{field} must be .*, got "):
        MoEConfig.from_args(Namespace(**{field: text}))
