"""docs/python.md: its examples run, one after the other in one program."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_examples_run(shared_goldens, tmp_path, monkeypatch, capsys):
    for name, place in FILES.items():
        (tmp_path / name).symlink_to(shared_goldens.joinpath(*place))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 6
    names: dict = {}
    printed = []
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
        printed.append(capsys.readouterr().out.splitlines())
    translated, refused, several, multilingual, language_model, hub = printed
    assert translated[0].startswith("['") and "▁" not in translated[0]
    assert "did you mean expert_buffer_size" in refused[0]
    assert "buffer_size must not be given" in refused[1]
    assert "tokens_per_sample must go with a model of moe_language_modeling" in refused[2]
    assert len(several) == 3 and float(several[2].split()[0]) < 0
    assert len(multilingual) == 1 and len(language_model) == 2 and float(language_model[0].split()[0]) > 1
    assert len(hub) == 1
