"""examples/table.py: the table of two reports, and what it refuses to read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fairseq_moe_ext.command_line.translations import translation_quality

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "table.py"
spec = importlib.util.spec_from_file_location("examples_table", SCRIPT)
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)
main = table.main

TRANSLATIONS = "S-0\ta\nT-0\tx y z w\nH-0\t-0.1\tx y z w\nT-1\tu v\nH-1\t-0.2\tu v\n| Generate test\n"


def write_report(folder, gating, encoder=100.0):
    report = {
        "layers": [{"active_experts_mean": 3.0, "load": [1] * 8}, {"active_experts_mean": 4.0, "load": [1] * 8}],
        "decoder": {"tokens_per_second": 1234.5},
        "memory": {"peak_rss_bytes": 2_000_000},
    }
    if encoder is not None:
        report["encoder"] = {"tokens_per_second": encoder}
    (folder / f"{gating}.json").write_text(json.dumps(report))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "my_model"
    made.mkdir()
    for gating in ("static", "dynamic"):
        write_report(made, gating)
        (made / f"{gating}.txt").write_text(TRANSLATIONS)
    return made


def test_the_table_of_a_translation_and_a_language_model(folder, tmp_path, capsys):
    lm = tmp_path / "lm"
    lm.mkdir()
    for gating, perplexity in (("static", "12.5"), ("dynamic", "12.25")):
        write_report(lm, gating, encoder=None)
        (lm / f"{gating}.log").write_text(f"Loss (base 2): 3.6, Perplexity: {perplexity}\n")
    assert main([str(folder), str(lm)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert head[:3] == ["model", "gating", "quality"] and len(head) == 7
    assert rows == [
        ["my model", "static", "BLEU 100.00, chrF 100.00", "100", "1,234", "2 MB", "3.5 of 8"],
        ["my model", "dynamic", "BLEU 100.00, chrF 100.00", "100", "1,234", "2 MB", "3.5 of 8"],
        ["lm", "static", "perplexity 12.5", "", "1,234", "2 MB", "3.5 of 8"],
        ["lm", "dynamic", "perplexity 12.25", "", "1,234", "2 MB", "3.5 of 8"],
    ]


def test_quality_pairs_references_with_hypotheses_by_number():
    swapped = "T-1\tu v\nT-0\tx y z w\nH-0\t-0.1\tx y z w\nH-1\t-0.2\tu v\n"
    assert translation_quality(swapped)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda folder: (folder / "dynamic.json").unlink(), "my_model must hold dynamic.json"),
    (lambda folder: (folder / "dynamic.json").write_text("[1]"), "dynamic.json must be what --moe-report wrote"),
    (lambda folder: (folder / "static.json").write_text("{"), "static.json must be what --moe-report wrote"),
    (lambda folder: (folder / "static.txt").write_text("T-0\tx\n"), "static.txt must be the output of fairseq-gen"),
    (lambda folder: (folder / "static.txt").unlink(), "static.log"),
], ids=range(5))
def test_a_folder_that_cannot_be_read_ends_in_one_sentence(spoil, words, folder, capsys):
    spoil(folder)
    assert main([str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
