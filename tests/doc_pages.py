"""The pages that people read: their code blocks, headings and links, as GitHub shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "examples").glob("*/README.md")),
)
NO_RUN = "no-run: "
_FENCE = re.compile(r"^ {0,3}```(.*)$")


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@dataclass(frozen=True)
class Block:
    """A fenced block of code: its page, the line of its fence, the fence's words (`bash`, ...) and what is in it."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def language(self) -> str:
        return self.info.split(" ", 1)[0]

    @property
    def why_not_run(self) -> str | None:
        """The reason after `no-run: `; None where the block is to run."""
        rest = self.info[len(self.language) :].strip()
        return rest.removeprefix(NO_RUN.strip()).strip() if rest else None

    def __str__(self) -> str:
        return f"{page_name(self.page)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's fenced blocks in these languages, or all of them."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, inside = (number, fence.group(1).strip()), []
        elif fence:
            found.append(Block(page, *opened, "\n".join(inside) + "\n"))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{page_name(page)}:{opened[0]} opens a block that does not end"
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> list[str]:
    """The page's lines outside its fenced blocks; the others are empty."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = _FENCE.match(line)
        lines.append("" if inside or fence else line)
        inside ^= fence is not None
    return lines


def anchors(page: Path) -> set[str]:
    """What a link to one of the page's headings has after its #."""
    found: dict[str, int] = {}
    result = set()
    for line in prose(page):
        if match := re.match(r"#{1,6} (.*)", line):
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match.group(1)).strip().lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            times = found.get(slug, 0)
            found[slug] = times + 1
            result.add(slug if times == 0 else f"{slug}-{times}")
    return result


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of every link and picture outside code."""
    found = []
    for number, line in enumerate(prose(page), 1):
        line = re.sub(r"`[^`]*`", lambda code: "`" * len(code.group()), line)
        found += [(number, target) for target in re.findall(r"\]\(([^)\s]+)\)", line)]
    return found


def commands_of(block: Block) -> list[str]:
    """The block's command lines: continued lines joined, comments and empty lines left out."""
    text = block.text.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]
