"""The plugin's flags: the same in all three tasks, checked by name before anything is loaded."""

import errno
import os
from argparse import Namespace
from dataclasses import fields

import pytest
from fairseq import options, tasks
from flag_makers import TASKS, parsed

from fairseq_moe_ext.atomic_file import write_text
from fairseq_moe_ext.checkpoints.moe_config import MoEConfig
from fairseq_moe_ext.tasks import flags
from fairseq_moe_ext.tasks.flags import MoEFlags, check_flags
from fairseq_moe_ext.tasks.moe_language_modeling import MoELanguageModelingTask


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_every_flag_at_its_default(task):
    cfg = parsed(task)
    for item in fields(MoEFlags):
        if not item.name.startswith("_"):
            assert getattr(cfg, item.name) == item.default, item.name


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_every_flag(task):
    flags = ("--moe-gating", "static", "--moe-eval-capacity-token-fraction", "0.5", "--is-moe")
    cfg = parsed(task, *flags, "--moe-report", "r.json", "--moe-trace", "t.npz", "--moe-dtype", "bfloat16")
    assert str(cfg.moe_gating) == "static"
    assert cfg.moe_eval_capacity_token_fraction == 0.5
    assert str(cfg.moe_dtype) == "bfloat16"
    assert (cfg.moe_report, cfg.moe_trace, cfg.is_moe) == ("r.json", "t.npz", True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--moe-gating", "sparse"), ("--moe-gating", "sparse")),
        (("--moe-dtype", "float8"), ("--moe-dtype", "float8")),
        (("--moe-kernel", "cutlass"), ("--moe-kernel", "cutlass")),
        (("--moe-eval-capacity-token-fraction", "much"), ("--moe-eval-capacity-token-fraction", "much")),
        (("--distributed-world-size", "8"), ("--distributed-world-size", "must be 1", "got 8")),
    ],
)
def test_the_parser_refuses_values_of_the_wrong_kind(flags, words, capsys):
    """Of one task: all have the same flags, as the tests before show."""
    with pytest.raises(SystemExit):
        parsed("moe_translation", *flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for word in words:
        assert word in message


@pytest.mark.parametrize("flag", ["moe_report", "moe_trace"])
def test_files_that_cannot_be_written(tmp_path, flag):
    name = "--" + flag.replace("_", "-")
    for value, words in ((tmp_path / "missing" / "file", "an existing folder"), (tmp_path, "must name a file")):
        with pytest.raises(ValueError, match=f"{name} .*{words}.* got .*{value}"):
            check_flags(Namespace(**{flag: str(value)}))
    check_flags(Namespace(**{flag: str(tmp_path / "file")}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["moe_report", "moe_trace"])
def test_targets_that_are_no_files(tmp_path, flag):
    """Devices, links and FIFOs with a reader are taken; what could only fail in the end is refused at once."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing/file")
    for name, reason in (
        ("fifo", "it is a FIFO that nothing reads"),
        ("loop", os.strerror(errno.ELOOP)),
        ("dangling", "there is no folder .*missing"),
        ("n" * 256, os.strerror(errno.ENAMETOOLONG)),
    ):
        with pytest.raises(ValueError, match=f"^--{flag.replace('_', '-')} .*{name} cannot be written: {reason}$"):
            check_flags(Namespace(**{flag: str(tmp_path / name)}))
    before = sorted(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("new")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    for path in (tmp_path / "fifo", tmp_path / "link", "/dev/null"):
        check_flags(Namespace(**{flag: str(path)}))
    write_text(tmp_path / "fifo", "report")
    assert os.read(reader, 100) == b"report" and os.read(reader, 100) == b""
    os.close(reader)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "link"])


def test_only_rank_0_needs_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    check_flags(Namespace(moe_report="/dev/full/not/here"))


def test_a_file_in_the_working_folder_needs_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_flags(Namespace(moe_report="report.json"))


def test_an_unknown_gating_or_kernel():
    with pytest.raises(ValueError, match="--moe-gating must be one of dynamic, static, got 'sparse'"):
        check_flags(Namespace(moe_gating="sparse"))
    with pytest.raises(ValueError, match="^--moe-kernel must be one of auto, triton, grouped-mm, loop, got 'cutlass'$"):
        check_flags(Namespace(moe_kernel="cutlass"))


def test_a_kernel_that_this_pytorch_lacks(monkeypatch):
    check_flags(Namespace(moe_kernel="loop"))
    monkeypatch.setattr(flags, "has_grouped_mm", lambda: False)
    check_flags(Namespace(moe_kernel="loop"))
    with pytest.raises(ValueError, match="^--moe-kernel grouped-mm needs .*grouped_mm, which PyTorch .* does not have"):
        check_flags(Namespace(moe_kernel="grouped-mm"))


@pytest.mark.parametrize("task", TASKS)
def test_checks_come_before_anything_is_read(task, tmp_path):
    cfg = parsed(task, "--moe-report", str(tmp_path / "missing" / "report.json"))  # the data folder is missing as well
    with pytest.raises(ValueError, match="--moe-report"):
        tasks.setup_task(cfg)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_fraction_is_a_finite_number(value):
    flags = Namespace(moe_gating="static", moe_eval_capacity_token_fraction=float(value))
    with pytest.raises(ValueError, match=f"--moe-eval-capacity-token-fraction must be a finite number, got {value}"):
        check_flags(flags)


@pytest.mark.parametrize("value", ["abc", float("nan")])
def test_an_overridden_fraction_is_a_finite_number(value):
    with pytest.raises(ValueError, match="moe_eval_capacity_token_fraction must be a finite number, got"):
        MoEConfig.from_args(Namespace(moe_eval_capacity_token_fraction=value))


def test_report_and_trace_are_two_files(tmp_path):
    flags = Namespace(moe_report=str(tmp_path / "out"), moe_trace=str(tmp_path / "." / "out"))
    with pytest.raises(ValueError, match="--moe-report and --moe-trace must name two files"):
        check_flags(flags)


def test_one_device_takes_both():
    check_flags(Namespace(moe_report="/dev/null", moe_trace="/dev/null"))


def test_training_keeps_its_world_size():
    parser = options.get_training_parser("moe_language_modeling")
    MoELanguageModelingTask.add_args(parser)
    assert parser.parse_args(["data", "--distributed-world-size", "8"]).distributed_world_size == 8


@pytest.mark.parametrize("task", TASKS)
def test_what_the_environment_asks_of_the_kernel_is_checked_with_the_flags(task, monkeypatch):
    monkeypatch.setenv("FAIRSEQ_MOE_CPU_KERNEL", "off")
    check_flags(parsed(task))
    monkeypatch.setenv("FAIRSEQ_MOE_CPU_KERNEL", "sse")
    choices = "auto, avx512, avx2, plain, off"
    with pytest.raises(ValueError, match=f"FAIRSEQ_MOE_CPU_KERNEL must be one of {choices}, got 'sse'"):
        check_flags(parsed(task))
