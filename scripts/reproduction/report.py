"""All that the reproduce scripts wrote, on one page: results/REPORT.md, or a page of the documentation.

    bash scripts/reproduce_all.sh                                                # runs them all, then this
    bash scripts/reproduce.sh report                                             # results/REPORT.md again
    bash scripts/reproduce.sh report --page docs/results.md --note "quiet, nothing else running"

With --page the pictures are copied beside the page, into a folder of its name; what other folders lie there is linked.
The page begins with the machine and how many of the papers' findings the figures bear out; nothing is written by hand.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fairseq_moe_ext.atomic_file import WriteError, copy_file, write_text
from reproduction.models import ROOT
from reproduction.tables import markdown

# folder under results/ -> the command that fills it; in the order of the papers
SECTIONS = {
    "configurations": "bash scripts/reproduce_configurations.sh",
    "characterization": "bash scripts/reproduce_characterization.sh",
    "activation": "bash scripts/reproduce_activation.sh",
    "throughput": "bash scripts/reproduce_throughput.sh",
    "memory": "bash scripts/reproduce_memory.sh",
    "buffering": "bash scripts/reproduce_buffering.sh",
    "balancing": "bash scripts/reproduce_balancing.sh",
    "scaling": "bash scripts/reproduce_scaling.sh",
    "capacity_aware": "bash scripts/reproduce_capacity_aware.sh",
    "peers": "python scripts/benchmarks/benchmark_peers.py",
}
VERDICTS = ("Confirmed", "Contradicted", "Not decided")


def text_of(folder: Path) -> str | None:
    """A section's Markdown without its title, headings one level down; None where its script has not run."""
    files = sorted(folder.glob("*.md"))
    if not files:
        return None
    text = "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)
    lines = text.splitlines()
    if lines and lines[0].startswith("# "):
        lines = lines[1:]
    return re.sub(r"^(#+ )", r"#\1", "\n".join(lines).strip(), flags=re.MULTILINE)


def title_of(name: str) -> str:
    return name.replace("_", "-").capitalize() if name == "capacity_aware" else name.capitalize()


def verdicts(text: str) -> dict[str, int]:
    """How many of a section's findings have each verdict."""
    return {verdict: text.count(f"- **{verdict}**:") for verdict in VERDICTS}


def agreement(text: str) -> str:
    """One sentence: what agrees with the paper, and what differs."""
    counts = verdicts(text)
    if not sum(counts.values()):
        return ""
    found = re.findall(r"^- \*\*(Contradicted|Not decided)\*\*: (.*?) \([^()]*\)\. Here: ", text, flags=re.MULTILINE)
    names = "; ".join(f"{claim} ({verdict.lower()})" for verdict, claim in found)
    told = f"Of {sum(counts.values())} findings of the paper, {counts['Confirmed']} are confirmed here"
    return f"{told}; not so: {names}." if names else f"{told}."


def _cpu_info(name: str) -> list[str]:
    """The values of this name in /proc/cpuinfo, one per core."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]


def cpu_name() -> str:
    return next(iter(_cpu_info("model name")), platform.processor())


def machine() -> str:
    """The hardware and versions in words."""
    flags = next(iter(_cpu_info("flags")), "").split()
    instructions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cpu_name()} ({', '.join(instructions) or platform.machine()}), "
        f"{os.cpu_count()} cores, {memory:.0f} GiB of memory, no GPU used; one thread per process; Python "
        f"{platform.python_version()}, PyTorch {version('torch')}"
    )


def assemble(results: Path, picture, note: str = "") -> str:
    """The page. picture: a PNG -> the link to it."""
    texts = {name: text_of(results / name) for name in SECTIONS}
    here = {name: text for name, text in texts.items() if text is not None}
    if not here:
        raise FileNotFoundError(f"nothing to report in {results}: run `bash scripts/reproduce_all.sh` first")
    rows = [
        (f"[{title_of(name)}](#{title_of(name).lower()})", *verdicts(text).values(), f"`{SECTIONS[name]}`")
        for name, text in here.items()
    ]
    told = f" {note[0].upper()}{note[1:].rstrip('.')}." if note else ""
    parts = [
        "# The papers' tables and figures, as measured here",
        f"Machine: {machine()}.{told} The models are the quickstart's, unless a section names another; paper figures "
        "are the papers' own (scripts/reproduction/paper.json has their sources). A finding is confirmed or "
        "contradicted by the rule that stands with it.",
        markdown(("section", *(verdict.lower() for verdict in VERDICTS), "command"), rows),
    ]
    for name, text in here.items():
        pictures = [picture(file) for file in sorted((results / name).glob("*.png"))]
        links = "\n\n".join(f"![{Path(link).stem}]({link})" for link in pictures)
        parts += [part for part in (f"## {title_of(name)}", agreement(text), text, links) if part]
    if missing := [name for name in SECTIONS if name not in here]:
        parts.append("Not run: " + ", ".join(f"`{SECTIONS[name]}`" for name in missing) + ".")
    return "\n\n".join(parts) + "\n"


def more(page: Path) -> str:
    """Links to what lies in folders beside the page's pictures: other measurements, such as a GPU's."""
    folder = page.with_suffix("")
    files = sorted(folder.glob("*/*.md"))
    links = "\n".join(f"- [{file.parent.name}: {file.stem}]({file.relative_to(page.parent)})" for file in files)
    return f"\n## More measurements\n\n{links}\n" if files else ""


def copy_beside(page: Path):
    """A function that copies a picture into the folder named as the page and links to it there."""
    folder = page.with_suffix("")

    def picture(file: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        copy_file(file, folder / file.name)
        return f"{folder.name}/{file.name}"

    return picture


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="the scripts' folder (results/)")
    parser.add_argument("--page", type=Path, help="write this page instead of RESULTS/REPORT.md")
    parser.add_argument("--note", default="", help="a sentence on how it was measured")
    args = parser.parse_args(arguments)
    page = args.page or args.results / "REPORT.md"
    picture = copy_beside(page) if args.page else lambda file: str(file.relative_to(args.results))
    try:
        text = assemble(args.results, picture, args.note)
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, text + (more(page) if args.page else ""))
    except (FileNotFoundError, WriteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0
