"""docs/python.md: its examples run, one after the other in one program; the one of several ranks by its command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import quantized_goldens

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
FILES = {  # name in the examples -> recorded model and file
    "model.pt": ("mt_plain", "checkpoint_merged.pt"),
    "data-bin": ("mt_plain", "data-bin"),
    "nllb-shared.pt": ("mt_nllb_ws2", "checkpoint_last-shared.pt"),
    "nllb-rank-0.pt": ("mt_nllb_ws2", "checkpoint_last-rank-0.pt"),
    "nllb-rank-1.pt": ("mt_nllb_ws2", "checkpoint_last-rank-1.pt"),
    "nllb-data": ("mt_nllb_ws2", "data-bin"),
    "lm-shared.pt": ("lm_top2", "checkpoint_last-shared.pt"),
    "lm-rank-0.pt": ("lm_top2", "checkpoint_last-rank-0.pt"),
    "lm-data": ("lm_top2", "data-bin"),
}


RANKS = "\n## Several ranks\n"


@pytest.fixture
def folder(shared_goldens, tmp_path):
    for name, place in FILES.items():
        (tmp_path / name).symlink_to(shared_goldens.joinpath(*place))
    quantized_goldens.write_nllb(tmp_path / "made")
    (tmp_path / "made" / "X.safetensors").rename(tmp_path / "nllb.safetensors")
    return tmp_path


def page() -> tuple[str, str]:
    """(all but the section of several ranks, that section)."""
    before, rest = PAGE.read_text(encoding="utf-8").split(RANKS)
    section, heading, after = rest.partition("\n## ")
    return before + heading + after, section


def examples_of(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    examples = examples_of(page()[0], "python")
    assert len(examples) == 7
    names: dict = {}
    printed = []
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
        printed.append(capsys.readouterr().out.splitlines())
    translated, refused, several, multilingual, one_file, language_model, hub = printed
    assert translated[0].startswith("['") and "▁" not in translated[0]
    assert "did you mean expert_buffer_size" in refused[0]
    assert "buffer_size must not be given" in refused[1]
    assert "tokens_per_sample must go with a model of moe_language_modeling" in refused[2]
    assert len(several) == 3 and float(several[2].split()[0]) < 0
    assert len(one_file) == 1 and one_file[0].startswith("['") and "▁" not in one_file[0]
    assert len(multilingual) == 2 and len(language_model) == 2 and float(language_model[0].split()[0]) > 1
    assert len(hub) == 1


@pytest.mark.slow
def test_the_example_of_several_ranks_runs(folder):
    (program, _), (command,) = (examples_of(page()[1], language) for language in ("python", "sh"))
    (folder / "translate.py").write_text(program, encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = commands.environment(PATH=path, PYTHONPATH=str(commands.REPOSITORY))
    done = subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert line.startswith("['") and line.endswith("of 2 ranks")


@pytest.mark.slow
def test_the_example_that_starts_ranks_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    _, example = examples_of(page()[1], "python")
    exec(compile("import fairseq_moe_ext as moe\n" + example, str(PAGE), "exec"), {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("['") and line.endswith("of 2 ranks")
