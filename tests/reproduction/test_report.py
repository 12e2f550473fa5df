"""One page of what all scripts wrote."""

import re

import commands

from reproduction.report import SECTIONS, agreement, main
from reproduction.tables import Finding, findings_section

FINDINGS = findings_section([
    Finding("it is fast (LM)", "section 1", "at least 2", "3", True),
    Finding("it is small (MT)", "section 2, table", "at most 2", "3", False),
    Finding("it is old", "section 3", "none", "nothing", None),
])


def write(results):
    folder = results / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.md").write_text(f"# Memory\n\nwords\n\n## Table\n\n{FINDINGS}\n")
    (folder / "memory.png").write_bytes(b"picture")


def test_what_agrees_and_what_differs():
    assert agreement(FINDINGS) == (
        "Of 3 findings of the paper, 1 are confirmed here; not so: it is small (MT) (contradicted); it is old (not "
        "decided)."
    )
    assert agreement("no findings") == ""


def test_the_report_and_the_page(tmp_path, capsys):
    write(tmp_path / "results")
    assert main(["--results", str(tmp_path / "results")]) == 0
    report = (tmp_path / "results" / "REPORT.md").read_text()
    for part in ("## Memory\n\nOf 3 findings", "\n### Table\n", "\n### The paper's findings\n"):
        assert part in report
    assert "![memory](memory/memory.png)" in report
    assert "| [Memory](#memory) | 1 | 1 | 1 | `bash scripts/reproduce_memory.sh` |" in report
    assert "Not run: `bash scripts/reproduce_configurations.sh`" in report
    assert "More measurements" not in report
    page = tmp_path / "docs" / "results.md"
    gpu = tmp_path / "docs" / "results" / "gpu-h200"
    gpu.mkdir(parents=True)
    (gpu / "layers.md").write_text("figures\n")
    assert main(["--results", str(tmp_path / "results"), "--page", str(page), "--note", "a quiet machine"]) == 0
    assert "![memory](results/memory.png)" in page.read_text() and "A quiet machine." in page.read_text()
    assert "- [gpu-h200: layers](results/gpu-h200/layers.md)" in page.read_text()
    assert (tmp_path / "docs" / "results" / "memory.png").read_bytes() == b"picture"


def test_report_without_results_names_the_command_to_run_first(tmp_path, capsys):
    assert main(["--results", str(tmp_path)]) == 2
    assert "run `bash scripts/reproduce_all.sh` first" in capsys.readouterr().err


def test_all_runs_every_script_that_is_reported():
    scripts = commands.REPOSITORY / "scripts"
    (names,) = re.findall(r"names=\(([^)]*)\)", (scripts / "reproduce_all.sh").read_text())
    assert set(names.split()) == set(SECTIONS) - {"peers"}
    for command in SECTIONS.values():
        assert (commands.REPOSITORY / command.split()[-1]).is_file()
