"""The flags of capacity-aware inference: the same in all three tasks, checked by name before anything is loaded."""

from argparse import Namespace
from dataclasses import fields

import pytest
from fairseq import tasks
from flag_makers import TASKS, assert_the_parser_refuses, parsed

from fairseq_moe_ext.checkpoints.supported_fields import check_fields
from fairseq_moe_ext.gating.capacity import CapacityRules
from fairseq_moe_ext.serving.expert_share import CapacitySettings
from fairseq_moe_ext.tasks.capacity_flags import CapacityFlags, capacity_settings, check_capacity_flags
from fairseq_moe_ext.tasks.flags import MoEFlags, check_flags


def given(**values) -> Namespace:
    """All flags of capacity-aware inference, these at other values than their defaults."""
    defaults = {item.name: item.default for item in fields(CapacityFlags) if item.name.startswith("moe_")}
    return Namespace(**{**defaults, **values})


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_every_flag(task):
    assert capacity_settings(parsed(task)) is None
    assert capacity_settings(parsed(task, "--moe-capacity-factor", "1.5")) == CapacitySettings(
        CapacityRules(1.5, "drop", "score", "expert", False), "all", 1, False
    )
    phases = () if task == "moe_language_modeling" else ("--moe-capacity-phases", "prefill")  # of eval-lm there is one
    flags = parsed(
        task, "--moe-capacity-factor", "2", "--moe-overflow", "expand", "--moe-drop-metric", "reverse-order",
        "--moe-capacity-scope", "rank", *phases, "--moe-renormalize-after-drop",
        "--moe-virtual-ranks", "4", "--moe-reroute-prefer", "resident", "--expert-buffer-size", "2",
    )
    check_capacity_flags(flags)
    rules = CapacityRules(2.0, "expand", "reverse-order", "rank", True)
    assert capacity_settings(flags) == CapacitySettings(rules, "prefill" if phases else "all", 4, True)


@pytest.mark.parametrize(("values", "words"), [
    *(({"moe_capacity_factor": value}, f"--moe-capacity-factor must be a number above 0, got {value}")
      for value in (0.0, -1.5, float("nan"), float("inf"))),
    *(({"moe_capacity_factor": 1.0, name: "best"}, f"--{name.replace('_', '-')} must be one of {known}, got 'best'")
      for name, known in (
          ("moe_overflow", "drop, reroute, expand"),
          ("moe_drop_metric", "score, order, reverse-order, random"),
          ("moe_capacity_scope", "expert, rank"),
          ("moe_capacity_phases", "all, prefill"),
      )),
    *(({"moe_capacity_factor": 1.0, "moe_virtual_ranks": value}, f"--moe-virtual-ranks must be at least 1, got {value}")
      for value in (0, -2)),
    ({"moe_capacity_factor": 1.0, "moe_overflow": "reroute", "moe_reroute_prefer": "resident"},
     "--moe-reroute-prefer resident needs --expert-buffer-size, got none"),
    ({"moe_capacity_factor": 1.0, "moe_reroute_prefer": "resident", "expert_buffer_size": "4"},
     "--moe-reroute-prefer needs --moe-overflow reroute or expand, got drop"),
])
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError) as error:
        check_flags(given(**values))
    assert words in str(error.value)


ALONE = {
    "moe_overflow": "reroute", "moe_drop_metric": "random", "moe_capacity_scope": "rank",
    "moe_capacity_phases": "prefill", "moe_renormalize_after_drop": True, "moe_virtual_ranks": 2,
    "moe_reroute_prefer": "resident",
}


@pytest.mark.parametrize("name", ALONE)
def test_a_flag_needs_the_factor(name):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} needs --moe-capacity-factor, got {ALONE[name]} without it"):
        check_flags(given(**{name: ALONE[name]}))


@pytest.mark.parametrize("name, value", [("moe_capacity_factor", 1.5), *ALONE.items()])
def test_static_gating_has_a_capacity_of_its_own(name, value):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag} must go with --moe-gating dynamic, got {value} with static gating"):
        check_flags(given(moe_gating="static", **{name: value}))
    check_flags(given(moe_gating="static"))


def test_virtual_ranks_are_of_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--moe-virtual-ranks must be of one process, got 4 with 2 ranks"):
        check_flags(given(moe_capacity_factor=1.0, moe_virtual_ranks=4))


@pytest.mark.parametrize("flag, value", [
    ("--moe-capacity-factor", "much"), ("--moe-virtual-ranks", "two"), ("--moe-overflow", "spill"),
    ("--moe-drop-metric", "best"), ("--moe-capacity-scope", "layer"), ("--moe-capacity-phases", "decode"),
    ("--moe-reroute-prefer", "idle"),
])
def test_the_parser_refuses_what_it_does_not_know(flag, value, capsys):
    assert_the_parser_refuses(flag, value, capsys)


@pytest.mark.parametrize("task", TASKS)
def test_checks_come_before_anything_is_read(task):
    with pytest.raises(ValueError, match="--moe-capacity-factor must be a number above 0, got 0"):
        tasks.setup_task(parsed(task, "--moe-capacity-factor", "0"))


def test_a_checkpoint_may_hold_any_flag():
    """fairseq writes the task's flags into a checkpoint that is trained; they must not make it unknown."""
    values = {item.name: "any" for item in fields(MoEFlags) if not item.name.startswith("_")}
    check_fields(values, has_encoder=True)
