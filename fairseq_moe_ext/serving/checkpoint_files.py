"""Which files a `--path` means: one whole checkpoint, or upstream's shared file and rank files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that cannot be served: names the file, the rule and what was found."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint.

    whole: one file with everything in it, else None. shared: all but the experts; ranks: the experts, by rank.
    """

    whole: Path | None = None
    shared: Path | None = None
    ranks: tuple[Path, ...] = ()

    @property
    def first(self) -> Path:
        return self.whole or self.shared


def find_checkpoint_files(path: str) -> CheckpointFiles:
    """Take `X.pt`, `X-shared.pt` or `X-rank-0.pt` alike; CheckpointError where a part is missing.

    A file that is exactly there as `X.pt` is whole; otherwise `X-shared.pt` and `X-rank-{r}.pt`, r from 0 without
    a gap, must stand beside each other.
    """
    given = Path(path)
    match = re.fullmatch(r"(.+?)(-shared|-rank-\d+)?\.pt", given.name)
    if match is None:
        if given.is_file():
            return CheckpointFiles(whole=given)
        raise CheckpointError(f"--path {path}: no such file")
    stem, part = match.groups()
    if part is None and given.is_file():
        return CheckpointFiles(whole=given)
    shared = given.with_name(f"{stem}-shared.pt")
    pattern = re.compile(re.escape(stem) + r"-rank-(\d+)\.pt")
    ranks: dict[int, Path] = {}
    for file in given.parent.glob("*.pt") if given.parent.is_dir() else ():
        found = pattern.fullmatch(file.name)
        if found:
            ranks[int(found.group(1))] = file
    if not ranks and not shared.is_file():
        raise CheckpointError(f"--path {path}: there is neither {stem}.pt nor {stem}-shared.pt with {stem}-rank-0.pt")
    if not shared.is_file():
        raise CheckpointError(f"--path {path}: {len(ranks)} rank files but no {shared.name} beside them")
    if not ranks:
        raise CheckpointError(f"--path {path}: {shared.name} is there but no {stem}-rank-0.pt beside it")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        names = ", ".join(f"{stem}-rank-{rank}.pt" for rank in missing[:4])
        raise CheckpointError(f"--path {path}: rank files must run from 0 to {max(ranks)} with no gap; missing {names}")
    return CheckpointFiles(shared=shared, ranks=tuple(ranks[rank] for rank in sorted(ranks)))
