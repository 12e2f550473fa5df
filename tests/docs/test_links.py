"""What the pages point at is there: files, headings, and the modules that they name."""

import re

import pytest
from doc_pages import PAGES, REPOSITORY, anchors, links, page_name, prose

EXTERNAL = ("http://", "https://", "mailto:")
# a file named in code, with a folder before it: `checkpoints/safe_loader.py`
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|c|sh|md|json|pt|npz))(?: [^`]*)?`")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page):
    for line, target in links(page):
        if target.startswith(EXTERNAL):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_name(page)}:{line}: {target}"
        assert file.is_relative_to(REPOSITORY), f"{page_name(page)}:{line}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors(file), f"{page_name(page)}:{line}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_that_are_named_exist(page):
    """In the repository or in the package; what a command writes is under other folders."""
    elsewhere = ("examples/output/", "results/", "multilingual/", "build/", "examples/nllb/modeling/")  # fairseq's own
    for number, line in enumerate(prose(page), 1):
        for name in NAMED.findall(line):
            places = [folder / name for folder in (REPOSITORY, REPOSITORY / "fairseq_moe_ext", page.parent)]
            known = any(place.exists() for place in places)
            assert known or name.startswith(elsewhere), f"{page_name(page)}:{number}: {name}"


def test_the_readme_leads_to_every_page_of_the_documentation():
    found = {(REPOSITORY / target.partition("#")[0]).resolve() for _, target in links(REPOSITORY / "README.md")}
    missing = {page for page in (REPOSITORY / "docs").glob("*.md")} - found
    assert not missing, sorted(map(page_name, missing))


def test_internals_has_every_room_of_the_package():
    page = (REPOSITORY / "docs" / "internals.md").read_text(encoding="utf-8")
    table = page[page.index("## Rooms") : page.index("## A token's way")]
    named = set(re.findall(r"`(\w+)/`", "".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))))
    assert named == {file.parent.name for file in (REPOSITORY / "fairseq_moe_ext").glob("*/__init__.py")}


def test_headings_and_links_are_read_as_github_reads_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b-c`: d?\n\n## Twice\n\n## Twice\n\n```bash\n# no heading\n```\n[x](y.md#z) `[n](o)`\n")
    assert anchors(page) == {"a-b-c-d", "twice", "twice-1"}
    assert links(page) == [(10, "y.md#z")]
