"""Tables, findings, the papers' figures, and runs that are reused."""

import csv
import json
from dataclasses import dataclass

import pytest

from reproduction import paper, runs, tables


@dataclass(frozen=True)
class Row:
    name: str
    value: float | None


def test_csv_of_dataclasses_and_of_mappings(tmp_path):
    for rows in ([Row("a", 1.5), Row("b", None)], [{"name": "a", "value": 1.5}, {"name": "b", "value": None}]):
        tables.write_csv(tmp_path / "t.csv", rows)
        with open(tmp_path / "t.csv", newline="") as opened:
            assert list(csv.DictReader(opened)) == [{"name": "a", "value": "1.5"}, {"name": "b", "value": ""}]
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_markdown_leaves_unknown_cells_empty():
    assert tables.markdown(("a", "b"), [(1, None)]) == "| a | b |\n| --- | --- |\n| 1 |  |"


@pytest.mark.parametrize("holds, word", [(True, "Confirmed"), (False, "Contradicted"), (None, "Not decided")])
def test_a_finding_says_its_verdict(holds, word):
    line = str(tables.Finding("experts idle", "section 2", "more than half", "12 of 32", holds))
    assert line == f"- **{word}**: experts idle (section 2). Here: 12 of 32. Rule: more than half."


def test_every_figure_of_the_papers_has_its_source():
    figures = paper.paper_figures()
    assert len(figures) > 100
    for key, figure in figures.items():
        assert figure.what and figure.place and ("arXiv" in figure.paper or "NeurIPS" in figure.paper), key
        assert str(figure)
    # the ratio that the paper gives, of the two times that it gives
    for key in ("lm", "mt-encoder", "mt-decoder"):
        dense, static, slowdown = (
            paper.paper_value(f"characterisation.{key}.{name}") for name in ("dense-ms", "static-ms", "slowdown")
        )
        assert static / dense == pytest.approx(slowdown, abs=0.5)
    for key in ("lm", "mt"):
        static, dynamic = (paper.paper_value(f"memory.{key}.{name}") for name in ("static-gb", "dynamic-gb"))
        assert 1 - dynamic / static == pytest.approx(paper.paper_value(f"memory.{key}.saved"), abs=0.003)
        experts, capacity = paper.paper_value(f"{key}.experts"), paper.paper_value(f"{key}.capacity")
        assert paper.paper_value(f"{key}.waste-factor") == pytest.approx(experts * capacity / 2)


def test_beside_paper_shows_both_values():
    text = paper.beside_paper([("throughput.lm.over-static", "4.20x")])
    cells = text.splitlines()[2].split(" | ")
    assert cells[:3] == ["| LM: maximum throughput over static gating, one node", "6.21x", "4.20x"]


def test_a_result_is_remembered_by_its_identity(tmp_path):
    calls = []

    def result():
        calls.append(1)
        return {"calls": len(calls)}

    file = tmp_path / "deep" / "r.json"
    assert runs.remembered(file, {"flags": ["a"]}, result) == {"calls": 1}
    assert runs.remembered(file, {"flags": ["a"]}, result) == {"calls": 1}
    assert runs.remembered(file, {"flags": ["b"]}, result) == {"calls": 2}
    assert json.loads(file.read_text())["identity"] == {"flags": ["b"]}


def test_a_command_that_fails_says_why():
    with pytest.raises(runs.RunError, match="no module named nothing_of_the_kind"):
        runs.run_command(["python3", "-c", "raise SystemExit('no module named nothing_of_the_kind')"])
